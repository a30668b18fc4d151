"""A run's output folder: check that it holds no links; write models into it atomically."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cli.command import CannotContinue
from files.atomic import atomic_folder


def refuse_links(paths: Iterable[Path]) -> None:
    """Raises: ValueError if one of `paths` is a link, because files written there would go to another place."""
    for path in paths:
        if path.is_symlink():
            raise ValueError(
                f"{path}: is a link; a run writes only into its own folder. Remove the link, or give the folder that "
                "it points to as a part of --output"
            )


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder that replaces `folder` once the block has ended and everything is on the disk.

    Raises: CannotContinue if it cannot be written (a full disk, a link in its place). Then nothing of the new one
    remains.
    """
    try:
        with atomic_folder(folder) as unfinished:
            yield unfinished
    except (OSError, SafetensorError) as error:
        raise CannotContinue(
            f"{folder}: could not be written ({error}). Make room on the disk; the same command with --resume latest "
            "continues from the last checkpoint, and writes it"
        ) from error


def save_model(model: Any, folder: Path) -> None:
    """Call `model.save_pretrained`, and replace an older folder only once the new one is complete and on the disk.

    Raises: as `replacing`.
    """
    with replacing(folder) as unfinished:
        model.save_pretrained(str(unfinished), safe_serialization=True)
