"""Room in the cache: `room_for` keeps all processes together below its limit, by a total that they share.

    .room.lock       held while a process looks at the total, and makes room; while it writes, only if the cache is
                     nearly full, and not for the hours in which files are copied from a server
    room/total       what the cache holds with all that was promised, and when the folders were last looked at
    room/<bytes>-*   one for each promise, locked by its process until the bytes are written; of files that are copied
                     from a server, the bytes that are still to come

The folders are looked at only when the total says that they are full, and every ten minutes; then room is made for more
than one file (`LOW_WATER`).
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from .cache import (
    LIMIT,
    alone,
    bytes_freed,
    cache_limit,
    cache_root,
    contents,
    file_mode,
    make_folder,
    remove,
    remove_unfinished,
)
from .locks import one_at_a_time

WRITERS = 64  # files of one size for which there must be room if they shall be written at the same time
LOW_WATER = 0.9  # of the limit, less what cannot be removed: so much stays when room is made
LOOKED_AGAIN = 600.0  # seconds after which the folders are looked at, for people remove files too
REFUSED_AGAIN = 10.0  # seconds during which what did not fit is not tried again by the same process
FORGOTTEN = 86400.0  # seconds after which a promise that cannot be locked is void


class Room:
    """Whether there is room in the cache, as its truth, and the promise to fill it."""

    def __init__(self, root: Path, fits: bool) -> None:
        self._root, self._fits = root, fits
        self._promise: Path | None = None
        self._guard = threading.Lock()

    def __bool__(self) -> bool:
        return self._fits

    def written(self, nbytes: int) -> None:
        """Say that so many of the bytes are in the cache now, where others count them; only the rest stays promised."""
        with self._guard:
            if self._promise is None:  # nobody else writes meanwhile
                return
            with one_at_a_time(self._root / ".room.lock", file_mode()):
                size, _, rest = self._promise.name.partition("-")
                less = self._promise.with_name(f"{max(int(size) - nbytes, 0)}-{rest}")
                with contextlib.suppress(FileNotFoundError):  # void by its age, where files cannot be locked
                    self._promise = self._promise.rename(less)
                    os.utime(less)

    @contextlib.contextmanager
    def promised(self, nbytes: int) -> Iterator[None]:
        """Let others count bytes that are not written yet, until the end of the block or of this process."""
        descriptor, name = tempfile.mkstemp(prefix=f"{nbytes}-", dir=self._root / "room")
        os.close(descriptor)
        os.chmod(name, file_mode())
        self._promise = Path(name)
        with alone(self._promise):
            try:
                yield
            finally:
                self._promise.unlink(missing_ok=True)
                self._promise = None


@contextlib.contextmanager
def room_for(nbytes: int, *, anyway: bool = False, generated: bool = False) -> Iterator[Room]:
    """Make room for `nbytes` more bytes, and yield whether there is room. Write them in the block.

    Args:
        anyway: whether they are written even if there is no room, and may take long: others write meanwhile, too. Call
            `written` of what is yielded for each file of several.
        generated: whether to remove nothing but generated volumes.
    Raises: ValueError if $MEDVOLUME_CACHE_LIMIT is not a size; OSError if the cache cannot be written to.
    """
    root, asked = cache_root(), (cache_root(), os.environ.get(LIMIT), generated)
    refused = _refused.get(asked)
    if refused and not anyway and nbytes >= refused[1] and time.monotonic() - refused[0] < REFUSED_AGAIN:
        yield Room(root, False)
        return
    make_folder(root / "room")
    with contextlib.ExitStack() as writing:
        with contextlib.ExitStack() as alone_here:
            alone_here.enter_context(one_at_a_time(root / ".room.lock", file_mode()))
            used, looked = _total(root)
            if used is None or used + nbytes > cache_limit(root, used):
                used, looked = _make_room(root, nbytes, generated, anyway), time.time()
            limit = cache_limit(root, used)
            fits = used + nbytes <= limit
            room = Room(root, fits)
            _write_total(root, used + (nbytes if fits or anyway else 0), looked)
            if anyway or used + WRITERS * nbytes <= limit:
                writing.enter_context(room.promised(nbytes))
            elif fits:
                writing.push(alone_here.pop_all())
            else:
                _refused[asked] = time.monotonic(), nbytes
        yield room


_refused: dict[tuple[Path, str | None, bool], tuple[float, int]] = {}


def _total(root: Path) -> tuple[int | None, float]:
    """Return the total, None if it is not known or too old, and when the folders were looked at."""
    try:
        used, looked = json.loads((root / "room/total").read_text())
        if isinstance(used, int) and abs(time.time() - looked) < LOOKED_AGAIN:
            return used, looked
    except (OSError, ValueError, TypeError):
        pass
    return None, 0.0


def _write_total(root: Path, used: int, looked: float) -> None:
    """Write the total, under the lock. A part of it, which a killed process leaves, counts as none."""
    path = root / "room/total"
    path.write_text(json.dumps([used, looked]))
    with contextlib.suppress(PermissionError):  # another user's, of a shared cache
        path.chmod(file_mode())


def _make_room(root: Path, nbytes: int, generated: bool, anyway: bool) -> int:
    """Remove files until `nbytes` more fit and the cache is at its low water.

    Return the bytes that it holds, with all promises. If no removal makes room for so many bytes, nothing is removed
    but what killed processes left unfinished; and, if they are written anyway, what is above the limit already, for
    such files would pile up.
    """
    remove_unfinished(root)
    used, removable = contents(root)
    used += _promises(root)
    limit = cache_limit(root, used)
    if used + nbytes <= limit:
        return used
    removable = sorted(one for one in removable if not (generated and one.kept))
    fixed = used - bytes_freed(root, removable)  # pinned copies, promises, and what is not this caller's to remove
    if fixed + nbytes <= limit:
        enough = min(limit - nbytes, fixed + int(LOW_WATER * (limit - fixed)))
    elif anyway:
        enough = limit
    else:
        return used
    for one in removable:
        if used <= enough:
            break
        used -= remove(root, one)
    return used


def _promises(root: Path) -> int:
    """Return the bytes that running processes still write, and remove the promises of others."""
    total = 0
    for path in (root / "room").glob("*-*"):
        size = path.name.partition("-")[0]
        with contextlib.suppress(FileNotFoundError, PermissionError):
            old = time.time() - path.stat().st_mtime > FORGOTTEN
            with alone(path) as unused:
                if unused or (unused is None and old) or not size.isdigit():
                    path.unlink()
                else:
                    total += int(size)
    return total
