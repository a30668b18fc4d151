"""Decoded volumes back to people's grids: in original units, on the grid of the mask, as an image or written slab by
slab.

Axes: (C, X, Y, Z) in RAS+ order.
"""

import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import torch

from files.atomic import UNFINISHED
from pipelines.inputs.crop import Constant, OfImages, Outside
from pipelines.inputs.inpainting import PreparedEdit
from pipelines.inputs.prepared import PreparedGrid
from volumes import (
    PADDING,
    LinearScale,
    Volume,
    merge_channels,
    read_slabs,
    resample_to,
    stored_grid,
    to_nibabel,
    to_stored_grid,
    write_slabs,
)
from volumes.foreground import background_index
from volumes.formats.nifti import check_voxels

if TYPE_CHECKING:
    from pipelines.volume_processor import VolumeProcessor

PLANES = 16  # restored at a time
LARGE_BYTES = 1 << 28  # of float32 voxels, above which it is worth a warning that they are all in memory
FilePart = tuple[slice, np.dtype]  # the channels of one file, and the type of its voxels


def make_restorer(model: "VolumeProcessor", prepared: PreparedGrid) -> "Restorer":
    """The restorer of a generated volume, or of an edited image."""
    return Restorer(model, prepared) if prepared.edit is None else EditRestorer(model, prepared, prepared.edit)


