"""Tables that people keep: CSV as spreadsheets write it, JSON lists of objects, the dataset.json of the Decathlon.

Every table of this project is read here. What cannot be read reliably is refused, with its line as a spreadsheet
counts: rows, empty ones too. A cell with line breaks is part of one row.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from files.names import nfc
from files.paths import open_regular, refuse_special
from volumes.formats.contents import (
    GZIP,
    POINTER,
    RESOURCE_FORK,
    WEB_PAGE,
)

logger = logging.getLogger(__name__)
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SEP_LINE = re.compile(r'"?sep=(\\t|[^\r\n"])"?[ \t]*(?:\r\n|\r|\n|\Z)', re.IGNORECASE)
SAVE = 'save it as "CSV UTF-8"'
MAX_BYTES = 1 << 26  # of a table, unpacked
MOST_LINE = 1 << 20  # letters of a line of CSV
MOST_ROWS, MOST_COLUMNS, MOST_CELLS = 100_000, 10_000, 10_000_000
PLAIN = re.compile(r"[\w .+/-]*", re.ASCII)  # a cell that needs no further check
MARKS = (  # longest first where one begins with another
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
WORKBOOKS = {b"PK\x03\x04": "a workbook (.xlsx, .ods) or a zip", b"\xd0\xcf\x11\xe0": "a workbook (.xls)"}
INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060"  # of no width, left behind by copying from web pages
FORMULA_TEXT = re.compile(r'="([^"]*)"')  # Excel's way to keep the zeros of 007
FORMULA_ERROR = re.compile(r"#(?:N/A|NV|DIV/0!|[A-ZÄÖÜ]+[!?])|Err:\d+")
CURLY = re.compile("[“”„«»‘‚].*[“”«»’]", re.DOTALL)
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+", re.ASCII)
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?:,\d{3})+", re.ASCII)


class Row(dict[str, Any]):
    """A table's row by column. `place` is where it is, for messages: "line 5", "entry 4"."""

    def __init__(self, values: dict[str, Any], place: str) -> None:
        super().__init__(values)
        self.place = place


def read_table(path: Path, used: Collection[str] | None = None) -> list[Row]:
    """Read the rows of a CSV file with a header, or of a JSON list of objects, also as .gz.

    CSV: separated by commas, semicolons, tabs or bars, which the header shows, or a line `sep=;` states. UTF-8, or
    UTF-16 with a byte order mark. Rows without a value are skipped, and so are columns without a name if they are empty
    or the first (row names of R and pandas). In a JSON object with a list called `training`, as in the dataset.json of
    the Decathlon, that list is the table. Names and values are in NFC, without space around them; null and NaN are
    empty cells.

    Args:
        used: columns that are read; by default all. In these a formula, a spreadsheet's error (#N/A), a line
            break, a list, and curly quotation marks around a value are refused.
    Raises: ValueError naming the file, the line and the remedy for anything that cannot be read reliably.
    """
    refuse_special(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such table")
    kind = "JSON" if path.name.lower().removesuffix(".gz").endswith(".json") else "CSV"
    try:
        text = _decoded(_content(path))
        rows = _json_rows(text, str(path)) if kind == "JSON" else _csv_rows(text)
        if not rows:
            raise ValueError("expected rows: a CSV file with a header, or a JSON list of objects")
        _check_cells(rows, used)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: cannot be read as a JSON table: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: cannot be read as a JSON table: it is nested too deeply") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return rows


def read_number(cell: Any) -> float:
    """Read the number in a cell: 1.5, "1.5", or "1,5" where commas are decimal. It may be NaN or infinite if the cell
    is a number.

    Raises: ValueError for other text, and for "1,500", which may be 1.5 or 1500.
    """
    if isinstance(cell, bool):
        raise ValueError(f"{cell!r} is not a number")
    if not isinstance(cell, str):
        return float(cell)
    text = cell.strip().replace("\u2212", "-")
    if THOUSANDS.fullmatch(text):
        raise ValueError(
            f"{cell!r} may have a decimal comma or a thousands separator; write it with a point, or without commas"
        )
    if DECIMAL_COMMA.fullmatch(text):
        text = text.replace(",", ".")
    if not NUMBER.fullmatch(text):
        raise ValueError(f"{cell!r} is not a number")
    return float(text)


def _content(path: Path) -> bytes:
    with open_regular(path) as file:
        data = file.read(MAX_BYTES + 1)
    packed = data.startswith(GZIP)
    if packed and path.suffix.lower() != ".gz":
        raise ValueError(f"is gzip, though its name does not end in .gz; rename it to {path.name}.gz, or unpack it")
    if path.suffix.lower() == ".gz" and not packed:
        raise ValueError(f"is not gzip, though its name ends in .gz; rename it to {path.name[:-3]}")
    if packed:
        try:
            with gzip.open(path) as file:
                data = file.read(MAX_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"damaged gzip file: {error}") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"is larger than {MAX_BYTES >> 20} MiB, too large for a table")
    return data


