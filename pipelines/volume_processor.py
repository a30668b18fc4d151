"""Between people's grids and the model's: masks in, volumes out.

Axes: (C, X, Y, Z) in RAS+ order. Intensities are in [-1, 1] inside the model and in the training files' units outside.
"""

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import torch

from volumes import (
    PADDING,
    LinearScale,
    Placement,
    Volume,
    on_stored_grid,
    pad_to_multiple,
    resample,
    resample_to,
    stored_grid,
    to_nibabel,
    write_slabs,
)

from .masks import LabelMap, MaskLike, index_labels, load_mask

OUTPUT_TYPES = ("nifti", "np", "pt", "latent")
SPACING_TOLERANCE = 0.01  # relative; a mask within it is taken as it is
WHOLE_UNITS = 256  # a window at least this wide, with whole limits, loses nothing by rounding: int16
PLANES = 16  # restored at a time
LARGE_BYTES = 1 << 28  # of float32 voxels, above which it is worth a warning that they are all in memory


@dataclass(frozen=True, eq=False)
class Canvas:
    """The grid that one volume is drawn on.

    Attributes:
        grid: shape (X, Y, Z) and affine in the model's spacing, before padding; its array is the label indices or
            zeros.
        target: the grid that the result is handed back on: the mask's own.
        placement: pads `grid` to a multiple of the autoencoder's stride, and takes the padding off again.
        labels: label indices (X, Y, Z) int16 of the padded grid, PADDING outside the field of view; None without a
            mask.
    """

    grid: Volume
    target: Volume
    placement: Placement
    labels: np.ndarray | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sides of the padded grid; volumes whose canvases agree in it can share a batch."""
        return self.placement.target

    @property
    def needs_resampling(self) -> bool:
        """Whether the result must be resampled to lie on the grid of the mask's file."""
        return self.grid is not self.target or not on_stored_grid(self.target)


