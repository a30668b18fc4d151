"""Find who the cases are of: tables beside the files, subjects, splits, and what could condition a model."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from files.names import same_name
from volumes.data.cases import SPLITS
from volumes.data.tables import Row, read_number, read_table
from volumes.volume import GRID_NUMBERS

from .choice import Ambiguous
from .layouts.folders import SPLIT_FOLDERS
from .layouts.layout import Key, case_name
from .layouts.listed import ROW, ROW_NUMBER
from .listing import Listing

JOINED = 0.5  # of the cases, that a table's column must name for the table to be of this data set
SUBJECT_NAMES = re.compile(
    r"(?:subj(?:ect)?|pat(?:ient)?|participant|person|case|volunteer|donor)(?:[-_. ]?(?:id|number|no|nr|name))?|"
    r"id|pid|mrn",
    re.IGNORECASE,
)
ID_NAMES = re.compile(r"(?:.*[-_. ])?(?:id|pid|mrn|pseudonym|accession)", re.IGNORECASE)
IDENTIFIER = re.compile(r"[^\W\d_]+[-_ ]?\d{2,}|\d{5,}", re.IGNORECASE)  # P017, 0034512
TIMES = re.compile(r"date|time|year|day", re.IGNORECASE)
EMPTY = ("", "n/a", "N/A")  # cells without a value; NA, too, in a TSV
SPLIT_NAMES = re.compile(r"split|subset|partition|set|fold|group", re.IGNORECASE)
SUBJECT_FIELDS = ("subject", "participant_id")
MOST_CLASSES = 8
ENDINGS = "visit|ses|session|tp|timepoint|time|scan|day|week|month|year|fu|followup|baseline|run|left|right|l|r"
ENDING = rf"(.+?)[\W_]+(?:{ENDINGS})-?\d*$"


@dataclass
class People:
    """Whose volumes the cases are, and what is known of them.

    Attributes:
        subjects: of each case.
        subject: the column or field that says so; "" if every case counts as a subject.
        group_by: a regular expression that finds the subject in a case's name; "" if there is none.
        splits: of each case, if a table or folders say it.
        split: the column or field that says so.
        table: the table that was joined, relative to the root.
        join: (field of the key, column of the table).
        metadata: {case: {column: value}} of the table and the headers; "" for n/a.
        rewritten: whether cells of the table had to be changed, so that the table itself cannot serve.
        classes, numbers: columns that could condition a model, with their values and ranges.
        unsure: what the user should look at.
    """

    subjects: dict[Key, str]
    subject: str = ""
    group_by: str = ""
    splits: dict[Key, str] = field(default_factory=dict)
    split: str = ""
    table: str | None = None
    join: tuple[str, str] = ("", "")
    metadata: dict[Key, dict[str, str]] = field(default_factory=dict)
    rewritten: bool = False
    classes: dict[str, list[str]] = field(default_factory=dict)
    numbers: dict[str, tuple[float, float]] = field(default_factory=dict)
    unsure: list[str] = field(default_factory=list)


def find_people(
    keys: Sequence[Key],
    known: Mapping[Key, Mapping[str, str]],
    tables: Mapping[str, Sequence[Row]],
    *,
    subject: str | None = None,
    group_by: str | None = None,
) -> People:
    """Find the subjects of cases.

    Args:
        keys: the cases.
        known: metadata that the layout knows, by case.
        tables: rows of tables that may be of these cases, by their names.
        subject: column or field that the user named.
        group_by: regular expression that the user gave.

    Raises:
        Ambiguous: if several tables, several columns of names or of subjects, fit, or a subject's cell is empty.
        ValueError: for a subject column that is not there.
    """
    people = People({key: case_name(key) for key in keys})
    people.metadata = {key: _cells(known.get(key, {}), "") for key in keys}
    people.rewritten = any(people.metadata[key] != known.get(key, {}) for key in keys)
    joined = {name: join for name, rows in tables.items() if (join := _join(keys, name, rows)) is not None}
    if len(joined) > 1:
        raise Ambiguous(f"{len(joined)} tables name the cases: {', '.join(joined)}; say --table {next(iter(joined))}")
    for name, (field_name, column, rows) in joined.items():
        people.table, people.join = name, (field_name, column)
        for key, row in rows.items():
            people.metadata[key] |= (cells := _cells(row, name))
            people.rewritten |= cells != {str(k): str(v) for k, v in row.items()}
        if without := [case_name(key) for key in keys if key not in rows]:
            people.unsure.append(f"{len(without)} cases have no row in {name}: {', '.join(without[:3])}")
    for name in tables.keys() - joined.keys():
        people.unsure.append(
            f"{name} is not used: none of its columns names the cases (or it names them several times)"
        )
    _find_subjects(people, keys, subject, group_by)
    _find_splits(people, keys)
    _find_conditions(people, keys)
    return people


def read_tables(listing: Listing, names: Sequence[str], asked: bool) -> tuple[dict[str, list[Row]], list[str]]:
    """Read tables: {name: rows}, and notes on those that cannot be read.

    Raises:
        ValueError: if a table that the user asked for cannot be read.
    """
    tables, notes = {}, []
    for name in names:
        try:
            tables[name] = read_table(listing.root / name)
        except ValueError as error:
            if asked:
                raise
            notes.append(f"{name} is not used: {str(error).removeprefix(str(listing.root / name)).lstrip(': ')}")
    return tables, notes


def _cells(row: Mapping[str, object], table: str) -> dict[str, str]:
    """Return the cells of a row as text, and "" for those that say that there is no value."""
    empty = (*EMPTY, "NA") if ".tsv" in table.lower() else EMPTY
    return {str(column): "" if str(cell) in empty else str(cell) for column, cell in row.items()}


def _join(keys: Sequence[Key], table: str, rows: Sequence[Row]) -> tuple[str, str, dict[Key, Row]] | None:
    """Return the (field, column) whose values are equal for most cases, and the row of each case; None if none are.

    Raises:
        Ambiguous: if two columns name as many cases, and give them different rows.
    """
    best: tuple[str, str, dict[Key, Row]] | None = None
    rival = ""
    fields = list(dict.fromkeys(["", *(name for key in keys for name, _ in key)]))
    for column in rows[0]:
        by_value = {same_name(str(row[column])): row for row in rows if row[column] != ""}
        if len(by_value) < len([row for row in rows if row[column] != ""]):
            continue
        for name in fields:
            found = {key: by_value[value] for key in keys if (value := same_name(_value(key, name))) in by_value}
            if len(found) < max(JOINED * len(keys), 1 if best is None else len(best[2])):
                continue
            if best is None or len(found) > len(best[2]):
                best, rival = (name, column, found), ""
            elif any(found.get(key) is not row for key, row in best[2].items()):
                rival = rival or column
    if best is not None and rival:
        raise Ambiguous(
            f"{table}: the columns {best[1]} and {rival} both name the cases, and give them different rows; remove or "
            "rename the one that does not name files, or give another table by --table FILE"
        )
    return best


def _value(key: Key, name: str) -> str:
    return dict(key).get(name, "") if name else case_name(key)


def _find_subjects(people: People, keys: Sequence[Key], asked: str | None, group_by: str | None) -> None:
    columns = list(dict.fromkeys(column for key in keys for column in people.metadata[key]))
    fields = list(dict.fromkeys(name for key in keys for name, _ in key))
    if group_by is not None:
        people.group_by = group_by
        people.subjects = {key: _grouped(group_by, case_name(key)) for key in keys}
        return
    if asked is not None:
        people.subject = next((name for name in [*columns, *fields] if same_name(name) == same_name(asked)), "")
        if not people.subject:
            raise ValueError(f"--subject {asked}: there is no such column; there are {', '.join([*columns, *fields])}")
    else:
        people.subject = _subject_column(people, keys, columns, fields)
    if people.subject:
        people.subjects = {
            key: str(people.metadata[key].get(people.subject) or _value(key, people.subject) or case_name(key))
            for key in keys
        }
        return
    _group_names(people, keys)


def _subject_column(people: People, keys: Sequence[Key], columns: Sequence[str], fields: Sequence[str]) -> str:
    """Return the column or field that says whose volume a case is.

    Raises:
        Ambiguous: if several disagree, if a cell is empty, and for a column of identifiers with another name.
    """
    groups: dict[tuple[int, ...], str] = {}
    for column in columns:
        if not SUBJECT_NAMES.fullmatch(column):
            continue
        values = [people.metadata[key].get(column, "") for key in keys]
        if not any(values) or (column == people.join[1] and not all(values)):  # the files' own names say it, too
            continue
        if "" in values:
            where = f"{people.table}: " if people.table else ""
            raise Ambiguous(
                f"{where}the case {case_name(keys[values.index('')])} has no value in the column {column}, so it is "
                f"not known whose it is; fill the cell, or say --subject {column} to count each such case as a "
                "subject of its own"
            )
        groups.setdefault(tuple(values.index(value) for value in values), column)
    coarser = {g: column for g, column in groups.items() if len(set(g)) < len(keys)}
    coarser = coarser or {g: column for g, column in groups.items() if column.lower() != "id"}
    if len(coarser) > 1:
        named = list(coarser.values())
        raise Ambiguous(f"{len(named)} columns could be the subject: {', '.join(named)}; say --subject {named[0]}")
    if coarser:
        return next(iter(coarser.values()))
    if found := next((name for name in SUBJECT_FIELDS if name in fields), ""):
        return found
    if column := next((column for column in columns if _is_identifier(people, keys, column)), ""):
        raise Ambiguous(
            f"the column {column} repeats values that look like identifiers, such as "
            f"{next(cell for key in keys if (cell := people.metadata[key].get(column)))}; say --subject {column} if it "
            "says whose the scans are, or --group_by '.+' if each scan is of another subject"
        )
    return ""


def _is_identifier(people: People, keys: Sequence[Key], column: str) -> bool:
    """Return whether a column repeats values that look as if they name people: many, and called or formed so."""
    cells = [cell for key in keys if (cell := people.metadata[key].get(column, ""))]
    values = set(cells)
    if column == people.join[1] or SPLIT_NAMES.fullmatch(column) or TIMES.search(column):
        return False
    if len(values) == len(cells) or len(values) < max(3, len(cells) / 6) or len(cells) < len(keys) / 2:
        return False
    return ID_NAMES.fullmatch(column) is not None or all(IDENTIFIER.fullmatch(cell) for cell in values)


def _group_names(people: People, keys: Sequence[Key]) -> None:
    """Group names that differ in a visit or side alone: p01_visit1, p01_visit2."""
    names = {key: _plain_name(key) for key in keys}
    groups = {key: match[1] for key, name in names.items() if (match := re.match(ENDING, name, re.IGNORECASE))}
    shared = [subject for subject, count in Counter(groups.values()).items() if count > 1]
    if shared and len(groups) == len(keys):
        people.group_by = f"(?i){ENDING.replace('(.+?)', '^(.+?)', 1)}"
        people.subjects = groups
        example = [case_name(key) for key in keys if groups[key] == shared[0]][:2]
        people.unsure.append(f"{' and '.join(example)} count as one subject; --group_by REGEX changes that")
        return
    heads = Counter(re.split(r"[\W_]+(?=[^\W_]+$)", name)[0] for name in names.values())
    several = [head for head, count in heads.items() if count > 1]
    if len(several) > 1 or (several and len(heads) > len(keys) / 4 and max(heads.values()) <= 4):
        alike = [case_name(key) for key, name in names.items() if name.startswith(several[0])][:2]
        people.unsure.append(
            f"every case counts as its own subject, though {' and '.join(alike)} have similar names; if they are one "
            "person, say --subject COLUMN or --group_by REGEX, or the splits leak"
        )


def _plain_name(key: Key) -> str:
    """Return a case's name without what is not of the patient: the folder of its split, and the number of a row."""
    plain = case_name(tuple(item for item in key if item[0] != "split"))
    return ROW_NUMBER.sub("", plain) if key[0][0] == ROW else plain