def _decoded(data: bytes) -> str:
    for start, what in WORKBOOKS.items():
        if data.startswith(start):
            raise ValueError(f"is {what} by its content, not text; open it in a spreadsheet, and {SAVE}")
    if data.startswith(POINTER):
        raise ValueError("is a Git LFS pointer, not the table itself; fetch it with `git lfs pull`")
    if data.startswith(GZIP):
        raise ValueError("is gzip within gzip; unpack it once (gunzip)")
    if WEB_PAGE.match(data):
        raise ValueError("is a web page by its content, not a table; fetch the table itself, perhaps with a login")
    if data.startswith(RESOURCE_FORK):
        raise ValueError("is a macOS resource fork, not a table; the table's name does not begin with ._")
    mark, encoding = next(((mark, name) for mark, name in MARKS if data.startswith(mark)), (b"", "utf-8"))
    data = data.removeprefix(mark)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = _line(data[: error.start].decode(encoding, "ignore"))
        raise ValueError(
            f"line {line} holds bytes (0x{data[error.start]:02x}) that are not {encoding.upper()}: it was saved in "
            f"another encoding, perhaps of Windows; {SAVE}"
        ) from error
    if "\0" in text:
        line = _line(text[: text.index("\0")])
        raise ValueError(f"line {line} holds a NUL character: it is damaged, or UTF-16 without its mark; {SAVE}")
    return text


def _line(before: str) -> int:
    """Return the line number of the character after this text."""
    return len(re.findall(r"\r\n|\r|\n", before)) + 1


def _csv_rows(text: str) -> list[Row]:
    if re.match(r"\s*(?:\[\s*\{|\{\s*\")", text):
        raise ValueError("is JSON by its content; rename it to end in .json")
    _check_lines(text)
    said = SEP_LINE.match(text)
    if said:
        text, separator = text[said.end() :], said[1].replace("\\t", "\t")
    else:
        separator = _separator(text)
    records = ((place, [_clean(value) for value in values]) for place, values in _records(text, separator, bool(said)))
    records = [(place, values) for place, values in records if any(values)]
    if not records:
        return []
    (_, columns), *lines = records
    _check_header(columns)
    last = max(index for index, name in enumerate(columns) if name)
    rows = []
    for place, values in lines:
        filled = max(index for index, value in enumerate(values) if value) + 1
        if len(values) <= last or filled > len(columns):
            few = f"add a {separator!r} for each cell that is empty"
            many = f'put a value that holds {separator!r} into "quotation marks"'
            many += ", or remove what stands above the header" if len(columns) == 1 else ""
            raise ValueError(
                f"{place} has {max(len(values), filled)} values, the header has {len(columns)} columns, separated by "
                f"{SEPARATORS.get(separator, separator)}; {few if len(values) <= last else many}"
            )
        for index, value in enumerate(values[: len(columns)]):
            if value and not columns[index] and index:
                raise ValueError(
                    f"{place} has a value ({value[:40]!r}) in column {index + 1}, which has no name; name it"
                )
            if len(columns) > 1 and separator in (swallowed := _swallowed(value, separator, len(columns))):
                raise ValueError(
                    f"{place}: a value in quotation marks spans lines that look like rows ({swallowed[:40]!r}); is a "
                    "quotation mark missing, or one too many? Otherwise remove its line breaks"
                )
        rows.append(Row({name: value for name, value in zip(columns, values, strict=False) if name}, place))
    return rows


