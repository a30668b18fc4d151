"""The folder of prepared volumes: `prepared/` in the cache, shared by all runs and processes of one account, and by the
group that may write to the cache.

    prepared/<key>.safetensors      the voxels; removed when the cache is full, and prepared again when they are read
    prepared/<key>.json             what is known without them, a few kB; stays
    prepared/claims/<key>           locked by the process that prepares it
    generated/                      the same of generated volumes, which are read for an evaluation and not again: they
                                    push nothing else out, and are removed first, with what is known of them

A process takes what no other one prepares. So threads, ranks, jobs and machines share the work without knowing of each
other, whether they see one cache or not, and a preparation that was killed continues.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from files.atomic import NO_LOCKS, atomic_files, remove_leftovers
from files.cache import GENERATED, LIMIT, PREPARED, cache_root, file_mode, make_folder, touch
from files.paths import open_regular
from files.room import room_for
from volumes.data.cases import Case

from .case import CaseFacts
from .entry import MAX_FACTS, Arrays, Box, Part, facts_from, facts_text, read_part, write_arrays
from .keys import forget_digests

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.2  # while another process prepares a volume


class PreparedStore:
    """Reads and writes prepared volumes. Remembers which whole ones this process has checked.

    Args:
        generated: whether they are generated volumes.
    Attributes:
        wanted: bytes of the volumes that are read from here, by key.
    """

    def __init__(self, *, generated: bool = False) -> None:
        self.generated = generated
        self.folder = cache_root() / (GENERATED if generated else PREPARED)
        self.wanted: dict[str, int] = {}
        self._checked: dict[str, tuple[int, ...]] = {}
        self._said = False
        _in_use.add(self)

    def wanted_of_process(self) -> dict[str, int]:
        """Return the bytes of the volumes that this process reads from this folder, by key: those of all data sets."""
        return {key: size for one in [*_in_use] if one.folder == self.folder for key, size in one.wanted.items()}

    def has_all(self) -> bool:
        """Return whether the voxels of all volumes that this process reads from this folder are there."""
        return all(self._holds(key, size) for key, size in self.wanted_of_process().items())

    def voxels(self, key: str) -> Path:
        """Return the file of voxels."""
        return self.folder / f"{key}.safetensors"

    def clean(self) -> None:
        """Remove what killed processes left."""
        try:
            make_folder(self.folder)
            remove_leftovers(self.folder)
            forget_digests()
        except OSError as error:
            self.cannot_write(error)

    def find(self, key: str, case: Case) -> CaseFacts | None:
        """Return what is known of a volume; None if it was not prepared yet."""
        path = self.folder / f"{key}.json"
        try:
            with open_regular(path) as file:
                return facts_from(file.read(MAX_FACTS).decode(), key, case)
        except (FileNotFoundError, NotADirectoryError, PermissionError):  # the last: another user's
            return None
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("%s: damaged (%s); %s is prepared again", path, error, case.name)
            with suppress(OSError):
                path.unlink()
            return None

    def has_voxels(self, key: str, facts: CaseFacts) -> bool:
        """Return whether the voxels are there, in their length."""
        return self._holds(key, facts.nbytes)

    def _holds(self, key: str, nbytes: int) -> bool:
        try:
            return self.voxels(key).stat().st_size > nbytes
        except OSError:
            return False

    @contextmanager
    def claim(self, key: str, *, wait: bool, stopped: threading.Event) -> Iterator[bool]:
        """Yield whether no other process prepares this volume, and keep others from it meanwhile.

        Args:
            wait: whether to wait until no other process does, or until `stopped` is set.
        Raises: CancelledError if it is set before.
        """
        place = self.folder / "claims" / key
        lock = FileLock(place, mode=file_mode(), fallback_to_soft=False)
        try:
            make_folder(place.parent)
            while not _acquired(lock, POLL_SECONDS if wait else 0):
                if not wait:
                    yield False
                    return
                if stopped.is_set():
                    raise CancelledError(f"{key}: another process still prepares it")
        except OSError as error:  # then some volumes are prepared twice
            if error.errno not in NO_LOCKS:
                self.cannot_write(error)
            yield True
            return
        try:
            yield True
        finally:
            place.unlink(missing_ok=True)
            lock.release()

    def put(self, key: str, case: Case, facts: CaseFacts, arrays: Arrays) -> bool:
        """Write a volume, and return whether its voxels are stored: not if they exceed the limit of the cache, or if
        the cache cannot be written to.
        """
        known, voxels = self.folder / f"{key}.json", self.voxels(key)
        try:
            with room_for(facts.nbytes + 1024, generated=self.generated) as room:
                fits = bool(room)
                files = [voxels, known] if fits else [] if self.generated else [known]
                with atomic_files(*files, mode=file_mode()) if files else nullcontext([]) as unfinished:
                    if fits:
                        write_arrays(unfinished[0], key, facts, arrays)
                    if files:
                        unfinished[-1].touch(0o600)
                        unfinished[-1].write_text(facts_text(facts, key, case), encoding="utf-8")
            if not fits:
                self.say(
                    f"prepared volumes of {facts.nbytes / 2**20:.3g} MiB do not fit into the limit of the cache "
                    f"{self.folder.parent}; raise ${LIMIT}"
                )
            return fits
        except OSError as error:
            self.cannot_write(error)
            return False

    def read(self, key: str, facts: CaseFacts, box: Box | None = None) -> Part:
        """Read a box of a volume, or all of it; a whole one is compared with its checksum, once per process.

        Raises: FileNotFoundError if its voxels were removed; DamagedEntry.
        """
        path = self.voxels(key)
        touch(path)
        try:
            found = path.stat()
        except NotADirectoryError as error:
            raise FileNotFoundError(str(error)) from error
        if box is not None:
            return read_part(path, key, facts, box)
        stamp = found.st_ino, found.st_size, found.st_mtime_ns
        part = read_part(path, key, facts, check=self._checked.get(key) != stamp)
        self._checked[key] = stamp
        return part

    def cannot_write(self, error: OSError) -> None:
        """Say once that the cache cannot be written to, and what follows."""
        self.say(
            f"prepared volumes cannot be written to {self.folder} ({error.strerror or error}); set MEDVOLUME_CACHE to "
            "a folder with room"
        )

    def say(self, message: str) -> None:
        """Warn once that volumes are not stored."""
        if not self._said:
            self._said = True
            logger.warning(
                "%s. Meanwhile they are kept in memory, as far as it goes, or prepared at each read", message
            )


_in_use: weakref.WeakSet[PreparedStore] = weakref.WeakSet()


def _acquired(lock: FileLock, seconds: float) -> bool:
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    return True
