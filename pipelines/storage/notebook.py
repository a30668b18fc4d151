"""Show volumes in a notebook, by NiiVue (the package ipyniivue, extra `studio`): three planes and a 3-D view."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib

from volumes.formats.nifti import open_nifti

MASK_OPACITY = 0.4
HEIGHT = 400  # pixels


def show_volume(volume: Any, mask: str | os.PathLike | nib.Nifti1Image | None = None, height: int = HEIGHT) -> Any:
    """Return the widget that shows a generated volume, which a notebook displays.

    Args:
        volume: an entry of `MedVolumePipelineOutput.volumes`: a NIfTI image or its file, or {channel: either}.
            Of several channels the last one lies on top.
        mask: NIfTI file or image of labels, shown over the volume in colors.
        height: of the widget, in pixels.

    Returns: an `ipyniivue.NiiVue`.
    Raises: ValueError for what is not a NIfTI, such as arrays and latents, and without the package.
    """
    shown = layers(volume, mask)  # first, so that a mistake is named also where the package is missing
    try:
        ipyniivue = importlib.import_module("ipyniivue")  # of the extra `studio`
    except ModuleNotFoundError as error:
        raise ValueError(
            f"show() needs {error.name}: pip install -e '.[studio]' -c constraints.txt, or pip install ipyniivue"
        ) from error
    widget = ipyniivue.NiiVue(height=height)
    widget.load_volumes([ipyniivue.Volume(**layer) for layer in shown])
    return widget


def layers(volume: Any, mask: Any = None) -> list[dict[str, Any]]:
    """Return the arguments of ipyniivue's volumes, from the lowest to the one on top. Errors as `show_volume`."""
    channels = volume if isinstance(volume, dict) else {"volume": volume}
    shown = [{"name": f"{name}.nii", "data": nifti_bytes(one), "colormap": "gray"} for name, one in channels.items()]
    if mask is not None:
        shown.append({"name": "mask.nii", "data": nifti_bytes(mask), "colormap": "$itksnap", "opacity": MASK_OPACITY})
    return shown


def nifti_bytes(image: Any) -> bytes:
    """Return a NIfTI image, or the content of its file, as the bytes of an uncompressed .nii file. Raises: ValueError
    for anything else."""
    if isinstance(image, str | os.PathLike):
        if not str(image).endswith((".nii", ".nii.gz")):
            raise ValueError(f"{Path(image)}: show() shows NIfTI files, .nii or .nii.gz")
        _, image = open_nifti(image)
    if not isinstance(image, nib.Nifti1Image):
        raise ValueError(
            f"show() shows NIfTI images and files, got {type(image).__name__}; call the pipeline with "
            'output_type="nifti", and do not interrupt it'
        )
    return image.to_bytes()


def numbered(volumes: Sequence[Any], number: int) -> Any:
    """Return a volume of an output. Raises: ValueError naming how many there are."""
    if not -len(volumes) <= number < len(volumes):
        raise ValueError(f"there is no volume {number}; the output holds {len(volumes)}, counted from 0")
    return volumes[number]
