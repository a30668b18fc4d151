"""Can files be written there? Tried before hours of work: what a folder allows is not all in its permissions."""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .remote import refuse_url

TRIED_BYTES = 1 << 16


def check_output_folder(folder: Path) -> None:
    """Make the folder of --output, and try it. Raises: ValueError if nothing can be written there."""
    refuse_url(folder, "--output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _try(folder)
    except OSError as error:
        raise ValueError(f"--output {folder}: cannot be written to: {error.strerror}; choose another folder") from error


def check_output_file(path: Path) -> None:
    """Try the folder in which a file will be made, or the nearest one above it.

    Raises: ValueError if the file cannot be there.
    """
    try:
        if path.is_dir():
            raise ValueError(f"{path}: is a folder; name a file")
        folder = next(place for place in path.absolute().parents if place.exists())
        if not folder.is_dir():
            raise ValueError(f"{path}: {folder} is a file, not a folder; choose another path")
        _try(folder)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written ({error.strerror or error}); choose another path, or change its permissions"
        ) from error


def _try(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(TRIED_BYTES))


@contextmanager
def explain_disk_full(output: Path) -> Iterator[None]:
    """Raise ValueError with a remedy in place of a full disk's error."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"--output {output}: {error.strerror}; make room, and run the same command again: it resumes"
        ) from error
