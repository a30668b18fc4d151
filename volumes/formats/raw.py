"""The result of every reader of volume files, and the checks of headers that all readers share.

Axes: stored voxels are (I, J, K, C) in the order of the file. Affines lead to RAS+ and millimeters.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypedDict

import numpy as np
import psutil

from files.names import Disk
from files.paths import path_inside, refuse_special
from volumes.volume import SourceGrid, VolumeError, check_affine

try:
    import resource
except ImportError:  # Windows, where a process has no such limits
    resource = None

COPY_BYTES = 1 << 22  # at a time, through a compressed file
WORKING_BYTES = 16  # a voxel, beside the stored one: scaled in float64, as float32, and its copy in RAS+ order
SPACINGS = (1e-4, 100.0)  # mm: no scan has smaller or larger voxels
UNITS = {"mm": 1.0, "m": 1000.0, "cm": 10.0, "um": 0.001}  # of length, in mm
AXES = ("XYZC", "CXYZ")  # orders of a NIfTI file's axes
MAX_COSINE = 0.1  # between voxel axes: 5.7 degrees from a right angle; less stays in the affine, where it is right
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # the patient coordinates of DICOM, ITK and most NRRD files to NIfTI's


class Reading(TypedDict, total=False):
    """Keywords of the readers that correct wrong headers.

    Attributes:
        units: unit of lengths, one of `UNITS`.
        axes: the order of a NIfTI file's axes, one of `AXES`.
    """

    units: str
    axes: str


class MaskReading(Reading, total=False):
    """Keywords of `read_mask` beside those of all readers.

    Attributes:
        names: label values of the segments of DICOM-SEG and RTSTRUCT, see `volumes.labels.segment_values`.
    """

    names: Mapping[str | int, int]


@dataclass(frozen=True, eq=False)
class RawVolume:
    """Voxels as a file holds them: its name for messages, values (I, J, K, C) in its units, and their grid."""

    name: str
    values: np.ndarray
    grid: SourceGrid


def refuse_special_volume(path: Path) -> None:
    """Raise VolumeError for a pipe, socket or device, which would keep its reader waiting."""
    try:
        refuse_special(path)
    except ValueError as error:
        raise VolumeError(str(error)) from error


def make_grid(
    name: str,
    shape: Sequence[int],
    affine: np.ndarray,
    unit: str = "mm",
    units: str | None = None,
    frame: str | None = None,
) -> SourceGrid:
    """Build the grid (I, J, K) of a file that is not NIfTI. Raises: VolumeError if its geometry is broken.

    Args:
        affine: (4, 4) in the header's numbers.
        unit: the one of `UNITS` that the header names.
        units: the unit of its numbers, if the header is wrong.
        frame: DICOM's FrameOfReferenceUID.
    """
    try:
        check_affine(affine)
        affine = in_millimeters(affine, units or unit)
        check_grid(affine, "mm" if units else unit)
    except ValueError as error:
        raise VolumeError(f"{name}: its geometry is broken: {error}") from error
    i, j, k = shape
    return SourceGrid((i, j, k), affine, affine, qform_code=1, sform_code=1, unit="mm" if units else unit, frame=frame)


def in_millimeters(affine: np.ndarray, unit: str) -> np.ndarray:
    """Convert an affine to mm whose lengths are in a unit of `UNITS`, or in an unknown one, which is taken as mm."""
    scale = UNITS.get(unit, 1.0)
    return np.diag([scale, scale, scale, 1.0]) @ np.asarray(affine, dtype=np.float64)


def check_grid(affine: np.ndarray, unit: str = "mm") -> None:
    """Raise ValueError unless `affine` is that of a grid: finite, not singular, with axes at right angles and voxel
    sizes that a scan can have (`SPACINGS`). `unit` is the header's, for the message.
    """
    check_affine(affine)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if lengths.max() > SPACINGS[1] or lengths.min() < SPACINGS[0]:
        likely = "mm" if unit not in ("mm", "unknown") else "um" if lengths.max() > SPACINGS[1] else "m"
        raise ValueError(
            f"its voxels are {' x '.join(f'{mm:.4g}' for mm in lengths)} mm, which no scan has (the header's unit "
            f"of length is {unit}); correct the header, or set the unit of its numbers in the training's config, such "
            f"as data.units: {likely}"
        )
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosine = float(np.abs(np.triu(axes.T @ axes, 1)).max())
    if cosine > MAX_COSINE:
        angle = math.degrees(math.acos(min(cosine, 1.0)))
        raise ValueError(
            f"its voxel axes are sheared, two of them {angle:.1f} degrees apart instead of 90 (a tilted gantry, or an "
            "affine registration); resample it onto a grid with right angles"
        )


def check_room(name: str, shape: Sequence[int], itemsize: int) -> int:
    """Compute the bytes of a file's voxels from its header, before anything is allocated.

    Raises: VolumeError if reading them takes more than the memory of this process.
    """
    voxels = math.prod(int(n) for n in shape)
    needed, room = voxels * (itemsize + WORKING_BYTES), memory_bytes()
    if needed > room:
        raise VolumeError(
            f"{name}: says that it holds {' x '.join(map(str, shape))} voxels; reading them takes "
            f"{needed / 2**30:.3g} GiB of memory, {room / 2**30:.3g} GiB are available"
        )
    return voxels * itemsize


def memory_bytes() -> int:
    """Return the memory that this process may use: the machine's, or the limit that is set on it (ulimit -v, ulimit
    -d).
    """
    machine = psutil.virtual_memory().total
    if resource is None:
        return machine
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return min([machine, *(limit for limit in limits if limit != resource.RLIM_INFINITY)])


def read_packed(name: str, file: BinaryIO, nbytes: int, *, compressed: bool) -> bytes | bytearray:
    """Read the rest of a file, which holds exactly `nbytes` bytes of voxels, uncompressed or compressed (zlib or gzip).

    Raises: VolumeError if there are fewer or more, or if compressed data are damaged.
    """
    if not compressed:
        there = os.fstat(file.fileno()).st_size - file.tell()
        if there != nbytes:
            raise VolumeError(f"{name}: holds {there} bytes of voxels, its header says {nbytes}; is it complete?")
        return file.read(nbytes)
    inflater, data = zlib.decompressobj(47), bytearray()  # 47: zlib or gzip, whichever it is
    try:
        while not inflater.eof and (piece := file.read(COPY_BYTES)):
            data += inflater.decompress(piece, nbytes - len(data) + 1)
            if len(data) > nbytes or inflater.unconsumed_tail:
                raise VolumeError(f"{name}: holds more voxels than the {nbytes} bytes that its header says")
    except zlib.error as error:
        raise VolumeError(f"{name}: its compressed voxels are damaged: {error}") from error
    if not inflater.eof or len(data) < nbytes:
        raise VolumeError(f"{name}: its compressed voxels end after {len(data)} of {nbytes} bytes; it is truncated")
    if inflater.unused_data or file.read(1):
        raise VolumeError(f"{name}: has data after its compressed voxels; it is damaged")
    return data


def file_beside(header: Path, named: str) -> Path:
    """Return the file of voxels that a header names: in the header's folder, or below it.

    Raises: VolumeError for a name that leads out of that folder, links included, and for a missing file.
    """
    home = header.parent.resolve()
    try:
        inside = named and named.isprintable() and not Path(named).is_absolute()
        spelled = Disk().find(home / named).relative_to(home).as_posix() if inside else named
        return path_inside(home, spelled, f"{header}: its file of voxels")
    except ValueError as error:
        raise VolumeError(str(error)) from error


def numbers(name: str, field: str, text: str, count: int | None = None) -> list[float]:
    """Parse the numbers in a field of a text header. Raises: VolumeError for anything else, or another count."""
    try:
        values = [float(word) for word in text.split()]
    except ValueError as error:
        raise VolumeError(f"{name}: its {field!r} is {text[:80]!r}, which are not numbers") from error
    if (count is not None and len(values) != count) or not all(map(math.isfinite, values)):
        raise VolumeError(f"{name}: its {field!r} is {text[:80]!r}; expected {count or 'finite'} numbers")
    return values


def whole_numbers(name: str, field: str, text: str, count: int | None = None) -> list[int]:
    """Parse as `numbers`, for whole numbers from 1 on."""
    values = numbers(name, field, text, count)
    if any(value != int(value) or not 1 <= value < 2**53 for value in values):
        raise VolumeError(f"{name}: its {field!r} is {text[:80]!r}; expected whole numbers, 1 or more")
    return [int(value) for value in values]
