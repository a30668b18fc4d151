"""The cache on this machine: its folder, who may read it, its limit, and what is removed first when it is full.

$MEDVOLUME_CACHE (default: ~/.cache/medvolume) holds prepared volumes (`prepared/`, those of generated volumes in
`generated/`, see volumes/prepared/), copies of remote files (see `files.remote`), and copies of remote latents. All of
it can be made or fetched again. $MEDVOLUME_CACHE_LIMIT bounds it: a size such as 200GB or 1.5TiB, or a share of its
disk such as 50%. The default is half of what the disk would have free without the cache. Generated volumes are removed
first, then what was used least recently. A file that is open stays readable until it is closed, and the links of remote
files that a running job uses stay (`pin`).

It holds patients' data: its files can be read by this user alone, unless its folder is set up for a group (chmod 2770),
which then shares it (`make_folder`, `file_mode`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .atomic import NO_LOCKS, remove_folder, remove_leftovers

try:
    import fcntl
except ImportError:  # Windows: links of remote files are never removed there
    fcntl = None

logger = logging.getLogger(__name__)
LIMIT = "MEDVOLUME_CACHE_LIMIT"
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(%|[KMGTP]?i?B)", re.IGNORECASE)
TOUCHED_AGAIN = 60.0  # seconds
VIEW = re.compile(r"@[0-9a-f]{16}")  # the name of a folder of links to copies of remote files
# Only files of these names are removed: people put other things into the folder, such as their runs.
VOXELS, COPY = re.compile(r"[0-9a-f]{40}\.safetensors"), re.compile(r"[0-9a-f]{32}")
LATENTS = re.compile(r"\d+_\d+\.safetensors")
OF_URL = ".copied"  # file in a folder of copies of remote latents; other folders of latents are no copies
PREPARED, GENERATED = "prepared", "generated"
OWN = ("files", "digests", PREPARED, GENERATED, "sources", "room")  # folders that are no protocol's
COPYING = ".copying"  # the file that a process locks while it copies remote files
PINNED = ".in-use"  # suffix of the file beside a folder of links that its jobs lock


def cache_root() -> Path:
    """Return the folder of the cache."""
    usual = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "medvolume")
    named = os.environ.get("MEDVOLUME_CACHE") or usual
    return _resolved(named, os.environ.get("HOME"), "" if named.startswith(("/", "~")) else os.getcwd())


@cache
def _resolved(path: str, home: str | None, working: str) -> Path:
    """Follow the links of a path, once: a start asks for the cache several times a volume."""
    return Path(path).expanduser().resolve()


def make_folder(folder: Path) -> None:
    """Make a folder of the cache, and those above it.

    Only this user may enter them, or the group that shares the cache (`file_mode`). A folder that is there keeps its
    rights.
    """
    root = cache_root()
    root.parent.mkdir(parents=True, exist_ok=True)
    root.mkdir(mode=0o700, exist_ok=True)
    for place in reversed([folder, *folder.parents]):
        if not place.exists():
            with contextlib.suppress(FileExistsError):  # another process was first
                place.mkdir(mode=0o700)
                place.chmod(folder_mode())


def folder_mode() -> int:
    """Return the rights of new folders in the cache, see `file_mode`."""
    return 0o2770 if _shared_by_group() else 0o700


def file_mode() -> int:
    """Return the rights of files in the cache: of this user alone, or of the group that shares it.

    A group shares it if it may write to its folder and owns what is made there (setgid, chmod 2770). Only the first
    says nothing: with umask 002 every new folder is such.
    """
    return 0o660 if _shared_by_group() else 0o600


def _shared_by_group() -> bool:
    try:
        mode = cache_root().stat().st_mode
    except OSError:
        return False
    return bool(mode & stat.S_IWGRP and mode & stat.S_ISGID)


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


def mark(path: Path) -> None:
    """Make an empty file of the cache, or note that it is used now."""
    _open(path).close()
    os.utime(path)


def pin(view: Path) -> None:
    """Keep a folder of links to copies of remote files from being removed, until this process ends."""
    if view not in _pinned and (held := _shared(_pin_of(view))) is not None:
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
        file = _open(lock)
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


def _open(path: Path) -> BinaryIO:
    file = path.open("ab")
    with contextlib.suppress(PermissionError):  # another user's, of a shared cache
        path.chmod(file_mode())
    return file


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[bool | None]:
    """Yield whether no process holds the lock, and keep it from being taken during the block.

    None if nobody can tell: the file system cannot lock, or the file cannot be opened (another user's, or a cache that
    is read-only).
    """
    try:
        file = None if fcntl is None else _open(lock)
    except OSError:
        file = None
    if fcntl is None or file is None:
        yield None
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unused = True
        except OSError as error:
            unused = None if error.errno in NO_LOCKS else False
        yield unused


class Removable(NamedTuple):
    """A file, or a folder of links, that may be removed.

    In the order of removal: generated volumes first (`kept` is False), then by the time of last use. `size` is in bytes
    (0 of links).
    """

    kept: bool
    used: float
    path: Path
    size: int


def contents(root: Path) -> tuple[int, list[Removable]]:
    """Return the bytes that the cache holds, and what may be removed of it."""
    removable = _files(root / PREPARED, VOXELS)
    removable += [one._replace(kept=False) for one in _files(root / GENERATED, VOXELS)]
    views, latents = _places(root)
    for folder in latents:
        removable += _files(folder, LATENTS)
    used = sum(one.size for one in [*removable, *_files(root / "files", COPY)])
    return used, removable + [Removable(True, _last_use(view), view, 0) for view in views]


def _places(root: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders of links to copies of remote files, and the folders of copies of remote latents."""
    views, latents = [], []
    if root.is_dir():
        for place in (one for one in root.iterdir() if one.name not in OWN and one.is_dir() and not one.is_symlink()):
            for folder, folders, files in os.walk(place):
                views += [Path(folder, name) for name in folders if VIEW.fullmatch(name)]
                folders[:] = [name for name in folders if not VIEW.fullmatch(name) and not name.startswith(".")]
                if OF_URL in files:
                    latents.append(Path(folder))
    return views, latents


