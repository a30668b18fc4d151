"""Copy volumes from object storage: an fsspec URL (s3://bucket/folder, gs://, https://, ...) in place of a folder.

The files that are needed are copied to this machine first, so the readers of local files and their checks serve for
both. Copies are in $MEDVOLUME_CACHE (default: ~/.cache/medvolume):

    files/<digest>                  one version (URL, size, etag or time) of one remote file; fetched once
    digests/<digest>                sha256 of its content when fetched, compared once per process; a damaged copy is
                                    fetched again
    s3/bucket/folder/@<digest>/...  the folder as it was listed, as hard links to these files; it never changes, and is
                                    not removed while a job uses it (see `files.cache`)

Copies can be read by this user alone, or by the group that shares the cache (`files.cache.file_mode`).

Credentials, endpoints and options come from fsspec (environment, ~/.config/fsspec, ~/.aws, ...), never from a URL or
config.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from posixpath import dirname
from typing import TYPE_CHECKING, Any, BinaryIO, TypeGuard, cast

if TYPE_CHECKING:  # imported when the first URL is used: local files do not need it
    import fsspec

from .atomic import (
    atomic_file,
    atomic_folder,
    remove_leftovers,
    write_text,
)
from .cache import LIMIT, cache_root, copying, file_mode, folder_mode, make_folder, pin
from .locks import one_at_a_time
from .names import nfc, tidy
from .room import Room, room_for

logger = logging.getLogger(__name__)

URL = re.compile(r"([a-z][a-z0-9+.:-]*)://(.*)", re.IGNORECASE | re.DOTALL)
LOCAL = ("file", "local")  # protocols of local files
COPY_BYTES = 1 << 22  # at a time
CONNECTIONS = 8
MAX_DEPTH = 64  # nested folders; a server that reports more makes them up
VERSIONS = {  # keys by which file systems tell versions of a file apart
    *("etag", "md5", "md5hash", "content_md5", "crc32c", "checksum", "generation", "versionid", "version_id"),
    *("lastmodified", "last_modified", "mtime", "modified", "modificationtime", "updated", "created"),
    *("modify", "sha", "hex", "blob_id"),  # of FTP, GitHub, git and Hugging Face
}


@dataclass(frozen=True)
class RemoteFile:
    """A listed file: its size in bytes (None if the server does not tell), and what identifies its version."""

    size: int | None
    version: tuple[tuple[str, str], ...]


def is_url(path: object) -> TypeGuard[str]:
    """Return whether a path is the URL of a remote file or folder."""
    match = URL.match(path) if isinstance(path, str) else None
    return match is not None and match[1].lower() not in LOCAL


def plain_path(path: str) -> str:
    """Return the path of a file:// URL, with `~` expanded; any other text is returned unchanged."""
    match = URL.match(path)
    path = match[2] if match and match[1].lower() in LOCAL else path
    return os.path.expanduser(path) if path.startswith("~") else path


def refuse_url(path: str | os.PathLike, what: str) -> None:
    """Refuse a URL, also one that became a `Path`, where only local files are possible. Raises: ValueError."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path), re.IGNORECASE):
        raise ValueError(
            f"{what} {path}: is a URL, but {what} must be local; write to this machine and copy it with other tools"
        )


def copy_place(url: str) -> Path:
    """Return the folder for copies of a URL.

    Raises: ValueError if the URL names no folder, or has a password or a query.
    """
    match = URL.fullmatch(url.rstrip("/"))
    if match is None or not match[2]:
        raise ValueError(f"{url}: names no folder; give PROTOCOL://PLACE/FOLDER, such as s3://bucket/folder")
    if re.match(r"[^/]*:[^/]*@", match[2]) or "?" in url or "::" in url:
        hidden = re.sub(r"://.*@", "://...@", url.partition("?")[0])
        raise ValueError(
            f"{hidden}: contains a password, a query or another URL; put credentials and options into fsspec's own "
            "configuration (environment, ~/.config/fsspec)"
        )
    return cache_root() / match[1].lower() / _inside(url, match[2])


def with_urls(message: str) -> str:
    """Replace paths of copies in a message by the URLs of the files."""
    return re.sub(re.escape(f"{cache_root()}/") + r"([^/\s]+)/([^\n]+?)/@[0-9a-f]{16}(?![0-9a-f])", r"\1://\2", message)


def connect(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URL, for this thread, and the path in it.

    Raises:
        ValueError: if the protocol is unknown or not installed, or credentials are missing.
    """
    from fsspec.core import url_to_fs

    copy_place(url)
    try:
        return url_to_fs(url.rstrip("/"))
    except ImportError as error:
        package = getattr(error.__cause__, "name", None)
        remedy = f"; install the missing package: pip install {package}" if package else ""
        raise ValueError(f"{url}: {error}{remedy}") from error
    except Exception as error:  # each file system has errors of its own
        raise _failed(url, "cannot be reached", error) from error


