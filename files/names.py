"""Normalize file names, which people, tables and disks spell differently.

"ü" is one character (NFC: Linux, Windows) or two (NFD: older macOS). Tables from Windows have backslashes; others put
"./" before each path. Names are compared and created in NFC with slashes; files are opened by the name that is on the
disk.
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
    """Return the text in NFC."""
    return text if text.isascii() else normalize("NFC", text)


def same_name(text: str) -> str:
    """Return a key that is equal for names that are one file on macOS (NFD is NFC) or on Windows (A is a)."""
    return nfc(nfc(text).casefold())


def tidy(path: str) -> str:
    """Normalize a path or pattern: NFC, slashes, no "./", no "//" and no slash at the end."""
    path = nfc(path).replace("\\", "/")
    return re.sub("^//+", "/", normpath(path)) if path else path


class Disk:
    """Find files whose names are spelled differently on disk. Each folder is listed once."""

    def __init__(self) -> None:
        self._listed: dict[Path, dict[str, list[str]]] = {}

    def find(self, path: str | Path) -> Path:
        """Return the path as it is spelled on disk, or unchanged if there is no such file.

        Raises:
            ValueError: if two files match, one in NFC and one in NFD.
        """
        requested = Path(path)
        if str(path).isascii():
            return requested
        on_disk = Path(requested.anchor)
        for part in requested.relative_to(on_disk).parts if requested.anchor else requested.parts:
            spellings = [part] if part.isascii() else self._names(on_disk).get(nfc(part), [part])
            if len(spellings) > 1:
                raise twins(on_disk / spellings[0], on_disk / spellings[1])
            on_disk /= spellings[0]
        return on_disk

    def _names(self, folder: Path) -> dict[str, list[str]]:
        """Return the names in a folder by their NFC; empty if it cannot be listed."""
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
    """Return the file named in a table cell, relative to `folder`, or to the home folder after `~`.

    Backslashes count as slashes unless a file of that name exists.
    """
    cell = os.path.expanduser(cell) if cell.startswith("~") else cell
    if "\\" in cell and (folder / cell).exists():
        return folder / cell
    return disk.find(folder / tidy(cell))


def windows_hint(cell: str) -> str:
    """Return a hint to add to "no such file" if a path is an absolute Windows path, else an empty text."""
    return "; this is a Windows path: give it relative to the table's root" if DRIVE.match(cell) else ""


def glob_names(pattern: str) -> list[str]:
    """Match like `glob.glob(recursive=True)`, but in any Unicode spelling."""
    paths = set(glob.glob(pattern, recursive=True))
    if not pattern.isascii():
        wider = re.sub(r"[^\x00-\x7f]+", "*", nfc(pattern))
        wider = glob.glob(re.sub(r"\*\*\*+", "**", wider), recursive=True)
        paths |= {path for path in wider if fnmatch.fnmatchcase(nfc(path), nfc(pattern))}
    return sorted(paths)


def resource_forks(files: list[Path]) -> list[Path]:
    """Return the files that macOS left beside these (`._scan.nii.gz`); they contain no voxels."""
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
    """Return the error for two files of the same name."""
    return ValueError(
        f"{first} and {second}: these names differ only in Unicode normalization (NFC and NFD); rename or remove one"
    )
