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


def printable(text: str) -> str:
    """Text for a terminal: control characters but line breaks and tabs as Python writes them, so that no file's name moves the cursor,
    or changes what stands there already."""
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    shown = (
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in hidden and letter not in "\n\t"
        else letter
        for letter in text
    )
    return text if text.isascii() and text.isprintable() else "".join(shown)


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read. Raises: ValueError, at once, for what is not a regular file: a pipe would wait for a writer for ever."""
    refuse_special(path)  # a socket cannot be opened, and of a device the opening alone may do something
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise ValueError(f"{path}: {_not_regular(mode)}")
    return os.fdopen(descriptor, "rb")


def refuse_special(path: Path) -> None:
    """Raises: ValueError for a pipe, socket or device; not for files, folders and what is not there."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # whoever opens it says what is wrong
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path}: {_not_regular(mode)}")


def _not_regular(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    found = kinds.get(stat.S_IFMT(mode), "a device")
    return f"is {found}, not a regular file; remove it or name another one"
