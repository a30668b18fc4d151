"""Between people's grids and the model's: masks in, volumes out.

Axes: (C, X, Y, Z) in RAS+ order. Intensities are in [-1, 1] inside the model and in the training files' units outside.
"""

import math
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from pipelines.inputs.arguments import grid_shape, translation
from pipelines.inputs.crop import (
    Cropped,
    cropped_by_image,
    cropped_by_mask,
    cut_images,
    cut_region,
    filled,
    warn_of_labels_outside,
    warn_of_whole_grid,
)
from pipelines.inputs.images import GivenImage, ImageLike, Images, load_images
from pipelines.inputs.inpainting import EditRequest, PreparedEdit, load_region
from pipelines.inputs.masks import (
    BACKGROUND,
    LabelMap,
    MaskLike,
    index_labels,
    is_placed,
    known_labels,
    load_mask,
)
from pipelines.inputs.prepared import PreparedGrid
from pipelines.restore import make_restorer
from volumes import (
    PADDING,
    UNKNOWN,
    LinearScale,
    Volume,
    VolumeError,
    describe_grid,
    on_stored_grid,
    pad_to_multiple,
    resample,
    same_grid,
)
from volumes.data.alignment import check_share, shown
from volumes.description import DataDescription
from volumes.foreground import background_index, cut
from volumes.formats.raw import memory_bytes
from volumes.labels import labels_present, segment_values
from volumes.map_checks import MAX_SIDE
from volumes.plausible import resampling_oddities

OUTPUT_TYPES = ("nifti", "np", "pt", "latent")
SPACING_TOLERANCE = 0.01  # relative; a mask within it is taken as it is
WHOLE_UNITS = 256  # a window at least this wide, with whole limits, loses nothing by rounding: int16
TOUCHED = 1e-3  # of a voxel: resampled, it belongs to a region that fills more than this part of it


