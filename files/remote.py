"""Volumes on object storage: an fsspec URL (s3://bucket/folder, gs://, https://, ...) in the place of a folder.

What is needed of a remote folder is copied to this machine before anything reads it, so that all readers, and their
checks, are those of local files. Copies are in $MEDVOLUME_CACHE (default: ~/.cache/medvolume):

    files/<digest>                  one version (URL, size, etag or time) of one remote file; fetched once
    digests/<digest>                sha256 of its content as it was fetched, compared once a process: what is damaged is fetched again
    s3/bucket/folder/@<digest>/...  the folder as it was listed, as hard links to these: it never changes

Credentials, endpoints and options are fsspec's own (environment, ~/.config/fsspec, ~/.aws, ...), never a URL's or config's.
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
from pathlib import Path
from posixpath import dirname
from typing import TYPE_CHECKING, Any, BinaryIO, TypeGuard, cast

if TYPE_CHECKING:  # where a URL is met, and not before: whoever reads local files has no need of them
    import fsspec

from .atomic import (
    atomic_file,
    atomic_folder,
    remove_leftovers,
    write_text,
)
from .locks import one_at_a_time
from .names import nfc, tidy

logger = logging.getLogger(__name__)

URL = re.compile(r"([a-z][a-z0-9+.:-]*)://(.*)", re.IGNORECASE | re.DOTALL)
LOCAL = ("file", "local")  # protocols of this machine's own files
COPY_BYTES = 1 << 22  # at a time
CONNECTIONS = 8
DEEPEST = 64  # folders in each other; more is a server that makes them up
VERSIONS = {  # what file systems call that by which a new version of a file is told
    *("etag", "md5", "md5hash", "content_md5", "crc32c", "checksum", "generation", "versionid", "version_id"),
    *("lastmodified", "last_modified", "mtime", "modified", "modificationtime", "updated", "created"),
    *("modify", "sha", "hex", "blob_id"),  # of FTP, GitHub, git and Hugging Face
}


def is_url(path: object) -> TypeGuard[str]:
    """Whether this is the URL of something that is not among this machine's own files."""
    match = URL.match(path) if isinstance(path, str) else None
    return match is not None and match[1].lower() not in LOCAL


def plain_path(path: str) -> str:
    """A file:// URL as the path that it is, and `~` at the beginning as the home folder; all else unchanged."""
    match = URL.match(path)
    path = match[2] if match and match[1].lower() in LOCAL else path
    return os.path.expanduser(path) if path.startswith("~") else path


def refuse_url(path: str | os.PathLike, what: str) -> None:
    """Raises: ValueError for a URL, also one that has become a `Path`, where only local files will do."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path), re.IGNORECASE):
        raise ValueError(
            f"{what} {path}: is a URL; {what} is on this machine: write it here, and copy it with other tools"
        )


def cache_root() -> Path:
    """The folder of copies."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "medvolume"
    return Path(os.environ.get("MEDVOLUME_CACHE") or usual).expanduser().resolve()


def copy_place(url: str) -> Path:
    """The folder of a URL's copies. Raises: ValueError for a URL that names no folder, or holds a password or a query."""
    match = URL.fullmatch(url.rstrip("/"))
    if match is None or not match[2]:
        raise ValueError(f"{url}: names no folder; give PROTOCOL://PLACE/FOLDER, such as s3://bucket/folder")
    if re.match(r"[^/]*:[^/]*@", match[2]) or "?" in url or "::" in url:
        hidden = re.sub(r"://.*@", "://...@", url.partition("?")[0])
        raise ValueError(
            f"{hidden}: holds a password, a query or another URL; credentials and options belong into fsspec's own "
            "configuration (environment, ~/.config/fsspec)"
        )
    return cache_root() / match[1].lower() / _inside(url, match[2])


def with_urls(message: str) -> str:
    """A message with the URLs of files in the place of their copies' paths."""
    return re.sub(re.escape(f"{cache_root()}/") + r"([^/\s]+)/([^\n]+?)/@[0-9a-f]{16}(?![0-9a-f])", r"\1://\2", message)


