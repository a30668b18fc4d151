"""Write the data section: patterns where they say exactly what was found, else a table of the cases."""

from __future__ import annotations

import csv
import io
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.settings import construct, faults, refuse
from files.names import nfc
from volumes.data.cases import Case, load_cases
from volumes.data.config import DataConfig

from .choice import Choice
from .layouts.layout import Key, Layout
from .layouts.structures import ROLE as STRUCTURES
from .listing import Listing
from .people import People, is_plain_split
from .proposals.sizing import Settings

CASES = "cases.csv"
LABELS = "labels"  # folder of label maps that were made of binary files
MOST_UP = 4  # folders that a relative path may climb
TEST, VALIDATION = 0.2, 0.1  # of the subjects
MIN_TEST = 4  # `evaluation.metrics.set_distances.MIN_SIZE`, which takes seconds to import
FEWEST = 5  # subjects, with which some can be held out for both


@dataclass
class DataSection:
    """The data section of a recipe.

    Attributes:
        settings: as they are written; `root` is relative to the recipe, if that is sensible.
        why: {setting: reason}.
        cases: as training will list them.
        table: text of cases.csv; "" if patterns say it all.
    """

    settings: Settings
    why: dict[str, str]
    cases: list[Case]
    table: str = ""


def find_section(
    listing: Listing, layout: Layout, choice: Choice, people: People, recipe: Path, others: Mapping[str, Any]
) -> DataSection:
    """Write the section, and list its cases as training does.

    Args:
        listing: the folder.
        layout: of its files.
        choice: channels, mask and cases.
        people: subjects, splits, metadata.
        recipe: the folder of the recipe.
        others: settings that do not depend on files: labels, spacing, intensity, classes, numbers.

    Raises:
        ValueError: if the cases cannot be listed.
    """
    files = _expected(listing, layout, choice)
    for found in _with_patterns(listing, layout, choice, people, recipe):
        settings = {**found, **_held_out(people, found), **others}
        try:
            cases = load_cases(data_config(settings, listing.root))
        except ValueError:  # patterns that find other files, too, or not all of them
            continue
        if _is_same(cases, files, choice, people):
            return DataSection(settings, _reasons(people, settings), cases)
    text = cases_table(layout, choice, people, recipe, listing.root)
    found = _with_cases(listing, choice, people, recipe)
    settings = {**found, **_held_out(people, found), **others}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CASES).write_text(text, encoding="utf-8")
        lenient = {**settings, "table": str(Path(folder) / CASES)}
        if choice.mask == STRUCTURES:  # the maps are not made yet
            del lenient["masks"], lenient["label_names"]
        cases = load_cases(data_config(lenient, listing.root))
    reasons = _reasons(people, settings)
    reasons["table"] = "the cases that were found: names alone do not say which files belong together, or some lack one"
    return DataSection(settings, reasons, cases, text)


def data_config(settings: Mapping[str, Any], root: Path) -> DataConfig:
    """Return the settings as training reads them, with an absolute root. Raises: ValueError naming a setting."""
    values = {**settings, "root": str(root.resolve())}
    refuse(faults(DataConfig, values, "data."))
    return construct(DataConfig, values)


def relative(path: Path, folder: Path) -> str:
    """Return a path relative to a folder, or absolute if that would climb too far."""
    found = Path(os.path.relpath(path.resolve(), folder.resolve()))
    return found.as_posix() if found.parts.count("..") <= MOST_UP else str(path.resolve())


def _expected(listing: Listing, layout: Layout, choice: Choice) -> dict[frozenset[Path], Key]:
    by_role = {role: layout.of_role(role) for role in choice.roles}
    return {
        frozenset(listing.root.resolve() / by_role[role][key].path for role in choice.roles): key for key in choice.keys
    }


def _is_same(cases: list[Case], files: dict[frozenset[Path], Key], choice: Choice, people: People) -> bool:
    """Return whether these are the cases that were found, grouped by the same subjects and in the same splits."""
    groups: dict[str, str] = {}
    for case in cases:
        parts = [*case.images.values(), *([case.mask] if case.mask and choice.mask != STRUCTURES else [])]
        key = files.get(frozenset(parts))
        if key is None or groups.setdefault(case.subject, people.subjects[key]) != people.subjects[key]:
            return False
        if people.splits and case.split != people.splits[key] and case.split != "validation":
            return False
    return len(cases) == len(files) and len(set(groups.values())) == len(groups)


def _with_patterns(
    listing: Listing, layout: Layout, choice: Choice, people: People, recipe: Path
) -> Iterator[Settings]:
    """Yield settings of file patterns, with the table that was joined and without one; none if a role has several."""
    patterns = {role: {file.pattern for file in layout.files if file.role == role} for role in choice.roles}
    if any(len(found) > 1 or "" in found for found in patterns.values()):
        return
    plain = {role: next(iter(found)) for role, found in patterns.items()}
    fields = {name for key in choice.keys for name, _ in key}
    if choice.mask == STRUCTURES:
        plain[STRUCTURES] = f"{_labels_folder(recipe, listing.root)}/{{case}}.nii.gz"
    base: Settings = {"root": relative(listing.root, recipe)}
    split = {"split": people.split} if people.splits and is_plain_split(people) else {}
    if (people.splits and not split) or people.rewritten:
        return
    name, column = people.join
    own = next(iter(fields)) if len(fields) == 1 else name
    subject = (
        {"group_by": people.group_by} if people.group_by else {"subject": people.subject} if people.subject else {}
    )
    if people.table or layout.name.startswith("the table"):
        if own and fields <= {own, *people.metadata[choice.keys[0]]}:
            renamed = {role: pattern.replace(f"{{{own}}}", f"{{{column}}}") for role, pattern in plain.items()}
            if subject.get("subject") == own:
                subject = {"subject": column}
            yield base | {"table": people.table or layout.table} | _files(choice, renamed) | subject | split
        return
    if any(people.metadata[key] for key in choice.keys):
        return
    yield base | _files(choice, plain) | subject | split


