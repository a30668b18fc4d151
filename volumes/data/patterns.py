"""File patterns with named pieces: `sub-{subject}/*_T1w.nii.gz` finds files and returns what `{subject}` and `*`
matched.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from pathlib import Path

from files.names import nfc, tidy, twins
from volumes.formats.read import SUFFIXES, is_volume

PIECE = re.compile(r"\{(\w+)\}|(\*\*/)|(\*)|(\?)")


def fill_pattern(pattern: str, values: dict[str, object]) -> str:
    """Replace `{column}` by the table row's value. Raises ValueError for a column that the row lacks."""
    pattern = nfc(pattern)
    missing = sorted(set(placeholders(pattern)) - set(values))
    if missing:
        raise ValueError(f"the pattern {pattern!r} names the columns {missing}; the table has {sorted(values)}")
    return PIECE.sub(lambda piece: str(values[piece[1]]) if piece[1] else piece[0], pattern)


def placeholders(pattern: str) -> list[str]:
    """Return the names in braces, in order, each once."""
    return list(dict.fromkeys(piece[1] for piece in PIECE.finditer(nfc(pattern)) if piece[1]))


def find_files(root: Path, pattern: str) -> dict[Path, dict[str, str]]:
    """Find files, and folders of DICOM files, under `root` that match, sorted, each with what its pieces matched
    (wildcards are called "1", "2", ...), in NFC. Raises: ValueError for two files whose names are the same in NFC.
    """
    matcher, glob_pattern = _matcher(pattern)
    found, spelled = {}, {}
    for path in sorted(glob.glob(glob_pattern, root_dir=root, recursive=True)):
        match = matcher.fullmatch(nfc(path).replace(os.sep, "/"))
        if match and is_volume(root / path):
            if (other := spelled.setdefault(nfc(path), path)) != path:
                raise twins(root / other, root / path)
            found[root / path] = {key.removeprefix("_"): value for key, value in match.groupdict().items()}
    return found


def is_wanted(pattern: str) -> Callable[[str], bool]:
    """Return a function that tells whether `find_files` would take a file of this relative path, or the folder that it
    is in.
    """
    matcher, _ = _matcher(pattern)
    return lambda path: bool(matcher.fullmatch(nfc(path)) or matcher.fullmatch(nfc(path).rpartition("/")[0]))


def first_folder(pattern: str) -> str:
    """Return the folder that contains every possible match."""
    pattern = tidy(pattern)
    piece = PIECE.search(pattern)
    return pattern[: piece.start() if piece else len(pattern)].rpartition("/")[0]


def _matcher(pattern: str) -> tuple[re.Pattern[str], str]:
    """Return a regular expression that finds pieces in a relative path, and the `glob` pattern of all paths that may
    match.
    """
    pattern, expression, glob_pattern, last = tidy(pattern), "", "", 0
    names: list[str] = []
    for piece in PIECE.finditer(pattern):
        literal = pattern[last : piece.start()]
        expression += re.escape(literal)
        glob_pattern += _as_stored(literal)
        last = piece.end()
        name, folders, star, _ = piece.groups()
        if name in names:
            expression += f"(?P={name})"
        else:
            key = name or f"_{sum(not n.isidentifier() for n in names) + 1}"
            inner = "[^/]+" if name else "(?:[^/]+/)*" if folders else "[^/]*" if star else "[^/]"
            expression += f"(?P<{key}>{inner})"
            names.append(name or key[1:])
        glob_pattern += "**/" if folders else "?" if piece[0] == "?" else "*"
    expression += re.escape(pattern[last:])
    glob_pattern += _as_stored(pattern[last:])
    return re.compile(expression), glob_pattern


def _as_stored(literal: str) -> str:
    """Escape literal text for `glob`, for every Unicode form in which the disk may spell it."""
    return re.sub(r"[^\x00-\x7f]+", "*", glob.escape(literal))


def case_name(pieces: list[str], path: Path) -> str:
    """Return a case's name from the pieces of its first image's path, or from the file if the pattern has none."""
    parts = [part for piece in pieces for part in tidy(piece).split("/") if part not in ("", ".", "..", "~")]
    text = "_".join(parts) or nfc(path.name)
    for suffix in SUFFIXES:
        text = text.removesuffix(suffix)
    return text
