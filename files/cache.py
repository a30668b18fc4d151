"""The cache on this machine: its folder, its limit, and what is removed first when it is full.

$MEDVOLUME_CACHE (default: ~/.cache/medvolume) holds prepared volumes (`prepared/`, see volumes/prepared/) and copies of
remote files (see `files.remote`). All of it can be made or fetched again. $MEDVOLUME_CACHE_LIMIT bounds it: a size such
as 200GB or 1.5TiB, or a share of its disk such as 50%. The default is half of what the disk would have free without the
cache. What was used least recently is removed first. A file that is open stays readable until it is closed, and the
links of remote files that a running job uses stay (`pin`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .atomic import NO_LOCKS, remove_folder
from .locks import one_at_a_time

try:
    import fcntl
except ImportError:  # Windows: links of remote files are never removed there
    fcntl = None

logger = logging.getLogger(__name__)
LIMIT = "MEDVOLUME_CACHE_LIMIT"
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(%|[KMGTP]?i?B)", re.IGNORECASE)
WRITERS = 64  # processes that may write to one cache between two looks at its size, without exceeding its limit
TOUCHED_AGAIN = 60.0  # seconds
VIEW = re.compile(r"@[0-9a-f]{16}")  # the name of a folder of links to copies of remote files
# Only files of these names are removed: people put other things into the folder, such as their runs.
VOXELS, COPY = re.compile(r"[0-9a-f]{40}\.safetensors"), re.compile(r"[0-9a-f]{32}")
OWN = ("files", "digests", "prepared", "sources")  # folders of no protocol
COPYING = ".copying"  # the file that a process locks while it copies remote files
PINNED = ".in-use"  # suffix of the file beside a folder of links that its jobs lock


def cache_root() -> Path:
    """Return the folder of the cache."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "medvolume"
    return Path(os.environ.get("MEDVOLUME_CACHE") or usual).expanduser().resolve()


def parse_size(text: str, disk: int) -> int:
    """Return the bytes that a text such as "200GB", "1.5 TiB" or "50%" (of a `disk` of so many bytes) says.

    Raises: ValueError for any other text.
    """
    match = SIZE.fullmatch(text.strip())
    if match is None or (match[2] == "%" and float(match[1]) > 100):
        raise ValueError(
            f"${LIMIT} is {text!r}; give a size such as 200GB or 1.5TiB, or a share of the disk such as 50%"
        )
    number, unit = float(match[1]), match[2].upper()
    if unit == "%":
        return int(number / 100 * disk)
    return int(number * (1024 if "I" in unit else 1000) ** "BKMGTP".index(unit[0]))


def cache_limit(root: Path, used: int) -> int:
    """Return how many bytes the cache in `root`, which holds `used` bytes, may hold.

    Raises: ValueError if $MEDVOLUME_CACHE_LIMIT is not a size.
    """
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    disk = shutil.disk_usage(there)
    text = os.environ.get(LIMIT)
    return parse_size(text, disk.total) if text else (disk.free + used) // 2


def touch(path: Path) -> None:
    """Note that a file of the cache is used now, at most once a minute."""
    now = time.time()
    if now - _touched.get(path, 0.0) < TOUCHED_AGAIN:
        return
    _touched[path] = now
    with contextlib.suppress(OSError):  # a cache that others own, or on a disk that is read-only
        os.utime(path, ns=(int(now * 1e9), path.stat().st_mtime_ns))


_touched: dict[Path, float] = {}


def pin(view: Path) -> None:
    """Keep a folder of links to copies of remote files from being removed, until this process ends."""
    if view not in _pinned and (held := _shared(view.with_name(f".{view.name}{PINNED}"))) is not None:
        os.utime(held.name)
        _pinned[view] = held


_pinned: dict[Path, BinaryIO] = {}


@contextlib.contextmanager
def copying() -> Iterator[None]:
    """Keep all copies of remote files from being removed during the block: new ones have no links yet."""
    held = _shared(cache_root() / COPYING)
    try:
        yield
    finally:
        if held is not None:
            held.close()


