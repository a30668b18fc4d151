"""Volumes that a check refuses once they are made (copies of training volumes, broken label maps) are made again from a next
seed; their records say so.

A record has an entry a check, {"copy_check": {its settings and what it found of the volume kept}}, and "rejected":
[{"seed", "check", what it found}] in the order in which they were made; "seed" is that of the volume kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Made = tuple[Sequence[Any], Sequence[dict[str, Any]]]  # images as `output_type="nifti"` has them, and their records
Found = tuple[bool, dict[str, Any]]  # whether it is refused, and what was found of it, for the record


@dataclass(frozen=True)
class Check:
    """One reason to refuse a volume.

    Args:
        name: its entry in the records, such as "copy_check".
        judge: says of an image, as the pipeline returns it, whether it is refused, and what it found.
        reason: a sentence's end about one that was refused, from what was found: "is a copy of a training volume ...".
        settings: what decides, for the records.
    """

    name: str
    judge: Callable[[Any], Found]
    reason: Callable[[Mapping[str, Any]], str]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejection:
    """Which volumes are refused, and how often.

    Args:
        checks: a volume must pass all of them.
        most: rejections of one volume after which it is given up.
    """

    checks: Sequence[Check]
    most: int = 10

    @property
    def planned(self) -> dict[str, Any]:
        """What a record says of the checks before its volume is made."""
        return {check.name: dict(check.settings) for check in self.checks} | {"rejected": []}

    def accepted(
        self, make: Callable[[Sequence[int], Sequence[int]], Made], seed_of: Callable[[int, int], int], count: int
    ) -> Iterator[tuple[int, Any, dict[str, Any]]]:
        """(number, image, record) of each of `count` volumes as soon as it passes; of one that is given up the image is
        None, and the record {"rejected"} alone, with {"fault"} if its voxels are such as no file should hold.

        `make(numbers, seeds)` makes those volumes from those seeds, and `seed_of(number, rejections)` is the seed of a
        volume that was rejected so often; of one that cannot be written `make` gives None, and the record
        {"fault": why}. Neither depends on what became of other volumes, so nor does any volume.
        """
        rejected: list[list[dict[str, Any]]] = [[] for _ in range(count)]
        waiting = list(range(count))
        while waiting:
            seeds = [seed_of(number, len(rejected[number])) for number in waiting]
            again = []
            for number, seed, image, record in zip(waiting, seeds, *make(waiting, seeds), strict=True):
                if image is None:
                    yield number, None, {"rejected": rejected[number], "fault": record["fault"]}
                    continue
                entries, refusal = self._judge(image)
                if refusal is None:
                    yield number, image, {**record, **entries, "rejected": rejected[number]}
                    continue
                rejected[number].append({"seed": seed, **refusal})
                if len(rejected[number]) < self.most:
                    again.append(number)
                else:
                    yield number, None, {"rejected": rejected[number]}
            waiting = again

    def _judge(self, image: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The record's entry of each check, and what the first that refuses the image says."""
        entries: dict[str, Any] = {}
        for check in self.checks:
            refused, found = check.judge(image)
            if refused:
                return entries, {"check": check.name, **found}
            entries[check.name] = {**check.settings, **found}
        return entries, None

    def given_up(self, name: str, record: Mapping[str, Any]) -> str:
        """What to say of a volume of which `accepted` gave no image."""
        if "fault" in record:
            return f"{name}: {record['fault']}"
        reasons = {check.name: check.reason for check in self.checks}
        last = record["rejected"][-1]
        return (
            f"{name}: each of {self.most} volumes was refused, the last because it {reasons[last['check']](last)}; raise "
            "--max_attempts, or leave it out"
        )


def as_planned(record: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, Any]:
    """The record as it was before its volume was made: with the first seed, and nothing of what was found or rejected.

    Args:
        planned: record of the same volume as it would be made now; it has the entries of its checks.
    """
    if "rejected" not in record:
        return dict(record)
    checks = [name for name in {*planned, *record} if name.endswith("_check")]
    kept = {name: _settings(record[name], planned.get(name)) for name in checks if name in record}
    first = next((one["seed"] for one in record["rejected"]), record["seed"])
    return {**record, **kept, "seed": first, "rejected": []}


def _settings(entry: Mapping[str, Any], planned: Mapping[str, Any] | None) -> dict[str, Any]:
    return dict(entry) if planned is None else {key: value for key, value in entry.items() if key in planned}


def rejection_columns(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of it: {"copy_threshold", "copy_similarity"} if it was compared with the training volumes, and of
    every checked volume {"rejections", "rejected_seeds", "rejected_because"}, several in one with semicolons between."""
    if "rejected" not in record:
        return {}
    rejected, copy = record["rejected"], record.get("copy_check", {})
    return {
        **{f"copy_{key}": copy[key] for key in ("threshold", "similarity") if key in copy},
        "rejections": len(rejected),
        "rejected_seeds": ";".join(str(one["seed"]) for one in rejected),
        "rejected_because": ";".join(
            f"{one['check']} " + " ".join(str(v) for k, v in one.items() if k not in ("seed", "check"))
            for one in rejected
        ),
    }