def _grouped(expression: str, name: str) -> str:
    match = re.search(expression, name)
    if match is None:
        raise ValueError(f"--group_by {expression}: matches nothing in {name}")
    return match[1] if match.re.groups else match[0]


def _find_splits(people: People, keys: Sequence[Key]) -> None:
    """Find a column or field whose values are those of splits, and that splits no subject."""
    candidates = {"split": {key: dict(key).get("split", "") for key in keys}}
    for column in dict.fromkeys(column for key in keys for column in people.metadata[key]):
        if SPLIT_NAMES.fullmatch(column):
            candidates[column] = {key: people.metadata[key].get(column, "") for key in keys}
    for column, values in candidates.items():
        if all(value.lower() in SPLIT_FOLDERS for value in values.values()):
            splits = {key: SPLIT_FOLDERS[value.lower()] for key, value in values.items()}
            torn = Counter(subject for subject, _ in sorted({(people.subjects[key], splits[key]) for key in keys}))
            if "train" not in splits.values():
                continue
            if both := [subject for subject, count in torn.items() if count > 1]:
                people.unsure.append(f"{column} is not used: it puts {both[0]} into two splits")
                continue
            people.split, people.splits = column, splits
            return


def is_plain_split(people: People) -> bool:
    """Return whether the splits are written as a data section expects them."""
    values = {people.metadata[key].get(people.split) or dict(key).get("split", "") for key in people.splits}
    return values <= set(SPLITS)


