"""Edits of an image: what is asked for, and how what is made anew is joined to what stays. Axes: (C, X, Y, Z) in RAS+ order."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from autoencoder import VolumeAutoencoder
from diffusion.denoise import steps_of
from volumes import Volume, describe_grid, read_mask, same_grid, stored_grid
from volumes.description import DataDescription
from volumes.formats.carriers import as_array
from volumes.formats.raw import Reading

from .images import GivenImage, ImageLike, Images, describe_images
from .masks import MaskLike, as_list, describe_mask, identity, is_placed, load_mask

BLEND_MARGIN_MM = 4.0  # mm
DETAIL_CARRYOVER = 0.6  # of the texture across the border that the first voxel inside takes on
Box = tuple[slice, slice, slice]


@dataclass(frozen=True, eq=False)
class EditRequest:
    """One edit, as it is asked for.

    Args:
        images: {channel: image} of every channel that the model makes.
        keep_channels: those of them that are left alone and condition the others.
        region: label map on the images' grid, not 0 where voxels are made anew; None: everywhere.
        strength: in (0, 1], the share of the denoising that the image goes through; 1 leaves nothing of it.
        blend_margin: mm inside the region in which what is made is brought to what stays, see `harmonic_blend`.
    """

    images: Images
    keep_channels: tuple[str, ...] = ()
    region: MaskLike | None = None
    strength: float = 1.0
    blend_margin: float = BLEND_MARGIN_MM

    @property
    def anew(self) -> bool:
        """Whether nothing of the image is left but its grid."""
        return self.strength == 1 and self.region is None

    @property
    def conditions(self) -> dict[str, ImageLike]:
        """The images that are given."""
        return {channel: self.images[channel] for channel in self.keep_channels}

    @property
    def identity(self) -> tuple[Any, ...]:
        """By which one tells whether an edit is asked for twice."""
        return tuple(identity(one) for one in [*self.images.values(), self.region])

    @property
    def files(self) -> list[Any]:
        """What is read."""
        return [*self.images.values(), self.region]

    def record(self) -> dict[str, Any]:
        """For the sidecar: {"image": {channel: file and sha256} of those that are changed, "strength"}, and with a region
        {"region": file and sha256, "blend_margin"}."""
        changed = {channel: image for channel, image in self.images.items() if channel not in self.keep_channels}
        record = {"image": describe_images(changed), "strength": float(self.strength)}
        if self.region is not None:
            record |= {"region": describe_mask(self.region), "blend_margin": float(self.blend_margin)}
        return record


def edit_requested(
    strength: float | None, region: Any, keep_channels: Sequence[str], begins_from: Mapping[str, Any]
) -> bool:
    """Whether an image is to be changed. Raises: ValueError for one without an image, or with another beginning."""
    if strength is None and region is None:
        if keep_channels:
            raise ValueError(
                f"keep_channels {list(keep_channels)} is for strength and region: without them all of image is given"
            )
        return False
    if [name for name, one in begins_from.items() if one is not None] != ["image"]:
        raise ValueError("strength and region change an image: give image=..., and neither shape nor latents")
    return True


def by_channel(image: Any, data: DataDescription) -> Any:
    """`image` of an edit as dicts {channel: image}: of a model of one channel it may be that image alone."""
    if isinstance(image, (list, tuple)):
        return [by_channel(one, data) for one in image]
    if isinstance(image, Mapping) or len(data.channels) > 1:
        return image
    return {next(iter(data.channels)): image}


def resolve_edits(
    data: DataDescription,
    images: Sequence[Images],
    region: MaskLike | Sequence[MaskLike] | None,
    *,
    strength: float | None,
    blend_margin: float,
    keep_channels: Sequence[str],
    num_inference_steps: int,
) -> list[EditRequest]:
    """What is asked for of each volume, from the images of each. Without `strength` it is 1.

    Raises: ValueError naming what cannot be: a model of label maps, channels that lack, regions of another number, strength
    or blend_margin out of range, nothing left to change.
    """
    if data.image_labels:
        raise ValueError("this model makes label maps, which strength and region cannot change; edit the map itself")
    if isinstance(keep_channels, str) or not set(keep_channels) <= set(data.channels):
        raise ValueError(
            f"keep_channels is {keep_channels!r}; it lists channels that are left alone, of {', '.join(data.channels)}"
        )
    if set(keep_channels) >= set(data.channels):
        raise ValueError(
            f"keep_channels names all channels ({', '.join(keep_channels)}), so nothing is left to change; leave one out"
        )
    if not (blend_margin >= 0 and math.isfinite(blend_margin)):
        raise ValueError(f"blend_margin is a length in mm, 0 or more, got {blend_margin}")
    steps_of(1.0 if strength is None else strength, num_inference_steps)
    for of_volume in images:
        if set(of_volume) != set(data.channels):
            raise ValueError(
                f"image holds {', '.join(map(str, of_volume)) or 'nothing'}; to be changed (by strength or region) it must hold every "
                f"channel that the model makes: {', '.join(data.channels)}"
            )
    regions = [None] if region is None else as_list(region)
    if len(regions) not in (1, len(images)):
        raise ValueError(f"{len(regions)} regions for {len(images)} images; give one an image, or one for all")
    regions = regions * (len(images) if len(regions) == 1 else 1)
    strength = 1.0 if strength is None else float(strength)
    return [
        EditRequest(dict(of_volume), tuple(keep_channels), one, strength, blend_margin)
        for of_volume, one in zip(images, regions, strict=True)
    ]


def load_region(region: MaskLike, target: Volume, reading: Reading | None = None) -> np.ndarray:
    """bool (X, Y, Z) on the grid of the image `target`: where the region is not 0. A plain array is in the order of its file.
    `reading` is how headers are read, see `volumes.DataConfig.reading`.

    Raises: ValueError for another grid, and for a region without a voxel.
    """
    if is_placed(region):
        volume, name = load_mask(region, target.affine, reading)
    else:
        array, grid, name = as_array(region, "the region"), stored_grid(target), "the region"
        array = array[0] if array.ndim == 4 and len(array) == 1 else array
        if array.shape != tuple(grid.shape):
            raise ValueError(f"{name}: is an array of {array.shape} voxels, the image's grid has {tuple(grid.shape)}")
        volume = read_mask(nib.Nifti1Image(array.astype(np.uint8 if array.dtype == bool else array.dtype), grid.affine))
    if not same_grid(volume, target):
        raise ValueError(
            f"{name}: lies on another grid than the image ({describe_grid(volume)} against {describe_grid(target)}); "
            "resample one onto the other first"
        )
    inside = volume.array[0] != 0
    if not inside.any():
        raise ValueError(f"{name}: is 0 everywhere, so nothing is to be made anew; mark some voxels")
    return inside


@dataclass(frozen=True, eq=False)
class PreparedEdit:
    """An image that is changed, on the grid that results are handed back on.

    Attributes:
        images: its channels, scaled as in training.
        originals: {channel: (X, Y, Z)} their voxels as they are, see `volumes.read_volume(exact=True)`.
        region: bool (X, Y, Z), True where voxels are made anew; None: everywhere.
        spacing, blend_margin: mm.
        unseen: bool (X, Y, Z), True outside the field of view by the mask: nothing there is continued into the region.
    """

    images: Mapping[str, GivenImage]
    originals: Mapping[str, np.ndarray]
    region: np.ndarray | None
    spacing: Sequence[float]
    blend_margin: float
    unseen: np.ndarray
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for channel, original in self.originals.items():
            scale = self.images[channel].scale
            low, high = min(scale.low, original.min()), max(scale.high, original.max())
            if original.dtype.kind in "iu":
                of_type = np.iinfo(original.dtype)
                low, high = max(low, of_type.min), min(high, of_type.max)
            self.limits[channel] = float(low), float(high)

    def dtype(self, channels: Iterable[str]) -> np.dtype:
        """A floating type that holds these channels' own voxels without loss."""
        return np.result_type(np.float32, *(self.originals[channel].dtype for channel in channels))

    def composited(self, slabs: Iterable[np.ndarray], channels: Sequence[str]) -> Iterator[np.ndarray]:
        """Slabs (C, X, Y, z) of `channels` in file units, as they were made, to those of the edited image: outside the
        region its own voxels, bit for bit; inside, what was made and the membrane. Values stay within the range of the
        image and of its scale, and of its type.

        Planes that the region reaches are held until all of them are there, others pass.
        """
        if self.region is None:
            for slab in slabs:
                yield self._limited(slab, channels)
            return
        box = _box(self.region)
        x, y, z = box
        waiting, done, joined = [], 0, False
        for slab in slabs:
            stop = done + slab.shape[3]
            if done < z.stop and stop > z.start:
                waiting.append(slab[:, x, y, max(z.start - done, 0) : z.stop - done].astype(np.float32))
            if done < z.start:
                yield self._original(channels, slice(done, min(stop, z.start)))
            if stop >= z.stop and not joined:
                yield self._joined(np.concatenate(waiting, axis=3), channels, box)
                waiting, joined = [], True
            if stop > z.stop:
                yield self._original(channels, slice(max(done, z.stop), stop))
            done = stop

    def _joined(self, made: np.ndarray, channels: Sequence[str], box: Box) -> np.ndarray:
        """The planes of the box, whole, from what was made in the box (C, x, y, z)."""
        assert self.region is not None
        x, y, z = box
        planes, inside = self._original(channels, z), self.region[box]
        missing = np.where(self.unseen[box], 0, planes[:, x, y].astype(np.float32) - made)
        made = self._limited(made + harmonic_blend(missing, inside, self.spacing, self.blend_margin), channels)
        planes[:, x, y][:, inside] = made[:, inside]
        return planes

    def _original(self, channels: Sequence[str], planes: slice) -> np.ndarray:
        dtype = self.dtype(channels)
        return np.stack([self.originals[channel][..., planes].astype(dtype) for channel in channels])

    def _limited(self, slab: np.ndarray, channels: Sequence[str]) -> np.ndarray:
        return np.stack([part.clip(*self.limits[one]) for part, one in zip(slab, channels, strict=True)])


