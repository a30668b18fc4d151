"""The parts of a page: claims, and sections with tables of figures. One rule decides whether a figure is within its
floor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Style = Literal["number", "percent", "signed"]
RULE = (
    "Each figure stands beside its floor: the same figure for real volumes in place of generated ones. A figure is "
    "outside if it is worse than its floor by more than chance. This is read from 95 % intervals: of the difference, "
    "of the figure and its floor, or of the figure where the floor is a fixed number. All other figures are within, "
    "which says little where volumes are few. A figure without an interval gets no verdict."
)
# Names of sets in reports that a page shows in other words.
SET_NAMES = {"judge": "test", "judge_synthetic": "synthetic of test masks"}


@dataclass(frozen=True)
class Row:
    """A figure of generated volumes beside its floor, the same figure for real volumes.

    Args:
        within: whether the figure is within its floor by `RULE`; None without a floor or an interval.
        floor_name: one or two words for the floor.
    """

    name: str
    value: float
    interval: tuple[float, float] | None = None
    floor: float | None = None
    floor_interval: tuple[float, float] | None = None
    within: bool | None = None
    style: Style = "number"
    floor_name: str = "real against real"

    @property
    def text(self) -> str:
        """Format the figure, such as "12.3 %"."""
        return format_number(self.value, self.style)

    @property
    def interval_text(self) -> str:
        return format_interval(self.interval, self.style)

    @property
    def floor_text(self) -> str:
        return "" if self.floor is None else format_number(self.floor, self.style)

    @property
    def floor_interval_text(self) -> str:
        return format_interval(self.floor_interval, self.style)

    @property
    def verdict(self) -> str:
        """Return "within", "outside" or nothing."""
        return "" if self.within is None else ("within" if self.within else "outside")


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, and its caption, which is also its alternative text."""

    source: str
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows of figures under a heading; `note` explains the figures and their units."""

    heading: str
    note: str
    rows: Sequence[Row]
    picture: Picture | None = None


@dataclass(frozen=True)
class Section:
    """The content of one report: a sentence or two, and tables."""

    title: str
    lead: str
    tables: Sequence[Table]
    pictures: Sequence[Picture] = ()
    measured_on: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """One of the four claims: the row that supports it, and a sentence; or how to measure it."""

    title: str
    question: str
    row: Row | None
    sentence: str


@dataclass(frozen=True)
class Page:
    """Claims and sections, and the JSON reports that they come from, by command."""

    claims: Sequence[Claim]
    sections: Sequence[Section]
    reports: Mapping[str, Mapping[str, Any]]
    rule: str = RULE


def format_number(value: float, style: Style) -> str:
    """Format a number with three or four significant digits."""
    if style == "percent":
        return f"{100 * value:.1f} %"
    if style == "signed":
        return f"{value:+.3f}"
    return f"{value:.3f}" if 0.01 <= abs(value) < 100 or value == 0 else f"{value:.3g}"


def format_interval(interval: Sequence[float] | None, style: Style) -> str:
    """Format an interval; nothing for None."""
    return "" if interval is None else f"{format_number(interval[0], style)} to {format_number(interval[1], style)}"


def pair(values: Sequence[float] | None) -> tuple[float, float] | None:
    """Read an interval of a JSON report."""
    return None if values is None else (float(values[0]), float(values[1]))


def not_above(interval: Sequence[float] | None, floor: float) -> bool | None:
    """Apply `RULE` to a figure where less is better. Returns None without an interval, which is needed to judge
    chance."""
    return None if interval is None else interval[0] <= floor


def not_below(interval: Sequence[float] | None, floor: float) -> bool | None:
    """Apply `RULE` to a figure where more is better. Returns None without an interval."""
    return None if interval is None else interval[1] >= floor


def count_volumes(volumes: object) -> str:
    """Format the number of volumes of each set in a report."""
    if not isinstance(volumes, Mapping):
        return "" if volumes is None else str(volumes)
    counts = {name: entry.get("volumes") if isinstance(entry, Mapping) else entry for name, entry in volumes.items()}
    return ", ".join(f"{count} {SET_NAMES.get(name, name)}" for name, count in counts.items() if count is not None)


def overlap(first: Sequence[float], second: Sequence[float]) -> bool:
    """Return whether two intervals share a value."""
    return first[0] <= second[1] and second[0] <= first[1]


def distance_row(name: str, compared: Mapping[str, Any]) -> Row:
    """Make the row of `set_distances.compare_sets`; the verdict comes from the excess over the floor in each
    resample."""
    generated, floor = compared["generated_to_test"], compared["training_to_test"]
    return Row(
        name,
        generated["mean"],
        pair(generated["interval"]),
        floor["mean"],
        pair(floor["interval"]),
        not_above(compared["excess"]["interval"], 0.0),
    )


def auc_row(name: str, attack: Mapping[str, Any]) -> Row:
    """Make the row of an attack's {"auc", "interval"}, beside chance."""
    within = not_above(attack["interval"], 0.5)
    return Row(name, attack["auc"], pair(attack["interval"]), 0.5, None, within, floor_name="chance")
