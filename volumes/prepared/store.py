"""The folder of prepared volumes: `prepared/` in the cache, shared by all runs, processes and users of one account.

    prepared/<key>.safetensors      the voxels; removed when the cache is full, and prepared again when they are read
    prepared/<key>.json             what is known without them, a few kB; stays
    prepared/claims/<key>           locked by the process that prepares it

A process takes what no other one prepares. So threads, ranks, jobs and machines share the work without knowing of each
other, whether they see one cache or not, and a preparation that was killed continues.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from files.atomic import NO_LOCKS, atomic_files, remove_leftovers
from files.cache import LIMIT, cache_root, room_for, touch
from files.paths import open_regular
from volumes.data.cases import Case

from .case import CaseFacts
from .entry import MAX_FACTS, Arrays, Box, Part, facts_from, facts_text, read_part, write_arrays

logger = logging.getLogger(__name__)


class PreparedStore:
    """Reads and writes prepared volumes. Remembers which whole ones this process has checked."""

    def __init__(self) -> None:
        self.folder = cache_root() / "prepared"
        self._checked: dict[str, tuple[int, ...]] = {}
        self._said = False

    def voxels(self, key: str) -> Path:
        """Return the file of voxels."""
        return self.folder / f"{key}.safetensors"

    def clean(self) -> None:
        """Remove what killed processes left."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            remove_leftovers(self.folder)
        except OSError as error:
            self.cannot_write(error)

    def find(self, key: str, case: Case) -> CaseFacts | None:
        """Return what is known of a volume; None if it was not prepared yet."""
        path = self.folder / f"{key}.json"
        try:
            with open_regular(path) as file:
                return facts_from(file.read(MAX_FACTS).decode(), key, case)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("%s: damaged (%s); %s is prepared again", path, error, case.name)
            with suppress(OSError):
                path.unlink()
            return None

    def has_voxels(self, key: str, facts: CaseFacts) -> bool:
        """Return whether the voxels are there, in their length."""
        try:
            return self.voxels(key).stat().st_size > facts.nbytes
        except OSError:
            return False

    @contextmanager
    def claim(self, key: str, *, wait: bool) -> Iterator[bool]:
        """Yield whether no other process prepares this volume, and keep others from it meanwhile.

        Args:
            wait: whether to wait until no other process does.
        """
        place = self.folder / "claims" / key
        lock = FileLock(place, mode=0o600, fallback_to_soft=False)
        try:
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
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
            with room_for(facts.nbytes + 1024) as fits:
                files = atomic_files(voxels, known) if fits else atomic_files(known)
                with files as unfinished:
                    if fits:
                        write_arrays(unfinished[0], key, facts, arrays)
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
