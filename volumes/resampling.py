"""Volumes onto another grid, through both affines, so that anatomy stays where it is in the patient.

Axes: (C, X, Y, Z). Interpolation runs on the CPU in float32, in slabs along X, so that memory stays bounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from volumes.formats.raw import check_room

from .volume import Volume, VolumeError

SLAB_VOXELS = 1 << 21
MIN_COUNT = 4  # an axis with as many voxels must not become a single plane
MAX_OLD_VOXELS = 1000  # along an axis of a new one; a header with more is wrong


def resample(volume: Volume, spacing: tuple[float, float, float] | list[float], *, nearest: bool = False) -> Volume:
    """Resample the volume to another voxel size (mm), with the same orientation and center; its extent is kept to the
    nearest voxel.
    """
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing is three positive lengths in mm, got {spacing}")
    old = np.array(volume.spacing)
    new = np.array(spacing, dtype=np.float64)
    if np.allclose(old, new, rtol=1e-4, atol=0):
        return volume
    x, y, z = (max(1, round(n)) for n in (np.array(volume.shape) * old / new).tolist())
    shape = (x, y, z)
    sizes = [" x ".join(f"{mm:.4g}" for mm in of) for of in (volume.spacing, spacing)]
    change = f"resampling {_by(volume.shape)} voxels of {sizes[0]} mm to {sizes[1]} mm gives {_by(shape)}"
    remedy = "correct the header's unit or data.spacing, or set data.units"
    if any(after == 1 and before >= MIN_COUNT for before, after in zip(volume.shape, shape, strict=True)):
        raise VolumeError(f"{change}, which leaves no volume; {remedy}")
    try:
        check_room("resampling", (len(volume.array), *shape), 4)
    except VolumeError as error:
        raise VolumeError(f"{change}, more than fits into memory ({error}); {remedy}") from error
    affine = volume.affine.copy()
    affine[:3, :3] *= new / old
    center = volume.affine[:3] @ [*((np.array(volume.shape) - 1) / 2), 1]
    affine[:3, 3] = center - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return resample_to(volume, shape, affine, nearest=nearest)


def resample_to(
    volume: Volume, shape: tuple[int, int, int], affine: np.ndarray, *, nearest: bool = False, fill: float | None = None
) -> Volume:
    """Resample the volume to the grid (shape, affine), by linear or nearest-neighbor interpolation.

    Where the new grid is coarser, linear interpolation is preceded by a Gaussian of the width that turns one voxel's
    point spread into the other's (Cardoso et al. 2015, "Scale factor point spread function matching"), to avoid
    aliasing. Voxels of the new grid whose center lies outside the old field of view get `fill`: by default 0 for
    `nearest` and the lowest value otherwise. Raises: VolumeError for a grid that does not fit into memory.
    """
    check_room("resampling", (len(volume.array), *shape), 4)
    to_source = np.linalg.inv(volume.affine) @ np.asarray(affine, dtype=np.float64)
    if fill is None:
        fill = 0.0 if nearest else float(volume.array.min())
    source = torch.from_numpy(np.ascontiguousarray(volume.array, dtype=np.float32))
    if not nearest:
        factors = np.abs(to_source[:3, :3]).max(axis=1)
        if factors.max() > MAX_OLD_VOXELS:
            raise VolumeError(
                f"resampling: a new voxel would span {factors.max():.3g} of the old ones, which measure "
                f"{' x '.join(f'{mm:.3g}' for mm in volume.spacing)} mm; is that spacing right?"
            )
        source = _smooth(source, factors)
    sizes = torch.tensor(volume.shape, dtype=torch.float64)
    result = torch.empty((len(source), *shape), dtype=torch.float32)
    matrix = torch.from_numpy(to_source)
    step = max(1, SLAB_VOXELS // (shape[1] * shape[2]))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        axes = [torch.arange(start, stop), torch.arange(shape[1]), torch.arange(shape[2])]
        index = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).double()
        position = index @ matrix[:3, :3].T + matrix[:3, 3]
        # half a voxel beyond the outermost centers is the edge of the field of view; 1e-4 voxels of it are rounding
        inside = ((position >= -0.5 - 1e-4) & (position <= sizes - 0.5 + 1e-4)).all(dim=-1)
        unit = (2 * position + 1) / sizes - 1
        slab = F.grid_sample(
            source[None],
            unit.flip(-1).float()[None],
            mode="nearest" if nearest else "bilinear",
            padding_mode="border",
            align_corners=False,
        )[0]
        result[:, start:stop] = torch.where(inside, slab, fill)
    array = result.numpy()
    if volume.array.dtype.kind in "biu":
        array = np.rint(array)
    return Volume(array.astype(volume.array.dtype), affine, volume.source)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _smooth(source: torch.Tensor, factors: np.ndarray) -> torch.Tensor:
    """Blur (C, X, Y, Z) along the axes on which a new voxel spans more than one old one (`factors`, in old voxels)."""
    for axis, factor in enumerate(factors.tolist(), start=1):
        if factor <= 1 + 1e-3:
            continue
        # squares of widths at half maximum add up: ours is sqrt(factor^2 - 1) voxels, and 2 sqrt(2 ln 2) sigma
        sigma = math.sqrt(factor**2 - 1) / (2 * math.sqrt(2 * math.log(2)))
        radius = math.ceil(3 * sigma)
        offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
        kernel = (kernel / kernel.sum()).view(1, 1, -1)
        lines = source.movedim(axis, -1)
        padded = F.pad(lines.reshape(-1, 1, lines.shape[-1]), (radius, radius), mode="replicate")
        source = F.conv1d(padded, kernel).view(lines.shape).movedim(-1, axis)
    return source
