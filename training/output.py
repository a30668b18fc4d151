"""Writing a run's files and folders, whole or not at all."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from volumes.command import CannotContinue
from volumes.remote import refuse_url


def write_text(path: Path, text: str) -> None:
    """Write a file that replaces an older one only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial_{path.name}")
    partial.write_text(text)
    sync_file(partial)
    partial.replace(path)


def sync_file(path: Path) -> None:
    """Return once a file is on the disk, and not in memory alone."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def remove_folder(folder: Path) -> None:
    """Remove a folder. Killed at any moment, it leaves it whole, or hidden: see `recover_folders`."""
    partial = folder.with_name(f".partial_{folder.name}")
    folder.rename(partial)
    shutil.rmtree(partial)


def replace_folder(partial: Path, folder: Path) -> None:
    """Put `partial` in the place of `folder`. Killed at any moment, it leaves one of them whole: see `recover_folders`."""
    older = folder.with_name(f".replaced_{folder.name}")
    if older.exists():
        shutil.rmtree(older)
    if folder.exists():
        folder.rename(older)
    partial.rename(folder)
    if older.exists():
        shutil.rmtree(older)


def recover_folders(parent: Path) -> None:
    """Remove what a killed run left half written in `parent`, and put folders back that it was about to replace."""
    for partial in parent.glob(".partial_*/"):
        shutil.rmtree(partial)
    for older in parent.glob(".replaced_*/"):
        folder = older.with_name(older.name.removeprefix(".replaced_"))
        shutil.rmtree(older) if folder.exists() else older.rename(folder)


def check_writable(folder: Path) -> None:
    """Make the folder of a run, and try it before hours of work. Raises: ValueError if nothing can be written there."""
    refuse_url(folder, "--output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        raise ValueError(f"--output {folder}: cannot be written to: {error.strerror}; choose another folder") from error


@contextmanager
def naming_full_disk(output: Path) -> Iterator[None]:
    """Raises: ValueError with a remedy in the place of a full disk's error."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"--output {output}: {error.strerror}; make room, and run the same command again: it goes on with what is there"
        ) from error


def save_model(model: Any, folder: Path) -> None:
    """`model.save_pretrained(folder)` that replaces an older folder only once the new one is complete.

    Raises: CannotContinue if it cannot be written (a full disk); then nothing is left of the new one.
    """
    recover_folders(folder.parent)
    partial = folder.with_name(f".partial_{folder.name}")
    try:
        model.save_pretrained(str(partial), safe_serialization=True)
        replace_folder(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CannotContinue(
            f"{folder}: could not be written ({error}). Make room on the disk; the same command with --resume latest goes on "
            "from the last checkpoint, and writes it"
        ) from error
