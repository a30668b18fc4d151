"""One process at a time for each output: a lock that ends with its process, however that ends."""

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
LOOK_EVERY = 0.5  # seconds


class OutputInUse(ValueError):
    """Another process writes to the same output."""


@contextmanager
def only_writer(
    folder: Path, wait_minutes: float = 0, *, option: str = "--output", file: str | None = None
) -> Iterator[None]:
    """Hold `folder`, which must exist, or one `file` in it, until the end of the block.

    Of processes that were launched together the first one calls this.

    Args:
        wait_minutes: how long to wait for another process that holds it; 0 refuses at once.
        option: that named the folder or the file, for the message.
        file: name of a file that is held alone, by `.NAME.lock` beside it, so that others of the folder may be written meanwhile.

    Processes that are forked from this one hold it no longer than this one. Where the file system cannot lock, that is said, and
    nothing is held.

    Raises: OutputInUse naming the host and the process id of the holder; ValueError if a link is in the place of the lock.
    """
    output, place = (folder, folder / LOCK) if file is None else (folder / file, folder / f".{file}.lock")
    holder = place.with_name(f"{place.name}.json")
    shared = 0o600 | (
        folder.stat().st_mode & 0o066
    )  # who may write in a folder that a group shares, may hold it after this one
    lock = FileLock(place, mode=shared, fallback_to_soft=False)
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
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Hold the file `lock` until the end of the block, after all processes that hold it now; where the file system cannot lock, at once."""
    held = FileLock(lock, fallback_to_soft=False)
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
    """Whether the file system can lock; then the lock is held."""
    said = False
    end = time.monotonic() + 60 * wait_minutes
    while True:
        try:
            lock.acquire(timeout=0)
            return True
        except Timeout:
            if time.monotonic() >= end:
                raise OutputInUse(
                    f"{option} {output}: another process writes there: {_holder(holder)}. Wait for its end, choose another output, "
                    "or say how many minutes to wait for it, with --wait_minutes"
                ) from None
            if not said:
                print(f"waiting for another process that writes to {output}: {_holder(holder)}", flush=True)
                said = True
            time.sleep(LOOK_EVERY)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise ValueError(f"{option} {output}: {lock.lock_file} is a link; remove it") from error
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"{output}: its file system cannot lock ({error.strerror}), so no other process is kept away",
                flush=True,
            )
            return False


def _holder(path: Path) -> str:
    try:
        with open_regular(path) as file:
            holder = json.loads(file.read(4096))
        told = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        told = ""
    return told if told.isprintable() and told else "its process id is not known yet"
