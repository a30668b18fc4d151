"""List the cases of a data config: files that belong together, their subject and their split.

A subject is never in two splits.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from files.names import (
    Disk,
    cell_path,
    nfc,
    resource_forks,
    same_name,
    tidy,
    windows_hint,
)
from files.paths import check_name
from files.remote import (
    copy_file,
    copy_here,
    is_url,
    plain_path,
    with_urls,
)
from volumes.phantom import PHANTOM_CLASSES, phantom_lesion
from volumes.placement import Placement
from volumes.volume import GRID_NUMBERS

from .config import DataConfig, PhantomConfig
from .patterns import case_name, fill_pattern, find_files, first_folder, is_wanted, placeholders
from .tables import Row, read_table

logger = logging.getLogger(__name__)
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Case:
    """One volume of the data set: its files by channel, its mask, its subject and split, and the table's other columns
    (classes by their names).

    A phantom has no files, only its number. `box` is the box of `data.crop`, where it is known and not to be found.
    """

    name: str
    subject: str
    split: str = "train"
    images: dict[str, Path] = field(default_factory=dict)
    mask: Path | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    phantom: int | None = None
    box: Placement | None = None


def load_cases(config: DataConfig) -> list[Case]:
    """List all cases of the data set, sorted by name, each in split "train", "validation" or "test".

    The same config and files give the same splits on every machine. Raises ValueError for missing files (but not those
    of a table with `on_error: skip`), names used twice, columns that no case has, unknown splits, and subjects that a
    table puts into two splits. Files are not read here: a damaged one is found later (`VolumeDataset`).

    If root or table are URLs, the files are copied first, and the paths are those of the local copies.
    """
    if is_url(config.root) or is_url(config.table):
        try:
            return load_cases(_copied(config))
        except ValueError as error:
            raise ValueError(with_urls(str(error))) from error
    if config.phantom is not None:
        cases = _phantoms(config.phantom)
    else:
        cases = _from_table(config) if config.table else _from_patterns(config)
        cases = [replace(case, subject=_subject(case, config)) for case in cases]
        cases = [replace(case, metadata=_named_classes(case.metadata, config)) for case in cases]
    _check_names(cases)
    _mention_case(cases)
    _check_columns(cases, config)
    cases.sort(key=lambda case: case.name)
    if config.split:
        cases = [replace(case, split=_named_split(case, config)) for case in cases]
    elif config.test_fraction:
        cases = _hold_out(cases, "test", config.test_fraction, config.split_seed)
    if config.validation_fraction and not any(case.split == "validation" for case in cases):
        cases = _hold_out(cases, "validation", config.validation_fraction, config.split_seed)
    _check_subjects(cases)
    return cases


def _copied(config: DataConfig) -> DataConfig:
    """Return the config with local copies of the files that its URLs name."""
    root, table, names = config.root, config.table, set()
    if table and (is_url(table) or not Path(plain_path(table)).is_absolute()):
        url = table if is_url(table) else f"{root.rstrip('/')}/{table}"
        table = str(copy_file(url) if is_url(url) else Path(plain_path(root)) / table)
    if not is_url(root):
        return replace(config, table=table)
    patterns = [str(one) for channel in config.patterns.values() for one in channel]
    patterns += [config.masks] if config.masks else []
    if table:
        rows = read_table(Path(plain_path(table)), _used(config))
        names = {tidy(fill_pattern(pattern, row)) for pattern in patterns for row in rows}
        wanted = [lambda path: nfc(path) in names or nfc(path).rpartition("/")[0] in names]
    else:
        wanted = [is_wanted(pattern) for pattern in patterns]
    folder = copy_here(root, lambda path: any(one(path) for one in wanted), map(first_folder, patterns))
    return replace(config, root=str(folder), table=table)


def _phantoms(config: PhantomConfig) -> list[Case]:
    cases = []
    for number in range(config.seed, config.seed + config.count):
        kind, voxels = phantom_lesion(number, config.shape, config.lesion_voxels, config.lesions)
        metadata = {"class": PHANTOM_CLASSES[kind], "lesion_volume": voxels}  # of 1 mm
        cases.append(Case(f"phantom_{number:04d}", subject=f"P{number:04d}", metadata=metadata, phantom=number))
    return cases


def _used(config: DataConfig) -> set[str]:
    """Return the table's columns that the config uses."""
    patterns = [one for channel in config.patterns.values() for one in channel] + [config.masks or ""]
    named = {name for pattern in patterns for name in placeholders(pattern)}
    return named | {*config.classes, *config.numbers} | {one for one in (config.subject, config.split) if one}


