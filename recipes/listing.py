"""List the volume files and DICOM folders below a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from files.names import nfc
from volumes.formats.dicom import is_series
from volumes.formats.read import SUFFIXES, is_volume_name, volume_stem

MOST_FILES = 200_000
RECIPE_FILES = {"data.yaml", "ldm.yaml"}
TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")


@dataclass(frozen=True)
class Listing:
    """What lies below a folder. All paths are relative to `root`, with slashes, as the disk spells them.

    Attributes:
        root: the folder.
        volumes: volume files; of two files that differ in the suffix alone, one.
        series: folders of DICOM files.
        tables: tables directly in the folder.
        twins: files that were left out for a twin.
    """

    root: Path
    volumes: tuple[str, ...]
    series: tuple[str, ...]
    tables: tuple[str, ...]
    twins: tuple[str, ...]


def list_folder(root: Path, skip: Path | None = None) -> Listing:
    """List a folder. Hidden files and folders, and recipes, are passed over. Linked folders are followed once.

    Args:
        root: the folder.
        skip: a folder below it that is not looked at: where the recipe will be.

    Raises:
        ValueError: if there is no such folder, or if it holds no volumes or far too many files.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; give the folder of the scans")
    volumes: list[str] = []
    series: list[str] = []
    count, linked = 0, {root.resolve()}
    for folder, folders, names in os.walk(root, followlinks=True):
        here = Path(folder)
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith(".") and not _is_skipped(here / name, skip) and not _is_known(here / name, linked)
        ]
        count += len(names)
        if count > MOST_FILES:
            raise ValueError(f"{root}: holds more than {MOST_FILES} files; give the folder of one data set")
        found = [here / name for name in sorted(names) if is_volume_name(name)]
        volumes += [path.relative_to(root).as_posix() for path in found]
        if names and not found and is_series(here):
            series.append(here.relative_to(root).as_posix())
    kept, twins = _without_twins(volumes)
    tables = [name for name in sorted(os.listdir(root)) if name.lower().endswith(TABLES) and name[0] != "."]
    if not kept and not series:
        raise ValueError(
            f"{root}: holds no volumes ({', '.join(SUFFIXES)}, DICOM folders); give the folder of the scans"
        )
    return Listing(root, tuple(kept), tuple(series), tuple(tables), tuple(twins))


def stem_of(path: str) -> str:
    """Return a file's name without its folder and suffix, in NFC."""
    return volume_stem(path)


def suffix_of(path: str) -> str:
    """Return a file's suffix as it is spelled: `.nii.gz`, `.NRRD`; "" for a DICOM folder."""
    name = nfc(Path(path).name)
    return name[len(volume_stem(name)) :]


def _is_known(folder: Path, linked: set[Path]) -> bool:
    """Return whether a linked folder is listed at another place, or holds one that is (a loop); remember it if not."""
    if not folder.is_symlink():
        return False
    real = folder.resolve()
    for other in linked:
        hidden = real.is_relative_to(other) and any(part.startswith(".") for part in real.relative_to(other).parts)
        if other.is_relative_to(real) or (real.is_relative_to(other) and not hidden):
            return True
    linked.add(real)
    return False


def _is_skipped(folder: Path, skip: Path | None) -> bool:
    if skip is not None and folder.resolve() == skip.resolve():
        return True
    return not os.access(folder, os.R_OK) or set(os.listdir(folder)) >= RECIPE_FILES


def _without_twins(paths: list[str]) -> tuple[list[str], list[str]]:
    """Keep one of the files that differ in the suffix alone: .nii.gz first, then in the order of `SUFFIXES`."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(f"{nfc(path).rpartition('/')[0]}/{stem_of(path)}", []).append(path)
    order = {suffix: number for number, suffix in enumerate(SUFFIXES)}
    kept, twins = [], []
    for group in groups.values():
        first, *others = sorted(group, key=lambda path: (order.get(suffix_of(path).lower(), len(order)), path))
        kept.append(first)
        twins += others
    return sorted(kept), sorted(twins)