def _shared(lock: Path) -> BinaryIO | None:
    """Hold a lock that others may hold too, until the file is closed; None if the file system cannot lock."""
    while fcntl is not None:
        file = lock.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
            if lock.exists() and os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                return file
        except OSError as error:
            file.close()
            if error.errno not in NO_LOCKS:
                raise
            return None
        file.close()  # its folder of links was just removed, and the lock with it
    return None


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Yield whether no process holds the lock, and keep it from being taken during the block."""
    if fcntl is None:
        yield False
        return
    with lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # a job uses it, or the file system cannot lock
            yield False
            return
        yield True


class Removable(NamedTuple):
    """A file, or a folder of links, that may be removed: when it was used last, and its bytes (0 of links)."""

    used: float
    path: Path
    size: int


@contextlib.contextmanager
def room_for(nbytes: int) -> Iterator[bool]:
    """Make room for `nbytes` more bytes, and yield whether there is room. Write them in the block.

    While the cache is nearly full, one process writes at a time, so that all of them together stay below the limit.

    Raises: ValueError if $MEDVOLUME_CACHE_LIMIT is not a size; OSError if the cache cannot be written to.
    """
    root, limit = cache_root(), os.environ.get(LIMIT)
    with _guard:
        seen = _seen.get(root)
        roomy = seen is not None and seen.limit == limit and (seen.written + nbytes) * WRITERS <= seen.room
        if seen is not None and roomy:
            seen.written += nbytes
    if roomy:
        yield True
        return
    root.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(root / ".room.lock"):
        room = _make_room(root, nbytes)
        with _guard:
            _seen[root] = _Seen(room, nbytes, limit)
        yield room >= nbytes


@dataclass
class _Seen:
    """What this process knows of a cache: the room at its last look, the bytes that it wrote since, and the limit."""

    room: int
    written: int
    limit: str | None


_seen: dict[Path, _Seen] = {}
_guard = threading.Lock()


def _make_room(root: Path, nbytes: int) -> int:
    """Remove what was used least recently until `nbytes` more fit. Return the bytes that may be written now."""
    used, removable = contents(root)
    limit = cache_limit(root, used)
    if nbytes > limit:
        return limit - used
    for one in sorted(removable):
        if used + nbytes <= limit:
            break
        used -= _remove(root, one)
    return limit - used


def contents(root: Path) -> tuple[int, list[Removable]]:
    """Return the bytes that the cache holds, and what may be removed of it."""
    prepared = _files(root / "prepared", VOXELS)
    used = sum(one.size for one in [*prepared, *_files(root / "files", COPY)])
    if root.is_dir():
        for place in (one for one in root.iterdir() if one.name not in OWN and one.is_dir() and not one.is_symlink()):
            for folder, folders, _ in os.walk(place):
                views = [name for name in folders if VIEW.fullmatch(name)]
                folders[:] = [name for name in folders if not VIEW.fullmatch(name) and not name.startswith(".")]
                prepared += [Removable(_last_use(Path(folder, name)), Path(folder, name), 0) for name in views]
    return used, prepared


def _files(folder: Path, name: re.Pattern[str]) -> list[Removable]:
    """Return the files of a folder that have such a name."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # another process removed it meanwhile
                if name.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    found.append(Removable(max(status.st_atime, status.st_mtime), Path(entry.path), status.st_size))
    return found


def _last_use(view: Path) -> float:
    lock = view.with_name(f".{view.name}{PINNED}")
    try:
        return (lock if lock.exists() else view).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove(root: Path, one: Removable) -> int:
    """Remove a file, or links and the copies that nothing else links to. Return the bytes that became free."""
    if not VIEW.fullmatch(one.path.name):
        one.path.unlink(missing_ok=True)
        logger.info("%s: removed from the cache, which is full", one.path)
        return one.size
    lock = one.path.with_name(f".{one.path.name}{PINNED}")
    with _alone(root / COPYING) as nobody_copies, _alone(lock) as unused:
        if not (nobody_copies and unused):
            return 0
        remove_folder(one.path)
        lock.unlink(missing_ok=True)
        freed = 0
        for copy in _files(root / "files", COPY):
            if copy.path.stat().st_nlink == 1:
                copy.path.unlink(missing_ok=True)
                (root / "digests" / copy.path.name).unlink(missing_ok=True)
                freed += copy.size
    logger.info("%s: removed from the cache, which is full", one.path)
    return freed