def copy_here(url: str, selects: Callable[[str], bool], starts: Iterable[str] = ("",)) -> Path:
    """Copy selected files below a URL, with the files that belong to them, into a local folder and return it.

    Args:
        url: the remote folder.
        selects: tells by a path relative to the URL whether to copy the file.
        starts: folders to search, relative to the URL.

    Raises:
        ValueError: naming the URL, if it cannot be listed or read, if a file changes meanwhile or differs from its
            listed length, or if the copies cannot be stored here.
    """
    place, starts = copy_place(url), sorted({start.strip("/") for start in starts})
    listed = list_files(url, [_inside(url, start) if start else start for start in starts])
    needed = {name: listed[name] for name in sorted(_with_parts(filter(selects, listed), listed))}
    versions = {_inside(url, name): _digest(url, name, file) for name, file in needed.items()}
    folder = place / f"@{hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:16]}"
    files = cache_root() / "files"
    sizes = {versions[name]: _size(url, name, file) for name, file in needed.items()}
    try:
        for parent in (files, cache_root() / "digests", place):
            make_folder(parent)
        with ThreadPoolExecutor(CONNECTIONS) as threads:  # not under the lock: each process checks the copies itself
            list(threads.map(lambda version: _is_whole(files / version, sizes[version]), sizes))
        pin(folder)
        with one_at_a_time(place / ".lock", file_mode()):  # one process fetches, the others find it there
            for parent in (files, cache_root() / "digests", place):
                remove_leftovers(parent)
            absent = {version: size for version, size in sizes.items() if not (files / version).exists()}
            with room_for(sum(absent.values()), anyway=True) as room, copying():
                if not room:
                    logger.warning("%s: its copies exceed the limit of the cache (see $%s)", url, LIMIT)
                missing = [name for name in needed if not _is_whole(files / versions[name], sizes[versions[name]])]
                _fetch_all(url, {name: files / versions[name] for name in missing}, sizes, absent, room)
                if missing:
                    _check_unchanged(url, versions, missing, files, list_files(url, starts))
                _link_all({folder / _inside(url, name): files / version for name, version in versions.items()}, folder)
    except OSError as error:
        raise ValueError(
            f"{url}: its files cannot be copied to {cache_root()} ({error.strerror or error}); set MEDVOLUME_CACHE to "
            "a folder with room, on a disk that has hard links"
        ) from error
    return folder


def _fetch_all(
    url: str, copies: Mapping[str, Path], sizes: Mapping[str, int], absent: Mapping[str, int], room: Room
) -> None:
    """Fetch files, {name: its copy}, whose copies are missing (`absent`, for which there is `room`) or damaged."""
    from tqdm import tqdm

    for name, copy in copies.items():
        if copy.exists():
            logger.warning("%s/%s: its copy in %s is damaged; fetched again", url, name, cache_root())
    _check_room(url, cache_root() / "files", sum(sizes[copy.name] for copy in copies.values()))

    def fetch(name: str, copy: Path) -> None:
        _fetch(url, name, sizes[copy.name], copy)
        if copy.name in absent:
            room.written(absent[copy.name])

    with ThreadPoolExecutor(CONNECTIONS) as threads:
        jobs = [threads.submit(fetch, name, copy) for name, copy in copies.items()]
        try:
            for job in tqdm(jobs, desc=f"copying from {url}", unit="file", delay=2, leave=False, disable=None):
                job.result()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def copy_pattern(pattern: str) -> str:
    """Copy the files that a URL pattern matches, or those of a folder, and return the same pattern for the copies."""
    head = re.split(r"[*?\[]", pattern.rstrip("/"), maxsplit=1)[0]
    copy_place(pattern if pattern.lower().startswith("http") else head)
    if "/" not in head.partition("://")[2]:  # all of a bucket
        url, rest = head, pattern[len(head) :].strip("/")
    else:
        url, rest = head.rpartition("/")[0], pattern[head.rindex("/") + 1 :].strip("/")
    if head != pattern.rstrip("/"):
        from fsspec.utils import glob_translate

        matches = re.compile(glob_translate(rest)).match
        return f"{copy_here(url, lambda path: bool(matches(path) or matches(dirname(path))))}/{rest}"

    def selects(path: str) -> bool:  # the file, a file of the folder, or a slice in a folder of that folder
        return not rest or path == rest or (path.startswith(f"{rest}/") and path[len(rest) + 1 :].count("/") < 2)

    return f"{copy_here(url, selects, (rest,))}/{rest}".rstrip("/")