class VolumeProcessor:
    """Prepares masks for a model and brings its output back to the mask's grid and to original units.

    Args:
        data: the description of the training set.
        stride: of the whole model per axis: that of the autoencoder, times that of the U-Net.
    """

    def __init__(self, data: DataDescription, stride: Sequence[int]):
        self.labels, self.common_labels = data.labels, data.common_labels or ()
        self.spacing = data.spacing
        self.channels = list(data.channels)
        self.apart = len(self.channels) > 1 and not data.image_labels  # each channel has its own file
        self.scalings = {channel: scale.scaling for channel, scale in zip(data.channels, data.intensity, strict=True)}
        self.intensity = [(scale.kind, scale.linear) for scale in data.intensity]
        self.image_labels = list(data.image_labels)
        self.shape_range = data.shape_range
        self.affine = np.array(data.affine, dtype=np.float64)
        self.reading = data.reading
        self.reference = data.resample_to
        self.crop = data.crop
        self.background_threshold = data.background_threshold
        self.stride = tuple(stride)

    def preprocess(
        self, mask: MaskLike, label_map: LabelMap | None = None, box_image: ImageLike | None = None
    ) -> PreparedGrid:
        """Read, check, translate, crop, resample and pad one mask.

        Args:
            box_image: of `data.crop`'s channel, whose foreground sets the box; without it the whole grid is taken,
                unless the box is that of the mask's labels.
        Raises: ValueError (or VolumeError) naming the mask for what cannot be used: unknown labels, no voxels, no mask.
        Warns: background alone; a label missing that every training mask has, outside the box, or lost by resampling;
            a box that is not found for want of an image; another spacing than the model's; a size outside the training
            range; odd geometry.
        """
        label_map = translation(label_map)
        names = segment_values(self.labels, known_labels(self.labels, label_map))
        volume, name = load_mask(mask, self.affine, self.reading, names)
        whole = volume.replace(index_labels(volume.array, self.labels, label_map, name))
        cropped = self._cropped(whole, name, box_image)
        target = whole if cropped is None else cut(whole, cropped.box)
        grid = self._resampled(target, name, "mask")
        self._warn_of_labels(whole, target, grid, name)
        return self._padded(grid, target, name, grid.array[0], cropped)

    def _cropped(self, whole: Volume, name: str, box_image: ImageLike | None) -> Cropped | None:
        """The box of a mask (label indices). Raises: ValueError as `load_images`, and for a box that is not found."""
        crop = self.crop
        if crop is None:
            return None
        if crop.by_mask:
            return cropped_by_mask(whole, name, crop, sorted(self.labels))
        if box_image is None:
            warn_of_whole_grid(crop)
            return None
        assert crop.channel is not None
        with warnings.catch_warnings():  # an image that conditions the volume, too, is read again, with its warnings
            warnings.simplefilter("ignore")
            images, _ = self._load({crop.channel: box_image}, whole)
        return cropped_by_image(whole, images[crop.channel], crop)

    def _load(self, images: Images, target: Volume | None) -> tuple[dict[str, Volume], dict[str, float]]:
        """Read images, see `load_images`. Where there is a box, it is in the box that they must show enough."""
        return load_images(
            images, target, self.affine, reading=self.reading, reference=self.reference, partial=self.crop is not None
        )

    def preprocess_shape(self, shape: Sequence[int], spacing: Sequence[float] | None = None) -> PreparedGrid:
        """A grid of `shape` (X, Y, Z) voxels on the template's affine, with `spacing` (mm) in place of its own, for a
        model that no mask conditions. Warns: of another spacing than the model's, as for a mask."""
        shape = grid_shape(shape)
        _check_room(shape)
        target = Volume(_no_labels(shape), self.affine)
        if spacing is not None:
            affine = self.affine.copy()
            affine[:3, :3] = affine[:3, :3] / target.spacing * np.asarray(spacing)
            target = Volume(target.array, affine)
        name = "the shape asked for"
        grid = target if spacing is None else self._resampled(target, name, "shape")
        return self._padded(grid, target, name, None)

    def preprocess_images(self, images: Images, prepared: PreparedGrid | None) -> PreparedGrid:
        """Read images {channel: image} that condition the others: on the grid of `prepared`; without one, on their own.

        Raises: ValueError naming the channel and the file for what cannot be used, see `load_images`.
        Warns: without `prepared` as `preprocess` does.
        """
        target = None if prepared is None else prepared.output
        volumes, shares = self._load(images, target)
        prepared = prepared or self._image_grid(volumes)
        whole, cropped = volumes, prepared.cropped
        if cropped is not None:
            volumes = cut_images(cropped, whole)
            shares = {channel: float(shown(volumes[channel]).mean()) for channel in shares}
        if shares:
            prepared = self._without_unseen(prepared, volumes, shares)
        if cropped is not None:
            given = {channel: filled(image) if channel in shares else image for channel, image in whole.items()}
            prepared = replace(prepared, cropped=replace(cropped, images=given))
        return replace(prepared, images=self._scaled_images(volumes, prepared))

    def _without_unseen(
        self, prepared: PreparedGrid, volumes: dict[str, Volume], shares: Mapping[str, float]
    ) -> PreparedGrid:
        """Mark as PADDING what resampled images do not show (NaN), and give it their lowest values in `volumes`.

        Raises: ValueError if the images and the mask together show too little.
        """
        outside = prepared.target.array[0] == PADDING
        for channel in shares:
            outside = outside | ~shown(volumes[channel])
        least = min(shares, key=lambda channel: shares[channel])
        check_share(float(1 - outside.mean()), f"the image {least!r}, with the other inputs", "the volume")
        volumes |= {channel: filled(volumes[channel]) for channel in shares}
        target = prepared.target.replace(np.where(outside, np.int16(PADDING), prepared.target.array))
        grid = target
        if prepared.grid is not prepared.target:
            assert self.spacing is not None
            grid = resample(target, self.spacing, nearest=True)
        labels = None if prepared.labels is None else prepared.placement.apply(grid.array[0], PADDING)
        return replace(prepared, target=target, grid=grid, labels=labels, resampled=dict(shares))

    def preprocess_edit(self, request: EditRequest, prepared: PreparedGrid | None) -> PreparedGrid:
        """Read the image that is edited. The grid of its file is the target; a mask that was prepared must lie on it.

        Raises: ValueError naming the image or the region for what cannot be used, see `load_images` and `load_region`.
        Warns: without `prepared` as `preprocess` does.
        """
        placed = {name: image for name, image in request.images.items() if is_placed(image)}
        target = prepared.output if prepared is not None and not placed else None  # arrays are in the order of a file
        exact, _ = load_images(placed | dict(request.images), target, self.affine, exact=True, reading=self.reading)
        channel, first = next(iter(exact.items()))
        if not on_stored_grid(first):
            raise ValueError(
                f"the image {channel!r}: was resampled from its file's grid; give the file, or a new Volume"
            )
        prepared = self._image_grid(exact) if prepared is None else _on_image(channel, first, prepared)
        region = None if request.region is None else load_region(request.region, first, self.reading)
        if (cropped := prepared.cropped) is not None:
            prepared = replace(prepared, cropped=replace(cropped, images=exact))
            exact = cut_images(cropped, exact)
            region = None if region is None else cut_region(cropped, region)
        images = self._scaled_images(
            {n: one.replace(one.array.astype(np.float32)) for n, one in exact.items()}, prepared
        )
        kept = {name: images[name] for name in request.keep_channels}
        if request.replaces_all:
            return replace(prepared, images=kept)
        originals = {name: volume.array[0] for name, volume in exact.items()}
        unseen = prepared.target.array[0] == PADDING
        edit = PreparedEdit(images, originals, region, first.spacing, request.blend_margin, unseen)
        return replace(prepared, images=kept, edit=edit)

    def _image_grid(self, images: Mapping[str, Volume]) -> PreparedGrid:
        """The grid of images, without a mask. Raises: ValueError if their box is not found. Warns: if none sets it."""
        channel, image = next(iter(images.items()))
        whole, name = image.replace(_no_labels(image.shape)), f"the image {channel!r}"
        cropped, of_box = None, None if self.crop is None else images.get(self.crop.channel or "")
        if self.crop is not None and of_box is not None:
            cropped = cropped_by_image(whole, of_box, self.crop)
        elif self.crop is not None:
            warn_of_whole_grid(self.crop)
        target = whole if cropped is None else cut(whole, cropped.box)
        return self._padded(self._resampled(target, name, "image"), target, name, None, cropped)

    def _scaled_images(self, volumes: Mapping[str, Volume], prepared: PreparedGrid) -> dict[str, GivenImage]:
        """Images on the target of `prepared`, with their scales. Raises: ValueError for one that is constant."""
        scaled = {}
        inside = prepared.grid.array[0] != PADDING if prepared.resampled else ...
        for channel, volume in volumes.items():
            try:
                scale = self.scalings[channel].fit(self._on_grid(volume, prepared).array[0][inside])
            except VolumeError as error:
                raise ValueError(f"the image {channel!r}: {error}") from error
            scaled[channel] = GivenImage(volume, scale)
        return scaled

    def standardized_images(self, prepared: PreparedGrid, images: Mapping[str, GivenImage]) -> np.ndarray:
        """Images on the padded grid, float32 (C, *prepared.shape) in [-1, 1], scaled as in training: -1 in the padding,
        outside the mask's field of view, and in channels without an image."""
        voxels = np.full((len(self.channels), *prepared.shape), -1, np.float32)
        for channel, image in images.items():
            scaled = image.scale.apply(self._on_grid(image.volume, prepared).array[0])
            if prepared.labels is not None or prepared.resampled:
                scaled[prepared.grid.array[0] == PADDING] = -1
            voxels[self.channels.index(channel)] = prepared.placement.apply(scaled, -1)
        return voxels

    def padded_region(self, prepared: PreparedGrid, region: np.ndarray) -> np.ndarray:
        """A region (X, Y, Z) of the target on the padded grid, bool (*prepared.shape)."""
        volume = prepared.target.replace(region[None].astype(np.float32))
        return prepared.placement.apply(self._on_grid(volume, prepared).array[0] > TOUCHED, False)

    def generated(self, given: Collection[str]) -> list[str]:
        """The channels that have a file each, where `given` are condition channels; none where one file holds all."""
        return [channel for channel in self.channels if channel not in given] if self.apart else []

    def file_dtype(self, channels: Sequence[str]) -> np.dtype:
        """The type of the voxels of a file of these channels: int16 where rounding loses nothing, float32 otherwise; of
        label maps uint8 if that holds them, else int16."""
        if self.image_labels:
            return np.dtype(np.uint8 if self.image_labels[0] >= 0 and self.image_labels[-1] <= 255 else np.int16)
        return whole_or_float([self.intensity[self.channels.index(channel)] for channel in channels])

    def _on_grid(self, volume: Volume, prepared: PreparedGrid) -> Volume:
        """A volume on the target of `prepared`, resampled to its grid."""
        if prepared.grid is prepared.target:
            return volume
        assert self.spacing is not None
        return resample(volume, self.spacing)

    def _resampled(self, target: Volume, name: str, what: str) -> Volume:
        """Label indices at the model's spacing: themselves, where they have it. Warns: where they have not."""
        if self.spacing is not None and not np.allclose(target.spacing, self.spacing, rtol=SPACING_TOLERANCE, atol=0):
            warnings.warn(
                f"{name}: has a spacing of {_by(target.spacing)} mm, the model was trained at {_by(self.spacing)} mm; "
                f"the {what} is resampled, and the volume resampled back to the {what}'s grid",
                stacklevel=2,
            )
            grid = resample(target, self.spacing, nearest=True)
            for oddity in resampling_oddities(target.shape, grid.shape):
                warnings.warn(f"{name}: {oddity}", stacklevel=2)
            return grid
        return target

    def _warn_of_labels(self, whole: Volume, target: Volume, grid: Volume, name: str) -> None:
        """Warn of labels that every training mask has and this one lacks, that lie outside the box, and that resampling
        lost. A mask of background alone has had its warning."""
        present = labels_present(whole.array, len(self.labels))
        names = dict(zip(sorted(self.labels), present.tolist(), strict=True))
        if not any(found for value, found in names.items() if value != BACKGROUND):
            return
        hidden = (whole.array == UNKNOWN).any()  # it may be where the label is not known
        if not hidden and (missing := [self.labels[value] for value in self.common_labels if not names[value]]):
            warnings.warn(
                f"{name}: has no {', '.join(missing)}, which every training mask has; what the volume shows in its "
                "place is invented",
                stacklevel=3,
            )
        if target is not whole:
            warn_of_labels_outside(whole, target, self.labels, name)
            present = labels_present(target.array, len(self.labels))
        if grid is target:
            return
        lost = present & ~labels_present(grid.array, len(self.labels))
        if lost.any():
            listed = ", ".join(self.labels[value] for value, gone in zip(names, lost.tolist(), strict=True) if gone)
            warnings.warn(
                f"{name}: {listed} is too small for the model's spacing, and lost when the mask is resampled; enlarge "
                "it",
                stacklevel=3,
            )

    def _padded(
        self, grid: Volume, target: Volume, name: str, labels: np.ndarray | None, cropped: Cropped | None = None
    ) -> PreparedGrid:
        placement = pad_to_multiple(grid.shape, self.stride)
        self._check_size(placement.target, name)
        padded = None if labels is None else placement.apply(labels, PADDING)
        return PreparedGrid(grid=grid, target=target, placement=placement, labels=padded, cropped=cropped)

    def _check_size(self, shape: tuple[int, int, int], name: str) -> None:
        """Warn where the padded grid is smaller or larger than any padded grid in training."""
        low, high = (pad_to_multiple(limit, self.stride).target for limit in self.shape_range)
        if any(not small <= size <= large for small, size, large in zip(low, shape, high, strict=True)):
            warnings.warn(
                f"{name}: its grid of {_by(shape)} voxels (padded) is outside of what the model was trained on, "
                f"{_by(low)} to {_by(high)}; look at the result with care",
                stacklevel=2,
            )

    def emptied(self, slabs: Iterable[torch.Tensor], prepared: PreparedGrid) -> Iterable[torch.Tensor]:
        """Empty the background of a decoded volume's slabs (C, X, Y, z), for a model of volumes whose background is
        empty (`DataDescription.background_threshold`); others stay as they are.

        What is background is set to -inf: residual noise does not change it, and it is written as the lowest
        intensity. It is what the mask says; where no mask says it, what was decoded says it.
        """
        if (threshold := self.background_threshold) is None:
            return slabs
        return self._emptied(slabs, threshold, prepared.labels)

    def _emptied(
        self, slabs: Iterable[torch.Tensor], threshold: float, known: np.ndarray | None
    ) -> Iterator[torch.Tensor]:
        start = 0
        for slab in slabs:
            empty = (slab < threshold).all(0)
            if known is not None:
                labels = torch.from_numpy(known[..., start : start + slab.shape[3]]).to(slab.device)
                empty = torch.where(labels == UNKNOWN, empty, labels == background_index(self.labels))
            start += slab.shape[3]
            yield torch.where(empty, -torch.inf, slab)

    def postprocess(
        self,
        sample: torch.Tensor | Iterable[torch.Tensor],
        prepared: PreparedGrid,
        output_type: str = "nifti",
        description: str = "",
    ) -> nib.Nifti1Image | dict[str, nib.Nifti1Image] | np.ndarray | torch.Tensor:
        """Bring a decoded volume (C, *prepared.shape), or its slabs along the third axis one after the other, to the
        mask's own grid and original units.

        Values are clipped to [-1, 1], the range that the training volumes were clipped to; voxels that the mask marks
        as PADDING get the lowest. A NIfTI is int16 where every channel has a window with whole limits at least 256
        wide (CT, in HU) and float32 otherwise; "np" and "pt" are float32. Of several channels, "nifti" is a dict of the
        images of those that were generated; "np" and "pt" hold all of them, the condition channels as in their files.

        Where the model generates label maps, all three are the label map (one channel, uint8 or int16) that the
        channels mean, see `merge_channels`, after they were resampled.
        """
        slabs = [sample] if isinstance(sample, torch.Tensor) else sample
        return make_restorer(self, prepared).output(slabs, output_type, description)

    def write(
        self,
        slabs: Iterable[torch.Tensor],
        prepared: PreparedGrid,
        path: str | os.PathLike | Sequence[str | os.PathLike],
        description: str = "",
    ) -> None:
        """Write the NIfTI that `postprocess` returns, the same bytes, slab by slab, without holding the volume. Where
        it returns several, `path` lists as many, and all pass through one temporary file beside the first.

        A volume that must be resampled to the mask's grid is held, with a warning if it is large.
        """
        paths = [Path(path)] if isinstance(path, (str, os.PathLike)) else [Path(one) for one in path]
        make_restorer(self, prepared).write(slabs, paths, description)