def _from_table(config: DataConfig) -> list[Case]:
    disk = Disk()
    root = disk.find(plain_path(config.root))
    cases = []
    for row in read_table(disk.find(root / plain_path(str(config.table))), _used(config)):
        images = {}
        for channel, patterns in config.patterns.items():
            if len(patterns) != 1:
                raise ValueError("data: with a table, images is one pattern, or one per channel, not a list")
            images[channel] = _file_of(patterns[0], row, root, config, disk)
        mask = _file_of(config.masks, row, root, config, disk) if config.masks else None
        first, pattern = next(iter(images.items()))[1], next(iter(config.patterns.values()))[0]
        name = case_name([str(row[column]) for column in placeholders(pattern)], first)
        cases.append(Case(name, subject=name, images=images, mask=mask, metadata=dict(row)))
    return cases


def _file_of(pattern: str, row: Row, root: Path, config: DataConfig, disk: Disk) -> Path:
    """Return the file that a row names. A missing file is refused, or with `on_error: skip` when it is read.

    Raises: ValueError naming the row.
    """
    empty = [column for column in placeholders(pattern) if row.get(column) == ""]
    text = fill_pattern(pattern, row)
    path = root / f"({row.place}: no {empty[0]})" if empty else cell_path(root, text, disk)
    if config.on_error == "raise" and not path.exists():
        if empty:
            raise ValueError(
                f"{config.table}: {row.place} has no value for {empty[0]!r}, which names a file; fill it in, or "
                "remove the row"
            )
        raise ValueError(
            f"{path}: no such file, though {row.place} of {config.table} names it: {dict(row)}{windows_hint(text)}"
        )
    return path


def _from_patterns(config: DataConfig) -> list[Case]:
    root = Disk().find(plain_path(config.root))
    found: dict[str | None, dict[tuple, Path]] = {}  # channel, or None for the mask -> {pieces of the path: file}
    names: dict[tuple, str] = {}
    for channel, patterns in [*config.patterns.items(), *([(None, [config.masks])] if config.masks else [])]:
        found[channel] = {}
        for pattern in patterns:
            for path, pieces in find_files(root, str(pattern)).items():
                key = tuple(sorted(pieces.items()))
                names.setdefault(key, case_name(list(pieces.values()), path))  # the first channel names the case
                if found[channel].setdefault(key, path) != path:
                    raise ValueError(
                        f"{path} and {found[channel][key]} match as one case; put what differs into {{braces}}"
                    )
        if not found[channel]:
            raise ValueError(f"no file matches {' or '.join(map(str, patterns))} in {root.resolve()}")
    if forks := resource_forks([path for files in found.values() for path in files.values()]):
        logger.warning("%d files of macOS beside the volumes are ignored, such as %s", len(forks), forks[0])
    channels = list(config.patterns)
    keys = set(found[channels[0]])
    for channel, files in found.items():
        for key in sorted(keys ^ set(files)):
            there, missing = (files[key], channels[0]) if key in files else (found[channels[0]][key], channel or "mask")
            raise ValueError(
                f"{there}: has no {missing} file; images and masks belong together when their {{names}} and * agree"
            )
    cases = []
    for key in keys:
        images = {channel: found[channel][key] for channel in channels}
        mask = found[None][key] if config.masks else None
        metadata = {piece: value for piece, value in key if not piece.isdigit()}
        cases.append(Case(names[key], subject=names[key], images=images, mask=mask, metadata=metadata))
    return cases