def copy_file(url: str) -> Path:
    """Copy one file and return the path of the copy, which does not exist if the file does not."""
    folder, _, name = url.rpartition("/")
    return copy_here(folder, lambda path: path == name, (name,)) / name


def copy_table(url: str, read: Callable[[Path], Sequence[Mapping[str, Any]]]) -> Path:
    """Copy a table, and beside it all files below its folder that are named in cells.

    Args:
        url: the table.
        read: reads the rows of a local table.
    """
    folder, _, name = url.rpartition("/")
    table = copy_file(url)
    cells = {tidy(str(cell)) for row in read(table) for cell in row.values()}
    return copy_here(folder, lambda path: path == name or nfc(path) in cells or nfc(dirname(path)) in cells) / name


def list_files(url: str, starts: Iterable[str] = ("",)) -> dict[str, RemoteFile]:
    """List all files below a URL, or below folders of it: {path relative to the URL: file}.

    Raises:
        ValueError: if a folder cannot be listed; a missing folder counts as empty.
    """
    system, base = connect(url)
    files: dict[str, RemoteFile] = {}
    system.invalidate_cache()
    for start in starts:
        below = []
        folders = [f"{base}/{start}".rstrip("/")]
        try:
            while folders:  # fsspec's own `find` passes over folders that it fails to list
                folder = folders.pop()
                if folder[len(base) :].count("/") > MAX_DEPTH:
                    raise RecursionError(f"{folder} is more than {MAX_DEPTH} folders deep")
                for info in system.ls(folder, detail=True):
                    if info["type"] != "directory":
                        below.append(info if info.get("size") is not None else {**info, **system.info(info["name"])})
                    elif info["name"].rstrip("/").startswith(f"{folder}/"):
                        folders.append(info["name"].rstrip("/"))
        except Exception as error:
            if isinstance(error, FileNotFoundError) and not below:
                continue
            raise _failed(url, "cannot be listed", error) from error
        for info in below:
            path, name = info["name"], info["name"][len(base) :].strip("/")
            if path.startswith(base) and name and not path.endswith("/"):
                files[name] = _listed(info)
    return files


def _listed(info: Mapping[str, Any]) -> RemoteFile:
    """Take size and version from what fsspec knows of a file."""
    version = sorted((key.lower(), str(value)) for key, value in info.items() if key.lower() in VERSIONS)
    return RemoteFile(info["size"], tuple(version))


def download(url: str, name: str, size: int, target: Path, time: int | None = None) -> str:
    """Download a file and return the SHA-256 of its content.

    Args:
        url: the remote folder.
        name: path of the file relative to it.
        size: expected size in bytes; reading stops above it.
        target: temporary file to write.
        time: time of change to set, in seconds.

    Raises:
        ValueError: if the file is missing or has another length.
        OSError: if `target` cannot be written.
    """
    system, base = connect(url)
    digest, got = hashlib.sha256(), 0
    with open(target, "wb") as file:
        for piece in _pieces(url, name, system, f"{base}/{name}"):
            got += len(piece)
            if got > size:
                break
            digest.update(piece)
            file.write(piece)
    if got != size:
        more = "more than" if got > size else f"{got} of"
        raise ValueError(f"{url}/{name}: sends {more} the {size} bytes that were listed; did it change? Try again")
    if time is not None:
        os.utime(target, (time, time))
    return digest.hexdigest()


def _pieces(url: str, name: str, system: fsspec.AbstractFileSystem, path: str) -> Iterator[bytes]:
    try:
        with cast(BinaryIO, system.open(path, "rb")) as source:
            while piece := source.read(COPY_BYTES):
                yield piece
    except Exception as error:
        raise _failed(f"{url}/{name}", "cannot be read", error) from error