def remove_unfinished(root: Path) -> None:
    """Remove what killed processes left of files that they wrote or copied; `contents` does not count it."""
    for folder in (root / PREPARED, root / GENERATED, root / "files", root / "digests", *_places(root)[1]):
        remove_leftovers(folder)


def pinned_bytes(removable: Iterable[Removable]) -> int:
    """Return the bytes of copies of remote files that running jobs use: of all that `contents` returns, they stay."""
    used = (one.path for one in removable if VIEW.fullmatch(one.path.name) and _in_use(one.path))
    return sum({found.st_ino: found.st_size for view in used for found in _linked(view)}.values())


def bytes_freed(root: Path, removable: Iterable[Removable]) -> int:
    """Return the bytes that become free if all of these are removed.

    Copies of remote files become free where nothing else links to them, and none while a process copies.
    """
    everything = list(removable)
    freed = sum(one.size for one in everything)
    with alone(root / COPYING) as nobody_copies:
        views = [one.path for one in everything if VIEW.fullmatch(one.path.name)] if nobody_copies else []
        views = [view for view in views if not _in_use(view)]
    links = Counter(found.st_ino for view in views for found in _linked(view))
    for copy in _files(root / "files", COPY) if views else ():
        with contextlib.suppress(FileNotFoundError):  # another process removed it meanwhile
            found = copy.path.lstat()
            freed += copy.size if found.st_nlink - links[found.st_ino] == 1 else 0
    return freed


def _in_use(view: Path) -> bool:
    """Return whether a job uses a folder of links, or may do so because nobody can tell."""
    lock = _pin_of(view)
    if not lock.exists():
        return False
    with alone(lock) as unused:
        return not unused


def _linked(view: Path) -> Iterator[os.stat_result]:
    """Yield the status of each file in a folder of links."""
    for folder, _, files in os.walk(view):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                yield Path(folder, name).lstat()


def _files(folder: Path, name: re.Pattern[str]) -> list[Removable]:
    """Return the files of a folder that have such a name."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # another process removed it meanwhile
                if name.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    used = max(status.st_atime, status.st_mtime)
                    found.append(Removable(True, used, Path(entry.path), status.st_size))
    return found


def _pin_of(view: Path) -> Path:
    """Return the file that the jobs that use a folder of links lock."""
    return view.with_name(f".{view.name}{PINNED}")


def _last_use(view: Path) -> float:
    lock = _pin_of(view)
    try:
        return (lock if lock.exists() else view).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def remove(root: Path, one: Removable) -> int:
    """Remove a file, or links and the copies that nothing else links to. Return the bytes that became free."""
    if not VIEW.fullmatch(one.path.name):
        one.path.unlink(missing_ok=True)
        if not one.kept:
            one.path.with_suffix(".json").unlink(missing_ok=True)
        logger.info("%s: removed from the cache, which is full", one.path)
        return one.size
    lock = _pin_of(one.path)
    with alone(root / COPYING) as nobody_copies, alone(lock) as unused:
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
