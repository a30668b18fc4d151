"""Lock an output for one process at a time; the lock ends with its process, however that ends."""

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from .atomic import NO_LOCKS, write_text
from .paths import open_regular

LOCK = ".medvolume.lock"
HOLDER = ".medvolume.lock.json"  # who holds it, for the message
POLL_SECONDS = 0.5


class OutputInUse(ValueError):
    """Another process writes to the same output."""


@contextmanager
def only_writer(
    folder: Path, wait_minutes: float = 0, *, option: str = "--output", file: str | None = None
) -> Iterator[None]:
    """Lock an existing `folder`, or one `file` in it, until the end of the block.

    If several processes were launched together, only the first one calls this. Forked processes do not keep the lock
    longer than this one. If the file system cannot lock, a message says so and nothing is locked.

    Args:
        folder: the output folder.
        wait_minutes: how long to wait for another process that holds the lock; 0 refuses at once.
        option: the option that named the folder or file, for the message.
        file: name of a file to lock alone, by `.NAME.lock` beside it; other files of the folder may be written
            meanwhile.

    Raises:
        OutputInUse: naming host and process id of the process that holds the lock.
        ValueError: if the lock file is a link.
    """
    output, place = (folder, folder / LOCK) if file is None else (folder / file, folder / f".{file}.lock")
    holder = place.with_name(f"{place.name}.json")
    # In a folder that a group shares, its other members must be able to take the lock later.
    mode = 0o600 | (folder.stat().st_mode & 0o066)
    lock = FileLock(place, mode=mode, fallback_to_soft=False)
    if not _acquire(lock, output, holder, wait_minutes, option):
        yield
        return
    try:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        write_text(holder, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextmanager
def one_at_a_time(lock: Path, mode: int = 0o600) -> Iterator[None]:
    """Wait for the file `lock`, made with these rights, and hold it until the end of the block.

    Do not wait if the file system cannot lock.
    """
    held = FileLock(lock, mode=mode, fallback_to_soft=False)
    try:
        held.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        held.release()


def _acquire(lock: FileLock, output: Path, holder: Path, wait_minutes: float, option: str) -> bool:
    """Take the lock; return False if the file system cannot lock."""
    announced = False
    end = time.monotonic() + 60 * wait_minutes
    while True:
        try:
            lock.acquire(timeout=0)
            return True
        except Timeout:
            if time.monotonic() >= end:
                raise OutputInUse(
                    f"{option} {output}: another process writes there: {_holder(holder)}. Wait until it ends, choose "
                    "another output, or set how many minutes to wait with --wait_minutes"
                ) from None
            if not announced:
                print(f"waiting for another process that writes to {output}: {_holder(holder)}", flush=True)
                announced = True
            time.sleep(POLL_SECONDS)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise ValueError(f"{option} {output}: {lock.lock_file} is a link; remove it") from error
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"{output}: its file system cannot lock ({error.strerror}), so other processes are not kept out",
                flush=True,
            )
            return False


def _holder(path: Path) -> str:
    try:
        with open_regular(path) as file:
            holder = json.loads(file.read(4096))
        text = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        text = ""
    return text if text.isprintable() and text else "its process id is not known yet"
