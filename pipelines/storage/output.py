"""What the pipeline returns, and where it writes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from diffusers.utils import BaseOutput

from files.writable import check_output_file
from pipelines.inputs.arguments import listed, local_path
from volumes import nifti_path
from volumes.formats.carriers import source_file

from .notebook import HEIGHT, numbered, show_volume
from .provenance import channel_files, read_sidecar, sidecar_path
from .record import GenerationRecord


@dataclass
class MedVolumePipelineOutput(BaseOutput):
    """Generated volumes, mask by mask (all volumes of the first mask, then all of the second, ...).

    Attributes:
        volumes: one entry per volume, whatever the shapes. By `output_type`:
            "nifti"   nibabel images on their mask's own grid (shape, affine, orientation), in original units; of a
                      model of several channels {channel: image} of those that were generated;
            "np"      float32 arrays (C, X, Y, Z) with the same voxels in the same axis order; channels that were given
                      hold the voxels of their file; of label maps uint8 or int16 (1, X, Y, Z);
            "pt"      the same as float32 tensors on the CPU;
            "latent"  standardized latents (latent_channels, h, w, d) of the padded mask, on the model's device.
            With `paths`: the files that were written, as `Path`, or {channel: path}.
            None for volumes that were not begun when `pipe._interrupt` was set.
        provenance: one JSON-ready dict per volume: model hash, seed, steps, scheduler, mask. It equals the sidecar,
            apart from the digests of the files (`files`). It records what a callback changed (`call.StepCallback`), as
            the seed alone cannot reproduce such volumes.
    """

    volumes: list[Any]
    provenance: list[dict[str, Any]]

    def show(self, number: int = 0, *, mask: Any = None, height: int = HEIGHT) -> Any:
        """Show a volume in a notebook, with its mask over it if one is given: see `notebook.show_volume`.

        Args:
            number: of the volume, counted from 0.
            mask: NIfTI file or image of labels on any grid.
            height: of the viewer, in pixels.

        Raises: ValueError for a volume that is not there or not a NIfTI, and without the package ipyniivue.
        """
        return show_volume(numbered(self.volumes, number), mask, height)


def check_paths(
    paths: str | PathLike | Sequence[str | PathLike] | None,
    records: Sequence[GenerationRecord],
    output_type: str,
    inputs: Sequence[object],
) -> list[Path] | list[None]:
    """Return one path per volume; None for each without `paths`. Raises: ValueError for what cannot be written there,
    and for the file of a mask or an image among the inputs.
    """
    count = len(records)
    if paths is None:
        return [None] * count
    several = [paths] if isinstance(paths, (str, PathLike)) else listed("paths", paths)
    files = [nifti_path(local_path("paths", path)) for path in several]
    if output_type != "nifti":
        raise ValueError(f"paths are of NIfTI files: leave output_type at 'nifti', not {output_type!r}")
    different = len({sidecar_path(path).resolve() for path in files})  # a.nii and a.nii.gz have one sidecar
    if len(files) != count or different < count:
        raise ValueError(f"{different} different paths for {count} volumes; give one per volume")
    written = [
        file for path, record in zip(files, records, strict=True) for file in channel_files(path, record.channels)
    ]
    if len(set(written)) < len(written):
        raise ValueError(f"two volumes would write {max(written, key=written.count)}; choose other paths")
    sources = [one if isinstance(one, (str, PathLike)) else source_file(one) for one in inputs]
    read = {Path(os.path.expanduser(one)).resolve() for one in sources if one is not None}
    if lost := [str(path) for path in written if path.resolve() in read]:
        raise ValueError(f"{lost[0]} is a mask or an image of this call; write the volume to another file")
    for path in [*written, *map(sidecar_path, files)]:
        check_output_file(path)
    for path in files:
        read_sidecar(path)
    return files