class VolumeProcessor:
    """Prepares masks for a model and brings its output back to the mask's grid and to original units.

    Args:
        data: what the model was trained on, as `volumes.describe` writes it: labels, spacing, intensity, shape_range,
            affine.
        stride: total stride of the autoencoder per axis.
    """

    def __init__(self, data: Mapping[str, Any], stride: Sequence[int]):
        self.labels: dict[str, str] = dict(data["labels"])
        self.spacing: list[float] | None = data["spacing"]
        self.intensity = [(entry["kind"], LinearScale(entry["low"], entry["high"])) for entry in data["intensity"]]
        self.shape_range: list[list[int]] = data["shape_range"]
        self.affine = np.array(data["affine"], dtype=np.float64)
        self.stride = tuple(stride)

    def preprocess(self, mask: MaskLike, label_map: LabelMap | None = None) -> Canvas:
        """Read, check, translate, resample and pad one mask.

        Raises: ValueError (or VolumeError) naming the mask for what cannot be used: unknown labels, no voxels, no mask.
        Warns: background alone; another spacing than the model's; a size outside the training range.
        """
        volume, name = load_mask(mask, self.affine)
        target = volume.replace(index_labels(volume.array, self.labels, label_map, name))
        grid = target
        if self.spacing is not None and not np.allclose(target.spacing, self.spacing, rtol=SPACING_TOLERANCE, atol=0):
            warnings.warn(
                f"{name}: has a spacing of {_by(target.spacing)} mm, the model was trained at {_by(self.spacing)} mm; "
                "the mask is resampled, and the volume resampled back to the mask's grid",
                stacklevel=2,
            )
            grid = resample(target, self.spacing, nearest=True)
        return self._canvas(grid, target, name, grid.array[0])

    def preprocess_shape(self, shape: Sequence[int]) -> Canvas:
        """A canvas of `shape` (X, Y, Z) voxels on the template's affine, for a model that no mask conditions."""
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape is three positive numbers of voxels (X, Y, Z), got {tuple(shape)}")
        grid = Volume(np.zeros((1, *shape), dtype=np.int16), self.affine)
        return self._canvas(grid, grid, "the shape asked for", None)

    def _canvas(self, grid: Volume, target: Volume, name: str, labels: np.ndarray | None) -> Canvas:
        placement = pad_to_multiple(grid.shape, self.stride)
        self._check_size(placement.target, name)
        padded = None if labels is None else placement.apply(labels, PADDING)
        return Canvas(grid=grid, target=target, placement=placement, labels=padded)

    def _check_size(self, shape: tuple[int, int, int], name: str) -> None:
        """Warn where the padded grid is smaller or larger than any padded grid in training."""
        low, high = (pad_to_multiple(tuple(limit), self.stride).target for limit in self.shape_range)
        if any(not small <= size <= large for small, size, large in zip(low, shape, high, strict=True)):
            warnings.warn(
                f"{name}: its grid of {_by(shape)} voxels (padded) is outside of what the model was trained on, "
                f"{_by(low)} to {_by(high)}; look at the result with care",
                stacklevel=2,
            )

    def postprocess(
        self,
        sample: torch.Tensor | Iterable[torch.Tensor],
        canvas: Canvas,
        output_type: str = "nifti",
        description: str = "",
    ) -> nib.Nifti1Image | np.ndarray | torch.Tensor:
        """A decoded volume (C, *canvas.shape), or its slabs along the third axis one after the other, to what the user
        asked for: on the mask's own grid, in original units.

        Values are clipped to [-1, 1], the range that the training volumes were clipped to; voxels that the mask marks
        as PADDING get the lowest. A NIfTI is int16 where every channel has a window with whole limits at least 256
        wide (CT, in HU) and float32 otherwise; "np" and "pt" are float32.
        """
        dtype = self.file_dtype if output_type == "nifti" else np.float32
        # rounded last: whole numbers would not be interpolated
        array = np.empty((len(self.intensity), *canvas.grid.shape), np.float32 if canvas.needs_resampling else dtype)
        done = 0
        for slab in self._restored([sample] if isinstance(sample, torch.Tensor) else sample, canvas):
            planes = array[..., done : done + slab.shape[3]]
            planes[:] = np.rint(slab) if array.dtype.kind == "i" else slab
            done += slab.shape[3]
        volume = Volume(array, canvas.grid.affine, canvas.grid.source)
        if canvas.grid is not canvas.target:
            volume = _resample_back(volume, canvas.target)
        image = to_nibabel(volume, dtype=dtype, description=description)
        if output_type == "nifti":
            return image
        stored = np.asarray(image.dataobj)
        stored = np.ascontiguousarray(np.moveaxis(stored, -1, 0) if stored.ndim == 4 else stored[None])
        return torch.from_numpy(stored) if output_type == "pt" else stored

    def write(
        self, slabs: Iterable[torch.Tensor], canvas: Canvas, path: str | os.PathLike, description: str = ""
    ) -> None:
        """Write the NIfTI that `postprocess` makes, the same bytes, slab by slab, without holding the volume.

        One that must be resampled to the mask's grid is held, with a warning if it is large.
        """
        if not canvas.needs_resampling:
            restored = self._restored(slabs, canvas)
            write_slabs(path, restored, stored_grid(canvas.target), self.file_dtype, description=description)
            return
        size = 4 * len(self.intensity) * math.prod(canvas.target.shape)
        if size > LARGE_BYTES:
            warnings.warn(
                f"a volume of {_by(canvas.target.shape)} voxels ({size / 2**30:.1f} GiB) is resampled to its mask's grid, "
                "and held in memory for that; a mask of the model's spacing is written slab by slab",
                stacklevel=2,
            )
        image: Any = self.postprocess(slabs, canvas, "nifti", description)
        nib.save(image, path)

    def _restored(self, slabs: Iterable[torch.Tensor], canvas: Canvas) -> Iterator[np.ndarray]:
        """Decoded slabs (C, X, Y, z) of the padded grid to slabs float32 of `canvas.grid`, in original units.

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
                placement = canvas.placement.planes(start, start + planes.shape[3])
                array = placement.undo(planes.float().clamp(-1, 1).cpu().numpy())
                start += planes.shape[3]
                here = slice(done, done + array.shape[3])
                if canvas.labels is not None:
                    array[:, canvas.grid.array[0, ..., here] == PADDING] = -1
                yield self.to_original_units(array)
                done = here.stop
        if start != canvas.shape[2]:
            raise ValueError(f"the autoencoder gave {start} planes for a grid of {_by(canvas.shape)} voxels")

    def to_original_units(self, array: np.ndarray) -> np.ndarray:
        """(C, X, Y, Z) in [-1, 1] to the training files' units (HU, SUV, the median MR scale), channel by channel."""
        channels = [scale.invert(channel) for channel, (_, scale) in zip(array, self.intensity, strict=True)]
        return np.stack(channels).astype(np.float32, copy=False)

    @property
    def file_dtype(self) -> type[np.number]:
        """int16 where rounding loses nothing (windows of at least 256 units with whole limits), float32 otherwise."""
        limits = np.iinfo(np.int16)
        whole = all(
            kind == "window"
            and float(scale.low).is_integer()
            and float(scale.high).is_integer()
            and limits.min <= scale.low <= scale.high - WHOLE_UNITS
            and scale.high <= limits.max
            for kind, scale in self.intensity
        )
        return np.int16 if whole else np.float32


def _resample_back(volume: Volume, target: Volume) -> Volume:
    """Onto the mask's grid. Edge voxels are repeated once first: fine mask voxels may lie beyond the model grid's."""
    around = np.pad(volume.array, ((0, 0), (1, 1), (1, 1), (1, 1)), mode="edge")
    affine = volume.affine.copy()
    affine[:3, 3] -= affine[:3, :3].sum(axis=1)
    return target.replace(resample_to(Volume(around, affine), target.shape, target.affine).array)


def _by(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
