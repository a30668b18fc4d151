"""Edits of an image: requests, and how generated voxels are joined to those that stay. Axes: (C, X, Y, Z) in RAS+
order."""

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from autoencoder import VolumeAutoencoder
from diffusion.denoise import steps_of
from pipelines.storage.record import EditRecord
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
    """One edit of an image.

    Args:
        images: {channel: image} of every channel that the model generates.
        keep_channels: channels that stay unchanged and condition the others.
        region: label map on the images' grid, not 0 where voxels are generated; None: everywhere.
        strength: in (0, 1], the fraction of the denoising that the image goes through; 1 leaves nothing of it.
        blend_margin: mm inside the region in which the generated voxels are blended with their surroundings, see
            `harmonic_blend`.
    """

    images: Images
    keep_channels: tuple[str, ...] = ()
    region: MaskLike | None = None
    strength: float = 1.0
    blend_margin: float = BLEND_MARGIN_MM

    @property
    def replaces_all(self) -> bool:
        """Whether only the grid of the image is left."""
        return self.strength == 1 and self.region is None

    @property
    def conditions(self) -> dict[str, ImageLike]:
        """The images that condition the others."""
        return {channel: self.images[channel] for channel in self.keep_channels}

    @property
    def identity(self) -> Hashable:
        """A key that is equal for the same edit of the same images in the same region."""
        images = sorted((str(channel), identity(image)) for channel, image in self.images.items())
        return tuple(images), identity(self.region), self.keep_channels, self.strength, self.blend_margin

    @property
    def files(self) -> list[object]:
        """The images and the region that are read."""
        return [*self.images.values(), *([] if self.region is None else [self.region])]

    def record(self) -> EditRecord:
        """Describe for the volume's record which images are changed, and how."""
        changed = {channel: image for channel, image in self.images.items() if channel not in self.keep_channels}
        record: EditRecord = {"image": describe_images(changed), "strength": float(self.strength)}
        if self.region is not None:
            record["region"] = describe_mask(self.region)
            record["blend_margin"] = float(self.blend_margin)
        return record


def edit_requests(
    data: DataDescription,
    images: Sequence[Images],
    region: MaskLike | Sequence[MaskLike] | None,
    *,
    strength: float,
    blend_margin: float,
    keep_channels: Sequence[str],
    num_inference_steps: int,
) -> list[EditRequest]:
    """Build one edit per volume, from the images of each.

    Raises: ValueError naming what cannot be edited: a model of label maps, missing channels, another number of regions,
    a strength or margin out of range, or nothing to change.
    """
    channels = data.channels
    if data.image_labels:
        raise ValueError("this model generates label maps, which cannot be edited; edit the label map itself")
    if not set(keep_channels) <= set(channels):
        raise ValueError(
            f"keep_channels is {list(keep_channels)}; it lists channels that are kept, of {', '.join(channels)}"
        )
    if set(keep_channels) >= set(channels):
        raise ValueError(
            f"keep_channels names all channels ({', '.join(keep_channels)}), so nothing is left to change; omit one"
        )
    if blend_margin < 0:
        raise ValueError(f"blend_margin is a length in mm, 0 or more, got {blend_margin}")
    steps_of(strength, num_inference_steps)
    for of_volume in images:
        if set(of_volume) != set(channels):
            raise ValueError(
                f"image holds {', '.join(map(str, of_volume)) or 'nothing'}; to be edited it must hold every channel "
                f"that the model generates: {', '.join(channels)}"
            )
    regions = [None] if region is None else as_list(region)
    if len(regions) == 1:
        regions = regions * len(images)
    if len(regions) != len(images):
        raise ValueError(f"{len(regions)} regions for {len(images)} images; give one per image, or one for all")
    return [
        EditRequest(dict(of_volume), tuple(keep_channels), of_region, strength, blend_margin)
        for of_volume, of_region in zip(images, regions, strict=True)
    ]


def load_region(region: MaskLike, target: Volume, reading: Reading | None = None) -> np.ndarray:
    """Load a region on the grid of the image `target`, bool (X, Y, Z): True where it is not 0. A plain array is in the
    order of the image's file. `reading` is how headers are read, see `volumes.DataConfig.reading`.

    Raises: ValueError for another grid, and for an empty region.
    """
    if is_placed(region):
        volume, name = load_mask(region, target.affine, reading, like=target)
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
        raise ValueError(f"{name}: is 0 everywhere, so nothing is to be generated; mark some voxels")
    return inside