def _files(choice: Choice, patterns: Mapping[str, str]) -> Settings:
    """Return images, masks and time points; patterns by role."""
    single = len(choice.channels) == 1
    images = {channel.name: patterns[channel.role] for channel in choice.channels}
    settings: Settings = {"images": next(iter(images.values())) if single else images}
    if choice.mask is not None:
        settings["masks"] = patterns[choice.mask]
    points = {channel.name: channel.volume for channel in choice.channels if channel.volume is not None}
    if points:
        settings["time_point"] = next(iter(points.values())) if single else points
    return settings


def _with_cases(listing: Listing, choice: Choice, people: People, recipe: Path) -> Settings:
    """Return settings of cases.csv."""
    columns = _columns(choice)
    patterns = {channel.role: f"{{{columns[channel.role]}}}" for channel in choice.channels}
    if choice.mask is not None:
        patterns[choice.mask] = "{mask}"
    settings: Settings = {"root": relative(listing.root, recipe), "table": relative(recipe / CASES, listing.root)}
    settings |= _files(choice, patterns) | {"subject": "subject"}
    return settings | ({"split": "split"} if people.splits else {})


def _columns(choice: Choice) -> dict[str, str]:
    """Return the column of cases.csv for each role of a channel."""
    first = {}
    for channel in choice.channels:
        name = channel.name if channel.volume is None else channel.role.rpartition("/")[2]
        first.setdefault(channel.role, "".join(letter if letter.isalnum() else "_" for letter in name) + "_file")
    return first


def cases_table(layout: Layout, choice: Choice, people: People, recipe: Path, root: Path) -> str:
    """Return the text of cases.csv: a row per case with its files, its subject and split, and all other columns.

    Files are relative to the root.
    """
    columns = _columns(choice)
    by_role = {role: layout.of_role(role) for role in choice.roles}
    own = {*columns.values(), "subject", "split", "mask"}
    more = [
        column for column in dict.fromkeys(c for key in choice.keys for c in people.metadata[key]) if column not in own
    ]
    head = [
        *columns.values(),
        *(["mask"] if choice.mask is not None else []),
        "subject",
        *(["split"] if people.splits else []),
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*head, *more])
    for key in choice.keys:
        row = [nfc(by_role[role][key].path) for role in columns]
        if choice.mask == STRUCTURES:
            row.append(f"{_labels_folder(recipe, root)}/{structures_name(key)}")
        elif choice.mask is not None:
            row.append(nfc(by_role[choice.mask][key].path))
        row += [people.subjects[key], *([people.splits[key]] if people.splits else [])]
        writer.writerow([*row, *(people.metadata[key].get(column, "") for column in more)])
    return text.getvalue()


def structures_name(key: Key) -> str:
    """Return the name of the label map of a case that is made of binary files."""
    return "_".join(value.replace("/", "_") for _, value in key) + ".nii.gz"


def _labels_folder(recipe: Path, root: Path) -> str:
    return relative(recipe / LABELS, root)


def _held_out(people: People, settings: Settings) -> Settings:
    """Return the fractions of the subjects that are held out."""
    count = len(set(people.subjects.values()))
    if "split" in settings:
        given = "validation" in people.splits.values()
        trained = len({people.subjects[key] for key, split in people.splits.items() if split == "train"})
        return {"validation_fraction": 0.0 if given or trained < 2 else VALIDATION}
    if count < FEWEST:
        return {"test_fraction": 0.0, "validation_fraction": 0.0}
    return {"test_fraction": test_fraction(count), "validation_fraction": VALIDATION}


def test_fraction(subjects: int) -> float:
    """Return the share of the subjects to hold out for testing.

    It is a fifth, or what makes enough for `evaluate.py realism`, if that is a third at most.
    """
    if round(TEST * subjects) >= MIN_TEST or subjects / 3 < MIN_TEST:
        return TEST
    return math.ceil(100 * MIN_TEST / subjects) / 100


def _reasons(people: People, settings: Mapping[str, Any]) -> dict[str, str]:
    count = len(set(people.subjects.values()))
    why = {
        "root": "the scans, relative to this file (the patterns below are relative to it)",
        "table": "a row per case; its columns are known to the patterns",
        "subject": "splits are by subject: no one is in two of them",
        "group_by": "finds the subject in a case's name; splits are by subject",
        "split": f"as {people.split} says",
        "test_fraction": "of the subjects, held out for testing; evaluate.py realism needs 4 volumes",
        "validation_fraction": "of the training subjects, held out to watch the training",
    }
    if count < FEWEST:
        why["test_fraction"] = f"{count} subjects are too few to hold some out"
        why["validation_fraction"] = why["test_fraction"]
    return {name: reason for name, reason in why.items() if name in settings}
