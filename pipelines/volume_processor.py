"""Between people's grids and the model's: masks in, volumes out.

Axes: (C, X, Y, Z) in RAS+ order. Intensities are in [-1, 1] inside the model and in the training files' units outside.
"""

import math
import os
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from files.atomic import UNFINISHED
from pipelines.inputs.arguments import grid_shape, translation
from pipelines.inputs.images import GivenImage, Images, load_images
from pipelines.inputs.inpainting import EditRequest, PreparedEdit, load_region
from pipelines.inputs.masks import (
    LabelMap,
    MaskLike,
    index_labels,
    is_placed,
    load_mask,
)
from pipelines.inputs.prepared import PreparedVolume
from volumes import (
    PADDING,
    IntensityScaling,
    LinearScale,
    Volume,
    VolumeError,
    describe_grid,
    merge_channels,
    on_stored_grid,
    pad_to_multiple,
    read_slabs,
    resample,
    resample_to,
    same_grid,
    stored_grid,
    to_nibabel,
    to_stored_grid,
    write_slabs,
)
from volumes.description import DataDescription
from volumes.formats.nifti import check_voxels
from volumes.formats.raw import memory_bytes
from volumes.map_checks import MAX_SIDE
from volumes.plausible import resampling_oddities

OUTPUT_TYPES = ("nifti", "np", "pt", "latent")
SPACING_TOLERANCE = 0.01  # relative; a mask within it is taken as it is
WHOLE_UNITS = 256  # a window at least this wide, with whole limits, loses nothing by rounding: int16
PLANES = 16  # restored at a time
TOUCHED = 1e-3  # of a voxel: resampled, it belongs to a region of which it holds more than that
LARGE_BYTES = 1 << 28  # of float32 voxels, above which it is worth a warning that they are all in memory


