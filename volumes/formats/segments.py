"""What DICOM-SEG and RTSTRUCT have in common: segments that become labels, and the grid of the series that they were
drawn on.

Arrays are (X, Y, Z) in RAS+ order.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from volumes.labels import segment_key
from volumes.volume import SourceGrid, Volume, VolumeError, describe_grid

from .dicom import is_dicom, segmentation_kind, series_files, series_grid
from .nifti import canonical_grid
from .raw import check_room

SegmentValues = Mapping[str | int, int]
OFF_GRID = 0.1  # voxels that a frame or a contour may be away from those of its series: positions are rounded in files
MOST_FOLDERS = 4096  # searched for a series
LOOKED_AT = 8  # files of a folder, to tell which series it holds
FAR = 1e6  # mm: no scan is as large
LISTED = 12  # segments in a message


@dataclass(frozen=True)
class Reference:
    """What a segmentation object says of the images that it was drawn on.

    Attributes:
        series: SeriesInstanceUIDs.
        frame: the FrameOfReferenceUID; None where it is not said.
    """

    series: tuple[str, ...]
    frame: str | None


class OverlapError(VolumeError):
    """Segments of different labels overlap. Reading fewer of them may help."""


class LabelGrid:
    """A label map on the grid of a series, which segments are painted into.

    Attributes:
        labels: int16 (X, Y, Z), 0 where no segment is.
    """

    def __init__(self, name: str, grid: Volume):
        check_room(name, grid.shape, np.dtype(np.int16).itemsize)
        self.name, self.grid = name, grid
        self.labels = np.zeros(grid.shape, np.int16)
        self._segments: dict[int, list[str]] = defaultdict(list)  # by label value
        self._overlaps: dict[tuple[str, str], int] = defaultdict(int)  # voxels

    def paint(self, index: tuple[slice | int, ...], inside: np.ndarray, value: int, segment: str) -> None:
        """Give the voxels of a part of the grid that are `inside` a segment its value. 0 paints nothing."""
        if value == 0:
            return
        part = self.labels[index]
        taken = part[inside]
        for other in np.unique(taken[(taken != 0) & (taken != value)]).tolist():
            pair = " and ".join(self._segments[other]), segment
            self._overlaps[pair] += int((taken == other).sum())
        part[inside] = value
        if segment not in self._segments[value]:
            self._segments[value].append(segment)

    def volume(self) -> Volume:
        """Return the label map (1, X, Y, Z). Raises: OverlapError for segments of different labels that overlap."""
        if self._overlaps:
            (first, second), count = max(self._overlaps.items(), key=lambda item: item[1])
            raise OverlapError(
                f"{self.name}: {first} and {second} overlap in {count} voxels, and a voxel of a label map has one "
                "label; read them as one label with label_map, leave one out of the names, or cut one out of the other "
                "in the program that drew them"
            )
        return self.grid.replace(self.labels[None])


def chosen_values(name: str, segments: Mapping[int, str], names: SegmentValues | None) -> dict[int, int]:
    """Choose the label value of each segment that is read.

    Args:
        segments: {number: name} of all segments of the file.
        names: {name or number: label value}, see `volumes.labels.segment_values`; None reads all by their numbers.

    Raises: VolumeError for a file without segments, or without one of these names, and for numbers that are not
    labels. Warns: of segments that no name is of: they are left out.
    """
    if not segments:
        raise VolumeError(f"{name}: holds no segments")
    if names is None:
        limits = np.iinfo(np.int16)
        if wrong := [number for number in segments if not 0 < number <= limits.max]:
            raise VolumeError(
                f"{name}: {segments[wrong[0]]!r} has the number {wrong[0]}, which is not a label (1 to {limits.max}); "
                f"read it by its name: names={{{segments[wrong[0]]!r}: 1}}"
            )
        return {number: number for number in segments}
    names = {segment_key(key) if isinstance(key, str) else key: value for key, value in names.items()}
    found = {}
    for number, text in segments.items():
        value = names.get(segment_key(text), names.get(number))
        if value is not None:
            found[number] = value
    if not found:
        first = next(iter(segments.values()))
        known = ", ".join(f"{key!r}" for key in names)
        raise VolumeError(
            f"{name}: holds {listed(segments)}, none of which is called as a label ({known}); say which is which by "
            f"label_map, such as data.label_map: {{{first}: 1}}"
        )
    if left := {number: text for number, text in segments.items() if number not in found}:
        warnings.warn(f"{name}: segments that no label is called as are left out: {listed(left)}", stacklevel=2)
    return found


def listed(segments: Mapping[int, str]) -> str:
    """Write segments by number and name, for messages."""
    text = ", ".join(f"{number} {name!r}" for number, name in [*segments.items()][:LISTED])
    return text + (f" and {len(segments) - LISTED} more" if len(segments) > LISTED else "")


def grid_for(
    path: Path,
    reference: Reference,
    like: Volume | None,
    misfit: Callable[[Volume, bool], str | None],
    units: str | None = None,
    own: Callable[[], SourceGrid] | None = None,
    single: bool = False,
) -> Volume:
    """Find the grid that a segmentation object lies on.

    That of `like` if it fits; else that of the series that it names, see `find_series`; else its own. An object on one
    slice does not tell how far slices are apart, so the series that it names comes first if it is there once.

    Args:
        misfit: says why the object does not lie on a grid; None where it does. Its second argument is true for the
            object's own series, whose spacing is right.
        own: the object's own grid.
        single: the object lies on one slice.

    Returns: a volume of one channel of zeros that take no memory.
    Raises: VolumeError if there is none, or if the series does not fit.
    """
    why, fitting = "", None
    if like is not None:
        reason = _other_frame(reference, like) or misfit(like, False)
        if reason is None:
            fitting = like.replace(_nothing(like.shape))
            if not single:
                return fitting
        why = "" if reason is None else f"; on the image's grid ({describe_grid(like)}) it does not lie: {reason}"
    folders = find_series(path, reference.series)
    if fitting is not None and len(folders) != 1:
        return fitting
    if len(folders) > 1:
        raise VolumeError(
            f"{path}: the series that it was drawn on is there {len(folders)} times: {folders[0]} and {folders[1]}; "
            "keep one of them beside it"
        )
    if folders:
        grid = grid_volume(series_grid(folders[0], units))
        if reason := _other_frame(reference, grid) or misfit(grid, True):
            raise VolumeError(f"{path}: does not lie on its series {folders[0]}: {reason}")
        return grid
    if own is not None:
        try:
            grid = grid_volume(own())
        except VolumeError as error:
            raise VolumeError(f"{error}{why}") from error
        assert misfit(grid, True) is None, path
        return grid
    named = f"the series {reference.series[0]}" if reference.series else "no series"
    raise VolumeError(
        f"{path}: was drawn on {named}, which is not in {path.parent}, the folder above it, or below these{why}; put "
        "the folder of that series beside it, or read it with its image (data.images, like=)"
    )


def _other_frame(reference: Reference, grid: Volume) -> str | None:
    frame = None if grid.source is None else grid.source.frame
    if frame is None or reference.frame is None or frame == reference.frame:
        return None
    return f"its frame of reference is {reference.frame}, that of the images {frame}: another scan, or registered"


def grid_volume(source: SourceGrid) -> Volume:
    """Return a volume of zeros, which take no memory, on a grid."""
    shape, affine = canonical_grid(source)
    return Volume(_nothing(shape), affine, source)


def _nothing(shape: Sequence[int]) -> np.ndarray:
    return np.broadcast_to(np.int16(0), (1, *shape))


def find_series(path: Path, series: Sequence[str]) -> list[Path]:
    """Find the folders of these series near a file: in its own folder and below it; if there are none, in the folder
    above and below that. At most `MOST_FOLDERS` folders are looked at.
    """
    if not series:
        return []
    home = path.resolve().parent
    tops = [home] if home.parent == home.parent.parent else [home, home.parent]  # not from the root of a disk
    for top in tops:
        folders = itertools.islice(_folders(top), MOST_FOLDERS)
        if found := [folder for folder in folders if series_of(folder) & set(series)]:
            return found
    return []


def _folders(top: Path) -> Iterator[Path]:
    """Yield `top` and all folders below it, without hidden ones and links."""
    for place, names, _ in os.walk(top):
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield Path(place)


def series_of(folder: Path) -> frozenset[str]:
    """Read the SeriesInstanceUIDs of the first images in a folder, which holds one series as a rule."""
    try:
        return _series_of(folder, folder.stat().st_mtime_ns)
    except (OSError, VolumeError):  # a folder that cannot be read, or that holds a pipe, is not that of a series
        return frozenset()


@lru_cache(MOST_FOLDERS)
def _series_of(folder: Path, changed: int) -> frozenset[str]:
    """Read `series_of` a folder as it is at a time."""
    found: set[str] = set()
    images = (file for file in series_files(folder) if is_dicom(file) and segmentation_kind(file) is None)
    for file in itertools.islice(images, LOOKED_AT):
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
            found.add(str(header.get("SeriesInstanceUID")))
        except Exception:  # of many kinds: a damaged file is of no series that is looked for
            continue
    return frozenset(found)


def sequence(item: Any, keyword: str) -> list[Any]:
    """Return the items of a DICOM sequence, none if it is absent."""
    return list(item.get(keyword) or [])


def text(item: Any, keyword: str) -> str:
    """Return a DICOM text without white space at its ends, empty if it is absent."""
    return str(item.get(keyword) or "").strip()


def finite(name: str, what: str, values: Any, count: int | None = None) -> np.ndarray:
    """Read the decimal numbers of a DICOM attribute. Raises: VolumeError unless they are finite, below `FAR`, and as
    many as expected.
    """
    if isinstance(values, bytes):  # too long for its VR in an explicit syntax, so that it was written as UN
        values = values.decode("ascii", "replace").split("\\")
    try:
        numbers = np.array([float(value) for value in ([] if values is None else values)])
    except (TypeError, ValueError) as error:
        raise VolumeError(f"{name}: {what} is not a list of numbers: {error}") from error
    if not len(numbers) or (count is not None and len(numbers) != count) or not (np.abs(numbers) < FAR).all():
        expected = "finite numbers" if count is None else f"{count} finite numbers"
        raise VolumeError(f"{name}: {what} is {str(numbers.tolist())[:80]}; expected {expected}")
    return numbers
