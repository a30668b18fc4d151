"""Check untrusted names and paths (from JSON, tables and headers) before they are used."""

import os
import stat
import unicodedata
from pathlib import Path
from typing import BinaryIO

MAX_NAME_BYTES = 200  # of a name that suffixes are added to; most file systems take 255


def path_inside(home: Path, named: str, what: str) -> Path:
    """Return the file `named` in or below the folder `home`; links are followed.

    Args:
        home: the folder.
        named: an untrusted path by POSIX rules.
        what: where the path comes from, for the message, such as "report.json: pictures.a".

    Raises:
        ValueError: if the path is absolute, not printable, leads out of `home`, or is not a regular file.
    """
    if not isinstance(named, str) or not named or not named.isprintable():
        raise ValueError(f"{what}: {named!r} is not a file name")
    folder = home.resolve()
    try:
        path = (folder / named).resolve()
    except (OSError, RuntimeError) as error:  # Python's, for a circle of links
        raise ValueError(f"{what}: {named!r} cannot be followed: {error}") from error
    if Path(named).is_absolute() or "\\" in named or not path.is_relative_to(folder):
        raise ValueError(
            f"{what}: {named!r} leads out of the folder {home}; put the file there and name it without its path"
        )
    try:
        regular = path.is_file()
    except OSError as error:  # a name that is too long
        raise ValueError(f"{what}: {named!r} cannot be opened: {error.strerror}") from error
    if not regular:
        raise ValueError(f"{what}: {named!r} is not a file in {home}")
    return path


def check_name(name: str, what: str) -> str:
    """Return `name` if it is a valid file name on every system, also with suffixes added.

    Raises:
        ValueError: for separators, a leading dot, control characters (line breaks, escape sequences), white space at an
            end, and names of more than 200 bytes.
    """
    problem = None
    if not name:
        problem = "is empty"
    elif "/" in name or "\\" in name:
        problem = "has a slash, which no file name may have"
    elif any(unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") for letter in name):
        problem = "has characters that cannot be seen"
    elif name.startswith("."):
        problem = "begins with a dot, so its files would be hidden"
    elif name != name.strip():
        problem = "begins or ends with white space"
    elif len(os.fsencode(name)) > MAX_NAME_BYTES:
        problem = f"is longer than {MAX_NAME_BYTES} bytes"
    if problem:
        shown = repr(name if len(name) <= 60 else name[:60] + "...")
        raise ValueError(f"{what}: the name {shown} {problem}; choose another one")
    return name


def printable(text: str) -> str:
    """Escape control characters except line breaks and tabs, so that a file's name cannot move a cursor."""
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    shown = (
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in hidden and letter not in "\n\t"
        else letter
        for letter in text
    )
    return text if text.isascii() and text.isprintable() else "".join(shown)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises: ValueError for anything else, without waiting for the writer of a pipe.
    """
    refuse_special(path)  # a socket cannot be opened, and opening a device may have effects
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise ValueError(f"{path}: {_not_regular(mode)}")
    return os.fdopen(descriptor, "rb")


def refuse_special(path: Path) -> None:
    """Refuse a pipe, socket or device; accept files, folders and missing paths. Raises: ValueError."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # the function that opens it reports what is wrong
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path}: {_not_regular(mode)}")


def _not_regular(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    return f"is {kind}, not a regular file; remove it or name another one"


def leads_out(folder: Path, path: Path) -> bool:
    """Return whether a path in a folder is, or lies behind, a link out of it.

    The Hub's cache keeps files in `blobs`, beside the `snapshots` that link to them; these are inside.

    Raises: RuntimeError for a circle of links.
    """
    homes = [folder.resolve()]
    homes += [place.parent / "blobs" for place in homes[0].parents if place.name == "snapshots"]
    return not any(path.resolve().is_relative_to(home) for home in homes)