def _check_lines(text: str) -> None:
    """Raise ValueError for more lines, or a longer line, than tables of volumes have, which would take minutes."""
    if text.count("\n") + text.count("\r") > 4 * MOST_ROWS:
        raise ValueError(f"has more than {4 * MOST_ROWS} lines; {MOST_ROWS} rows at most are read")
    longest = max(map(len, text.replace("\r", "\n").split("\n")))
    if longest > MOST_LINE:
        raise ValueError(
            f"has a line of {longest} characters; {MOST_LINE} at most are read: are its line breaks missing?"
        )


def _separator(text: str) -> str:
    """Return the separator of the header's names. Raises: ValueError if two separators would give a table."""
    header = next((line for line in re.split(r"[\r\n]+", text) if line.strip(f'{"".join(SEPARATORS)} "')), "")
    bare = re.sub(r'"[^"]*"', "", header)
    there = [one for one in SEPARATORS if one in bare]
    if len(there) < 2:
        return there[0] if there else ","
    fitting = [one for one in there if _fits(text, one)]
    if len(fitting) > 1:
        listed = " or ".join(SEPARATORS[one] for one in fitting)
        raise ValueError(
            f"may be separated by {listed}; say which in a line before the header, such as sep={fitting[0]}"
        )
    return fitting[0] if fitting else max(there, key=bare.count)


def _fits(text: str, separator: str) -> bool:
    """Return whether all rows have as many values as the header."""
    try:
        return len({len(values) for _, values in _records(text, separator) if any(map(_clean, values))}) == 1
    except ValueError:
        return False


def _records(text: str, separator: str, after_sep_line: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Yield the rows, empty ones too, each with its place in the file."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    number = 0
    while True:
        number, line = number + 1, reader.line_num + 1 + after_sep_line
        place = f"line {number}" + (f" (line {line} in a text editor)" if line != number else "")
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = "opens a quotation mark that is never closed" if "end of data" in str(error) else str(error)
            raise ValueError(f'{place}: {what}; write a quotation mark within a value as ""') from error
        if number > MOST_ROWS + 1:
            raise ValueError(f"has more than {MOST_ROWS} rows, which no set of volumes has; split it")
        if len(values) > MOST_COLUMNS:
            raise ValueError(f"{place} has {len(values)} columns; {MOST_COLUMNS} at most are read")
        yield place, values


def _swallowed(value: str, separator: str, columns: int) -> str:
    """Return the first line within a value that has as many separators as a row; "" if there is none."""
    if "\n" not in value and "\r" not in value:
        return ""
    lines = re.split(r"[\r\n]+", value)[1:]
    return next((line for line in lines if line.count(separator) == columns - 1), "")


def _check_header(columns: list[str]) -> None:
    named = [name for name in columns if name]
    if twice := _twice(named):
        raise ValueError(f"two columns have one name: {twice}; rename one")
    if len(named) == 1 and any(one in named[0] for one in SEPARATORS):
        raise ValueError(
            f"its only column is called {named[0]!r}: whole lines are in quotation marks, or it is separated by "
            "something else; state the separator in a line before the header, such as sep=;"
        )
    if odd := [name for name in named if CURLY.fullmatch(name)]:
        raise ValueError(f'the column {odd[0]} is in curly quotation marks; write straight ones (")')


def _twice(names: Collection[str]) -> str:
    """List the first few names that occur more than once."""
    return ", ".join(sorted(name for name, count in Counter(names).items() if count > 1)[:4])


def _json_rows(text: str, name: str) -> list[Row]:
    found, where = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant), ""
    if isinstance(found, dict):
        found, where = _list_in(found, name)
    if not isinstance(found, list):
        raise ValueError(f"expected rows: a JSON list of objects, not {type(found).__name__}")
    if len(found) > MOST_ROWS:
        raise ValueError(f"has {len(found)} rows, {MOST_ROWS} at most are read; split it")
    rows = []
    for number, entry in enumerate(found, start=1):
        place = f"entry {number}{where}"
        if not isinstance(entry, dict):
            raise ValueError(f"{place} is {str(entry)[:40]!r}; expected rows: objects of column and value")
        values = {_clean(str(column)): _cleaned(value) for column, value in entry.items()}
        if len(values) < len(entry):
            raise ValueError(f"{place}: two columns have one name; rename one")
        if any(value != "" for value in values.values()):
            rows.append(Row(values, place))
    columns = dict.fromkeys(column for row in rows for column in row)
    if len(columns) > MOST_COLUMNS or len(columns) * len(rows) > MOST_CELLS:
        raise ValueError(f"has {len(columns)} columns in {len(rows)} rows, which no table of volumes has")
    for row in rows:  # a value that is left out is an empty cell
        row.update({column: "" for column in columns if column not in row})
    return rows


