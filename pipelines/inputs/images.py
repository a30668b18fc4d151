"""Images as conditions: condition channels, read and checked. Axes: (1, X, Y, Z) in RAS+ order, in the files' units."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import torch

from diffusion import LatentDenoiser
from pipelines.storage.record import SourceRecord
from volumes import LinearScale, Volume, describe_grid, read_volume, same_grid, stored_grid
from volumes.data.alignment import check_share, onto_grid, shown
from volumes.description import DataDescription
from volumes.formats.carriers import as_array, carries_geometry, source_file
from volumes.formats.nifti import exact_values
from volumes.formats.raw import Reading

from .masks import MaskLike, TimePoint, check_axes, describe_mask, is_placed, warn_of_header

ImageLike = MaskLike
Images = Mapping[str, ImageLike]  # {channel: image}


@dataclass(frozen=True, eq=False)
class GivenImage:
    """One condition channel.

    Attributes:
        volume: its voxels (1, X, Y, Z) float32 in the file's units, on the grid of the output.
        scale: brings them to [-1, 1], as in training.
    """

    volume: Volume
    scale: LinearScale


def check_images(unet: LatentDenoiser, data: DataDescription, images: Images) -> None:
    """Raise ValueError for channels that are unknown or are not condition channels, for a missing one that training
    never dropped, and if no channel is left to generate.
    """
    schema = unet.condition_schema
    known = [name for name, _ in schema.images]
    if images and not known:
        raise ValueError(
            f"image names {_listing(images)}, but this model was not trained with image conditions; leave image out, "
            "or edit that image with MedVolumeEditPipeline"
        )
    knows = f"its condition channels are {_listing(known)}, and it generates {_listing(data.channels)}"
    if unknown := [name for name in images if name not in data.channels]:
        raise ValueError(f"image names {_listing(unknown)}, which is not a channel of this model; {knows}")
    if untrained := [name for name in images if name not in known]:
        raise ValueError(
            f"image names {_listing(untrained)}, which this model was not trained to take as a condition; {knows}"
        )
    if images and set(data.channels) <= set(images):
        raise ValueError(f"image gives all channels ({_listing(images)}), so nothing is left to generate; omit one")
    if needed := [name for name in known if name not in images and not schema.dropout.get(name)]:
        raise ValueError(f"image must give {_listing(needed)}, as training never dropped it; {knows}")


def describe_images(images: Images) -> dict[str, SourceRecord]:
    """Describe the images that a volume is generated from, for its sidecar: {channel: file name and sha256}, see
    `describe_mask`.
    """
    return {channel: describe_mask(image) for channel, image in images.items()}


def load_images(
    images: Images,
    target: Volume | None,
    affine: np.ndarray,
    *,
    exact: bool = False,
    reading: Reading | None = None,
    reference: str | None = None,
    partial: bool = False,
) -> tuple[dict[str, Volume], dict[str, float]]:
    """Read images, all on the grid of `target`, or without one on that of the first: as float32, or with `exact` in a
    type that holds their values without loss (`read_volume`).

    Where the training set was brought onto one grid, `reference` is the channel whose grid that was. Then images on
    other grids are resampled in the same way, with NaN where they show nothing, unless they are `exact`; and without a
    target, the grid is that of the reference, if it is given. With `partial` they may show as little of the grid as
    they like, as it is cut to a box before the check.

    A plain array or tensor, (X, Y, Z) or (1, X, Y, Z), carries no geometry: its voxels are in the order of the target's
    file, as those of "np" results are; without a target it lies on `affine`, the model's template. `reading` is how
    headers are read, see `volumes.DataConfig.reading`.

    Returns: the images, and the fraction of the grid that each of those shows that were resampled.
    Raises: ValueError naming the channel and the file for another grid, several volumes, values that are not finite,
    and for what is not an image.
    """
    volumes: dict[str, Volume] = {}
    shares: dict[str, float] = {}
    first = [channel for channel in images if channel == reference and target is None and is_placed(images[channel])]
    for channel in dict.fromkeys([*first, *images]):
        image = images[channel]
        volume, name = _load(channel, image, target, affine, exact, reading or {})
        if len(volume.array) != 1:
            raise ValueError(f"{name}: holds {len(volume.array)} volumes; give the one that shows {channel!r} alone")
        if target is None:
            target = volume
        if not same_grid(volume, target):
            if reference is None or exact:
                remedy = "; an edit keeps each file's voxels" if exact else ""
                remedy = remedy or ", or train a model with data.resample_to, which resamples them"
                raise ValueError(
                    f"{name}: lies on another grid than {_other(volumes)} ({describe_grid(volume)} against "
                    f"{describe_grid(target)}); resample one onto the other first{remedy}"
                )
            volume = _resampled(volume, target, name, _other(volumes), partial)
            shares[channel] = float(shown(volume).mean())
        volumes[channel] = target.replace(volume.array)
    return {channel: volumes[channel] for channel in images}, shares


def _resampled(volume: Volume, target: Volume, name: str, other: str, partial: bool) -> Volume:
    """Resample an image onto the grid of another. Warns: that it does, and of what the image does not show.

    Raises: ValueError if it shows too little, unless it may be `partial`.
    """
    resampled = onto_grid(volume, target)
    share = float(shown(resampled).mean())
    if not partial:
        check_share(share, name, other)
    rest = f"; it shows {share:.0%} of it, and the rest is left empty" if share < 1 and not partial else ""
    warnings.warn(
        f"{name}: lies on another grid than {other}, and is resampled onto it, as the training set was{rest}",
        stacklevel=4,
    )
    return resampled


def _load(
    channel: str,
    image: ImageLike,
    target: Volume | None,
    affine: np.ndarray,
    exact: bool,
    reading: Reading,
) -> tuple[Volume, str]:
    """Load one image and its name for messages."""
    if isinstance(image, (str, os.PathLike)):
        number = image.number if isinstance(image, TimePoint) else None
        return warn_of_header(read_volume(image, exact=exact, time_point=number, **reading), str(image)), str(image)
    name = f"the image {channel!r}"
    if carries_geometry(image):
        name = source_file(image) or name
        return warn_of_header(read_volume(image, exact=exact, **reading), name), name
    if isinstance(image, Volume):
        check_axes(image, name)
        return Volume(_finite(image.array, name, exact), image.affine, image.source), name
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        raise ValueError(
            f"{name}: give a path, an image of nibabel, SimpleITK, torchio or MONAI, a Volume, an array or a tensor, "
            f"not {type(image).__name__}"
        )
    array = _finite(as_array(image, name), name, exact)
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if array.ndim != 3 or not array.size:
        raise ValueError(f"{name}: expected an array (X, Y, Z) or (1, X, Y, Z), got {array.shape}")
    if target is None:
        return Volume(array[None], affine), name
    grid = stored_grid(target)
    if array.shape != tuple(grid.shape):
        raise ValueError(
            f"{name}: is an array of {array.shape} voxels, the grid of the mask or first image has {tuple(grid.shape)}"
        )
    return read_volume(nib.Nifti1Image(array, grid.affine), exact=exact), name


def _finite(array: np.ndarray, name: str, exact: bool) -> np.ndarray:
    """Convert to float32, or with `exact` as `exact_values` does. Raises: ValueError for values that are not finite in
    float32.
    """
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    if bad := array.size - int(np.isfinite(single).sum()):
        raise ValueError(f"{name}: {bad} of {array.size} values are not finite (NaN or infinite); replace them first")
    return exact_values(array) if exact else single


def _other(volumes: Mapping[str, Volume]) -> str:
    return f"the image {next(iter(volumes))!r}" if volumes else "the mask"


def _listing(names: Any) -> str:
    return ", ".join(map(str, names)) or "nothing"
