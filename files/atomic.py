"""Write files and folders atomically: they appear complete or not at all, whatever ends the program.

    with atomic_file(path) as unfinished:
        save_file(tensors, unfinished)
    with atomic_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
    remove_leftovers(folder)  # at the start of a run

Unfinished work is in a hidden folder beside its target. Its name is random and only this user may enter it, so nobody
can plant a link there and two writers never collide. Contents are flushed to disk (fsync) before the rename, and the
rename after it. The process keeps the hidden folder locked while it runs; an unlocked one was left behind.
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
NEW = "new"  # folder in it: what is being written
REPLACED = "replaced"  # folder in it: what is about to be removed
LOCK = "lock"
STARTING = 60.0  # seconds between making the hidden folder and its lock, at most
# Errors of file systems that cannot lock, such as Lustre without `-o flock`.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
# Errors of file systems that cannot flush folders: CIFS, some of FUSE's.
NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def atomic_files(*paths: Path, mode: int | None = None) -> Iterator[list[Path]]:
    """Yield temporary files that replace `paths`, in this order, when the block ends.

    If the block raises an error, the temporary files are removed.

    Args:
        paths: files of one folder, which is created. A link at one of them is replaced, not followed.
        mode: rights of the files, such as 0o600; None: as the process makes files.

    Raises:
        FileExistsError: if one of them is a folder, a device such as /dev/null or a pipe, which would be lost.
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
        if mode is not None:
            for new in unfinished:
                new.chmod(mode)
        sync(hidden / NEW)
        for new, path in zip(unfinished, paths, strict=True):
            os.replace(new, path)
        _sync_folder(folder)


@contextmanager
def atomic_file(path: Path, mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary file that replaces `path`; see `atomic_files`."""
    with atomic_files(path, mode=mode) as (unfinished,):
        yield unfinished


def write_text(path: Path, text: str, mode: int | None = None) -> None:
    """Write a UTF-8 file atomically, of these rights (see `atomic_files`), and create its folder."""
    with atomic_file(path, mode) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` when the block ends.

    If the process is killed while it replaces an older folder, `remove_leftovers` restores that one.

    Raises:
        FileExistsError: if `folder` is a link or a file.
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
    """Yield a temporary folder whose files and folders replace those in `folder` when the block ends; other files stay.

    The file `index` is removed first and written last. A process that is killed in between leaves no index, so old and
    new parts are never read as one model. A missing folder appears in one step. An existing folder stays the same
    folder, even if empty: it may be a mount point, a working directory, or inside a folder that only others may write
    to.

    Raises:
        FileExistsError: if a link or a file is where a folder should be.
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
    """Replace `folder` by `unfinished`; an existing one is moved into `hidden` first."""
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
    """Remove a folder atomically. A link is removed, not followed."""
    if folder.is_symlink():
        folder.unlink()
        return
    with _hidden(folder.parent) as hidden:
        os.rename(folder, hidden / NEW / folder.name)


def refuse_link(folder: Path) -> None:
    """Refuse a link or a file where a folder should be.

    Raises:
        FileExistsError: naming the path.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(
            f"{folder}: a {'link' if folder.is_symlink() else 'file'} is in the place of this folder; remove it"
        )


def remove_leftovers(folder: Path) -> None:
    """Remove unfinished work of killed processes from `folder`, and restore what they were about to replace.

    Unfinished work stays if its process still runs (here, or on another machine that locks files on the same disk), if
    it belongs to another user, or if the file system cannot lock. Links are not followed.
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
    """Flush a file, or a folder with everything in it, to disk."""
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
    """Create a hidden folder in `folder`, locked by this process, and remove it at the end."""
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
    """Lock without waiting, if the file system can lock. Raises: Timeout if another process holds the lock."""
    try:
        lock.acquire(timeout=0)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
