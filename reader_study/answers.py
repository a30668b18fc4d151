"""Read what readers send back: files of JSON, checked against the key before anything is believed."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from files.documents import read_object

from .design import REAL, Item
from .kit import StudyKey
from .questions import asked

FORMAT = "medvolume reader study: answers"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """A reader's answers to one item.

    Attributes:
        reader: name of the reader.
        item: what was shown.
        source: "real" or the name of the model; of a pair, that of the generated one.
        answers: {question: key}, such as {"decision": "G", "confidence": "4", "appearance": "C"}.
        comment: the reader's text.
        seconds: in view.
        visits: how often the reader came to it.
        real_side: of a pair, "L" or "R", where the real one was.
        file: that the reader sent.
    """

    reader: str
    item: Item
    source: str
    answers: dict[str, str]
    comment: str
    seconds: float
    visits: int
    real_side: str
    file: Path

    @property
    def first(self) -> bool:
        """Return whether this is a first reading of a volume of the study proper."""
        return self.item.section == "single" and self.item.repeat_of is None

    @property
    def generated(self) -> bool:
        """Return whether the volume is generated."""
        return self.source != REAL

    @property
    def correct(self) -> bool:
        """Return whether the volume was called what it is."""
        return (self.answers["decision"] == "G") == self.generated

    @property
    def score(self) -> int:
        """Return the confidence that the volume is generated: -5 (certainly real) to 5 (certainly generated)."""
        confidence = int(self.answers["confidence"])
        return confidence if self.answers["decision"] == "G" else -confidence


def read_answers(paths: Sequence[Path], key: StudyKey) -> list[Reading]:
    """Read the answers of all readers, in the order in which they were shown; open items are left out.

    Raises: ValueError for a file of another study, with unknown items or answers, and for two files of one reader.
    """
    found = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))}: no file of answers (*.json); ask the readers to save them")
    readings: list[Reading] = []
    files_of: dict[str, Path] = {}
    for file in found:
        content = read_object(file)
        reader = content.get("reader")
        if content.get("format") != FORMAT or content.get("version") != 1 or content.get("study") != key.study:
            raise ValueError(f"{file}: holds no answers to this study; give the files that its pages saved")
        if not isinstance(reader, str) or reader not in key.readers:
            raise ValueError(f"{file}: reader {reader!r} is not in the key, which has {', '.join(key.readers)}")
        if reader in files_of:
            raise ValueError(f"{file}: {files_of[reader]} has answers of {reader} too; keep the later one")
        files_of[reader] = file
        found_in_file = _of_reader(file, reader, content.get("answers"), key)
        if not found_in_file:
            logger.warning("%s: %s has not finished a single item", file, reader)
        readings += found_in_file
    return readings


def _of_reader(file: Path, reader: str, given: Any, key: StudyKey) -> list[Reading]:
    items = {item.id: item for item in key.readers[reader]}
    if not isinstance(given, dict) or set(given) - set(items):
        raise ValueError(f"{file}: answers items that {reader} was not shown; was the file edited?")
    readings = []
    for item in key.readers[reader]:
        entry = given.get(item.id)
        if entry is not None and not isinstance(entry, dict):
            raise ValueError(f"{file}: item {item.id} is {entry!r:.40}, not an object of answers; was the file edited?")
        if entry is None or not entry.get("done"):
            continue
        answers = _checked(file, item, entry.get("answers"))
        milliseconds, visits = (_time(file, item, entry.get(name)) for name in ("milliseconds", "visits"))
        comment = entry.get("comment")
        sources = [key.cases[number].source for number in item.cases]
        source = next((name for name in sources if name != REAL), REAL)
        text = comment if isinstance(comment, str) else ""
        side = ("L" if sources[0] == REAL else "R") if item.section == "pair" else ""
        readings.append(Reading(reader, item, source, answers, text, milliseconds / 1000, int(visits), side, file))
    return readings


def _time(file: Path, item: Item, value: object) -> float:
    """Return a number of an answer. Raises: ValueError for anything else."""
    if not (isinstance(value, int | float) and math.isfinite(value)):
        raise ValueError(f"{file}: item {item.id} has no times; was the file edited?")
    return value


def _checked(file: Path, item: Item, given: Any) -> dict[str, str]:
    questions = {question.name: question for question in asked(item.section)}
    if not isinstance(given, dict) or set(given) != set(questions):
        raise ValueError(f"{file}: item {item.id} answers {given!r:.80}, not {', '.join(questions)}; was it edited?")
    for name, answer in given.items():
        if answer not in questions[name].keys:
            raise ValueError(
                f"{file}: item {item.id}: {name} is {answer!r:.40}, not one of {', '.join(questions[name].keys)}"
            )
    return given