def _find_conditions(people: People, keys: Sequence[Key]) -> None:
    """Find columns with few values (classes) and columns of numbers."""
    taken = {people.subject, people.split, people.join[1], "subject", "split", "mask"}
    for column in dict.fromkeys(column for key in keys for column in people.metadata[key]):
        cells = [people.metadata[key].get(column, "") for key in keys]
        filled = [cell for cell in cells if cell != ""]
        if _is_identifier(people, keys, column) or SUBJECT_NAMES.fullmatch(column):
            continue
        if column in taken or len(filled) < len(cells) / 2 or not all(cell.isprintable() for cell in filled):
            continue
        counts = Counter(filled)
        numbers = _numbers(filled)
        if 2 <= len(counts) <= MOST_CLASSES and min(counts.values()) > 1 and (numbers is None or len(counts) <= 4):
            people.classes[column] = sorted(counts)
        elif numbers is not None and min(numbers) < max(numbers):
            people.numbers[column] = (min(numbers), max(numbers))


def _numbers(cells: Sequence[str]) -> list[float] | None:
    try:
        return [read_number(cell) for cell in cells]
    except ValueError:
        return None


def conditions(
    people: People, keys: Sequence[Key], classes: Sequence[str], numbers: Sequence[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Return the classes with their values, and the numbers, that the user chose.

    Raises:
        ValueError: for columns that are not there, and for those that cannot be used so.
    """
    columns = {same_name(column): column for key in keys for column in people.metadata[key]}
    known = f"there are {', '.join(sorted(columns.values())) or 'no columns; give a table by --table FILE'}"
    chosen: dict[str, list[str]] = {}
    for name in classes:
        if same_name(name) not in columns:
            raise ValueError(f"--classes {name}: there is no such column; {known}")
        column = columns[same_name(name)]
        values = sorted({value for key in keys if (value := people.metadata[key].get(column, "")) != ""})
        if not 2 <= len(values) <= 20:
            raise ValueError(f"--classes {name}: has {len(values)} values; a class has 2 to 20")
        chosen[column] = values
    for name in numbers:
        if name not in GRID_NUMBERS and same_name(name) not in columns:
            raise ValueError(f"--numbers {name}: there is no such column; {known}")
        for key in keys if name not in GRID_NUMBERS else ():
            cell = people.metadata[key].get(columns[same_name(name)], "")
            if cell != "" and _numbers([cell]) is None:
                raise ValueError(
                    f"--numbers {name}: the case {case_name(key)} has {cell!r}, which is not a number; correct the "
                    f"cell, or say --classes {name}"
                )
    return chosen, [name if name in GRID_NUMBERS else columns[same_name(name)] for name in numbers]


def table_path(listing: Listing, given: str) -> str:
    """Return a table that the user named, relative to the folder. Raises: ValueError if there is none."""
    for path in (Path(given), listing.root / given):
        if path.is_file():
            return Path(os.path.relpath(path, listing.root)).as_posix()
    raise ValueError(f"--table {given}: no such file")
