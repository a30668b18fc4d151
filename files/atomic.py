"""Files and folders that appear whole or not at all, whatever kills the process, fills the disk or cuts the power.

    with atomic_file(path) as unfinished:
        save_file(tensors, unfinished)
    with atomic_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
    remove_leftovers(folder)  # at the start of a run

Unfinished work lies in a hidden folder of random name beside its target, which only this user may enter, so that no link can be
planted in its way, and two writers never meet. Everything is on the disk (fsync) before it takes its place, and the name after it. The
hidden folder is locked by its process while that lives; what is not locked was left behind.
"""

import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

UNFINISHED = ".unfinished-"  # prefix of the hidden folders
NEW, REPLACED = "new", "replaced"  # folders in it: what is written, and what is about to be removed
LOCK = "lock"
STARTING = 60.0  # seconds between making the hidden folder and its lock, at most
NO_LOCKS = (
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.ENOLCK,
)  # of a file system that cannot lock, such as Lustre without `-o flock`
NO_SYNC = (
    errno.EINVAL,
    errno.EBADF,
    errno.ENOSYS,
    errno.ENOTSUP,
)  # of one that cannot flush folders: CIFS, some of FUSE's


@contextmanager
def atomic_files(*paths: Path) -> Iterator[list[Path]]:
    """Give files to write instead of `paths`, which take their places, in this order, when the block ends.

    Args:
        paths: files of one folder, which is made. A link in the place of one is replaced, not followed.
    Where the block ends in an error, nothing of them is left.
    Raises: FileExistsError for a folder, a device such as /dev/null or a pipe in the place of one, which would be lost.
    """
    folder = paths[0].parent
    assert all(path.parent == folder for path in paths), paths
    for path in paths:
        if os.path.lexists(path) and stat.S_IFMT(path.lstat().st_mode) not in (stat.S_IFREG, stat.S_IFLNK):
            raise FileExistsError(f"{path}: is not a regular file but a folder, pipe or device; name another file")
    folder.mkdir(parents=True, exist_ok=True)
    with _hidden(folder) as hidden:
        unfinished = [hidden / NEW / path.name for path in paths]
        yield unfinished
        sync(hidden / NEW)
        for new, path in zip(unfinished, paths, strict=True):
            os.replace(new, path)
        _sync_folder(folder)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a file to write instead of `path`, as `atomic_files`."""
    with atomic_files(path) as (unfinished,):
        yield unfinished


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 that replaces an older one only once it is complete. Its folder is made."""
    with atomic_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to fill instead of `folder`, whose place it takes when the block ends. An older one is removed then.

    Killed between the two, the older one is hidden, and `remove_leftovers` puts it back.
    Raises: FileExistsError if a link or a file is in its place.
    """
    refuse_link(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _hidden(folder.parent) as hidden:
        unfinished = hidden / NEW / folder.name
        unfinished.mkdir()
        yield unfinished
        sync(unfinished)
        replace_folder(unfinished, folder, hidden)


@contextmanager
def atomic_parts(folder: Path, index: str) -> Iterator[Path]:
    """Give a folder to fill, whose files and folders take their places in `folder` when the block ends; what else is there stays.

    The file `index` goes first and comes last: killed in between, `folder` has none, so that nobody takes old and new parts for
    one whole. A folder that is not there appears in one step; one that is there, if empty, stays the same one: it may be a
    disk's own, somebody's working directory, or in a folder that only others may write to.

    Raises: FileExistsError if a link or a file is in the place of a folder.
    """
    folder = folder.resolve()
    if not folder.exists():
        with atomic_folder(folder) as unfinished:
            yield unfinished
        return
    remove_leftovers(folder)
    with _hidden(folder) as hidden:
        unfinished = hidden / NEW / folder.name
        unfinished.mkdir()
        yield unfinished
        sync(unfinished)
        parts = sorted(unfinished.iterdir(), key=lambda part: part.name == index)
        for part in parts:
            if part.is_dir():
                refuse_link(folder / part.name)
        (folder / index).unlink(missing_ok=True)
        for part in parts:
            if part.is_dir():
                replace_folder(part, folder / part.name, hidden)
            else:
                os.replace(part, folder / part.name)
        _sync_folder(folder)


def replace_folder(unfinished: Path, folder: Path, hidden: Path) -> None:
    """Put `unfinished` in the place of `folder`, which is moved into `hidden` first if it is there."""
    refuse_link(folder)
    older = hidden / REPLACED / folder.name
    if folder.exists():
        older.parent.mkdir(exist_ok=True)
        os.rename(folder, older)
    try:
        os.rename(unfinished, folder)
    except OSError:
        if older.exists():
            os.rename(older, folder)
        raise
    _sync_folder(folder.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder. Killed at any moment, it leaves it whole, or hidden; a link is removed, not followed."""
    if folder.is_symlink():
        folder.unlink()
        return
    with _hidden(folder.parent) as hidden:
        os.rename(folder, hidden / NEW / folder.name)


def refuse_link(folder: Path) -> None:
    """Raises: FileExistsError, which names it, if a link or a file is in the place of a folder."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(
            f"{folder}: a {'link' if folder.is_symlink() else 'file'} is in the place of this folder; remove it"
        )


def remove_leftovers(folder: Path) -> None:
    """Remove what processes left half written in `folder` that were killed, and put back what they were about to replace.

    Work of living processes stays, of this machine or of others that lock files on the same disk; so does what belongs to other
    users, and all of it where the file system cannot lock. No link is followed.
    """
    for hidden in folder.glob(f"{UNFINISHED}*"):
        if hidden.is_symlink() or not hidden.is_dir():
            continue  # not ours
        lock = hidden / LOCK
        try:
            if not lock.exists() and abs(time.time() - hidden.stat().st_mtime) < STARTING:  # clocks may be set back
                continue
            with FileLock(lock, timeout=0, fallback_to_soft=False):
                _put_back(hidden / REPLACED, folder)
                shutil.rmtree(hidden)
        except (Timeout, FileNotFoundError, PermissionError):  # it lives; has just finished; is another user's
            continue
        except OSError as error:
            if error.errno not in (*NO_LOCKS, errno.ELOOP):  # a link in the place of the lock is not ours
                raise


def _put_back(replaced: Path, folder: Path) -> None:
    if replaced.is_symlink() or not replaced.is_dir():
        return
    for older in replaced.iterdir():
        if not older.is_symlink() and not os.path.lexists(folder / older.name):
            os.rename(older, folder / older.name)


def sync(path: Path) -> None:
    """Return once a file, or a folder and all that is in it, is on the disk and not in memory alone."""
    if path.is_dir():
        for inner in path.iterdir():
            if not inner.is_symlink():
                sync(inner)
        _sync_folder(path)
        return
    flags = os.O_RDWR if os.name == "nt" else os.O_RDONLY  # Windows flushes only what may be written
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _hidden(folder: Path) -> Iterator[Path]:
    """A new folder in `folder` that is locked by this process; it is removed at the end."""
    with ExitStack() as stack:
        while True:
            hidden = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder))
            stack.callback(shutil.rmtree, hidden, ignore_errors=True)
            lock = FileLock(hidden / LOCK, fallback_to_soft=False)
            try:
                _acquire(lock)
                (hidden / NEW).mkdir()
            except (FileNotFoundError, Timeout):  # `remove_leftovers` of another process came in between
                lock.release()
                continue
            stack.callback(lock.release)
            yield hidden
            return


def _acquire(lock: FileLock) -> None:
    """Lock at once, where the file system can. Raises: Timeout if another process holds it."""
    try:
        lock.acquire(timeout=0)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
