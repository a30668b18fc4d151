"""Names of files as people, tables and disks spell them.

One name has several spellings: "ü" is one character (NFC: Linux, Windows) or two (NFD: older macOS), a table written on Windows has
backslashes, another one "./" before each path. Names are compared, and made, in NFC with slashes; a file is opened by the
name that its disk has.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from pathlib import Path
from posixpath import normpath
from unicodedata import normalize

RESOURCE_FORK = "._"  # what macOS writes beside each file on disks of others
DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def nfc(text: str) -> str:
    """The text in NFC."""
    return text if text.isascii() else normalize("NFC", text)


def same_name(text: str) -> str:
    """What two names have in common that would be one file on some disk: of macOS (NFD is NFC) or Windows (A is a)."""
    return nfc(nfc(text).casefold())


def tidy(path: str) -> str:
    """A path, or a pattern of paths, in NFC, with slashes, without "./", "//" and a slash at its end."""
    path = nfc(path).replace("\\", "/")
    return re.sub("^//+", "/", normpath(path)) if path else path


class Disk:
    """Finds files by names that are spelled otherwise than on disk. Folders are listed once."""

    def __init__(self) -> None:
        self._listed: dict[Path, dict[str, list[str]]] = {}

    def find(self, path: str | Path) -> Path:
        """The path as the disk spells it; where nothing is, the path itself.

        Raises: ValueError if two files are called so, in NFC and in NFD.
        """
        given = Path(path)
        if str(path).isascii():
            return given
        found = Path(given.anchor)
        for part in given.relative_to(found).parts if given.anchor else given.parts:
            spelled = [part] if part.isascii() else self._names(found).get(nfc(part), [part])
            if len(spelled) > 1:
                raise twins(found / spelled[0], found / spelled[1])
            found /= spelled[0]
        return found

    def _names(self, folder: Path) -> dict[str, list[str]]:
        """The names in a folder, by their NFC; none where it cannot be listed."""
        if folder not in self._listed:
            names: dict[str, list[str]] = {}
            try:
                there = sorted(os.listdir(folder))
            except OSError:  # what is in it may be opened all the same
                there = []
            for name in there:
                names.setdefault(nfc(name), []).append(name)
            self._listed[folder] = names
        return self._listed[folder]


def cell_path(folder: Path, cell: str, disk: Disk) -> Path:
    """The file that a table's cell names, relative to `folder` or, after `~`, to the home folder. Backslashes are slashes unless
    there is such a file."""
    cell = os.path.expanduser(cell) if cell.startswith("~") else cell
    if "\\" in cell and (folder / cell).exists():
        return folder / cell
    return disk.find(folder / tidy(cell))


def windows_hint(cell: str) -> str:
    """What to add to "no such file", where a path is one of another machine; else nothing."""
    return "; a path of Windows is not found here: give it relative to the table's root" if DRIVE.match(cell) else ""


def glob_names(pattern: str) -> list[str]:
    """As `glob.glob(recursive=True)`, but matching names however they are spelled on disk."""
    found = set(glob.glob(pattern, recursive=True))
    if not pattern.isascii():
        wider = re.sub(r"[^\x00-\x7f]+", "*", nfc(pattern))
        wider = glob.glob(re.sub(r"\*\*\*+", "**", wider), recursive=True)
        found |= {path for path in wider if fnmatch.fnmatchcase(nfc(path), nfc(pattern))}
    return sorted(found)


def resource_forks(files: list[Path]) -> list[Path]:
    """The files that macOS left beside these (`._scan.nii.gz`), which hold no voxels."""
    folders: dict[Path, set[str]] = {}
    for path in files:
        folders.setdefault(path.parent, set()).add(path.name)
    return sorted(
        folder / name
        for folder, names in folders.items()
        for name in os.listdir(folder)
        if name.startswith(RESOURCE_FORK) and name.removeprefix(RESOURCE_FORK) in names
    )


def twins(first: Path, second: Path) -> ValueError:
    """The error for two files of one name."""
    return ValueError(
        f"{first} and {second}: are two files whose names look alike and differ only in how Unicode spells them (NFC and NFD): "
        "rename or remove one"
    )