def harmonic_blend(missing: np.ndarray, region: np.ndarray, spacing: Sequence[float], margin: float) -> np.ndarray:
    """What to add inside a region so that it meets its surroundings: float32, the shape of `missing`.

    Across the border it is `missing`, what the surroundings have and the made voxels there lack; `margin` mm inside it is 0;
    between, it solves Laplace's equation, the smoothest way from one to the other (Perez et al. 2003, Eq. 4). That loses fine
    texture at once, but neighbors in a real volume are alike even there: so in the first voxel `DETAIL_CARRYOVER` of what is lost is added,
    and less in the next (see docs/editing.md for what it does to the border). Nothing that the region covers enters it. The
    edge of the volume is no border.

    Args:
        missing: (C, X, Y, Z); voxels inside the region are not read.
        region: bool (X, Y, Z).
        spacing: mm between voxels.
    """
    if region.all() or margin < min(spacing):
        return np.zeros_like(missing, np.float32)
    depth, nearest = ndimage.distance_transform_edt(region, sampling=spacing, return_indices=True)  # pyright: ignore[reportGeneralTypeIssues]
    free = torch.from_numpy(region & (depth <= margin))
    fixed = torch.from_numpy(np.where(region, 0, missing).astype(np.float32))
    straight = torch.from_numpy((missing[:, *nearest] * (1 - depth / (margin + min(spacing)))).astype(np.float32))
    solution = torch.where(free, straight, fixed)
    weights = torch.tensor([1 / mm**2 for mm in spacing])
    weights = (weights / weights.sum() / 2).tolist()
    for _ in range(
        math.ceil(2 * (margin / min(spacing)) ** 2)
    ):  # a smooth beginning: what is left is fine, and soon gone
        padded = F.pad(solution[None], (1,) * 6, mode="replicate")[0]
        mean = torch.zeros_like(solution)
        for axis, weight in enumerate(weights, start=1):
            inner = padded
            for other in {1, 2, 3} - {axis}:
                inner = inner.narrow(other, 1, solution.shape[other])
            mean += weight * (inner.narrow(axis, 0, solution.shape[axis]) + inner.narrow(axis, 2, solution.shape[axis]))
        solution = torch.where(free, mean, fixed)
    voxels = np.sqrt(((nearest - np.indices(region.shape)) ** 2).sum(axis=0))  # to the nearest outside
    solution += DETAIL_CARRYOVER * (straight - solution) * torch.from_numpy(np.exp(1 - voxels).astype(np.float32))
    return torch.where(free, solution, 0).numpy()


def _box(region: np.ndarray) -> Box:
    """The region's bounding box and a voxel around it, where there is one."""
    x, y, z = (
        slice(max(part.start - 1, 0), min(part.stop + 1, side))
        for part, side in zip(ndimage.find_objects(region.astype(np.uint8))[0], region.shape, strict=True)
    )
    return x, y, z


def cells_of(region: np.ndarray, stride: Sequence[int]) -> torch.Tensor:
    """bool (X, Y, Z) on a padded grid -> bool (1, 1, h, w, d): the latent cells that the region reaches."""
    x, y, z = (n // s for n, s in zip(region.shape, stride, strict=True))
    cells = region.reshape(x, stride[0], y, stride[1], z, stride[2]).any(axis=(1, 3, 5))
    return torch.from_numpy(cells)[None, None]


def encoded(vae: VolumeAutoencoder, voxels: np.ndarray, device: torch.device) -> torch.Tensor:
    """Standardized latents (1, C, h, w, d) of one volume (C, X, Y, Z) in [-1, 1]: the posterior's mode."""
    return vae.encode(torch.from_numpy(voxels)[None].to(device, vae.dtype), return_dict=False)[0].mode()
