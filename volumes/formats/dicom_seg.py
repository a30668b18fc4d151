"""DICOM Segmentation objects (SEG) to label maps: binary segments and label maps, on the full grid of their series.

Frames are placed by their own positions: their order, and empty ones that were left out, do not matter. Attributes are
those of PS3.3, section C.8.20.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.pixels import iter_pixels

from volumes.volume import SourceGrid, Volume, VolumeError

from .dicom import RLE_RATIO, Slice, check_syntax, stack
from .raw import LPS_TO_RAS, UNITS, check_room, make_grid
from .segments import (
    OFF_GRID,
    LabelGrid,
    Reference,
    SegmentValues,
    chosen_values,
    finite,
    grid_for,
    listed,
    sequence,
    text,
)

BITS = {"BINARY": (1,), "LABELMAP": (8, 16)}  # of a pixel


@dataclass(frozen=True, eq=False)
class Frame:
    """Where a frame lies: its segment's number (None in a label map, whose pixels are the numbers), and the affine
    (column, row, normal) to RAS+ in mm."""

    segment: int | None
    affine: np.ndarray


@dataclass(frozen=True, eq=False)
class SegHeader:
    """A SEG without its pixels."""

    path: Path
    kind: str  # BINARY or LABELMAP
    shape: tuple[int, int]  # columns, rows
    segments: dict[int, str]
    frames: list[Frame]
    reference: Reference
    instances: int  # of the series, that the file names; 0 if it names none


def read_seg(
    path: Path, names: SegmentValues | None = None, like: Volume | None = None, units: str | None = None
) -> Volume:
    """Read the label map (1, X, Y, Z) int16 of a SEG, on the grid of `segments.grid_for`.

    Without the image and its series, a SEG lies on the grid of its own frames, if there is one for each slice.

    Args:
        names: label values of the segments, see `segments.chosen_values`; None keeps their numbers.
        like: the image that it was drawn on.
        units: what lengths in it are in, if not mm.

    Raises: VolumeError for fractional segments, segments that overlap, frames that lie between the voxels, slices that
    are missing, and damaged files.
    """
    try:
        header = _read_header(path, units)
        values = chosen_values(str(path), header.segments, names)
        single = len({tuple(np.round(frame.affine[:3, 3], 3)) for frame in header.frames}) == 1
        grid = grid_for(path, header.reference, like, partial(_misfit, header), units, partial(_own, header), single)
        return _painted(header, values, grid).volume()
    except (VolumeError, OSError, MemoryError):
        raise
    except Exception as error:  # of many kinds, as in `dicom`
        raise VolumeError(f"{path}: cannot be read as DICOM-SEG: {type(error).__name__}: {error}") from error


def _read_header(path: Path, units: str | None) -> SegHeader:
    compressed = check_syntax(path)
    found = pydicom.dcmread(path, stop_before_pixels=True)
    kind = text(found, "SegmentationType")
    if kind == "FRACTIONAL":
        raise VolumeError(
            f"{path}: its segments are fractional (probabilities or shares of voxels), and a label map has whole "
            "voxels; threshold it in the program that wrote it, and save it as BINARY"
        )
    if kind not in BITS:
        raise VolumeError(f"{path}: its SegmentationType is {kind!r}; BINARY and LABELMAP are supported")
    if kind == "BINARY" and compressed:
        raise VolumeError(f"{path}: has compressed pixels of one bit; decompress it first (gdcmconv --raw)")
    columns, rows, bits = (int(found.get(tag) or 0) for tag in ("Columns", "Rows", "BitsAllocated"))
    frames = sequence(found, "PerFrameFunctionalGroupsSequence")
    if bits not in BITS[kind] or int(found.get("SamplesPerPixel") or 1) != 1:
        raise VolumeError(f"{path}: has {bits} bits a pixel; {kind} segments have {' or '.join(map(str, BITS[kind]))}")
    if not frames or len(frames) != int(found.get("NumberOfFrames") or 0):
        raise VolumeError(f"{path}: describes {len(frames)} frames, and says that it has {found.get('NumberOfFrames')}")
    promised = math.ceil(columns * rows * len(frames) * bits / 8)
    if not 0 < promised <= path.stat().st_size * (RLE_RATIO if compressed else 1):
        raise VolumeError(
            f"{path}: says {len(frames)} frames of {columns} x {rows} pixels, more than it can hold; it is truncated"
        )
    segments: dict[int, str] = {}
    for one in sequence(found, "SegmentSequence"):
        number = int(one.SegmentNumber)
        if number in segments:
            raise VolumeError(f"{path}: two of its segments have the number {number}")
        segments[number] = text(one, "SegmentLabel") or f"segment {number}"
    if kind == "LABELMAP" and segments.get(0) is not None and len(segments) > 1:
        del segments[0]  # the background
    scale = UNITS[units or "mm"]
    shared = (sequence(found, "SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
    series = sequence(found, "ReferencedSeriesSequence")
    return SegHeader(
        path=path,
        kind=kind,
        shape=(columns, rows),
        segments=segments,
        frames=[_frame(path, number, one, shared, kind, scale) for number, one in enumerate(frames, start=1)],
        reference=Reference(
            tuple(text(one, "SeriesInstanceUID") for one in series), text(found, "FrameOfReferenceUID") or None
        ),
        instances=sum(len(sequence(one, "ReferencedInstanceSequence")) for one in series),
    )


def _frame(path: Path, number: int, own: Any, shared: Any, kind: str, scale: float) -> Frame:
    """Frame `number` (from 1), by its own functional groups or the shared ones."""
    name = f"{path}: frame {number}"

    def group(keyword: str) -> Any:
        found = sequence(own, keyword) or sequence(shared, keyword)
        if not found:
            raise VolumeError(f"{name} has no {keyword}, so it is unknown where it lies, or what it shows")
        return found[0]

    spacing = finite(name, "PixelSpacing", group("PixelMeasuresSequence").get("PixelSpacing"), 2)
    axes = finite(name, "ImageOrientationPatient", group("PlaneOrientationSequence").get("ImageOrientationPatient"), 6)
    place = finite(name, "ImagePositionPatient", group("PlanePositionSequence").get("ImagePositionPatient"), 3)
    along_row, along_column = axes[:3], axes[3:]
    lengths = np.linalg.norm(along_row), np.linalg.norm(along_column)
    if max(abs(length - 1) for length in lengths) > 1e-2 or spacing.min() <= 0 or abs(along_row @ along_column) > 0.1:
        raise VolumeError(f"{name} has a broken geometry: orientation {axes.tolist()}, spacing {spacing.tolist()}")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = along_row * spacing[1] * scale, along_column * spacing[0] * scale
    affine[:3, 2], affine[:3, 3] = np.cross(along_row, along_column), place * scale
    segment = None if kind == "LABELMAP" else int(group("SegmentIdentificationSequence").ReferencedSegmentNumber)
    return Frame(segment, LPS_TO_RAS @ affine)


def _misfit(header: SegHeader, grid: Volume, series: bool) -> str | None:
    """Say why the frames do not lie on a grid; None if they do.

    On a grid that is not that of its series, neighboring frames must be one plane apart: frames of 3 mm would be
    stripes among planes of 1 mm. A grid with as many planes as the series has slices is taken as it is.
    """
    planes: dict[int, set[int]] = {}  # by axis
    for number, frame in enumerate(header.frames, start=1):
        found = _plane(frame, header.shape, grid)
        if found is None:
            return f"frame {number} of {header.shape[0]} x {header.shape[1]} pixels lies on no plane of its voxels"
        for axis, place in enumerate(found[0]):
            if not isinstance(place, slice):
                planes.setdefault(axis, set()).add(place)
    for axis, places in planes.items():
        if series or len(places) == 1 or header.instances == grid.shape[axis]:
            continue
        if (step := min(np.diff(sorted(places)))) > 1:
            return f"its frames are at least {step} planes apart, so the slices that it was drawn on are thicker"
    return None


def _plane(frame: Frame, shape: tuple[int, int], grid: Volume) -> tuple[tuple[slice | int, ...], bool] | None:
    """Find the part of the grid that a frame lies on, and whether its rows come before its columns there.

    Returns: None if it does not lie on voxels.
    """
    to_voxels = np.linalg.inv(grid.affine) @ frame.affine
    steps = np.rint(to_voxels[:3, :2])
    if (np.abs(steps).sum(axis=0) != 1).any() or (np.abs(steps).sum(axis=1) > 1).any():
        return None
    corners = np.array([(column, row) for column in (0, shape[0] - 1) for row in (0, shape[1] - 1)]).T
    exact = to_voxels[:3, :2] @ corners + to_voxels[:3, 3:]
    nearest = steps @ corners + np.rint(to_voxels[:3, 3:])
    low, high = nearest.min(axis=1).astype(int), nearest.max(axis=1).astype(int)
    if np.abs(exact - nearest).max() > OFF_GRID or low.min() < 0 or (high >= np.array(grid.shape)).any():
        return None
    column_axis, row_axis = np.abs(steps).argmax(axis=0)
    index: list[slice | int] = [int(place) for place in low]
    for axis, direction in ((column_axis, steps[column_axis, 0]), (row_axis, steps[row_axis, 1])):
        if direction > 0:
            index[axis] = slice(low[axis], high[axis] + 1)
        else:
            index[axis] = slice(high[axis], low[axis] - 1 if low[axis] else None, -1)
    return tuple(index), bool(row_axis < column_axis)


def _own(header: SegHeader) -> SourceGrid:
    """The grid of the frames.

    Raises: VolumeError for frames that do not form a regular stack, and where the file names more slices than it has
    frames for: empty ones were left out, at an end too.
    """
    path = header.path
    first: dict[tuple[float, ...], Slice] = {}
    for number, frame in enumerate(header.frames, start=1):
        affine = LPS_TO_RAS @ frame.affine
        spacing = np.linalg.norm(affine[:3, :2], axis=0)
        position = tuple(affine[:3, 3].tolist())
        first.setdefault(
            tuple(np.round(position, 3)),
            Slice(
                path=path / f"frame {number}",
                series="",
                frame=None,
                shape=header.shape,
                spacing=(float(spacing[0]), float(spacing[1])),
                axes=tuple((affine[:3, :2] / spacing).T.ravel().tolist()),
                position=position,
                slope=1.0,
                intercept=0.0,
                bytes_a_pixel=2,
            ),
        )
    slices = [*first.values()]
    if header.instances not in (0, len(slices)) or len(slices) < 2:
        raise VolumeError(
            f"{path}: has frames of {len(slices)} of the {header.instances or 'unknown'} slices of its series "
            f"{' and '.join(header.reference.series) or '(it names none)'}: empty ones were left out, so its grid is "
            "unknown; put the folder of that series beside it, or read it with its image (data.images, like=)"
        )
    if any(np.abs(np.subtract(one.axes, slices[0].axes)).max() > 1e-3 or one.spacing != slices[0].spacing
           for one in slices):  # fmt: skip
        raise VolumeError(f"{path}: its frames have several orientations or spacings; no volume has")
    ordered, affine = stack(path, slices)
    return make_grid(str(path), (*header.shape, len(ordered)), affine, frame=header.reference.frame)


def _painted(header: SegHeader, values: dict[int, int], grid: Volume) -> LabelGrid:
    labels = LabelGrid(str(header.path), grid)
    check_room(str(header.path), (*header.shape, 1), 2)
    for frame, pixels in zip(header.frames, _pixels(header), strict=True):
        place = _plane(frame, header.shape, grid)
        assert place is not None, header.path
        index, rows_first = place
        pixels = pixels if rows_first else pixels.T
        present = np.unique(pixels).tolist() if frame.segment is None else [frame.segment]
        for number in present:
            if number not in header.segments and number != 0:
                raise VolumeError(
                    f"{header.path}: has voxels of segment {number}, which it does not describe; it has "
                    f"{listed(header.segments)}"
                )
            if number in values:
                inside = pixels == number if frame.segment is None else pixels != 0
                labels.paint(index, inside, values[number], f"segment {header.segments[number]!r}")
    return labels


def _pixels(header: SegHeader) -> Iterator[np.ndarray]:
    """The pixels (row, column) of each frame. Raises: VolumeError if there are fewer."""
    found = pydicom.dcmread(header.path)
    if "PixelData" not in found:
        raise VolumeError(f"{header.path}: has no pixels; it is truncated, or was saved without them")
    shape = header.shape[1], header.shape[0]
    if header.kind == "BINARY":
        yield from _bits(header, found.PixelData, shape)
        return
    count = 0
    for pixels in iter_pixels(found):
        if pixels.shape != shape:
            raise VolumeError(f"{header.path}: a frame has {pixels.shape} pixels, its header says {shape}")
        count += 1
        yield pixels
    if count != len(header.frames):
        raise VolumeError(f"{header.path}: holds {count} of its {len(header.frames)} frames; it is truncated")


def _bits(header: SegHeader, packed: bytes, shape: tuple[int, int]) -> Iterator[np.ndarray]:
    """The frames of one bit a pixel, which begin anywhere in a byte (pydicom 3.0 iterates over whole bytes alone)."""
    size = shape[0] * shape[1]
    if len(packed) < math.ceil(size * len(header.frames) / 8):
        raise VolumeError(f"{header.path}: holds {len(packed)} bytes of pixels, fewer than its frames; it is truncated")
    data = np.frombuffer(packed, np.uint8)
    for number in range(len(header.frames)):
        begin, skipped = divmod(number * size, 8)
        bits = np.unpackbits(data[begin : begin + size // 8 + 2], bitorder="little")
        yield bits[skipped : skipped + size].reshape(shape)
