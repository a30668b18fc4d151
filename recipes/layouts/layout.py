"""The result of every layout: what each file of a data set is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Key = tuple[tuple[str, str], ...]  # ((field, value), ...), such as (("subject", "p01"), ("session", "1"))

IMAGE_WORDS = "images?|imgs?|vols?|volumes?|scans?|ct|cbct|pet|pt|suv|fdg|mri?|t1\\w*|t2\\w*|flair|adc|dwi|pd|dyn"
MASK_WORDS = (
    "masks?|labels?|lbls?|lab|segs?|segmentations?|gt|gtv\\w*|ptv|roi|rois|tumou?rs?|lesions?|annotations?|dseg|"
    "contours?|structures?|tissues?|organs?|truth|manual"
)
IMAGE_WORD = re.compile(rf"(?:{IMAGE_WORDS})(?:tr)?", re.IGNORECASE)
MASK_WORD = re.compile(rf"(?:{MASK_WORDS})(?:tr)?", re.IGNORECASE)
VISIT = re.compile(
    r"(?:visit|ses|session|tp|timepoint|time|scan|day|week|month|year|fu|followup|follow-up|baseline|run)-?\d*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class FoundFile:
    """One volume file, or DICOM folder, of a case.

    Attributes:
        path: relative to the root, as the disk spells it.
        key: the case that it belongs to.
        role: what it is in the case, such as "CT" or "tumour".
        pattern: its path with the key's values in braces: `{subject}/CT.nii.gz`; "" if it has none.
    """

    path: str
    key: Key
    role: str
    pattern: str = ""


@dataclass
class Layout:
    """The files of a data set and what its layout says of them.

    Attributes:
        name: the layout, in words.
        files: one per case and role.
        masks: roles that are masks; None if the contents must tell.
        secondary: roles that are used only if they are asked for.
        channel_names: {role: names}, one name per volume of the role's (perhaps 4-D) files.
        label_names: {value: name} of the masks, as far as the layout says.
        table: a table that belongs to the layout.
        metadata: what files say of each case: {key: {column: value}}.
        structures: {key: {structure: path}} of binary files that make up the mask.
        segments: {path: names} of the segments of DICOM-SEG and RTSTRUCT.
        drawn_on: {path: folder of the series} of these.
        doubtful: {role: why} of roles for which a case has several files, with what to do.
        notes: what was left out, and why.
    """

    name: str
    files: list[FoundFile]
    masks: set[str] | None = None
    secondary: set[str] = field(default_factory=set)
    channel_names: dict[str, list[str]] = field(default_factory=dict)
    label_names: dict[int, str] = field(default_factory=dict)
    table: str | None = None
    metadata: dict[Key, dict[str, str]] = field(default_factory=dict)
    structures: dict[Key, dict[str, str]] = field(default_factory=dict)
    segments: dict[str, tuple[str, ...]] = field(default_factory=dict)
    drawn_on: dict[str, str] = field(default_factory=dict)
    doubtful: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def keys(self) -> list[Key]:
        """All cases, sorted."""
        return sorted({file.key for file in self.files})

    def of_role(self, role: str) -> dict[Key, FoundFile]:
        """Return the files of a role by case."""
        return {file.key: file for file in self.files if file.role == role}

    @property
    def roles(self) -> list[str]:
        """All roles, sorted."""
        return sorted({file.role for file in self.files})

    @property
    def outlined(self) -> set[str]:
        """The roles whose files are DICOM-SEG or RTSTRUCT."""
        return {file.role for file in self.files if file.path in self.segments}

    def shown(self, role: str) -> str:
        """Return how a role's files are called, for messages: `tumour.nii.gz`, `labels/{case}.nii.gz`."""
        pattern = Counter(file.pattern or file.path for file in self.files if file.role == role).most_common(1)[0][0]
        while re.match(r"\{\w+\}/", pattern):
            pattern = pattern.partition("/")[2]
        return pattern


def case_name(key: Key) -> str:
    """Return a case's name: the values of its key."""
    return "_".join(value for _, value in key)


def tokens(text: str) -> list[str]:
    """Return the words of a name: `STS_001-CT` -> STS, 001, CT."""
    return [token for token in re.split(r"[\W_]+", text) if token]


def has_word(word: re.Pattern[str], text: str) -> bool:
    """Return whether one of the words of a name is such a word."""
    return any(word.fullmatch(token) for token in tokens(text))


def fill_of(pairs: Iterable[tuple[object, object]]) -> float:
    """Return the fraction of all combinations of case and role that are there; 0 without any."""
    there = set(pairs)
    cases, roles = {case for case, _ in there}, {role for _, role in there}
    return len(there) / (len(cases) * len(roles)) if there else 0.0


def pattern_of(text: str, values: Mapping[str, str], ignore_case: bool = False) -> str:
    """Return a text with values replaced by their names in braces, wherever they are whole words of it."""
    flags = re.IGNORECASE if ignore_case else 0
    for name, value in sorted(values.items(), key=lambda item: -len(item[1])):
        piece = "{" + name + "}"
        text = re.sub(rf"(?<![^\W_]){re.escape(value)}(?![^\W_])", lambda _, piece=piece: piece, text, flags=flags)
    return text