class VolumeProcessor:
    """Prepares masks for a model and brings its output back to the mask's grid and to original units.

    Args:
        data: the description of the training set.
        stride: total stride of the autoencoder per axis.
    """

    def __init__(self, data: DataDescription, stride: Sequence[int]):
        self.labels = data.labels
        self.spacing = data.spacing
        self.channels = list(data.channels)
        self.apart = len(self.channels) > 1 and not data.image_labels  # each channel has its own file
        self.percentiles = [scale.percentiles for scale in data.intensity]
        self.intensity = [(scale.kind, scale.linear) for scale in data.intensity]
        self.image_labels = list(data.image_labels)
        self.shape_range = data.shape_range
        self.affine = np.array(data.affine, dtype=np.float64)
        self.reading = data.reading
        self.stride = tuple(stride)

    def preprocess(self, mask: MaskLike, label_map: LabelMap | None = None) -> PreparedVolume:
        """Read, check, translate, resample and pad one mask.

        Raises: ValueError (or VolumeError) naming the mask for what cannot be used: unknown labels, no voxels, no mask.
        Warns: background alone; another spacing than the model's; a size outside the training range; odd geometry.
        """
        label_map = translation(label_map)
        volume, name = load_mask(mask, self.affine, self.reading)
        target = volume.replace(index_labels(volume.array, self.labels, label_map, name))
        grid = self._resampled(target, name, "mask")
        return self._canvas(grid, target, name, grid.array[0])

    def preprocess_images(self, images: Images, prepared: PreparedVolume | None) -> PreparedVolume:
        """The canvas with images {channel: image} that are given, which lie on its grid; without a canvas, on theirs.

        Raises: ValueError naming the channel and the file for what cannot be used, see `load_images`.
        Warns: without a canvas as `preprocess` does.
        """
        volumes = load_images(images, None if prepared is None else prepared.target, self.affine, reading=self.reading)
        prepared = prepared or self._canvas_of_image(*next(iter(volumes.items())))
        return replace(prepared, images=self._given(volumes, prepared))

    def preprocess_edit(self, editing: EditRequest, prepared: PreparedVolume | None) -> PreparedVolume:
        """The canvas of an edit: its target is the grid of the image's file, on which the mask's canvas must lie, if there is
        one.

        Raises: ValueError naming the image or the region for what cannot be used, see `load_images` and `load_region`.
        Warns: without a canvas as `preprocess` does.
        """
        placed = {name: image for name, image in editing.images.items() if is_placed(image)}
        target = prepared.target if prepared is not None and not placed else None  # arrays are in the order of a file
        exact = load_images(placed | dict(editing.images), target, self.affine, exact=True, reading=self.reading)
        channel, first = next(iter(exact.items()))
        if not on_stored_grid(first):
            raise ValueError(
                f"the image {channel!r}: was resampled from its file's grid; give the file, or a new Volume"
            )
        if prepared is None:
            prepared = self._canvas_of_image(channel, first)
        elif same_grid(first, prepared.target):
            target = first.replace(prepared.target.array)
            prepared = replace(
                prepared, target=target, grid=target if prepared.grid is prepared.target else prepared.grid
            )
        else:
            raise ValueError(
                f"the image {channel!r}: lies on another grid than the mask ({describe_grid(first)} against "
                f"{describe_grid(prepared.target)}); resample one onto the other first"
            )
        region = None if editing.region is None else load_region(editing.region, first, self.reading)
        images = self._given({n: one.replace(one.array.astype(np.float32)) for n, one in exact.items()}, prepared)
        originals = {name: volume.array[0] for name, volume in exact.items()}
        unseen = prepared.target.array[0] == PADDING
        return replace(
            prepared,
            images={name: images[name] for name in editing.keep_channels},
            edit=None
            if editing.anew
            else PreparedEdit(images, originals, region, first.spacing, editing.blend_margin, unseen),
        )

    def _canvas_of_image(self, channel: str, image: Volume) -> PreparedVolume:
        target, name = image.replace(np.zeros((1, *image.shape), dtype=np.int16)), f"the image {channel!r}"
        return self._canvas(self._resampled(target, name, "image"), target, name, None)

    def _given(self, volumes: Mapping[str, Volume], prepared: PreparedVolume) -> dict[str, GivenImage]:
        """Images on the canvas's target, with their scales. Raises: ValueError for one that is constant."""
        given = {}
        for channel, volume in volumes.items():
            try:
                scale = self._scaling(channel).fit(self._on_grid(volume, prepared).array)
            except VolumeError as error:
                raise ValueError(f"the image {channel!r}: {error}") from error
            given[channel] = GivenImage(volume, scale)
        return given

    def standardized_images(self, prepared: PreparedVolume, images: Mapping[str, GivenImage]) -> np.ndarray:
        """Images of a canvas on its padded grid, float32 (C, *canvas.shape) in [-1, 1], scaled as in training: -1 in the
        padding, outside the mask's field of view, and in channels of which there is none."""
        voxels = np.full((len(self.channels), *prepared.shape), -1, np.float32)
        for channel, image in images.items():
            scaled = image.scale.apply(self._on_grid(image.volume, prepared).array[0])
            if prepared.labels is not None:
                scaled[prepared.grid.array[0] == PADDING] = -1
            voxels[self.channels.index(channel)] = prepared.placement.apply(scaled, -1)
        return voxels

    def padded_region(self, prepared: PreparedVolume) -> np.ndarray | None:
        """The edit's region on the padded grid, bool (*canvas.shape); None where everything is changed."""
        if prepared.edit is None or prepared.edit.region is None:
            return None
        region = self._on_grid(prepared.target.replace(prepared.edit.region[None].astype(np.float32)), prepared).array[
            0
        ]
        return prepared.placement.apply(region > TOUCHED, False)

    def generated(self, given: Collection[str]) -> list[str]:
        """The channels that have a file each, where `given` are given; none where one file holds all that there is."""
        return [channel for channel in self.channels if channel not in given] if self.apart else []

    def _scaling(self, channel: str) -> IntensityScaling:
        """How this channel was scaled in training."""
        number = self.channels.index(channel)
        (kind, scale), percentiles = self.intensity[number], self.percentiles[number]
        if kind == "window":
            return IntensityScaling("window", scale.low, scale.high)
        if percentiles is None:
            raise ValueError(
                f"the image {channel!r}: this model's data does not say by which percentiles {channel} is scaled; it was "
                "trained before that was kept: train it anew, or add them to `data` in model_index.json"
            )
        return IntensityScaling("percentile", *percentiles)

    def _on_grid(self, volume: Volume, prepared: PreparedVolume) -> Volume:
        """A volume on the canvas's target, on its grid."""
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

    def preprocess_shape(self, shape: Sequence[int]) -> PreparedVolume:
        """A canvas of `shape` (X, Y, Z) voxels on the template's affine, for a model that no mask conditions."""
        shape = grid_shape(shape)
        _check_room(shape)
        grid = Volume(np.zeros((1, *shape), dtype=np.int16), self.affine)
        return self._canvas(grid, grid, "the shape asked for", None)

    def _canvas(self, grid: Volume, target: Volume, name: str, labels: np.ndarray | None) -> PreparedVolume:
        placement = pad_to_multiple(grid.shape, self.stride)
        self._check_size(placement.target, name)
        padded = None if labels is None else placement.apply(labels, PADDING)
        return PreparedVolume(grid=grid, target=target, placement=placement, labels=padded)

    def _check_size(self, shape: tuple[int, int, int], name: str) -> None:
        """Warn where the padded grid is smaller or larger than any padded grid in training."""
        low, high = (pad_to_multiple(limit, self.stride).target for limit in self.shape_range)
        if any(not small <= size <= large for small, size, large in zip(low, shape, high, strict=True)):
            warnings.warn(
                f"{name}: its grid of {_by(shape)} voxels (padded) is outside of what the model was trained on, "
                f"{_by(low)} to {_by(high)}; look at the result with care",
                stacklevel=2,
            )

    def postprocess(
        self,
        sample: torch.Tensor | Iterable[torch.Tensor],
        prepared: PreparedVolume,
        output_type: str = "nifti",
        description: str = "",
    ) -> nib.Nifti1Image | dict[str, nib.Nifti1Image] | np.ndarray | torch.Tensor:
        """A decoded volume (C, *canvas.shape), or its slabs along the third axis one after the other, to what the user
        asked for: on the mask's own grid, in original units.

        Values are clipped to [-1, 1], the range that the training volumes were clipped to; voxels that the mask marks
        as PADDING get the lowest. A NIfTI is int16 where every channel has a window with whole limits at least 256
        wide (CT, in HU) and float32 otherwise; "np" and "pt" are float32. Of several channels, "nifti" is a dict of the
        images of those that were generated; "np" and "pt" hold all of them, those that were given as they were given.

        Where the images are label maps, all three are the label map (one channel, uint8 or int16) that the channels
        mean, see `merge_channels`, after they were resampled.
        """
        files = self._files(prepared)
        if output_type != "nifti":  # one array of all channels
            files = [(slice(None), self.file_dtype if self.image_labels else np.float32)]
        channels = range(1 if self._merges_slabs(prepared) else len(self.intensity))
        count = sum(len(channels[part]) for part, _ in files)
        # rounded last: whole numbers would not be interpolated
        held = self._held(prepared) if prepared.needs_resampling or len(files) > 1 else files[0][1]
        array, done = np.empty((count, *prepared.grid.shape), held), 0
        for slab in self._finished([sample] if isinstance(sample, torch.Tensor) else sample, prepared):
            slab = np.concatenate([slab[part] for part, _ in files])
            planes = array[..., done : done + slab.shape[3]]
            check_voxels(slab, array.dtype)
            planes[:] = np.rint(slab) if array.dtype.kind in "iu" else slab
            done += slab.shape[3]
        volume = Volume(array, prepared.grid.affine, prepared.grid.source)
        if prepared.grid is not prepared.target:
            volume = _resample_back(volume, prepared.target)
            if prepared.edit is not None:  # on the image's own grid, where its voxels are
                names = [name for part, _ in files for name in self.channels[part]]
                volume = volume.replace(np.concatenate([*prepared.edit.composited([volume.array], names)], axis=3))
        if self.image_labels and prepared.needs_resampling:
            volume = to_stored_grid(volume)
            volume = volume.replace(self._merged(volume.array))
        images = [
            to_nibabel(volume.replace(part), dtype=dtype, description=description)
            for part, (_, dtype) in zip(np.split(volume.array, len(files)), files, strict=True)
        ]
        if output_type == "nifti":
            return dict(zip(self.generated(prepared.images), images, strict=True)) if self.apart else images[0]
        stored = np.asarray(images[0].dataobj)
        stored = np.ascontiguousarray(np.moveaxis(stored, -1, 0) if stored.ndim == 4 else stored[None])
        for channel, given in prepared.images.items():
            stored[self.channels.index(channel)] = to_nibabel(given.volume, dtype=np.float32).dataobj
        return torch.from_numpy(stored) if output_type == "pt" else stored

    def write(
        self,
        slabs: Iterable[torch.Tensor],
        prepared: PreparedVolume,
        path: str | os.PathLike | Sequence[str | os.PathLike],
        description: str = "",
    ) -> None:
        """Write the NIfTI that `postprocess` makes, the same bytes, slab by slab, without holding the volume. Where it
        makes several, `path` lists as many, and all pass through one temporary file beside the first.

        One that must be resampled to the mask's grid is held, with a warning if it is large.
        """
        paths = [Path(path)] if isinstance(path, (str, os.PathLike)) else [Path(one) for one in path]
        if not prepared.needs_resampling and (len(paths) == 1 or self._held(prepared) == np.float32):
            self._write_files(self._finished(slabs, prepared), prepared, paths, description)
            return
        size = 4 * len(self.intensity) * math.prod(prepared.target.shape)
        if size > LARGE_BYTES:
            warnings.warn(
                f"a volume of {_by(prepared.target.shape)} voxels ({size / 2**30:.1f} GiB) is resampled to its mask's grid, "
                "and held in memory for that; a mask of the model's spacing is written slab by slab",
                stacklevel=2,
            )
        made: Any = self.postprocess(slabs, prepared, "nifti", description)
        for image, one in zip(made.values() if self.apart else [made], paths, strict=True):
            nib.save(image, one)

    def _write_files(
        self, restored: Iterable[np.ndarray], prepared: PreparedVolume, paths: Sequence[Path], description: str
    ) -> None:
        """Slabs of all channels in original units to the files in which they belong."""
        files, grid = self._files(prepared), stored_grid(prepared.target)
        if len(files) == 1:
            [(part, dtype)], [path] = files, paths
            write_slabs(path, (slab[part] for slab in restored), grid, dtype, description=description)
            return
        plain = Volume(np.broadcast_to(np.float32(0), (1, *prepared.grid.shape)), prepared.grid.affine)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=paths[0].parent) as hidden:
            together = Path(hidden) / "channels.nii"  # decoded once, read once a file
            write_slabs(together, restored, stored_grid(plain), np.float32)
            for (part, dtype), path in zip(files, paths, strict=True):
                slabs = (slab[part] for slab in read_slabs(together, PLANES))
                write_slabs(path, slabs, grid, dtype, description=description)

    def _files(self, prepared: PreparedVolume) -> list[tuple[slice, type[np.number]]]:
        """Which channels each file holds, and the type of its voxels: of an edit that of the image."""
        own = None if prepared.edit is None else prepared.edit.originals
        if not self.apart:
            return [(slice(None), self.file_dtype if own is None else own[self.channels[0]].dtype.type)]
        numbers = [self.channels.index(channel) for channel in self.generated(prepared.images)]
        types = [
            _whole_or_float(self.intensity[n : n + 1]) if own is None else own[self.channels[n]].dtype.type
            for n in numbers
        ]
        return [(slice(n, n + 1), dtype) for n, dtype in zip(numbers, types, strict=True)]

    def _held(self, prepared: PreparedVolume) -> np.dtype:
        """The floating type that holds what is written without loss."""
        return np.dtype(np.float32) if prepared.edit is None else prepared.edit.dtype(self.channels)

    def _finished(self, slabs: Iterable[torch.Tensor], prepared: PreparedVolume) -> Iterator[np.ndarray]:
        """`_restored`, and of an edit on the image's own grid the edited image."""
        restored = self._restored(slabs, prepared)
        composited = prepared.edit is not None and prepared.grid is prepared.target
        return prepared.edit.composited(restored, self.channels) if composited else restored  # pyright: ignore[reportOptionalMemberAccess]

    def _restored(self, slabs: Iterable[torch.Tensor], prepared: PreparedVolume) -> Iterator[np.ndarray]:
        """Decoded slabs (C, X, Y, z) of the padded grid to slabs float32 of `prepared.grid`, in original units; to slabs of
        a label map if that is what they mean, unless they must be resampled first.

        Raises: ValueError if the slabs have other channels than the data, or together another number of planes than the
        grid.
        """
        start = done = 0
        for slab in slabs:
            if len(slab) != len(self.intensity):
                raise ValueError(
                    f"the autoencoder gave {len(slab)} channels, the model's data describes {len(self.intensity)}"
                )
            for planes in slab.split(PLANES, dim=3):
                placement = prepared.placement.planes(start, start + planes.shape[3])
                array = placement.undo(planes.float().clamp(-1, 1).cpu().numpy())
                start += planes.shape[3]
                here = slice(done, done + array.shape[3])
                if prepared.labels is not None:
                    array[:, prepared.grid.array[0, ..., here] == PADDING] = -1
                array = self.to_original_units(array, prepared.edit)
                yield self._merged(array) if self._merges_slabs(prepared) else array
                done = here.stop
        if start != prepared.shape[2]:
            raise ValueError(f"the autoencoder gave {start} planes for a grid of {_by(prepared.shape)} voxels")

    def to_original_units(self, array: np.ndarray, edit: PreparedEdit | None = None) -> np.ndarray:
        """(C, X, Y, Z) in [-1, 1] to the training files' units (HU, SUV, the median MR scale), channel by channel; of an
        edit to those of its image."""
        scales = [scale for _, scale in self.intensity]
        scales = scales if edit is None else [edit.images[channel].scale for channel in self.channels]
        channels = [scale.invert(channel) for channel, scale in zip(array, scales, strict=True)]
        with np.errstate(over="ignore"):  # what exceeds float32 becomes infinite, and is refused where it is written
            return np.stack(channels).astype(np.float32, copy=False)

    def _merges_slabs(self, prepared: PreparedVolume) -> bool:
        return bool(self.image_labels) and not prepared.needs_resampling

    def _merged(self, array: np.ndarray) -> np.ndarray:
        """Channels (C, X, Y, Z) of labels, 0 outside and 1 inside, to the label map (1, X, Y, Z)."""
        return merge_channels(array, self.image_labels, threshold=0.5)

    @property
    def file_dtype(self) -> type[np.number]:
        """int16 where rounding loses nothing (windows of at least 256 units with whole limits), float32 otherwise; of
        label maps uint8 if that holds them, else int16."""
        if self.image_labels:
            return np.uint8 if self.image_labels[0] >= 0 and self.image_labels[-1] <= 255 else np.int16
        return _whole_or_float(self.intensity)


