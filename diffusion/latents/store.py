"""A latent cache at an fsspec URL, which machines share: objects that are written once and never changed.

An entry's object is named after its entry, length and content, `00012_00-58824-2c26b46b68ffc68f.safetensors`. So a
truncated object does not count as present, and a damaged one is recognized by its name. Processes that create the same
entry at the same time write the same object, or two that are both valid. Nothing needs a lock, and there is no index
that could be damaged.

The copies are a part of this machine's cache: its limit counts them, and those that were read least recently are
removed when it is full, and copied again when they are read (`files.cache`).
"""

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from files.atomic import atomic_file
from files.cache import LIMIT, OF_URL, file_mode, make_folder, mark
from files.remote import (
    connect,
    copy_place,
    download,
    list_files,
)
from files.room import room_for

logger = logging.getLogger(__name__)
HEADER_BYTES = 1024  # of an entry, at most
OBJECT = re.compile(r"(\d+_\d+)-(\d+)-([0-9a-f]{16})\.safetensors")


class LatentStore:
    """The entries at a URL, and the folder on this machine, `copies`, that training reads them from.

    Raises: ValueError for a URL that cannot be used (`files.remote.connect`).
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.copies = copy_place(self.url)
        self.known: dict[str, str] = {}
        self._said = False
        self.refresh()

    @property
    def mode(self) -> int:
        """The rights of the copies."""
        return file_mode()

    @contextmanager
    def room(self, nbytes: int) -> Iterator[None]:
        """Make room in the cache for a copy of so many bytes, which is written in the block; warn once if there is
        none.
        """
        make_folder(self.copies)
        mark(self.copies / OF_URL)
        with room_for(nbytes + HEADER_BYTES, anyway=True) as fits:
            if not fits and not self._said:
                self._said = True
                logger.warning("%s: copies of its latents exceed the limit of the cache (see $%s)", self.url, LIMIT)
            yield

    def refresh(self) -> None:
        """See which entries are there: {file name: name of the object}."""
        self.known = {}
        for name, info in sorted(list_files(self.url).items()):
            match = OBJECT.fullmatch(name)
            if match and info.size == int(match[2]):
                self.known.setdefault(f"{match[1]}.safetensors", name)

    def put(self, partial: Path, name: str) -> None:
        """Upload a file as entry `name`. Raises: ValueError if that fails."""
        content = partial.read_bytes()
        stem = name.removesuffix(".safetensors")
        found = f"{stem}-{len(content)}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
        system, base = connect(self.url)
        try:
            try:
                system.pipe_file(f"{base}/{found}", content)
            except FileNotFoundError:  # file systems with real folders
                system.makedirs(base, exist_ok=True)
                system.pipe_file(f"{base}/{found}", content)
        except Exception as error:  # each file system has errors of its own
            raise ValueError(
                f"{self.url}/{found}: the latent cache could not be written ({type(error).__name__}: {error}); make "
                "room and check its permissions, or set cache.folder to another place. The same command keeps the "
                "existing entries and continues"
            ) from error
        self.known[name] = found

    def fetch(self, file: Path) -> None:
        """Copy an entry to `file`, which is in `copies`. Raises: ValueError if it is not there, or damaged."""
        if file.name not in self.known:
            self.refresh()
        if file.name not in self.known:
            raise ValueError(
                f"{self.url}: has no entry {file.stem} any more; continue with --resume latest, which writes it"
            )
        found = self.known[file.name]
        _, length, digest = OBJECT.fullmatch(found).groups()  # pyright: ignore[reportOptionalMemberAccess]
        try:
            with self.room(int(length)), atomic_file(file, self.mode) as unfinished:  # others may fetch it, too
                if not download(self.url, found, int(length), unfinished).startswith(digest):
                    raise self.damaged(file.name, "its content is not that of its name")
        except OSError as error:
            raise ValueError(
                f"{file}: an entry of the latent cache could not be copied here ({error}); make room, or set "
                "MEDVOLUME_CACHE to another folder, and continue with --resume latest"
            ) from error

    def damaged(self, name: str, why: str) -> ValueError:
        """Return the error for an entry whose object is damaged."""
        return ValueError(
            f"{self.url}/{self.known[name]}: is damaged: {why}; delete it, and continue with --resume latest, which "
            "writes it again"
        )