class Restorer:
    """Brings one decoded volume back to original units and to the grid of its mask.

    Args:
        model: scales and channels.
        prepared: the grid on which the volume was generated.
    """

    def __init__(self, model: "VolumeProcessor", prepared: PreparedGrid) -> None:
        self.model, self.prepared = model, prepared
        self.merges_slabs = bool(model.image_labels) and not prepared.needs_resampling

    # What an edit changes

    def scales(self) -> list[LinearScale]:
        """From [-1, 1] to original units, one per channel."""
        return [scale for _, scale in self.model.intensity]

    def file_dtype(self, channels: Sequence[str]) -> np.dtype:
        """The type of the voxels of the file that holds these channels."""
        return self.model.file_dtype(channels)

    def held_dtype(self) -> np.dtype:
        """The floating type that holds what is written without loss."""
        return np.dtype(np.float32)

    def finished_slabs(self, slabs: Iterable[torch.Tensor]) -> Iterator[np.ndarray]:
        """Decoded slabs to those that are written."""
        return self.restored_slabs(slabs)

    def finished_volume(self, volume: Volume, channels: Sequence[str]) -> Volume:
        """A volume that was resampled to the grid of the output, to the one that is written."""
        return volume

    def outside(self, channels: Sequence[str]) -> Outside:
        """What stands outside the box of a crop: the lowest intensities."""
        lowest = dict(zip(self.model.channels, (scale.low for scale in self.scales()), strict=True))
        return Constant([lowest[channel] for channel in channels], self.prepared.output.shape)

    # Restoring

    def restored_slabs(self, slabs: Iterable[torch.Tensor]) -> Iterator[np.ndarray]:
        """Decoded slabs (C, X, Y, z) of the padded grid to slabs float32 of `prepared.grid`, in original units; to
        slabs of a label map if the model generates those, unless they must be resampled first.

        Raises: ValueError if the slabs have other channels than the data, or together another number of planes than the
        grid.
        """
        prepared, expected = self.prepared, len(self.model.intensity)
        start = done = 0
        for slab in slabs:
            if len(slab) != expected:
                raise ValueError(f"the autoencoder gave {len(slab)} channels, the model's data describes {expected}")
            for planes in slab.split(PLANES, dim=3):
                placement = prepared.placement.planes(start, start + planes.shape[3])
                array = placement.undo(planes.float().clamp(-1, 1).cpu().numpy())
                start += planes.shape[3]
                here = slice(done, done + array.shape[3])
                if prepared.labels is not None or prepared.resampled:
                    array[:, prepared.grid.array[0, ..., here] == PADDING] = -1
                array = self.to_original_units(array)
                yield self._merged(array) if self.merges_slabs else array
                done = here.stop
        if start != prepared.shape[2]:
            sides = " x ".join(map(str, prepared.shape))
            raise ValueError(f"the autoencoder gave {start} planes for a grid of {sides} voxels")

    def to_original_units(self, array: np.ndarray) -> np.ndarray:
        """(C, X, Y, Z) in [-1, 1] to file units (HU, SUV, the median MR scale), channel by channel."""
        scales = self.scales()
        channels = [scale.invert(channel) for channel, scale in zip(array, scales, strict=True)]
        with np.errstate(over="ignore"):  # what exceeds float32 becomes infinite, and is refused where it is written
            return np.stack(channels).astype(np.float32, copy=False)

    def _merged(self, array: np.ndarray) -> np.ndarray:
        """Channels (C, X, Y, Z) of labels, 0 outside and 1 inside, to the label map (1, X, Y, Z)."""
        return merge_channels(array, self.model.image_labels, threshold=0.5)

    # Output

    def output_slabs(self, slabs: Iterable[torch.Tensor]) -> Iterator[np.ndarray]:
        """Decoded slabs to those of the output's grid; of the model's grid, if they must be resampled first."""
        finished, cropped = self.finished_slabs(slabs), self.prepared.cropped
        if cropped is None or self.prepared.grid is not self.prepared.target:
            return finished
        return cropped.put_back(finished, self.outside(self.model.channels))

    def file_parts(self) -> list[FilePart]:
        """Which channels each file holds, and the type of its voxels."""
        names = self.model.channels
        if not self.model.apart:
            return [(slice(None), self.file_dtype(names))]
        numbers = [names.index(channel) for channel in self.model.generated(self.prepared.images)]
        return [(slice(n, n + 1), self.file_dtype([names[n]])) for n in numbers]

    def output(
        self, slabs: Iterable[torch.Tensor], output_type: str, description: str
    ) -> nib.Nifti1Image | dict[str, nib.Nifti1Image] | np.ndarray | torch.Tensor:
        """The volume in memory, see `VolumeProcessor.postprocess`."""
        parts = self.file_parts()
        if output_type != "nifti":  # one array of all channels
            dtype = self.file_dtype(self.model.channels) if self.model.image_labels else np.dtype(np.float32)
            parts = [(slice(None), dtype)]
        volume = self._on_target(self._whole(slabs, parts), parts)
        images = [
            to_nibabel(volume.replace(array), dtype=dtype, description=description)
            for array, (_, dtype) in zip(np.split(volume.array, len(parts)), parts, strict=True)
        ]
        if output_type != "nifti":
            array = self._stored_array(images[0])
            return torch.from_numpy(array) if output_type == "pt" else array
        if self.model.apart:
            return dict(zip(self.model.generated(self.prepared.images), images, strict=True))
        return images[0]

    def _whole(self, slabs: Iterable[torch.Tensor], parts: Sequence[FilePart]) -> Volume:
        """All planes of `output_slabs`: the channels of the files one after the other."""
        prepared = self.prepared
        grid = prepared.output if prepared.grid is prepared.target else prepared.grid
        channels = range(1 if self.merges_slabs else len(self.model.intensity))
        count = sum(len(channels[part]) for part, _ in parts)
        # rounded last: whole numbers would not be interpolated
        dtype = self.held_dtype() if prepared.needs_resampling or len(parts) > 1 else parts[0][1]
        array, done = np.empty((count, *grid.shape), dtype), 0
        for slab in self.output_slabs(slabs):
            slab = np.concatenate([slab[part] for part, _ in parts])
            planes = array[..., done : done + slab.shape[3]]
            check_voxels(slab, array.dtype)
            planes[:] = np.rint(slab) if array.dtype.kind in "iu" else slab
            done += slab.shape[3]
        return Volume(array, grid.affine, grid.source)

    def _on_target(self, volume: Volume, parts: Sequence[FilePart]) -> Volume:
        """From the model's grid to that of the output; label maps are merged last."""
        prepared = self.prepared
        if prepared.grid is not prepared.target:
            channels = [name for part, _ in parts for name in self.model.channels[part]]
            volume = self._emptied(_resample_back(volume, prepared.target), channels)
            volume = self.finished_volume(volume, channels)
            if (cropped := prepared.cropped) is not None:
                planes = [*cropped.put_back([volume.array], self.outside(channels))]
                volume = cropped.whole.replace(np.concatenate(planes, axis=3))
        if self.model.image_labels and prepared.needs_resampling:
            volume = to_stored_grid(volume)
            volume = volume.replace(self._merged(volume.array))
        return volume

    def _emptied(self, volume: Volume, channels: Sequence[str]) -> Volume:
        """The volume with an empty background again, which resampling mixed with its surroundings."""
        if self.model.background_threshold is None or self.prepared.labels is None:
            return volume
        empty = self.prepared.target.array[0] == background_index(self.model.labels)
        lowest = dict(zip(self.model.channels, (scale.low for scale in self.scales()), strict=True))
        values = np.array([lowest[channel] for channel in channels], volume.array.dtype)
        return volume.replace(np.where(empty, values[:, None, None, None], volume.array))

    def _stored_array(self, image: nib.Nifti1Image) -> np.ndarray:
        """(C, X, Y, Z) in the order of the mask's file, the condition channels as in their files."""
        stored = np.asarray(image.dataobj)
        stored = np.ascontiguousarray(np.moveaxis(stored, -1, 0) if stored.ndim == 4 else stored[None])
        for channel, source in self.prepared.images.items():
            cropped = self.prepared.cropped
            volume = source.volume if cropped is None else cropped.images[channel]
            stored[self.model.channels.index(channel)] = to_nibabel(volume, dtype=np.float32).dataobj
        return stored

    def write(self, slabs: Iterable[torch.Tensor], paths: Sequence[Path], description: str) -> None:
        """Write the volume to one file, or to one per channel, see `VolumeProcessor.write`."""
        parts = self.file_parts()
        if self.prepared.needs_resampling or (len(paths) > 1 and self.held_dtype() != np.float32):
            self._write_held(slabs, paths, description)
        elif len(parts) > 1:
            self._write_channels(self.output_slabs(slabs), parts, paths, description)
        else:
            [(part, dtype)], [path] = parts, paths
            of_file = (slab[part] for slab in self.output_slabs(slabs))
            write_slabs(path, of_file, stored_grid(self.prepared.output), dtype, description=description)

    def _write_held(self, slabs: Iterable[torch.Tensor], paths: Sequence[Path], description: str) -> None:
        """Write a volume that must be whole before it is written."""
        shape = self.prepared.output.shape
        size = 4 * len(self.model.intensity) * math.prod(shape)
        if size > LARGE_BYTES:
            warnings.warn(
                f"a volume of {' x '.join(map(str, shape))} voxels ({size / 2**30:.1f} GiB) is resampled to its "
                "mask's grid, and held in memory for that; a mask of the model's spacing is written slab by slab",
                stacklevel=2,
            )
        images = self.output(slabs, "nifti", description)
        for image, path in zip(images.values() if isinstance(images, dict) else [images], paths, strict=True):
            assert isinstance(image, nib.Nifti1Image)
            nib.save(image, path)

    def _write_channels(
        self, slabs: Iterable[np.ndarray], parts: Sequence[FilePart], paths: Sequence[Path], description: str
    ) -> None:
        """Write slabs of all channels in original units to one file per channel."""
        whole = self.prepared.output
        grid = stored_grid(whole)
        plain = Volume(np.broadcast_to(np.float32(0), (1, *whole.shape)), whole.affine)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=paths[0].parent) as hidden:
            together = Path(hidden) / "channels.nii"  # decoded once, read once per file
            write_slabs(together, slabs, stored_grid(plain), np.float32)
            for (part, dtype), path in zip(parts, paths, strict=True):
                of_file = (slab[part] for slab in read_slabs(together, PLANES))
                write_slabs(path, of_file, grid, dtype, description=description)


