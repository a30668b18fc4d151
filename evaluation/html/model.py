"""What a page is made of: rows of figures, in sections, under claims. One rule says whether a row is within its floor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Style = Literal["number", "percent", "signed"]
RULE = (
    "Each figure stands beside its floor, what real volumes give in the place of generated ones. It is outside if it is worse beyond "
    "chance: if the 95 % interval of their difference, or of the two, or of the figure against a fixed floor, leaves no overlap. Else "
    "it is within; with few volumes that says little. Without an interval there is no verdict."
)


@dataclass(frozen=True)
class Row:
    """A figure of generated volumes beside its floor, what real volumes give in their place.

    Args:
        within: whether it is within the floor by `RULE`; None for what has no floor or no interval, or is only described.
        floor_name: what the floor is, in a word or two.
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
        """The figure, such as "12.3 %"."""
        return written(self.value, self.style)

    @property
    def interval_text(self) -> str:
        return between(self.interval, self.style)

    @property
    def floor_text(self) -> str:
        return "" if self.floor is None else written(self.floor, self.style)

    @property
    def floor_interval_text(self) -> str:
        return between(self.floor_interval, self.style)

    @property
    def verdict(self) -> str:
        """ "within", "outside" or nothing."""
        return "" if self.within is None else ("within" if self.within else "outside")


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, its caption and what it shows to those who cannot see it."""

    source: str
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows of figures under a heading; `note` says what they are and in which units."""

    heading: str
    note: str
    rows: Sequence[Row]
    picture: Picture | None = None


@dataclass(frozen=True)
class Section:
    """What one report says: a sentence or two, and tables."""

    title: str
    lead: str
    tables: Sequence[Table]
    pictures: Sequence[Picture] = ()
    measured_on: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """One of the four claims: the row that carries it, and a sentence; or how to measure it."""

    title: str
    question: str
    row: Row | None
    sentence: str


def written(value: float, style: Style) -> str:
    """A number as a page shows it: three or four significant digits."""
    if style == "percent":
        return f"{100 * value:.1f} %"
    if style == "signed":
        return f"{value:+.3f}"
    return f"{value:.3f}" if 0.01 <= abs(value) < 100 or value == 0 else f"{value:.3g}"


def between(interval: Sequence[float] | None, style: Style) -> str:
    """An interval as a page shows it; nothing for None."""
    return "" if interval is None else f"{written(interval[0], style)} to {written(interval[1], style)}"


def pair(values: Sequence[float] | None) -> tuple[float, float] | None:
    """An interval of a JSON report."""
    return None if values is None else (float(values[0]), float(values[1]))


def not_above(interval: Sequence[float] | None, floor: float) -> bool | None:
    """`RULE` for figures of which less is better; None without an interval, for then nobody knows what chance does."""
    return None if interval is None else interval[0] <= floor


def not_below(interval: Sequence[float] | None, floor: float) -> bool | None:
    """`RULE` for figures of which more is better; None without an interval."""
    return None if interval is None else interval[1] >= floor


def overlap(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two intervals have a value in common."""
    return first[0] <= second[1] and second[0] <= first[1]


def distance_row(name: str, compared: Mapping[str, Any]) -> Row:
    """The row of what `distances.compare_sets` found; within by its excess over the floor, draw by draw."""
    made, floor = compared["generated_to_test"], compared["training_to_test"]
    return Row(
        name,
        made["mean"],
        pair(made["interval"]),
        floor["mean"],
        pair(floor["interval"]),
        not_above(compared["excess"]["interval"], 0.0),
    )


def auc_row(name: str, attack: Mapping[str, Any]) -> Row:
    """The row of an attack's {"auc", "interval"}, beside chance."""
    within = not_above(attack["interval"], 0.5)
    return Row(name, attack["auc"], pair(attack["interval"]), 0.5, None, within, floor_name="chance")
