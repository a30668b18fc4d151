"""How many volumes may be prepared at a time: as many as a share of the free memory holds, by their files' headers.

A volume of unknown size counts by the bytes of its files. One volume at a time may always be prepared, whatever it
takes: what no memory holds is refused by its reader.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path

import psutil

from volumes.data.cases import Case
from volumes.data.config import DataConfig
from volumes.formats import metaimage, nrrd
from volumes.formats.dicom import series_size
from volumes.formats.nifti import open_nifti
from volumes.formats.raw import memory_bytes
from volumes.formats.read import is_nifti, volume_parts
from volumes.volume import VolumeError

SHARE = 0.5  # of the free memory, for all processes that share the work on this machine
VOXEL_BYTES = 30  # of memory that preparing takes at most for a voxel of a file or of the result
POLL_SECONDS = 0.2


class MemoryShare:
    """The memory in which one process prepares volumes.

    Args:
        processes: of this machine that do the same at the same time.
    """

    def __init__(self, processes: int) -> None:
        self.room = int(SHARE * min(memory_bytes(), psutil.virtual_memory().available) / max(processes, 1))
        self._taken, self._changed = 0, threading.Condition()

    @contextmanager
    def take(self, nbytes: int, stopped: threading.Event) -> Iterator[None]:
        """Wait until `nbytes` fit, or nothing else is taken, and keep them until the end of the block.

        Raises: CancelledError if `stopped` is set before.
        """
        with self._changed:
            while self._taken and self._taken + nbytes > self.room:
                if stopped.is_set():
                    raise CancelledError("stopped before its volume was read")
                self._changed.wait(POLL_SECONDS)
            self._taken += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._taken -= nbytes
                self._changed.notify_all()


def processes_here() -> int:
    """Return how many processes `accelerate launch` or `torchrun` started on this machine; 1 without them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def preparing_bytes(case: Case, config: DataConfig) -> int:
    """Return the memory that preparing a case takes, from the headers of its files; 0 for files that cannot be read,
    because reading their voxels says what is wrong.
    """
    if case.phantom is not None:
        assert config.phantom is not None
        return VOXEL_BYTES * math.prod(config.phantom.shape)
    voxels = 0
    for path in [*case.images.values(), *([] if case.mask is None else [case.mask])]:
        try:
            count, size = _header(path)
        except (VolumeError, OSError):
            continue
        resampled = 0.0 if config.spacing is None else count * (size / math.prod(config.spacing))
        # A header may say that its voxels are infinite; the reader says what is wrong with it.
        voxels += max(count, int(resampled)) if math.isfinite(resampled) else count
    return VOXEL_BYTES * voxels


def _header(path: Path) -> tuple[int, float]:
    """Return how many voxels a volume has in all channels, and the mm^3 of one, from its header; of a file whose header
    does not tell, its bytes and 0.

    Raises: VolumeError or OSError for files that cannot be read.
    """
    if is_nifti(path):
        header = open_nifti(path, check=False)[1].header
        return math.prod(map(int, header.get_data_shape())), math.prod(map(float, header.get_zooms()[:3]))
    if path.is_dir():
        return series_size(path)
    suffix = path.suffix.lower()
    if suffix in (".nrrd", ".nhdr"):
        return nrrd.stored_size(path)
    if suffix in (".mha", ".mhd"):
        return metaimage.stored_size(path)
    return sum(part.stat().st_size for part in volume_parts(path)), 0.0
