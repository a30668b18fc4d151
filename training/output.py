"""Writing a run's files and folders, whole or not at all."""

import shutil
import tempfile
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file that replaces an older one only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial_{path.name}")
    partial.write_text(text)
    partial.replace(path)


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        raise ValueError(f"--output {folder}: cannot be written to: {error.strerror}; choose another folder") from error


def save_model(model: Any, folder: Path) -> None:
    """`model.save_pretrained(folder)` that replaces an older folder only once the new one is complete."""
    recover_folders(folder.parent)
    partial = folder.with_name(f".partial_{folder.name}")
    model.save_pretrained(str(partial), safe_serialization=True)
    replace_folder(partial, folder)