@dataclass(frozen=True, eq=False)
class PreparedEdit:
    """An image that is edited, on the grid of the output.

    Attributes:
        images: its channels, scaled as in training.
        originals: {channel: (X, Y, Z)} the unchanged voxels, see `volumes.read_volume(exact=True)`.
        region: bool (X, Y, Z), True where voxels are generated; None: everywhere.
        spacing, blend_margin: mm.
        unseen: bool (X, Y, Z), True outside the mask's field of view: nothing there is continued into the region.
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
        """Return a floating type that holds these channels' own voxels without loss."""
        return np.result_type(np.float32, *(self.originals[channel].dtype for channel in channels))

    def composited(self, slabs: Iterable[np.ndarray], channels: Sequence[str]) -> Iterator[np.ndarray]:
        """Map generated slabs (C, X, Y, z) of `channels` in file units to slabs of the edited image. Outside the region
        are its own voxels, bit for bit; inside, the generated ones plus the blend. Values stay within the range of the
        image, of its scale and of its type.

        Planes that the region reaches are held until all of them are there; others are passed on at once.
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

    def _joined(self, generated: np.ndarray, channels: Sequence[str], box: Box) -> np.ndarray:
        """Return the planes of the box, whole, from the generated voxels of the box (C, x, y, z)."""
        assert self.region is not None
        x, y, z = box
        planes, inside = self._original(channels, z), self.region[box]
        missing = np.where(self.unseen[box], 0, planes[:, x, y].astype(np.float32) - generated)
        blend = harmonic_blend(missing, inside, self.spacing, self.blend_margin)
        planes[:, x, y][:, inside] = self._limited(generated + blend, channels)[:, inside]
        return planes

    def _original(self, channels: Sequence[str], planes: slice) -> np.ndarray:
        dtype = self.dtype(channels)
        return np.stack([self.originals[channel][..., planes].astype(dtype) for channel in channels])

    def _limited(self, slab: np.ndarray, channels: Sequence[str]) -> np.ndarray:
        return np.stack([part.clip(*self.limits[one]) for part, one in zip(slab, channels, strict=True)])


def harmonic_blend(missing: np.ndarray, region: np.ndarray, spacing: Sequence[float], margin: float) -> np.ndarray:
    """Compute the values to add inside a region so that it meets its surroundings: float32, the shape of `missing`.

    Across the border it is `missing`, the surroundings minus the generated voxels there; `margin` mm inside it is 0;
    between, it solves Laplace's equation, the smoothest way from one to the other (Perez et al. 2003, Eq. 4). This
    alone loses fine texture at once, but neighbors in a real volume are alike even there. So in the first voxel
    `DETAIL_CARRYOVER` of the loss is added, and less in the next (docs/editing.md shows its effect on the border). The
    original voxels inside the region have no influence. The edge of the volume is not a border.

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
    ):  # from a smooth start: the rest is fine detail, and soon gone
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
    """Return the region's bounding box, enlarged by one voxel where there is room."""
    x, y, z = (
        slice(max(part.start - 1, 0), min(part.stop + 1, side))
        for part, side in zip(ndimage.find_objects(region.astype(np.uint8))[0], region.shape, strict=True)
    )
    return x, y, z


def downsample_region(region: np.ndarray, stride: Sequence[int]) -> torch.Tensor:
    """Map bool (X, Y, Z) on a padded grid to bool (1, 1, h, w, d): the latent voxels that the region reaches."""
    x, y, z = (n // s for n, s in zip(region.shape, stride, strict=True))
    cells = region.reshape(x, stride[0], y, stride[1], z, stride[2]).any(axis=(1, 3, 5))
    return torch.from_numpy(cells)[None, None]


def encoded(vae: VolumeAutoencoder, voxels: np.ndarray, device: torch.device) -> torch.Tensor:
    """Encode one volume (C, X, Y, Z) in [-1, 1] to standardized latents (1, C, h, w, d): the posterior's mode."""
    return vae.encode(torch.from_numpy(voxels)[None].to(device, vae.dtype), return_dict=False)[0].mode()
