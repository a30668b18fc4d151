"""The result of training one segmenter, as studies compare it and as reports store it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Scores:
    """Dice of one segmenter on a set of volumes.

    Args:
        dice: mean over the labels, without the background, of the mean over the volumes.
        per_label: mean over the volumes of each label.
        per_volume: mean over the labels of each volume.
    """

    dice: float
    per_label: Sequence[float]
    per_volume: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """One training of a segmenter and its `Scores` on the real test set. The fields are in the order of the JSON.

    Args:
        arm: the way of training, such as "real", "both" (`evaluation.networks.defaults.ARMS`) or "scratch".
        labels: the label budget: "8", "all", or "any" for an arm that no budget changes.
        drawn_from: size of the training set.
        on_synthetic: scores of the same segmenter on generated volumes.
        seconds: training and scoring time.
    """

    arm: str
    labels: str
    drawn_from: int | None = None
    seed: int
    dice: float
    per_label: Sequence[float]
    per_volume: Sequence[float]
    on_synthetic: Scores | None = None
    seconds: float | None = None

    @property
    def job(self) -> tuple[str, str, int]:
        """(arm, labels, seed), which no two results of a report share."""
        return self.arm, self.labels, self.seed

    def as_json(self) -> dict[str, object]:
        """Return the row of a report, without fields that have no value."""
        row = _present(self)
        return row if self.on_synthetic is None else {**row, "on_synthetic": _present(self.on_synthetic)}

    @classmethod
    def from_json(cls, row: object, **more: object) -> "TrainingResult":
        """Read what `as_json` wrote; keys of `more` are added to the row.

        Raises: ValueError for anything else, such as a damaged row.
        """
        if not isinstance(row, Mapping):
            raise ValueError(f"a training is a mapping, not {type(row).__name__}")
        values = {**more, **row}
        arm, labels, seed, seconds, count = (values.get(k) for k in ("arm", "labels", "seed", "seconds", "drawn_from"))
        if not isinstance(arm, str) or not isinstance(labels, str) or type(seed) is not int:
            raise ValueError(f"arm {arm!r}, labels {labels!r}, seed {seed!r}: two texts and a whole number are needed")
        if count is not None and type(count) is not int:
            raise ValueError(f"drawn_from {count!r}: a whole number is needed")
        other = values.get("on_synthetic")
        scores = _scores(values)
        return cls(
            arm=arm,
            labels=labels,
            drawn_from=count,
            seed=seed,
            dice=scores.dice,
            per_label=scores.per_label,
            per_volume=scores.per_volume,
            on_synthetic=None if other is None else _scores(other),
            seconds=None if seconds is None else _number("seconds", seconds, math.inf),
        )


def _present(entry: Scores | TrainingResult) -> dict[str, object]:
    values = ((field.name, getattr(entry, field.name)) for field in fields(entry))
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values
        if value not in (None, (), [])
    }


def _scores(row: object) -> Scores:
    if not isinstance(row, Mapping):
        raise ValueError(f"scores are a mapping, not {type(row).__name__}")
    return Scores(_number("dice", row.get("dice"), 1), _numbers(row, "per_label"), _numbers(row, "per_volume"))


def _numbers(row: Mapping[str, object], name: str) -> list[float]:
    values = row.get(name)
    if not isinstance(values, list):
        raise ValueError(f"{name} is a list, not {type(values).__name__}")
    return [_number(name, value, 1) for value in values]


def _number(name: str, value: object, largest: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= largest:
        raise ValueError(f"{name} {value!r}: a number from 0 to {largest:g} is needed")
    return value
