"""Volumes larger than memory: files read and written in slabs along the third axis.

A slab is (C, X, Y, z): z consecutive planes of a volume in RAS+ order. In a file its voxels may lie anywhere, since
axes are permuted and flipped there, so both ways work on whole planes of the file, a few megabytes at a time. Files are
read and written rather than memory-mapped: a full disk is then an error and not a crash, and pages of a file do not
count as memory.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from nibabel.openers import Opener
from nibabel.orientations import io_orientation
from nibabel.volumeutils import apply_read_scaling

from files.atomic import atomic_file
from volumes.volume import SourceGrid, VolumeError

from .nifti import (
    MAX_HEADER_BYTES,
    canonical_grid,
    check_scalar,
    grid_of,
    gunzip,
    image_on_grid,
    nifti_path,
    open_nifti,
    rounded,
    shape_with_channels,
    stored_order,
)
from .raw import COPY_BYTES

BLOCK_BYTES = 1 << 24  # of the file in memory at once
GATHERED_BYTES = 1 << 26  # of slabs that touch every plane of the file: fewer passes over it


def write_slabs(
    path: str | os.PathLike,
    slabs: Iterable[np.ndarray],
    grid: SourceGrid,
    dtype: type[np.number] | np.dtype,
    *,
    description: str = "",
) -> None:
    """Write a .nii or .nii.gz file from consecutive slabs (C, X, Y, z) in RAS+ order. The file is byte by byte that of
    `write_volume`, but the whole volume is never in memory. The file appears complete or not at all.

    A .nii.gz file passes through an uncompressed one beside it, so the folder needs room for both.

    Args:
        slabs: of any thickness and type; rounded if `dtype` is an integer type.
        grid: the grid that the file stores, in any orientation, see `stored_grid`.
        dtype: type of the voxels in the file.
        description: for the header, at most 79 bytes.

    Raises: ValueError for slabs that do not fill the grid, VoxelError for values that are not finite or that `dtype`
    cannot hold, and OSError (a full disk); no file is left then.
    """
    path = nifti_path(path)
    with atomic_file(path) as unfinished:
        plain = unfinished.with_suffix("") if path.suffix == ".gz" else unfinished
        with open(plain, "w+b") as file:
            _write_plain(file, slabs, grid, np.dtype(dtype), description, path)
        if plain != unfinished:
            with open(plain, "rb") as source, Opener(str(unfinished), "wb") as compressed:  # at nibabel's own level
                shutil.copyfileobj(source, compressed, COPY_BYTES)
            plain.unlink()  # now, so that it is not flushed to the disk as well


def _write_plain(
    file: BinaryIO, slabs: Iterable[np.ndarray], grid: SourceGrid, dtype: np.dtype, description: str, path: Path
) -> None:
    (x, y, depth), _ = canonical_grid(grid)
    voxels, done = None, 0
    for slab in _gathered(slabs) if _scattered(grid) else slabs:
        if voxels is None:
            channels = len(slab)
            stored_shape = grid.shape if channels == 1 else (*grid.shape, channels)
            header = image_on_grid(np.broadcast_to(dtype.type(0), stored_shape), grid, description).header
            header.set_slope_inter(1, 0)
            header.write_to(file)
            voxels = StoredVoxels(file, header.get_data_offset(), grid, dtype)
            file.truncate(voxels.end(channels))
        if slab.shape[:3] != (channels, x, y) or done + slab.shape[3] > depth:
            raise ValueError(
                f"{path}: a slab of shape {slab.shape} after {done} planes does not fit a grid of "
                f"{(channels, x, y, depth)}"
            )
        voxels.put(slab, done)
        done += slab.shape[3]
    if done != depth:
        raise ValueError(f"{path}: the slabs end after {done} planes, the grid has {depth}")


def read_slabs(path: str | os.PathLike, planes: int) -> Iterator[np.ndarray]:
    """Read a scalar image as consecutive slabs (C, X, Y, z) float32 of `planes` planes (the last may have fewer), in
    RAS+ order, slope and intercept applied. Together they are what `read_volume` reads, but the whole volume is never
    in memory.

    A compressed file is decompressed once, into a temporary file (in $TMPDIR).

    Raises: VolumeError as `read_volume`, at once; only values that are not finite are reported with their slab.
    """
    if planes < 1:
        raise ValueError(f"a slab has 1 plane or more, not {planes}")
    name, image = open_nifti(path, check=False)
    check_scalar(name, image)
    *shape, channels = shape_with_channels(image.shape, name)
    grid = grid_of(image, (shape[0], shape[1], shape[2]), name)
    proxy: Any = image.dataobj
    part = Path(str(image.file_map["image"].filename))
    for other in {Path(str(holder.filename)) for holder in image.file_map.values()} - {part}:
        if other.suffix.lower() == ".gz":
            gunzip(other, most=MAX_HEADER_BYTES)
    if part.suffix.lower() not in Opener.compress_ext_map:
        file = open(part, "rb")
    elif part.suffix.lower() == ".gz":
        file = tempfile.TemporaryFile()
        voxel_bytes = math.prod((*shape, channels)) * proxy.dtype.itemsize
        gunzip(part, file, most=proxy.offset + voxel_bytes + MAX_HEADER_BYTES)
    else:
        raise VolumeError(f"{name}: is compressed in a way that cannot be read in slabs; decompress it, or use .gz")
    voxels = StoredVoxels(file, proxy.offset, grid, proxy.dtype)
    size = file.seek(0, os.SEEK_END)
    if size < voxels.end(channels):
        raise VolumeError(
            f"{name}: its voxels cannot be read: expected {voxels.end(channels)} bytes, got {size}; it is truncated"
        )
    return _slabs(voxels, planes, channels, proxy.slope, proxy.inter, name)


def _slabs(
    voxels: StoredVoxels, planes: int, channels: int, slope: float, inter: float, name: str
) -> Iterator[np.ndarray]:
    (x, y, depth), _ = canonical_grid(voxels.grid)
    at_once = planes * (max(GATHERED_BYTES // (4 * channels * x * y * planes), 1) if _scattered(voxels.grid) else 1)
    with voxels.file:
        for start in range(0, depth, at_once):
            read = voxels.get(start, min(at_once, depth - start), channels, slope, inter)
            for first in range(0, read.shape[3], planes):
                slab = np.ascontiguousarray(read[..., first : first + planes])
                bad = slab.size - int(np.isfinite(slab).sum())
                if bad:
                    low, high = start + first, start + first + slab.shape[3] - 1
                    raise VolumeError(
                        f"{name}: {bad} of {slab.size} values in planes {low} to {high} are not finite (NaN or "
                        "infinite); replace them first"
                    )
                yield slab


class StoredVoxels:
    """The voxels of an open, uncompressed file, by their planes in RAS+ order.

    Args:
        file: open for reading; for `put`, also for writing.
        offset: position of the first voxel, in bytes.
        grid: shape (I, J, K) and orientation in which the file stores each channel, one after the other.
        dtype: type of the voxels in the file.
    """

    def __init__(self, file: BinaryIO, offset: int, grid: SourceGrid, dtype: np.dtype):
        self.file, self.offset, self.grid, self.dtype = file, offset, grid, dtype

    def end(self, channels: int) -> int:
        """Return the position in bytes after the last voxel of so many channels."""
        return self._place(channels, 0)

    def put(self, slab: np.ndarray, start: int) -> None:
        """Write a slab (C, X, Y, z) whose first plane is `start`."""
        stored = stored_order(slab, self.grid)
        for channel, here, first, window in self._blocks(start, slab.shape[3], len(slab)):
            block = rounded(stored[:, :, here, channel], self.dtype)
            if _scattered(self.grid):
                planes = self._read(channel, first, block.shape[2])
                planes[window] = block
                block = planes
            self.file.seek(self._place(channel, first))
            self.file.write(block.T.data)

    def get(self, start: int, planes: int, channels: int, slope: float, inter: float) -> np.ndarray:
        """Read `planes` planes from `start` on, (C, X, Y, z) float32: slope times the stored values, plus inter."""
        (x, y, _), _ = canonical_grid(self.grid)
        slab = np.empty((channels, x, y, planes), dtype=np.float32)
        stored = stored_order(slab, self.grid)
        for channel, here, first, window in self._blocks(start, planes, channels):
            block = self._read(channel, first, here.stop - here.start)[window]
            with np.errstate(over="ignore"):  # what exceeds float32 becomes infinite
                stored[:, :, here, channel] = apply_read_scaling(block, np.float64(slope), np.float64(inter))
        return slab

    def _blocks(
        self, start: int, planes: int, channels: int
    ) -> Iterator[tuple[int, slice, int, tuple[slice, slice, slice]]]:
        """Yield where the parts of a slab are: the channel, which stored planes of the slab, the first of these in the
        file, and what part of the file's planes they fill.
        """
        axis, flipped = _third_axis(self.grid)
        low = self.grid.shape[axis] - start - planes if flipped else start
        first, depth = (0, self.grid.shape[2]) if _scattered(self.grid) else (low, planes)
        window = [slice(None)] * 3
        if _scattered(self.grid):
            window[axis] = slice(low, low + planes)
        step = max(BLOCK_BYTES // self._plane_bytes, 1)
        for channel in range(channels):
            for k in range(0, depth, step):
                yield channel, slice(k, min(k + step, depth)), first + k, (window[0], window[1], window[2])

    def _read(self, channel: int, first: int, planes: int) -> np.ndarray:
        """Read `planes` whole planes of the file, (I, J, k)."""
        block = np.empty((*self.grid.shape[:2], planes), self.dtype, order="F")
        self.file.seek(self._place(channel, first))
        self.file.readinto(block.T.data)  # pyright: ignore[reportAttributeAccessIssue]
        return block

    @property
    def _plane_bytes(self) -> int:
        return self.grid.shape[0] * self.grid.shape[1] * self.dtype.itemsize

    def _place(self, channel: int, plane: int) -> int:
        return self.offset + (channel * self.grid.shape[2] + plane) * self._plane_bytes


def _third_axis(grid: SourceGrid) -> tuple[int, bool]:
    """Return the stored axis that is the third one in RAS+, and whether it runs the other way."""
    orientation = io_orientation(grid.affine)
    axis = orientation[:, 0].tolist().index(2)
    return axis, bool(orientation[axis, 1] < 0)


def _scattered(grid: SourceGrid) -> bool:
    """Return whether a slab has voxels in every plane of the file."""
    return _third_axis(grid)[0] != 2


def _gathered(slabs: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the same planes in slabs of `GATHERED_BYTES` or more."""
    waiting: list[np.ndarray] = []
    for slab in slabs:
        waiting.append(slab)
        if sum(part.nbytes for part in waiting) >= GATHERED_BYTES:
            yield np.concatenate(waiting, axis=3)
            waiting = []
    if waiting:
        yield np.concatenate(waiting, axis=3)
