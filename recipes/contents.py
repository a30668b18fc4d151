"""Look into files: grids from their headers, and the intensities of a few volumes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from volumes.formats.dicom import series_grid
from volumes.formats.nifti import canonical_grid, grid_of, open_nifti, shape_with_channels
from volumes.formats.read import is_nifti, read_stored
from volumes.volume import Volume, VolumeError, affine_spacing, same_grid

SAMPLED = 6  # volumes of a channel whose intensities are read
MOST_DISTINCT = 256  # values up to which they are listed
QUANTILES = (0.5, 2.0, 50.0, 98.0, 99.5, 99.9)
MASK_VOXELS = 400_000_000  # of the masks that are all read: some seconds


@dataclass(frozen=True)
class Grid:
    """The grid of a file in RAS+ order, and how many volumes it holds (the fourth axis)."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    volumes: int

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm."""
        return affine_spacing(self.affine)

    def fits(self, other: Grid) -> bool:
        """Return whether two files have the same grid."""
        ours, theirs = (Volume(np.broadcast_to(False, (1, *grid.shape)), grid.affine) for grid in (self, other))
        return same_grid(ours, theirs)


@dataclass(frozen=True)
class Look:
    """Intensities of one volume in file units.

    Attributes:
        low, high: the smallest and the largest.
        quantiles: at `QUANTILES` percent.
        whole: whether all are whole numbers.
        distinct: the values, if they are few; else None.
        lung, bone: fraction of the voxels in -850 to -550, and above 400.
        voxels: how many.
    """

    low: float
    high: float
    quantiles: tuple[float, ...]
    whole: bool
    distinct: tuple[float, ...] | None
    lung: float
    bone: float
    voxels: int


class Reader:
    """Reads files of one folder; each header once.

    Args:
        root: the folder.
        drawn_on: {path: folder of the series} of masks whose grid is that of a series.
    """

    def __init__(self, root: Path, drawn_on: Mapping[str, str] | None = None) -> None:
        self.root, self.drawn_on = root, drawn_on or {}
        self._grids: dict[str, Grid] = {}

    def grid(self, path: str) -> Grid:
        """Return the grid of a file. Raises: VolumeError naming the file."""
        path = self.drawn_on.get(path, path)
        if path not in self._grids:
            self._grids[path] = _read_grid(self.root / path)
        return self._grids[path]

    def looks(self, path: str) -> list[Look]:
        """Read a file and describe each of its volumes. Raises: VolumeError naming the file."""
        values = read_stored(self.root / path).values
        return [_look(values[..., index], str(self.root / path)) for index in range(values.shape[3])]


def _read_grid(path: Path) -> Grid:
    if is_nifti(path):
        name, image = open_nifti(path, check=False)
        *shape, volumes = shape_with_channels(image.shape, name)
        source = grid_of(image, (shape[0], shape[1], shape[2]), name)
    elif path.is_dir():
        source, volumes = series_grid(path), 1
    else:
        stored = read_stored(path)
        source, volumes = stored.grid, stored.values.shape[3]
    shape, affine = canonical_grid(source)
    return Grid(shape, affine, volumes)


def _look(values: np.ndarray, name: str) -> Look:
    flat = values.ravel()
    if not np.isfinite(flat).all():
        raise VolumeError(f"{name}: holds values that are not finite (NaN or infinite); replace them first")
    whole = flat.dtype.kind in "biu" or bool((flat == np.rint(flat)).all())
    levels = np.unique(flat) if whole else ()
    return Look(
        low=float(flat.min()),
        high=float(flat.max()),
        quantiles=tuple(float(value) for value in np.percentile(flat, QUANTILES)),
        whole=whole,
        distinct=tuple(map(float, levels)) if whole and len(levels) <= MOST_DISTINCT else None,
        lung=float(((flat > -850) & (flat < -550)).mean()),
        bone=float((flat > 400).mean()),
        voxels=flat.size,
    )


def spread(items: Sequence[str], count: int) -> list[str]:
    """Return `count` items, evenly spread."""
    if len(items) <= count:
        return list(items)
    return [items[round(float(index))] for index in np.linspace(0, len(items) - 1, count)]


def label_counts(reader: Reader, paths: Iterable[str]) -> tuple[dict[int, int], int]:
    """Return how many of these masks have each value, and how many masks were read.

    Args:
        reader: of the folder.
        paths: masks that are read.

    Raises:
        VolumeError: if a mask holds other than whole numbers.
    """
    counts: dict[int, int] = {}
    read = 0
    for path in paths:
        look, read = reader.looks(path)[0], read + 1
        if look.distinct is None:
            what = "more than 256 values" if look.whole else "numbers that are not whole"
            raise VolumeError(
                f"{reader.root / path}: is not a mask: it holds {what}; say which file is, by --mask NAME"
            )
        for value in look.distinct:
            counts[int(value)] = counts.get(int(value), 0) + 1
    return counts, read


def masks_to_read(reader: Reader, paths: Sequence[str]) -> list[str]:
    """Return the masks to read: all if that takes seconds, else as many as do, evenly spread."""
    voxels = [int(np.prod(reader.grid(path).shape)) for path in paths]
    if sum(voxels) <= MASK_VOXELS:
        return list(paths)
    return spread(paths, max(5, int(MASK_VOXELS / (sum(voxels) / len(voxels)))))
