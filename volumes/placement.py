"""Reversible padding and cropping: a `Placement` can be applied and undone, and it has a field of view.

Spatial axes are the last three, whatever precedes them; numpy arrays and torch tensors are both fine.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import EllipsisType
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # commands that only parse arguments import this module, and torch takes seconds
    import torch

Array = TypeVar("Array", np.ndarray, "torch.Tensor")
Window = tuple[EllipsisType | slice, ...]


@dataclass(frozen=True)
class Placement:
    """A grid of `shape` voxels seen through a window of `target` voxels; window voxel t shows grid voxel t + start.

    A negative start, or a window that reaches beyond the grid, is padding; what the window does not show is cropped.
    """

    shape: tuple[int, int, int]
    target: tuple[int, int, int]
    start: tuple[int, int, int]

    def _slices(self) -> tuple[Window, Window]:
        """Return where the common voxels lie in the grid and in the window."""
        grid, window = [], []
        for size, width, start in zip(self.shape, self.target, self.start, strict=True):
            low = max(start, 0)
            high = max(min(start + width, size), low)
            grid.append(slice(low, high))
            window.append(slice(low - start, high - start))
        return (..., *grid), (..., *window)

    def apply(self, array: Array, fill: float) -> Array:
        """Map (..., *shape) to (..., *target), `fill` where the window shows no voxel."""
        grid, window = self._slices()
        return _moved(array, self.shape, grid, self.target, window, fill)

    def undo(self, array: Array, fill: float = 0) -> Array:
        """Map (..., *target) to (..., *shape), `fill` where voxels were cropped away. Exact after padding alone."""
        grid, window = self._slices()
        return _moved(array, self.target, window, self.shape, grid, fill)

    @property
    def field_of_view(self) -> np.ndarray:
        """bool (*target): True where the window shows a voxel of the grid, False in the padding."""
        seen = np.zeros(self.target, dtype=bool)
        seen[self._slices()[1]] = True
        return seen

    def inside(self) -> tuple[tuple[slice, slice, slice], Placement]:
        """Return the box of the grid that the window shows, and the placement of that box alone in the window."""
        low = [max(start, 0) for start in self.start]
        ends = zip(self.start, self.target, self.shape, low, strict=True)
        high = [max(min(start + width, size), first) for start, width, size, first in ends]
        x, y, z = (slice(*pair) for pair in zip(low, high, strict=True))
        sides = tuple(np.subtract(high, low).tolist())
        return (x, y, z), Placement(sides, self.target, tuple(np.subtract(self.start, low).tolist()))

    def planes(self, start: int, stop: int) -> Placement:
        """Return the placement of planes start..stop of the window's third axis alone, on the grid's planes that they
        show.
        """
        low = max(start + self.start[2], 0)
        high = max(min(stop + self.start[2], self.shape[2]), low)
        return Placement(
            (*self.shape[:2], high - low),
            (*self.target[:2], stop - start),
            (*self.start[:2], start + self.start[2] - low),
        )

    def shift(self, affine: np.ndarray) -> np.ndarray:
        """Return the affine of the window, from the affine (4, 4) of the grid."""
        moved = np.array(affine, dtype=np.float64)
        moved[:3, 3] += moved[:3, :3] @ np.array(self.start, dtype=np.float64)
        return moved


def pad_to_multiple(shape: tuple[int, ...], stride: int | tuple[int, ...] | list[int]) -> Placement:
    """Pad each axis on both sides (the odd voxel goes to the end) to the next multiple of `stride`."""
    strides = (stride,) * 3 if isinstance(stride, int) else tuple(stride)
    return pad_or_crop(shape, tuple(-(-size // step) * step for size, step in zip(shape, strides, strict=True)))


def pad_or_crop(shape: tuple[int, ...], target: tuple[int, ...], *, offset: tuple[int, ...] | None = None) -> Placement:
    """Bring a grid of `shape` to `target` voxels: centerd, or starting at grid voxel `offset` (negative: padding)."""
    if offset is None:
        offset = tuple(-((t - s) // 2) if t >= s else (s - t) // 2 for s, t in zip(shape, target, strict=True))
    return Placement(_triple(shape), _triple(target), _triple(offset))


def center_crop(array: Array, sides: tuple[int, ...]) -> Array:
    """Cut the last three axes of an array to `sides` voxels about the center; axes that are smaller stay whole."""
    window = []
    for size, side in zip(array.shape[-3:], sides, strict=True):
        start = max(size - side, 0) // 2
        window.append(slice(start, start + min(size, side)))
    return array[(..., *window)]


def _triple(values: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = values
    return int(x), int(y), int(z)


def _moved(
    array: Array, shape: tuple[int, int, int], source: Window, target: tuple[int, int, int], to: Window, fill: float
) -> Array:
    """Return a new array of `target` voxels: `array[source]` at `to`, `fill` elsewhere."""
    _check_shape(array, shape)
    size = (*array.shape[:-3], *target)
    if not isinstance(array, np.ndarray):
        result = array.new_full(size, fill)
        result[to] = array[source]
        return result
    moved = np.full(size, fill, dtype=array.dtype)
    moved[to] = array[source]
    return moved


def _check_shape(array: np.ndarray | torch.Tensor, shape: tuple[int, int, int]) -> None:
    if tuple(array.shape[-3:]) != shape:
        raise ValueError(f"this placement takes arrays of {shape} voxels here, got {tuple(array.shape)}")
