"""The box on which a volume is generated where training cut its cases (`data.crop`), and the grid that it was cut from.

Axes: (C, X, Y, Z) in RAS+ order.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from volumes import ForegroundCrop, Placement, Volume, read_volume, to_nibabel
from volumes.foreground import cut, image_box, labeled, mask_box
from volumes.labels import labels_present

PLANES = 16  # outside the box, at a time
# What stands outside a box: for planes of the third axis, a new array (C, X, Y, z).
Outside = Callable[[slice], np.ndarray]


@dataclass(frozen=True, eq=False)
class Cropped:
    """What a volume is cut from.

    Attributes:
        whole: the grid of the output; its array is label indices or zeros.
        box: the part of it on which the volume is generated.
        images: {channel: image} on the whole grid, of all that were given.
    """

    whole: Volume
    box: Placement
    images: Mapping[str, Volume] = field(default_factory=dict)

    def put_back(self, slabs: Iterable[np.ndarray], outside: Outside) -> Iterator[np.ndarray]:
        """Slabs (C, x, y, z) of the box, along its third axis, to slabs of the whole grid."""
        x, y = (slice(low, low + n) for low, n in zip(self.box.start[:2], self.box.target[:2], strict=True))
        done = self.box.start[2]
        yield from _planes(outside, 0, done)
        for slab in slabs:
            planes = outside(slice(done, done + slab.shape[3]))
            planes[:, x, y] = slab
            done += slab.shape[3]
            yield planes
        yield from _planes(outside, done, self.box.shape[2])


@dataclass(frozen=True, eq=False)
class Constant:
    """One value of each channel, on a grid of `shape` (X, Y, Z)."""

    values: Sequence[float]
    shape: tuple[int, int, int]

    def __call__(self, planes: slice) -> np.ndarray:
        shape = (len(self.values), *self.shape[:2], planes.stop - planes.start)
        return np.broadcast_to(np.array(self.values, np.float32)[:, None, None, None], shape).copy()


@dataclass(frozen=True, eq=False)
class OfImages:
    """The voxels of images (1, X, Y, Z), in a type that holds those of all."""

    images: Sequence[Volume]
    dtype: np.dtype

    def __call__(self, planes: slice) -> np.ndarray:
        return np.concatenate([image.array[..., planes] for image in self.images]).astype(self.dtype)


def _planes(outside: Outside, start: int, stop: int) -> Iterator[np.ndarray]:
    for low in range(start, stop, PLANES):
        yield outside(slice(low, min(low + PLANES, stop)))


def cropped_by_mask(whole: Volume, name: str, crop: ForegroundCrop, labels: Sequence[int]) -> Cropped:
    """The box of the labels of a mask (label indices). Raises: ValueError if it is background alone."""
    box = mask_box(whole, labels, crop)
    if box is None:
        raise ValueError(
            f"{name}: is background alone, and this model generates the box of the labels (data.crop); give a mask "
            "with a label"
        )
    return Cropped(whole, box)


def cropped_by_image(whole: Volume, image: Volume, crop: ForegroundCrop) -> Cropped:
    """The box of the foreground of an image on the whole grid. Raises: ValueError if there is none."""
    box = image_box(image, crop)
    if box is None and np.isnan(image.array).all():
        raise ValueError(
            f"the image {crop.channel!r}: shows nothing of the volume's grid, and this model finds the box that it "
            "generates in it (data.crop); do both show the same patient in the same position? Correct its geometry"
        )
    if box is None:
        raise ValueError(
            f"the image {crop.channel!r}: nothing is above {crop.above:g}, so this model (data.crop) finds no box in "
            f"it; its highest value is {np.nanmax(image.array):g}: is it in the units of the training images?"
        )
    return Cropped(whole, box)


def warn_of_whole_grid(crop: ForegroundCrop) -> None:
    """Warn, in the same words for every volume, that no box was found as nothing that was given sets it."""
    if crop.by_mask:
        source, remedy = "the labels of a mask, and there is no mask", "give the mask"
    else:
        source = f"an image of {crop.channel!r}, and there is none"
        remedy = "generate from a data set (generate.py --config FILE --split test), or give that image as box_image"
    warnings.warn(
        f"this model was trained on boxes (data.crop) that are found in {source}: the whole grid is generated, which "
        f"it has not seen; {remedy}",
        stacklevel=5,
    )


def warn_of_labels_outside(whole: Volume, part: Volume, labels: Mapping[int, str], name: str) -> None:
    """Warn of voxels of a mask (label indices) with a label that lie outside the box, and of labels that are nowhere
    else."""
    total, inside = (int(labeled(mask.array, sorted(labels)).sum()) for mask in (whole, part))
    if inside == total:
        return
    everywhere, here = (labels_present(mask.array, len(labels)) for mask in (whole, part))
    names = [labels[value] for value, gone in zip(sorted(labels), (everywhere & ~here).tolist(), strict=True) if gone]
    gone = f", and all of {', '.join(names)}" if names else ""
    warnings.warn(
        f"{name}: {total - inside} of its {total} voxels with a label{gone} lie outside the box that this model sees "
        "of the image (data.crop); nothing is generated there",
        stacklevel=5,
    )


def filled(image: Volume) -> Volume:
    """A resampled image with its lowest value where it shows nothing (NaN)."""
    lowest = np.where(np.isnan(image.array), np.nanmin(image.array), image.array)
    return image.replace(lowest.astype(np.float32))


def cut_images(cropped: Cropped, images: Mapping[str, Volume]) -> dict[str, Volume]:
    """Images on the whole grid, cut to the box."""
    return {channel: cut(image, cropped.box) for channel, image in images.items()}


def cut_output(image: Any, box: Placement) -> Any:
    """What a pipeline returned for "nifti", an image or {channel: image} on the whole grid, cut to its box."""
    if isinstance(image, Mapping):
        return {channel: cut_output(one, box) for channel, one in image.items()}
    part = cut(read_volume(image, exact=True), box)
    return to_nibabel(Volume(part.array, part.affine), dtype=part.array.dtype)


def cut_region(cropped: Cropped, region: np.ndarray) -> np.ndarray:
    """A region (X, Y, Z) of the whole grid, cut to the box. Raises: ValueError if it lies outside. Warns: if a part
    does, where the image stays as it is.
    """
    inside = cropped.box.apply(region, False)
    count, total = int(inside.sum()), int(region.sum())
    if not count:
        raise ValueError(
            "the region: lies outside the box that this model sees of the image (data.crop), so nothing there can be "
            "generated; mark voxels of what is not background"
        )
    if count < total:
        warnings.warn(
            f"the region: {total - count} of its {total} voxels lie outside the box that this model sees of the image "
            "(data.crop), and stay as they are",
            stacklevel=4,
        )
    return inside
