"""Room in the cache: `room_for` keeps all processes together below its limit, by a total that they share.

    .room.lock       held while a process looks at the total, and makes room; while it writes, only if the cache is
                     nearly full, and not for the hours in which files are copied from a server
    room/total       what the cache holds with all that was promised, and when the folders were last looked at
    room/<bytes>-*   one for each promise, locked by its process until the bytes are written

The folders are looked at only when the total says that they are full, and every ten minutes; then room is made for more
than one file (`LOW_WATER`).
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .cache import LIMIT, alone, cache_limit, cache_root, contents, file_mode, make_folder, remove
from .locks import one_at_a_time

WRITERS = 64  # files of one size for which there must be room if they shall be written at the same time
LOW_WATER = 0.9  # of the limit: so much stays when room is made
LOOKED_AGAIN = 600.0  # seconds after which the folders are looked at, for people remove files too
REFUSED_AGAIN = 10.0  # seconds during which what did not fit is not tried again by the same process
FORGOTTEN = 86400.0  # seconds after which a promise that cannot be locked is void


@contextlib.contextmanager
def room_for(nbytes: int, *, anyway: bool = False, generated: bool = False) -> Iterator[bool]:
    """Make room for `nbytes` more bytes, and yield whether there is room. Write them in the block.

    Args:
        anyway: whether they are written even if there is no room, and may take long: others write meanwhile, too.
        generated: whether to remove nothing but generated volumes.
    Raises: ValueError if $MEDVOLUME_CACHE_LIMIT is no size; OSError if the cache cannot be written to.
    """
    root, asked = cache_root(), (cache_root(), os.environ.get(LIMIT), generated)
    refused = _refused.get(asked)
    if refused and not anyway and nbytes >= refused[1] and time.monotonic() - refused[0] < REFUSED_AGAIN:
        yield False
        return
    make_folder(root / "room")
    with contextlib.ExitStack() as writing:
        with contextlib.ExitStack() as alone_here:
            alone_here.enter_context(one_at_a_time(root / ".room.lock", file_mode()))
            used, looked = _total(root)
            if used is None or used + nbytes > cache_limit(root, used):
                used, looked = _make_room(root, nbytes, generated), time.time()
            limit = cache_limit(root, used)
            fits = used + nbytes <= limit
            _write_total(root, used + (nbytes if fits or anyway else 0), looked)
            if anyway or used + WRITERS * nbytes <= limit:
                writing.enter_context(_promised(root, nbytes))
            elif fits:
                writing.push(alone_here.pop_all())
            else:
                _refused[asked] = time.monotonic(), nbytes
        yield fits


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


def _make_room(root: Path, nbytes: int, generated: bool) -> int:
    """Remove files until `nbytes` more fit and the cache is at its low water.

    Return the bytes that it holds, with all promises. If no removal makes room for so many bytes, nothing is removed.
    """
    used, removable = contents(root)
    used += _promises(root)
    limit = cache_limit(root, used)
    if nbytes > limit or used + nbytes <= limit:
        return used
    enough = min(limit - nbytes, int(LOW_WATER * limit))
    for one in sorted(removable):
        if used <= enough or (generated and one.kept):
            break
        used -= remove(root, one)
    return used


@contextlib.contextmanager
def _promised(root: Path, nbytes: int) -> Iterator[None]:
    """Let others count bytes that are not written yet, until the end of the block or of this process."""
    descriptor, name = tempfile.mkstemp(prefix=f"{nbytes}-", dir=root / "room")
    os.close(descriptor)
    os.chmod(name, file_mode())
    with alone(Path(name)):
        try:
            yield
        finally:
            Path(name).unlink(missing_ok=True)


def _promises(root: Path) -> int:
    """Return the bytes that running processes still write, and remove the promises of others."""
    total = 0
    for path in (root / "room").glob("*-*"):
        size = path.name.partition("-")[0]
        with contextlib.suppress(FileNotFoundError, PermissionError):
            old = time.time() - path.stat().st_mtime > FORGOTTEN
            with alone(path) as unused:
                if unused or old or not size.isdigit():
                    path.unlink()
                else:
                    total += int(size)
    return total