def _no_labels(shape: tuple[int, ...]) -> np.ndarray:
    """Label indices (1, X, Y, Z) where there is no mask: zeros that take no memory."""
    return np.broadcast_to(np.int16(0), (1, *shape))


def _on_image(channel: str, image: Volume, prepared: PreparedGrid) -> PreparedGrid:
    """A mask's grid on the grid of the image's file. Raises: ValueError if it is another grid."""
    if not same_grid(image, prepared.output):
        raise ValueError(
            f"the image {channel!r}: lies on another grid than the mask ({describe_grid(image)} against "
            f"{describe_grid(prepared.output)}); resample one onto the other first"
        )
    target, cropped = image.replace(prepared.output.array), prepared.cropped
    if cropped is not None:
        cropped = replace(cropped, whole=target)
        target = cut(target, cropped.box)
    grid = target if prepared.grid is prepared.target else prepared.grid
    return replace(prepared, target=target, grid=grid, cropped=cropped)


def whole_or_float(intensity: Sequence[tuple[str, LinearScale]]) -> np.dtype:
    """int16 where rounding loses nothing (windows of at least 256 units with whole limits), float32 otherwise."""
    limits = np.iinfo(np.int16)
    whole = all(
        kind == "window"
        and float(scale.low).is_integer()
        and float(scale.high).is_integer()
        and limits.min <= scale.low <= scale.high - WHOLE_UNITS
        and scale.high <= limits.max
        for kind, scale in intensity
    )
    return np.dtype(np.int16 if whole else np.float32)


def _check_room(shape: tuple[int, int, int]) -> None:
    """Raises: ValueError for a grid that no NIfTI file can have, or that this process has no memory for."""
    needed, room = np.dtype(np.int16).itemsize * math.prod(shape), memory_bytes()
    if max(shape) > MAX_SIDE or needed > room:
        raise ValueError(
            f"shape {' x '.join(map(str, shape))}: a side has at most {MAX_SIDE} voxels, and the whole must fit into "
            f"the {room / 2**30:.0f} GiB of memory; ask for a smaller one"
        )


def _by(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