def connect(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, for this thread, and the path there.

    Raises: ValueError for a protocol that is not known or not installed, and without credentials.
    """
    from fsspec.core import url_to_fs

    copy_place(url)
    try:
        return url_to_fs(url.rstrip("/"))
    except ImportError as error:
        package = getattr(error.__cause__, "name", None)
        remedy = f"; install what it needs: pip install {package}" if package else ""
        raise ValueError(f"{url}: {error}{remedy}") from error
    except Exception as error:  # each file system has errors of its own
        raise _failed(url, "cannot be reached", error) from error


def copy_here(url: str, chosen: Callable[[str], bool], starts: Iterable[str] = ("",)) -> Path:
    """A local folder with the chosen files below a URL, and what belongs to them, at the same relative paths.

    Args:
        chosen: whether a file is wanted, by its path relative to the URL.
        starts: folders, relative to the URL, in which they are looked for.
    Raises: ValueError, which names the URL, if it cannot be listed or read, if files change meanwhile or do not have the
    length that was listed, and if they cannot be stored here.
    """
    from tqdm import tqdm

    place, starts = copy_place(url), sorted({start.strip("/") for start in starts})
    listed = list_files(url, [_inside(url, start) if start else start for start in starts])
    wanted = {name: listed[name] for name in sorted(_with_parts(filter(chosen, listed), listed))}
    versions = {_inside(url, name): _digest(url, name, info) for name, info in wanted.items()}
    folder = place / f"@{hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:16]}"
    files, sizes = cache_root() / "files", {versions[name]: _size(url, name, info) for name, info in wanted.items()}
    try:
        files.mkdir(parents=True, exist_ok=True)
        place.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(CONNECTIONS) as threads:  # not under the lock: each process reads what it is to believe
            list(threads.map(lambda version: _is_whole(files / version, sizes[version]), sizes))
        with one_at_a_time(place / ".lock"):  # one process fetches, the others find it there
            for left in (files, cache_root() / "digests", place):
                remove_leftovers(left)
            missing = {n: i for n, i in wanted.items() if not _is_whole(files / versions[n], sizes[versions[n]])}
            for name in missing:
                if (files / versions[name]).exists():
                    logger.warning("%s/%s: its copy in %s is damaged; fetched again", url, name, cache_root())
            _check_room(url, files, sum(info["size"] for info in missing.values()))
            with ThreadPoolExecutor(CONNECTIONS) as threads:
                jobs = [
                    threads.submit(_fetch, url, name, info["size"], files / versions[name])
                    for name, info in missing.items()
                ]
                try:
                    for job in tqdm(jobs, desc=f"copying from {url}", unit="file", delay=2, leave=False, disable=None):
                        job.result()
                except BaseException:
                    threads.shutdown(cancel_futures=True)
                    raise
            if missing:
                _check_unchanged(url, versions, missing, files, list_files(url, starts))
            _link_all({folder / _inside(url, name): files / version for name, version in versions.items()}, folder)
    except OSError as error:
        raise ValueError(
            f"{url}: its files cannot be copied to {cache_root()} ({error.strerror or error}); set MEDVOLUME_CACHE to a "
            "folder with room, on a disk that has hard links"
        ) from error
    return folder


def copy_pattern(pattern: str) -> str:
    """A URL of files, with wildcards or none, or of a folder of them, as the same pattern of local copies."""
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

    def chosen(path: str) -> bool:  # the file, a file of the folder, or a slice in a folder of that folder
        return not rest or path == rest or (path.startswith(f"{rest}/") and path[len(rest) + 1 :].count("/") < 2)

    return f"{copy_here(url, chosen, (rest,))}/{rest}".rstrip("/")


def copy_file(url: str) -> Path:
    """A local copy of one file; a path where nothing is, if there is none."""
    folder, _, name = url.rpartition("/")
    return copy_here(folder, lambda path: path == name, (name,)) / name


def copy_table(url: str, read: Callable[[Path], Sequence[Mapping[str, Any]]]) -> Path:
    """A local copy of a table at a URL, and beside it of all files below its folder that cells name.

    Args:
        read: rows of a local table.
    """
    folder, _, name = url.rpartition("/")
    table = copy_file(url)
    cells = {tidy(str(cell)) for row in read(table) for cell in row.values()}
    return copy_here(folder, lambda path: path == name or nfc(path) in cells or nfc(dirname(path)) in cells) / name


def list_files(url: str, starts: Iterable[str] = ("",)) -> dict[str, dict[str, Any]]:
    """All files below a URL, or in folders there: {path relative to the URL: what fsspec knows of it}.

    Raises: ValueError if any folder cannot be listed, but not for one that is not there.
    """
    system, base = connect(url)
    found: dict[str, dict[str, Any]] = {}
    system.invalidate_cache()
    for start in starts:
        below: list[dict[str, Any]] = []
        folders = [f"{base}/{start}".rstrip("/")]
        try:
            while folders:  # fsspec's own `find` passes over folders that it fails to list
                folder = folders.pop()
                if folder[len(base) :].count("/") > DEEPEST:
                    raise RecursionError(f"{folder} lies more than {DEEPEST} folders deep")
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
                found[name] = info
    return found


def download(url: str, name: str, size: int, target: Path, time: int | None = None) -> str:
    """Fetch a file into `target`, an unfinished one, never more than `size` bytes, and set its time of change (in seconds), if one is
    given. Returns the SHA-256 of its content.

    Raises: ValueError if it is not there, or has another length; OSError if `target` cannot be written.
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
    with atomic_file(target) as unfinished:
        write_text(_written(target), download(url, name, size, unfinished, seconds))


def _failed(url: str, what: str, error: Exception) -> ValueError:
    return ValueError(
        f"{url}: {what}: {type(error).__name__}: {error}. Is the URL right? Credentials and endpoints come from fsspec's own "
        "configuration (environment, ~/.config/fsspec)"
    )


def _digest(url: str, name: str, info: dict[str, Any]) -> str:
    """Of a file's version: URL, size, and whatever its file system tells versions by."""
    version = sorted((key.lower(), str(value)) for key, value in info.items() if key.lower() in VERSIONS)
    return hashlib.sha256(json.dumps([url.rstrip("/"), name, info["size"], version]).encode()).hexdigest()[:32]


def _size(url: str, name: str, info: dict[str, Any]) -> int:
    if not isinstance(info["size"], int) or info["size"] < 0:
        raise ValueError(
            f"{url}/{name}: its server does not say how long it is, so that it could not be seen to be whole"
        )
    return info["size"]


_whole: dict[Path, tuple[int, ...]] = {}  # copies whose digest this process has compared, as they were then


def _written(file: Path) -> Path:
    """Where the digest of a copy stands."""
    return file.parents[1] / "digests" / file.name


def _is_whole(file: Path, size: int) -> bool:
    """Whether a copy is there as it was fetched. Its digest is compared the first time that a process asks, and when it was touched
    since: all of it is read then anyway, and a file that lost sectors keeps its size and times."""
    try:
        found = file.lstat()
        stamp = found.st_ino, found.st_size, found.st_mtime_ns
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            return False
        if _whole.get(file) != stamp:
            with file.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != _written(file).read_text():
                    return False
            _whole[file] = stamp
    except (OSError, UnicodeDecodeError):  # not there, or on sectors that cannot be read
        return False
    return True


def _check_room(url: str, files: Path, needed: int) -> None:
    room = shutil.disk_usage(files).free
    if needed > room:
        raise ValueError(
            f"{url}: {needed / 2**30:.3g} GiB are to be copied to {cache_root()}, where {room / 2**30:.3g} GiB are free; make "
            "room (what is there can be deleted while nothing runs), or set MEDVOLUME_CACHE to another folder"
        )


def _check_unchanged(
    url: str, versions: dict[str, str], fetched: Iterable[str], files: Path, now: dict[str, dict[str, Any]]
) -> None:
    """Raises: ValueError if what was fetched is no longer the version that was listed; its copies are removed."""
    changed = [name for name in fetched if name not in now or _digest(url, name, now[name]) != versions[name]]
    for name in changed:
        (files / versions[name]).unlink(missing_ok=True)
    if changed:
        raise ValueError(f"{url}/{changed[0]}: changed while it was copied ({len(changed)} files did); start again")


def _link_all(links: Mapping[Path, Path], folder: Path) -> None:
    """`folder` with hard links to files, {link: file}; of one that is there already, only what is not the same file is replaced."""
    if not folder.exists():
        with atomic_folder(folder) as unfinished:
            for link, file in links.items():
                place = unfinished / link.relative_to(folder)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.link(file, place)
        return
    for link, file in links.items():
        if not (link.exists() and link.samefile(file)):
            remove_leftovers(link.parent)
            with atomic_file(link) as place:
                os.link(file, place)


def _inside(url: str, name: str) -> str:
    """A relative path that stays where it is put. Raises: ValueError for any other."""
    if any(part in ("", ".", "..") for part in name.split("/")) or not name.isprintable() or "\\" in name:
        raise ValueError(f"{url}: names a file {name!r}, which is no path below a folder; rename it there")
    return name


def _with_parts(chosen: Iterable[str], listed: Iterable[str]) -> set[str]:
    """Files with the other halves of .hdr/.img pairs, and with what lies beside .nhdr and .mhd headers by the same name."""
    wanted, every = set(chosen), sorted(listed)
    stems = set()
    for name in wanted:
        if match := re.fullmatch(r"(.*\.)(?:hdr|img)(?:\.gz)?|(.*\.)(?:nhdr|mhd)", name, re.IGNORECASE):
            stems.add(match[1] or match[2])
    beside = {name for name in every if any(name[:end] in stems for end in _dots(name))} if stems else set()
    return wanted | beside


def _dots(name: str) -> Iterator[int]:
    return (match.end() for match in re.finditer(r"\.", name))