def _check_room(shape: tuple[int, int, int]) -> None:
    """Raises: ValueError for a grid that no NIfTI file can have, or that this process has no memory for."""
    needed, room = np.dtype(np.int16).itemsize * math.prod(shape), memory_bytes()
    if max(shape) > MAX_SIDE or needed > room:
        raise ValueError(
            f"shape {' x '.join(map(str, shape))}: a side has at most {MAX_SIDE} voxels, and the whole must fit into the "
            f"{room / 2**30:.0f} GiB of memory; ask for a smaller one"
        )


def _resample_back(volume: Volume, target: Volume) -> Volume:
    """Onto the mask's grid. Edge voxels are repeated once first: fine mask voxels may lie beyond the model grid's."""
    around = np.pad(volume.array, ((0, 0), (1, 1), (1, 1), (1, 1)), mode="edge")
    affine = volume.affine.copy()
    affine[:3, 3] -= affine[:3, :3].sum(axis=1)
    return target.replace(resample_to(Volume(around, affine), target.shape, target.affine).array)


def _whole_or_float(intensity: Sequence[tuple[str, LinearScale]]) -> type[np.number]:
    """int16 where rounding loses nothing, float32 otherwise."""
    limits = np.iinfo(np.int16)
    whole = all(
        kind == "window"
        and float(scale.low).is_integer()
        and float(scale.high).is_integer()
        and limits.min <= scale.low <= scale.high - WHOLE_UNITS
        and scale.high <= limits.max
        for kind, scale in intensity
    )
    return np.int16 if whole else np.float32


def _by(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