def _fetch(url: str, name: str, size: int, target: Path) -> None:
    seconds = int(target.name[:8], 16) >> 1  # of this version, the same on every machine: keys are made of files' times
    with atomic_file(target, file_mode()) as unfinished:
        write_text(_written(target), download(url, name, size, unfinished, seconds), file_mode())


def _failed(url: str, what: str, error: Exception) -> ValueError:
    return ValueError(
        f"{url}: {what}: {type(error).__name__}: {error}. Is the URL right? Credentials and endpoints come from "
        "fsspec's own configuration (environment, ~/.config/fsspec)"
    )


def _digest(url: str, name: str, file: RemoteFile) -> str:
    """Return the digest of a file's version: URL, size, and whatever its file system tells versions by."""
    return hashlib.sha256(json.dumps([url.rstrip("/"), name, file.size, file.version]).encode()).hexdigest()[:32]


def _size(url: str, name: str, file: RemoteFile) -> int:
    if not isinstance(file.size, int) or file.size < 0:
        raise ValueError(
            f"{url}/{name}: its server does not say how long it is, so its copy could not be checked; use another "
            "server"
        )
    return file.size


_whole: dict[Path, tuple[int, ...]] = {}  # copies whose digest this process has checked: inode, size and time then


def _written(file: Path) -> Path:
    """Return the file with the digest of a copy."""
    return file.parents[1] / "digests" / file.name


def _is_whole(file: Path, size: int) -> bool:
    """Return whether a copy is as it was fetched.

    Its digest is checked once per process, and again if the file changed: a file that lost sectors keeps its size and
    times.
    """
    try:
        status = file.lstat()
        stamp = status.st_ino, status.st_size, status.st_mtime_ns
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            return False
        if _whole.get(file) != stamp:
            with file.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != _written(file).read_text():
                    return False
            _whole[file] = stamp
    except (OSError, UnicodeDecodeError):  # missing, or on unreadable sectors
        return False
    return True


def _check_room(url: str, files: Path, needed: int) -> None:
    room = shutil.disk_usage(files).free
    if needed > room:
        raise ValueError(
            f"{url}: {needed / 2**30:.3g} GiB are to be copied to {cache_root()}, which has {room / 2**30:.3g} GiB "
            "free; make room (old copies can be deleted while nothing runs), or set MEDVOLUME_CACHE to another folder"
        )


def _check_unchanged(
    url: str, versions: dict[str, str], fetched: Iterable[str], files: Path, now: Mapping[str, RemoteFile]
) -> None:
    """Remove copies of files that changed since they were listed. Raises: ValueError if there are any."""
    changed = [name for name in fetched if name not in now or _digest(url, name, now[name]) != versions[name]]
    for name in changed:
        (files / versions[name]).unlink(missing_ok=True)
    if changed:
        raise ValueError(f"{url}/{changed[0]}: changed while it was copied ({len(changed)} files did); start again")


def _link_all(links: Mapping[Path, Path], folder: Path) -> None:
    """Fill `folder` with hard links to files, {link: file}; links that are already right stay."""
    if not folder.exists():
        with atomic_folder(folder) as unfinished:
            unfinished.chmod(folder_mode())
            for link, file in links.items():
                place = unfinished / link.relative_to(folder)
                make_folder(place.parent)
                os.link(file, place)
        return
    for link, file in links.items():
        if not (link.exists() and link.samefile(file)):
            remove_leftovers(link.parent)
            with atomic_file(link) as place:
                os.link(file, place)


def _inside(url: str, name: str) -> str:
    """Return a relative path that stays inside its folder. Raises: ValueError for any other."""
    if any(part in ("", ".", "..") for part in name.split("/")) or not name.isprintable() or "\\" in name:
        raise ValueError(f"{url}: names a file {name!r}, which is not a path below a folder; rename it there")
    return name


def _with_parts(chosen: Iterable[str], listed: Iterable[str]) -> set[str]:
    """Add the other halves of .hdr/.img pairs, and the files beside .nhdr and .mhd headers of the same stem."""
    selected, every = set(chosen), sorted(listed)
    stems = set()
    for name in selected:
        if match := re.fullmatch(r"(.*\.)(?:hdr|img)(?:\.gz)?|(.*\.)(?:nhdr|mhd)", name, re.IGNORECASE):
            stems.add(match[1] or match[2])
    beside = {name for name in every if any(name[:end] in stems for end in _dots(name))} if stems else set()
    return selected | beside


def _dots(name: str) -> Iterator[int]:
    return (match.end() for match in re.finditer(r"\.", name))
