"""A volume and where it lies in the patient.

Axes, everywhere in this package: arrays are (C, X, Y, Z) in RAS+ canonical order, that is, index i grows toward the
patient's Right, j toward Anterior and k toward Superior (to the nearest axis when the scan is oblique). Affines map
voxel indices (i, j, k, 1) to millimeters. Nothing here knows about files; `nifti.py` does.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from files.paths import printable
from files.remote import with_urls

GRID_NUMBERS = tuple(f"{what}_{axis}" for what in ("spacing", "size") for axis in "xyz")
PADDING = -1
"""Label of the voxels outside the field of view: padding is not background, which is a label like any other."""
UNKNOWN = -2
"""Label of the voxels whose label is not known: a model of partial masks fills them in."""


class VolumeError(ValueError):
    """A file or volume that cannot be used; the message names it, the reason and, where there is one, the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(with_urls(message)))


@dataclass(frozen=True, eq=False)
class SourceGrid:
    """The grid on which a volume was stored before it was brought to RAS+, so that results can be written back onto it.

    shape: (I, J, K) as stored; affine: (4, 4) float64 in mm; qform: (4, 4) in mm, or None when qform_code is 0 or it is
    broken; unit: the header's unit of length ("mm", "m", "cm", "um", or "unknown"), unless the reader was told another;
    frame: DICOM's FrameOfReferenceUID, None if it is not known. Volumes that differ in it are of different scans.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    qform: np.ndarray | None
    qform_code: int
    sform_code: int
    unit: str = "mm"
    frame: str | None = None


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels and where they are: array (C, X, Y, Z), affine (4, 4) float64 to mm, and the grid of the file it came
    from."""

    array: np.ndarray
    affine: np.ndarray
    source: SourceGrid | None = None

    def __post_init__(self) -> None:
        if self.array.ndim != 4:
            raise ValueError(f"a Volume's array is (C, X, Y, Z); got shape {self.array.shape}")
        affine = np.asarray(self.affine, dtype=np.float64)
        check_affine(affine)
        object.__setattr__(self, "affine", affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(X, Y, Z), without the channels."""
        x, y, z = self.array.shape[1:]
        return x, y, z

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along X, Y and Z."""
        return affine_spacing(self.affine)

    def replace(self, array: np.ndarray) -> Volume:
        """Return a volume with other voxels (any number of channels) on the same grid."""
        if array.shape[-3:] != self.shape:
            raise ValueError(
                f"the array is {array.shape}, the volume's grid is {self.shape}; use resample_to or a Placement"
            )
        return replace(self, array=array)


def check_affine(affine: np.ndarray) -> None:
    """Raise a ValueError unless `affine` is a finite, invertible (4, 4) matrix."""
    if affine.shape != (4, 4):
        raise ValueError(f"an affine is 4 x 4; got {affine.shape}")
    if not np.isfinite(affine).all():
        raise ValueError("the affine holds values that are not finite")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not (lengths > 0).all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-4:
        raise ValueError(f"the affine is singular: its voxel axes are {affine[:3, :3].T.tolist()}")


def affine_spacing(affine: np.ndarray) -> tuple[float, float, float]:
    """Return the voxel size in mm: the lengths of the affine's columns."""
    x, y, z = np.linalg.norm(np.asarray(affine, dtype=np.float64)[:3, :3], axis=0).tolist()
    return x, y, z


def same_grid(a: Volume, b: Volume, tolerance: float = 0.05) -> bool:
    """Return whether shapes are equal and no corner is further apart than `tolerance` voxels (of a).

    The default allows for a qform and an sform of one grid, which differ by rounding: a float32 quaternion near half
    a turn is good to about 3e-4 rad.
    """
    if a.shape != b.shape:
        return False
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in a.shape))]).T
    offset = np.linalg.inv(a.affine) @ (b.affine @ corners) - corners
    return float(np.abs(offset).max()) <= tolerance


def describe_grid(volume: Volume) -> str:
    """Describe shape, spacing and origin in one phrase, for error messages."""
    shape = " x ".join(map(str, volume.shape))
    spacing = " x ".join(f"{s:.4g}" for s in volume.spacing)
    origin = ", ".join(f"{o:.5g}" for o in volume.affine[:3, 3])
    return f"{shape} voxels of {spacing} mm, first voxel at ({origin}) mm"


def grid_numbers(grid: Volume) -> dict[str, float]:
    """Return {"spacing_x": mm between voxels, ..., "size_x": mm from end to end, ...} of a grid, in RAS order."""
    sizes = [n * mm for n, mm in zip(grid.shape, grid.spacing, strict=True)]
    return {name: float(value) for name, value in zip(GRID_NUMBERS, [*grid.spacing, *sizes], strict=True)}