def _list_in(content: Mapping[str, object], name: str) -> tuple[list[object], str]:
    """Return the list of rows in an object, and the words that name it in messages."""
    lists: dict[str, list[object]] = {key: value for key, value in content.items() if isinstance(value, list) and value}
    if "training" in lists:
        if others := [
            f"{key!r} ({len(lists[key])} entries)" for key in lists if key in ("validation", "test", "testing")
        ]:
            logger.warning("%s: its list 'training' is the table; %s not read", name, ", ".join(others))
        return lists["training"], " of 'training'"
    rows = [key for key in lists if all(isinstance(entry, dict) for entry in lists[key])]
    if rows:
        raise ValueError(
            f"expected rows: a list of objects; it is called {rows[0]!r} here: name it 'training', or save it alone"
        )
    remedy = "give patterns instead of a table (images: imagesTr/{case}_0000.nii.gz, masks: labelsTr/{case}.nii.gz)"
    nnunet = "channel_names" in content or "numTraining" in content
    raise ValueError(
        "expected rows: a list of objects, or an object with a list called 'training'; it holds "
        f"{', '.join(content)[:80]}" + (f"; {remedy}" if nnunet else "")
    )


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if twice := _twice([name for name, _ in pairs]):
        raise ValueError(f"an object has two values called {twice}; rename one")
    return dict(pairs)


def _constant(text: str) -> None:
    if text != "NaN":  # which pandas and numpy write for an empty cell
        raise ValueError(f"holds {text}, which is not a number; leave the cell empty (null)")


def _clean(value: str) -> str:
    """Remove the space around a value: "A" and "A " are one subject."""
    if value.isascii() and value.isalnum():
        return value
    value = nfc(value).strip().strip(INVISIBLE).strip()
    text = FORMULA_TEXT.fullmatch(value)
    return text[1].strip() if text else value


def _cleaned(value: Any) -> Any:
    """Turn 1.0, which pandas writes in a column with an empty cell, into 1: as a subject or in a path they are the
    same.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return _clean(value) if isinstance(value, str) else "" if value is None else value


def _check_cells(rows: list[Row], used: Collection[str] | None) -> None:
    """Raise ValueError for cells of used columns that are not plain values."""
    for row in rows:
        for column, value in row.items():
            if used is not None and column not in used:
                continue
            if isinstance(value, (list, dict)):
                raise ValueError(f"{row.place}: {column} holds a {type(value).__name__}; expected one value")
            text = str(value)
            if PLAIN.fullmatch(text):
                continue
            if FORMULA_ERROR.fullmatch(text):
                raise ValueError(
                    f"{row.place}: {column} is a spreadsheet's error, {text}; correct it, or leave the cell empty"
                )
            if text.startswith("="):
                raise ValueError(f"{row.place}: {column} is a formula, {text[:40]!r}; save its value")
            if any(ord(character) < 32 for character in text):
                raise ValueError(
                    f"{row.place}: {column} holds a line break or control character: {text[:40]!r}; remove it"
                )
            if CURLY.fullmatch(text):
                raise ValueError(
                    f'{row.place}: {column} is in curly quotation marks, {text[:40]}; write straight ones (")'
                )