class EditRestorer(Restorer):
    """Joins what was generated to the image that is edited: in its units, and in the type of its voxels."""

    def __init__(self, model: "VolumeProcessor", prepared: PreparedGrid, edit: PreparedEdit) -> None:
        super().__init__(model, prepared)
        self.edit = edit

    def scales(self) -> list[LinearScale]:
        return [self.edit.images[channel].scale for channel in self.model.channels]

    def file_dtype(self, channels: Sequence[str]) -> np.dtype:
        return np.dtype(self.edit.originals[channels[0]].dtype.type)

    def held_dtype(self) -> np.dtype:
        return self.edit.dtype(self.model.channels)

    def finished_slabs(self, slabs: Iterable[torch.Tensor]) -> Iterator[np.ndarray]:
        restored = self.restored_slabs(slabs)
        on_its_grid = self.prepared.grid is self.prepared.target  # otherwise joined after it was resampled
        return self.edit.composited(restored, self.model.channels) if on_its_grid else restored

    def finished_volume(self, volume: Volume, channels: Sequence[str]) -> Volume:
        return volume.replace(np.concatenate([*self.edit.composited([volume.array], channels)], axis=3))

    def outside(self, channels: Sequence[str]) -> Outside:
        assert self.prepared.cropped is not None
        images = self.prepared.cropped.images
        return OfImages([images[channel] for channel in channels], self.edit.dtype(channels))


def _resample_back(volume: Volume, target: Volume) -> Volume:
    """Onto the mask's grid. Edge voxels are repeated once first: fine mask voxels may lie beyond the model grid's."""
    around = np.pad(volume.array, ((0, 0), (1, 1), (1, 1), (1, 1)), mode="edge")
    affine = volume.affine.copy()
    affine[:3, 3] -= affine[:3, :3].sum(axis=1)
    return target.replace(resample_to(Volume(around, affine), target.shape, target.affine).array)
