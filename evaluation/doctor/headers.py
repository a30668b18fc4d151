"""What reading a data set will take, from the headers of its files alone."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from volumes import Case, VolumeError, volume_parts
from volumes.formats.dicom import series_grid
from volumes.formats.nifti import open_nifti
from volumes.formats.raw import memory_bytes
from volumes.formats.read import is_nifti
from volumes.prepared.preparation import READERS

VOXEL_BYTES = 40  # of memory that examining a voxel takes: as stored, prepared, and sorted in float64
ROOM = 0.5  # of the memory of this process, for the volumes that are examined at a time
LONG = 60.0  # seconds: of a shorter examination nothing is said
SHARE = 0.02  # of the voxels, after which the time is told


@dataclass(frozen=True)
class CaseSize:
    """Bytes of a case's image files, and its voxels in all channels; None where only reading the file tells."""

    file_bytes: int
    voxels: int | None


def read_sizes(cases: Sequence[Case], on_case: Callable[[str], object] = lambda name: None) -> list[CaseSize]:
    """Read the headers of all cases in threads. `on_case(name)` is called after each. Files that cannot be read count
    as empty, because reading their voxels says what is wrong."""
    sizes = []
    with ThreadPoolExecutor(READERS) as readers:
        for case, size in zip(cases, readers.map(_size, cases), strict=True):
            sizes.append(size)
            on_case(case.name)
    return sizes


def _size(case: Case) -> CaseSize:
    file_bytes, voxels = 0, []
    for path in case.images.values():
        try:
            file_bytes += sum(part.stat().st_size for part in volume_parts(path))
            voxels.append(_voxels(path))
        except (VolumeError, OSError):
            continue
    known = [count for count in voxels if count is not None]
    return CaseSize(file_bytes, sum(known) if len(known) == len(voxels) else None)


def _voxels(path: Path) -> int | None:
    if is_nifti(path):
        return math.prod(map(int, open_nifti(path, check=False)[1].shape))
    return math.prod(series_grid(path).shape) if path.is_dir() else None


def examined_at_once(sizes: Sequence[CaseSize]) -> int:
    """Return how many cases to examine at a time: `READERS`, or fewer where the largest are too much for the memory."""
    largest = max((size.voxels or size.file_bytes for size in sizes), default=0)
    return max(min(READERS, int(ROOM * memory_bytes() / max(VOXEL_BYTES * largest, 1))), 1)


def describe_sizes(sizes: Sequence[CaseSize]) -> str:
    """Return the amount to read in one sentence: "headers: 2000 cases, 95.3 GiB in files, 122 GiB as float32"."""
    counts = [size.voxels for size in sizes]
    said = f"headers: {len(sizes)} cases, {sum(size.file_bytes for size in sizes) / 2**30:.3g} GiB in files"
    if not any(counts) or None in counts:
        return said
    return f"{said}, {4 * sum(filter(None, counts)) / 2**30:.3g} GiB of voxels as float32"


class Forecast:
    """Tells once how long an examination will take, from the share of the voxels that is done.

    Args:
        say: prints a message.
        clock: gives seconds.
    """

    def __init__(self, sizes: Sequence[CaseSize], say: Callable[[str], object], clock: Callable[[], float]) -> None:
        self.weights = [max(size.voxels or size.file_bytes, 1) for size in sizes]
        self.say, self.clock = say, clock
        self.start, self.done, self.number, self.told = clock(), 0, 0, False

    def case_done(self) -> None:
        """Note that the next case is done."""
        self.done, self.number = self.done + self.weights[self.number], self.number + 1
        share = self.done / sum(self.weights)
        if self.told or self.number < READERS or share < SHARE:
            return
        self.told = True
        seconds = (self.clock() - self.start) / share
        if seconds > LONG:
            self.say(f"examining all {len(self.weights)} cases takes about {seconds / 60:.0f} minutes")
