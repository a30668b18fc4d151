"""Keys of prepared volumes: a digest of everything that they depend on.

That is the content of a case's files, the settings of `DataConfig` that change what is prepared, and the version of
the preparation. Names, places and conditions (classes, numbers) do not matter, so a data set that is moved, or given
other columns, is not prepared again. The content of a file is read once: its digest is remembered with its path, size,
times and inode, until nobody has asked for it for `FORGOTTEN` seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from files.atomic import remove_leftovers, write_text
from files.cache import cache_root, file_mode, make_folder, mark, touch
from volumes.data.alignment import MASK
from volumes.data.cases import Case
from volumes.data.config import DataConfig
from volumes.formats.read import volume_parts

FORMAT = 1  # raise it when the same files are prepared otherwise
# Settings that change which cases there are, or what goes with them, but not their voxels.
UNRELATED = (
    *("root", "table", "images", "masks", "subject", "group_by", "split", "test_fraction", "validation_fraction"),
    *("split_seed", "classes", "numbers", "condition_channels", "on_error", "phantom", "empty_background"),
)
# Seconds: a file that changed later may change again without another time. File systems count times in up to two
# seconds, and the clock of a file server may be behind ours.
SETTLED = 60.0
FORGOTTEN = 90 * 86400.0  # seconds
FORGOTTEN_AGAIN = 86400.0  # seconds between two looks at what may be forgotten
SOURCES, MEMORY = "sources", re.compile("[0-9a-f]{40}")  # the folder of remembered digests, and their names

Stamps = list[list[object]]


def settings_key(config: DataConfig) -> str:
    """Return a digest of the settings that change what is prepared of a case."""
    settings = {name: value for name, value in asdict(config).items() if name not in UNRELATED}
    drawn = config.phantom
    parts = [FORMAT, _plain(settings), list(config.patterns), None if drawn is None else drawn.shape]
    if drawn is not None and drawn.lesion_voxels is not None:
        parts.append([drawn.lesion_voxels, drawn.lesions])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def case_key(case: Case, settings: str) -> str:
    """Return the key of a prepared case, from the digest of the settings.

    Raises: OSError or VolumeError for files that cannot be read.
    """
    box = None if case.box is None else asdict(case.box)
    parts = [settings, case.phantom, box, _digests(case)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def case_stamps(case: Case) -> dict[str, Stamps]:
    """Return path, size, times and inode of each file of a case, by channel; the mask's under `MASK`."""
    volumes = {**case.images, **({} if case.mask is None else {MASK: case.mask})}
    return {name: [_stamp(part) for part in volume_parts(path)] for name, path in volumes.items()}


def _stamp(path: Path) -> list[object]:
    found = os.stat(path)
    return [os.path.abspath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def content_stamps(case: Case) -> list[object]:
    """Return path, size, time of change and inode of each file of a case, which differ after another one was written
    in its place."""
    return [
        [path, size, changed, inode] for files in case_stamps(case).values() for path, size, changed, _, inode in files
    ]


def _digests(case: Case) -> dict[str, list[tuple[str, str]]]:
    """Return the suffix and the SHA-256 of each file of a case, by channel."""
    stamps, now = case_stamps(case), time.time_ns()
    if not stamps:
        return {}
    memory = cache_root() / SOURCES / hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:40]
    try:
        digests = json.loads(memory.read_text())
        if _fits(digests, stamps):
            touch(memory)
            return digests
    except (OSError, ValueError):
        pass
    digests = {name: [(_suffix(one[0]), _digest(str(one[0]))) for one in files] for name, files in stamps.items()}
    newest = max(int(str(time)) for files in stamps.values() for one in files for time in one[2:4])
    if newest < now - SETTLED * 1e9:
        with contextlib.suppress(OSError):  # a cache that cannot be written to is reported where volumes are written
            make_folder(memory.parent)
            write_text(memory, json.dumps(digests), file_mode())
    return digests


def forget_digests() -> None:
    """Remove the digests of files that nobody asked for in `FORGOTTEN` seconds; looks once a day. Raises: OSError."""
    folder, now = cache_root() / SOURCES, time.time()
    looked = folder / ".looked"
    if not folder.is_dir() or (looked.exists() and abs(now - looked.stat().st_mtime) < FORGOTTEN_AGAIN):
        return
    mark(looked)
    remove_leftovers(folder)
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # another process removed it meanwhile
                found = entry.stat(follow_symlinks=False)
                if MEMORY.fullmatch(entry.name) and max(found.st_atime, found.st_mtime) < now - FORGOTTEN:
                    os.unlink(entry.path)


def _fits(digests: object, stamps: Mapping[str, Stamps]) -> bool:
    return (
        isinstance(digests, dict)
        and digests.keys() == stamps.keys()
        and all(len(digests[name]) == len(files) for name, files in stamps.items())
        and all(len(one) == 2 and all(isinstance(text, str) for text in one) for f in digests.values() for one in f)
    )


def _suffix(path: object) -> str:
    return Path(str(path)).suffix.lower()  # readers are chosen by it


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: object) -> object:
    """Convert settings to JSON; keys of mappings, which may be numbers and words, to pairs in a fixed order."""
    if isinstance(value, Mapping):
        return sorted(([repr(key), _plain(one)] for key, one in value.items()), key=lambda pair: str(pair[0]))
    return [_plain(one) for one in value] if isinstance(value, tuple | list) else value
