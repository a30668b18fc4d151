"""RT Structure Sets (RTSTRUCT) to label maps: closed contours, filled on the slices of the series that they were drawn
on.

A voxel is inside where its center is. Inside is what a line from outside reaches after an odd number of borders, so
that inner contours are holes, and keyhole contours, which lead in and out on one line, as well. A center that lies on a
border belongs to the side of the greater indices: contours that share a border share no voxel. Attributes are those of
PS3.3, section C.8.8.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pydicom

from volumes.volume import Volume, VolumeError

from .dicom import check_syntax
from .raw import LPS_TO_RAS, UNITS
from .segments import (
    LISTED,
    OFF_GRID,
    LabelGrid,
    Reference,
    SegmentValues,
    chosen_values,
    finite,
    grid_for,
    sequence,
    text,
)

CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
THIN = 0.5  # mm: contours that are no farther apart lie on one slice
CROSSINGS = 1 << 22  # of borders with lines of voxels, at once


@dataclass(frozen=True, eq=False)
class Contour:
    """A closed contour: points (n, 3) in RAS+ and mm. `crossing` ones may cross each other."""

    points: np.ndarray
    crossing: bool


@dataclass(frozen=True, eq=False)
class Roi:
    """A region of interest."""

    name: str
    frame: str
    contours: list[Contour]


@dataclass(frozen=True, eq=False)
class Placed:
    """A contour on a slice of a grid: points (n, 2) in voxels of the other two axes."""

    points: np.ndarray
    crossing: bool


def read_rtstruct(
    path: Path, names: SegmentValues | None = None, like: Volume | None = None, units: str | None = None
) -> Volume:
    """Read the label map (1, X, Y, Z) int16 of an RTSTRUCT, on the grid of `segments.grid_for`.

    Args:
        names: label values of the ROIs, see `segments.chosen_values`; None keeps their numbers.
        like: the image that it was drawn on.
        units: what lengths in it are in, if not mm.

    Raises: VolumeError for contours that are not closed, not finite, or not on the slices, for ROIs that overlap, lie
    beside the images or on every other slice alone, where the series is not found, and for damaged files.
    Warns: of slices without a contour between others, of ROIs that are cut, and of those that hold no voxel.
    """
    try:
        check_syntax(path)
        found = pydicom.dcmread(path)
        segments: dict[int, str] = {}
        frames: dict[int, str] = {}
        for one in sequence(found, "StructureSetROISequence"):
            number = int(one.ROINumber)
            if number in segments:
                raise VolumeError(f"{path}: two of its ROIs have the number {number}")
            segments[number] = text(one, "ROIName") or f"ROI {number}"
            frames[number] = text(one, "ReferencedFrameOfReferenceUID")
        values = chosen_values(str(path), segments, names)
        rois = {number: Roi(segments[number], frames[number], []) for number in values}
        _add_contours(path, found, rois, UNITS[units or "mm"])
        if not any(roi.contours for roi in rois.values()):
            raise VolumeError(f"{path}: has no contours of {' and '.join(roi.name for roi in rois.values())}")
        reference = _reference(path, found, rois)
        grid = grid_for(path, reference, like, partial(_misfit, rois), units, single=_flat(rois))
        return _painted(path, rois, values, grid).volume()
    except (VolumeError, OSError, MemoryError):
        raise
    except Exception as error:  # of many kinds, as in `dicom`
        raise VolumeError(f"{path}: cannot be read as RTSTRUCT: {type(error).__name__}: {error}") from error


def _add_contours(path: Path, found: pydicom.Dataset, rois: dict[int, Roi], scale: float) -> None:
    for one in sequence(found, "ROIContourSequence"):
        roi = rois.get(int(one.ReferencedROINumber))
        if roi is None:
            continue
        for place, contour in enumerate(sequence(one, "ContourSequence"), start=1):
            name = f"{path}: contour {place} of {roi.name!r}"
            kind = text(contour, "ContourGeometricType")
            if kind not in CLOSED:
                raise VolumeError(
                    f"{name} is of type {kind or 'unknown'}, which encloses nothing; name the ROIs that are regions "
                    "(label_names, label_map), and this one not"
                )
            data = finite(name, "ContourData", contour.get("ContourData"))
            points = contour.get("NumberOfContourPoints")
            if len(data) % 3 or (points is not None and 3 * int(points) != len(data)):
                raise VolumeError(f"{name} has {len(data)} numbers for {points} points of 3; it is damaged")
            ras = data.reshape(-1, 3) @ LPS_TO_RAS[:3, :3] * scale
            roi.contours.append(Contour(ras, crossing=kind != "CLOSED_PLANAR"))


def _reference(path: Path, found: pydicom.Dataset, rois: dict[int, Roi]) -> Reference:
    """The series that the contours were drawn on. Raises: VolumeError for ROIs of several frames of reference."""
    frames = {roi.frame for roi in rois.values() if roi.contours and roi.frame}
    if len(frames) > 1:
        raise VolumeError(
            f"{path}: its ROIs lie in {len(frames)} frames of reference (scans), {' and '.join(sorted(frames))}; read "
            "those of one scan, by their names (label_names, label_map)"
        )
    frame = next(iter(frames), None)
    series = [
        text(one, "SeriesInstanceUID")
        for referenced in sequence(found, "ReferencedFrameOfReferenceSequence")
        for study in sequence(referenced, "RTReferencedStudySequence")
        for one in sequence(study, "RTReferencedSeriesSequence")
        if frame is None or text(referenced, "FrameOfReferenceUID") == frame
    ]
    return Reference(tuple(dict.fromkeys(uid for uid in series if uid)), frame)


def _axes(grid: Volume) -> list[int]:
    """The axes of a grid, those of slices first: in a file of slices the third one."""
    stored = [0, 1, 2]
    if grid.source is not None:
        rows = np.abs(np.linalg.inv(grid.affine) @ grid.source.affine)[:3, :3]
        stored = [int(axis) for axis in rows.argmax(axis=0)]
    return stored[::-1]


def _placed(rois: dict[int, Roi], grid: Volume) -> tuple[int, dict[int, dict[int, list[Placed]]]] | str:
    """The axis of the slices, and the contours of each ROI by slice; or why they do not lie on slices of the grid."""
    to_voxels = np.linalg.inv(grid.affine)
    voxels = {
        number: [contour.points @ to_voxels[:3, :3].T + to_voxels[:3, 3] for contour in roi.contours]
        for number, roi in rois.items()
    }
    reason = ""
    for axis in _axes(grid):
        others = [other for other in range(3) if other != axis]
        slices: dict[int, dict[int, list[Placed]]] = {number: defaultdict(list) for number in rois}
        fault = None
        for number, roi in rois.items():
            for place, (contour, points) in enumerate(zip(roi.contours, voxels[number], strict=True), start=1):
                index = float(np.rint(np.median(points[:, axis])))
                away = float(np.abs(points[:, axis] - index).max())
                if away > OFF_GRID:
                    fault = f"contour {place} of {roi.name!r} is {away:.3g} voxels away from slice {index:.0f}"
                elif not 0 <= index < grid.shape[axis]:
                    fault = f"contour {place} of {roi.name!r} is on slice {index:.0f} of 0 to {grid.shape[axis] - 1}"
                if fault:
                    break
                slices[number][int(index)].append(Placed(points[:, others], contour.crossing))
            if fault:
                break
        if fault is None:
            return axis, slices
        reason = reason or fault
    return reason


def _flat(rois: dict[int, Roi]) -> bool:
    """Whether all contours lie on one slice."""
    points = np.concatenate([contour.points for roi in rois.values() for contour in roi.contours])
    points = points - points.mean(axis=0)
    normal = np.linalg.eigh(points.T @ points)[1][:, 0]
    return bool(np.ptp(points @ normal) < THIN)


def _misfit(rois: dict[int, Roi], grid: Volume, series: bool) -> str | None:
    """Say why the contours do not lie on a grid; None if they do.

    On a grid that is not that of its series, most neighboring contours must be one slice apart, and none is cut.
    """
    placed = _placed(rois, grid)
    if isinstance(placed, str):
        return placed
    axis, slices = placed
    for number, roi in rois.items():
        if not roi.contours:
            continue
        beyond, beside = _beyond(slices[number], _sides(grid, axis))
        if beside:
            return f"{roi.name!r} lies beside its voxels"
        if beyond > 0.5 and not series:
            return f"{roi.name!r} reaches {beyond:.3g} voxels beyond its edge"
    step = _usual_step(slices.values())
    if step > 1 and not series:
        return f"its contours are usually {step} slices apart, so the slices that they were drawn on are thicker"
    return None


def _sides(grid: Volume, axis: int) -> tuple[int, int]:
    first, second = (side for other, side in enumerate(grid.shape) if other != axis)
    return first, second


def _beyond(contours: dict[int, list[Placed]], sides: tuple[int, int]) -> tuple[float, bool]:
    """How many voxels an ROI reaches beyond the outer edge of the voxels, and whether it lies there as a whole."""
    points = np.concatenate([one.points for on_slice in contours.values() for one in on_slice])
    low, high, edge = points.min(axis=0), points.max(axis=0), np.array(sides) - 0.5
    return float(max((-0.5 - low).max(), (high - edge).max(), 0)), bool(((high < -0.5) | (low > edge)).any())


def _usual_step(rois: Iterable[Mapping[int, object]]) -> int:
    """The median distance of neighboring contours of an ROI in slices, the lower one of two; where all ROIs are on one
    slice, that of neighboring ROIs; 1 if they are on the same."""
    drawn = [sorted(slices) for slices in rois]
    steps = sorted(int(step) for one in drawn for step in np.diff(one))
    steps = steps or sorted(int(step) for step in np.diff(sorted(set().union(*drawn))))
    return steps[(len(steps) - 1) // 2] if steps else 1


def _painted(path: Path, rois: dict[int, Roi], values: dict[int, int], grid: Volume) -> LabelGrid:
    placed = _placed(rois, grid)
    assert not isinstance(placed, str), path
    axis, slices = placed
    labels, sides = LabelGrid(str(path), grid), _sides(grid, axis)
    for number, roi in rois.items():
        drawn = sorted(slices[number])
        if len(drawn) > 2 and (step := _usual_step([slices[number]])) > 1:
            raise VolumeError(
                f"{path}: {roi.name!r} is drawn on every {step}th slice of its series as a rule; fill in the slices "
                "between in the program that drew it"
            )
        voxels = 0
        for place in drawn:
            name = f"{path}: {roi.name!r} on slice {place}"
            inside = _filled(name, slices[number][place], sides)
            voxels += int(inside.sum())
            index: list[slice | int] = [slice(None)] * 3
            index[axis] = place
            labels.paint(tuple(index), inside, values[number], repr(roi.name))
        if drawn:
            _warn(f"{path}: {roi.name!r}", drawn, _beyond(slices[number], sides)[0], voxels)
    return labels


def _warn(name: str, drawn: list[int], beyond: float, voxels: int) -> None:
    """Warn of what the label map of an ROI lacks."""
    if missing := sorted(set(range(drawn[0], drawn[-1])) - set(drawn)):
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        between = ", ".join(map(str, missing[:LISTED])) + more
        warnings.warn(f"{name} has no contour on slices {between} between others, so it is absent there", stacklevel=2)
    if beyond > 0.5:
        warnings.warn(f"{name} reaches {beyond:.3g} voxels beyond its images, and is cut there", stacklevel=2)
    if not voxels:
        warnings.warn(f"{name} holds the center of no voxel, so it is absent from the label map", stacklevel=2)


def _filled(name: str, contours: list[Placed], sides: tuple[int, int]) -> np.ndarray:
    """The voxels inside the contours of a slice, bool of `sides`.

    Raises: VolumeError for contours that cross each other or are there twice, unless they are XOR contours: the file
    does not say whether what they share is inside.
    """
    shapes = sorted(((fill(one.points, sides), one.crossing) for one in contours), key=lambda one: -int(one[0].sum()))
    inside, seen = np.zeros(sides, bool), set()
    for shape, crossing in shapes:
        shared = inside[shape]
        packed = np.packbits(shape).tobytes()
        if not crossing and shared.size and ((shared.any() and not shared.all()) or packed in seen):
            raise VolumeError(
                f"{name}: two contours cross each other, or are one, and it is not said whether what they share is "
                "inside; correct them in the program that drew them"
            )
        seen.add(packed)
        inside ^= shape
    return inside


def fill(points: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """Mark the voxels whose centers are inside one closed contour, bool of `sides`.

    Each border of the contour changes the side of all voxels of a line from where it crosses the line on.

    Args:
        points: (n, 2) in voxels, the last joined to the first.
    """
    changes = np.zeros((sides[0], sides[1] + 1), np.uint8)
    start, end = points, np.roll(points, -1, axis=0)
    swapped = start[:, 0] > end[:, 0]
    low, high = np.where(swapped[:, None], end, start), np.where(swapped[:, None], start, end)
    first = np.clip(np.ceil(low[:, 0]), 0, sides[0]).astype(int)  # lines from `low` on, and below `high`
    count = np.clip(np.ceil(high[:, 0]), 0, sides[0]).astype(int) - first
    step = max(CROSSINGS // max(sides[0], 1), 1)
    for begin in range(0, len(points), step):
        part = slice(begin, begin + step)
        edges = np.repeat(np.arange(len(points))[part], count[part])
        within = np.arange(len(edges)) - np.repeat(np.cumsum(count[part]) - count[part], count[part])
        lines = first[edges] + within
        run = high[edges] - low[edges]
        crossing = low[edges, 1] + (lines - low[edges, 0]) * run[:, 1] / run[:, 0]
        np.bitwise_xor.at(changes, (lines, np.clip(np.ceil(crossing), 0, sides[1]).astype(int)), 1)
    return np.bitwise_xor.accumulate(changes, axis=1)[:, :-1].astype(bool)