def _named_classes(cells: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """The cells of a case, with the names of `data.classes` in place of the table's values; others stay."""
    named = {
        column: values[str(cells[column])]
        for column, values in config.classes.items()
        if isinstance(values, dict) and str(cells.get(column)) in values
    }
    return {**cells, **named}


def _subject(case: Case, config: DataConfig) -> str:
    if config.subject:
        value = case.metadata.get(config.subject)
        if value in (None, ""):
            raise ValueError(
                f"{case.name}: no value for the subject column {config.subject!r}; it has {sorted(case.metadata)}"
            )
        return str(value)
    if config.group_by:
        match = re.search(nfc(config.group_by), case.name)
        if not match:
            raise ValueError(f"{case.name}: group_by {config.group_by!r} matches nothing in this name")
        subject = match[1] if match.re.groups else match[0]
        if not subject:
            raise ValueError(f"{case.name}: group_by {config.group_by!r} matches no character of this name")
        return subject
    return case.name


def _named_split(case: Case, config: DataConfig) -> str:
    value = case.metadata.get(str(config.split))
    if value not in SPLITS:
        raise ValueError(f"{case.name}: column {config.split!r} says {value!r}; a split is one of {', '.join(SPLITS)}")
    return str(value)


def _hold_out(cases: list[Case], split: str, fraction: float, seed: int) -> list[Case]:
    """Move a fraction of the training subjects (at least one, never all) to `split`.

    Subjects come in the order of a hash of their name, so a new subject hardly changes the splits of the others.
    """

    def draw(subject: str) -> str:
        return hashlib.sha256(f"{seed}:{split}:{subject}".encode()).hexdigest()

    subjects = sorted({case.subject for case in cases if case.split == "train"}, key=draw)
    if len(subjects) < 2:
        raise ValueError(f"{len(subjects)} training subject(s): none can be held out; set data.{split}_fraction to 0")
    chosen = set(subjects[: min(max(1, round(fraction * len(subjects))), len(subjects) - 1)])
    return [replace(case, split=split) if case.subject in chosen and case.split == "train" else case for case in cases]


def _check_names(cases: list[Case]) -> None:
    seen: dict[str, Case] = {}
    for case in cases:
        if case.name in seen:
            files = [next(iter(c.images.values())) for c in (seen[case.name], case)]
            raise ValueError(f"two volumes are called {case.name!r}: {files[0]} and {files[1]}")
        check_name(case.name, f"{str(next(iter(case.images.values()), case.name))!r}, for files of this case")
        seen[case.name] = case


def _mention_case(cases: Sequence[Case]) -> None:
    """Warn of names that differ in upper and lower case alone: a patient may be two subjects then, in two splits."""
    for what, named in (("subjects", {c.subject for c in cases}), ("volumes", {c.name for c in cases})):
        first: dict[str, str] = {}
        for name in sorted(named):
            other = first.setdefault(same_name(name), name)
            if other != name:
                logger.warning("two %s are called %r and %r: if they are one, write them alike", what, other, name)
                return


def _check_columns(cases: list[Case], config: DataConfig) -> None:
    columns = {column for case in cases for column in case.metadata}
    if missing := sorted({*config.classes, *(n for n in config.numbers if n not in GRID_NUMBERS)} - columns):
        raise ValueError(f"data: classes and numbers name the columns {missing}; the cases have {sorted(columns)}")


def _check_subjects(cases: list[Case]) -> None:
    splits: dict[str, Case] = {}
    for case in cases:
        other = splits.setdefault(case.subject, case)
        if other.split != case.split:
            raise ValueError(
                f"subject {case.subject} is in two splits, {other.split!r} ({other.name}) and {case.split!r} "
                f"({case.name}); put all volumes of a subject into one"
            )
