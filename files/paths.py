"""Names and paths that others wrote, in JSON, tables and headers: checked before anything is read or written by them."""

import os
import stat
import unicodedata
from pathlib import Path
from typing import BinaryIO

MAX_NAME_BYTES = 200  # of a name that suffixes are added to; most file systems take 255


def path_inside(home: Path, named: str, what: str) -> Path:
    """Return the file `named` in the folder `home`, or below it, links followed.

    Args:
        named: a path by POSIX rules, as a file of somebody else's has it.
        what: what names it, for the message, such as "report.json: pictures.a".
    Raises: ValueError for a path that is absolute, not printable, or leads out of `home`, and if there is no such regular file.
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
    """Return `name` if files can be called by it on every system, with suffixes added.

    Raises: ValueError for separators, a leading dot, control characters (line breaks, escape sequences), white space at an end,
    and names of more than 200 bytes.
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


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read. Raises: ValueError, at once, for what is not a regular file: a pipe would wait for a writer for ever."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: is not a regular file but a folder, pipe or device; remove it or name another one")
    return os.fdopen(descriptor, "rb")
