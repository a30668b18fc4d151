"""A table that names the files: a column per channel and mask."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from files.names import Disk, cell_path, nfc
from recipes.listing import Listing, is_volume_name, stem_of
from volumes.data.tables import Row

from .layout import FoundFile, Key, Layout

MOSTLY = 0.5  # of the rows


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
    for number, row in enumerate(rows, start=1):
        key: Key = (("row", _row_name(row, columns, number)),)
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
    metadata = {
        (("row", _row_name(row, columns, n)),): {k: str(v) for k, v in row.items()} for n, row in enumerate(rows, 1)
    }
    return Layout(f"the table {table}", files, metadata=metadata, table=table, notes=notes)


def _row_name(row: Row, columns: Sequence[str], number: int) -> str:
    """Return a name for a row's case: that of its first file."""
    first = next((str(row[column]) for column in columns if row[column]), "")
    return "_".join([*Path(first).parent.parts[-1:], stem_of(first)]) + f"#{number}" if first else f"row_{number}"


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
