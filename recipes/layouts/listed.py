"""A table that names the files: a column per channel and mask."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from files.names import Disk, cell_path, nfc, same_name
from recipes.listing import Listing, stem_of
from volumes.data.tables import Row
from volumes.formats.read import is_volume_name

from .folders import SPLIT_FOLDERS
from .layout import FoundFile, Key, Layout

MOSTLY = 0.5  # of the rows
ROW = "row"  # field of the key
ROW_NUMBER = re.compile(r"#\d+$")  # at the end of a name that several rows share


def find_listed(listing: Listing, table: str, rows: Sequence[Row]) -> Layout | None:
    """Read a table whose cells name files, relative to the folder or to the table's own; None if no column does.

    Args:
        listing: the folder.
        table: path of the table, relative to the folder.
        rows: its rows.
    """
    disk, files = Disk(), []
    columns = [column for column in rows[0] if _names_files(listing.root, table, rows, column, disk)]
    if not columns:
        return None
    notes, missing = [], []
    keys: list[Key] = [((ROW, name),) for name in _row_names(rows, columns)]
    for key, row in zip(keys, rows, strict=True):
        for column in columns:
            cell = str(row[column])
            if not cell:
                continue
            path = _file(listing.root, table, cell, disk)
            if path is None:
                missing.append(f"{row.place}: {cell}")
            else:
                files.append(FoundFile(path, key, column, f"{{{column}}}" if path == nfc(cell) else ""))
    if missing:
        notes.append(f"{len(missing)} files of {table} are missing, and their cells left out: {', '.join(missing[:3])}")
    metadata = {key: {k: str(v) for k, v in row.items()} for key, row in zip(keys, rows, strict=True)}
    return Layout(f"the table {table}", files, metadata=metadata, table=table, notes=notes)


def _row_names(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Return a name for each row's case: that of its first file, with as many folders as tell it from the others.

    Folders of splits are left out, as a patient may be in two of them; rows that then share a name end in `#row`.
    """
    files = [next((str(row[column]).replace("\\", "/") for column in columns if row[column]), "") for row in rows]
    folders = [
        [part for part in Path(file).parent.parts if part != "/" and part.lower() not in SPLIT_FOLDERS]
        for file in files
    ]
    depths = range(max(map(len, folders)) + 1)
    options = [
        [
            "_".join([*one[len(one) - min(depth, len(one)) :], stem_of(file)])
            for one, file in zip(folders, files, strict=True)
        ]
        for depth in depths
    ]
    names = max(options, key=lambda option: len(set(map(same_name, option))))  # the first of the best
    counts = Counter(map(same_name, names))
    return [
        f"row_{number}" if not file else name if counts[same_name(name)] == 1 else f"{name}#{number}"
        for number, (file, name) in enumerate(zip(files, names, strict=True), start=1)
    ]


def _file(root: Path, table: str, cell: str, disk: Disk) -> str | None:
    for folder in (root, (root / table).parent):
        path = cell_path(folder, cell, disk)
        if path.exists():
            return Path(os.path.relpath(path, root)).as_posix()
    return None


def _names_files(root: Path, table: str, rows: Sequence[Row], column: str, disk: Disk) -> bool:
    cells = [str(row[column]) for row in rows if row[column] != ""]
    named = [cell for cell in cells if is_volume_name(Path(cell.replace("\\", "/")).name) or "/" in cell]
    there = sum(_file(root, table, cell, disk) is not None for cell in named)
    return bool(cells) and len(named) >= MOSTLY * len(cells) and there >= MOSTLY * len(cells)
