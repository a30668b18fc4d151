"""One process at a time for each output: a lock that ends with its process, however that ends."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from .atomic import write_text

LOCK = ".medvolume.lock"
HOLDER = ".medvolume.lock.json"  # who holds it, for the message
LOOK_EVERY = 0.5  # seconds


class OutputInUse(ValueError):
    """Another process writes to the same output."""


@contextmanager
def only_writer(folder: Path, wait_minutes: float = 0, *, option: str = "--output") -> Iterator[None]:
    """Hold `folder`, which must exist, until the end of the block. Of processes that were launched together the first one calls this.

    Args:
        wait_minutes: how long to wait for another process that holds it; 0 refuses at once.
        option: that named the folder, for the message.

    Raises: OutputInUse naming the host and the process id of the holder.
    """
    lock = FileLock(folder / LOCK)
    said = False
    end = time.monotonic() + 60 * wait_minutes
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            if time.monotonic() >= end:
                raise OutputInUse(
                    f"{option} {folder}: another process writes there: {_holder(folder)}. Wait for its end, choose another folder, "
                    "or say how many minutes to wait for it, with --wait_minutes"
                ) from None
            if not said:
                print(f"waiting for another process that writes to {folder}: {_holder(folder)}", flush=True)
                said = True
            time.sleep(LOOK_EVERY)
    try:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        write_text(folder / HOLDER, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}))
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "its process id is not known yet"
