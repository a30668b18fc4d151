"""Rejection sampling: a volume that a check refuses (a copy of a training volume, a broken label map) is sampled again
from the next seed, and its record says so."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.inputs.crop import cut_output
from pipelines.storage.record import GenerationRecord
from volumes.foreground import box_from_json

Verdict = tuple[bool, Mapping[str, Any]]  # whether a volume is refused, and the findings for its record


@dataclass(frozen=True)
class Check:
    """One reason to refuse a volume.

    Args:
        name: its entry in the records, such as "copy_check".
        judge: takes an image, as the pipeline returns it, and whether it was cut to the box of its record; returns its
            verdict.
        reason: the end of a sentence about a refused volume, from the findings: "is a copy of a training volume ...".
        settings: what decides, for the records.
    """

    name: str
    judge: Callable[[Any, bool], Verdict]
    reason: Callable[[Mapping[str, Any]], str]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Attempt:
    """A volume that was sampled.

    Attributes:
        image: as the pipeline returns it for `output_type="nifti"`.
        fault: why no file can hold its voxels.
    """

    image: Any
    record: GenerationRecord
    fault: str | None = None

    @property
    def generated(self) -> Any:
        """The image without what stands around the box in which it was generated."""
        return self.image if self.record.box is None else cut_output(self.image, box_from_json(self.record.box))


@dataclass(frozen=True)
class Outcome:
    """What became of the volume `number`: the attempt that every check accepted, or None and the reason."""

    number: int
    accepted: Attempt | None
    rejected: Sequence[Mapping[str, Any]]
    reason: str = ""


@dataclass(frozen=True)
class Rejection:
    """Which volumes are refused, and how often.

    Args:
        checks: a volume must pass all of them.
        max_attempts: how many attempts at one volume are made.
    """

    checks: Sequence[Check]
    max_attempts: int = 10

    def plan(self, record: GenerationRecord) -> GenerationRecord:
        """The record of a volume that is going to be checked."""
        return replace(record, checks={check.name: dict(check.settings) for check in self.checks}, rejected=[])

    def sample_until_accepted(
        self,
        count: int,
        sample: Callable[[Sequence[int], Sequence[int]], Sequence[Attempt]],
        seed_of: Callable[[int, int], int],
    ) -> Iterator[Outcome]:
        """The outcome of each of `count` volumes as soon as it is known.

        `sample(numbers, seeds)` samples those volumes from those seeds, and `seed_of(number, rejections)` is the seed
        of a volume after so many rejections. Neither depends on the outcome of other volumes, so no volume does.
        """
        rejected: list[list[Mapping[str, Any]]] = [[] for _ in range(count)]
        waiting = list(range(count))
        while waiting:
            seeds = [seed_of(number, len(rejected[number])) for number in waiting]
            again = []
            for number, seed, attempt in zip(waiting, seeds, sample(waiting, seeds), strict=True):
                if attempt.fault is not None:
                    yield Outcome(number, None, rejected[number], attempt.fault)
                    continue
                entries, refusal = self._judge(attempt)
                if refusal is None:
                    record = replace(attempt.record, checks=entries, rejected=rejected[number])
                    yield Outcome(number, replace(attempt, record=record), rejected[number])
                    continue
                rejected[number].append({"seed": seed, **refusal})
                if len(rejected[number]) < self.max_attempts:
                    again.append(number)
                else:
                    yield Outcome(number, None, rejected[number], self._why(refusal))
            waiting = again

    def _judge(self, attempt: Attempt) -> tuple[Mapping[str, Mapping[str, Any]], Mapping[str, Any] | None]:
        """The record's entry of each check; and the findings of the first that refuses the image, with its name."""
        image, in_box = attempt.generated, attempt.record.box is not None
        entries: dict[str, Mapping[str, Any]] = {}
        for check in self.checks:
            refused, findings = check.judge(image, in_box)
            if refused:
                return entries, {"check": check.name, **findings}
            entries[check.name] = {**check.settings, **findings}
        return entries, None

    def _why(self, refusal: Mapping[str, Any]) -> str:
        """Why a volume was not accepted, from its last refusal."""
        reasons = {check.name: check.reason for check in self.checks}
        return (
            f"each of {self.max_attempts} volumes was refused, the last because it "
            f"{reasons[refusal['check']](refusal)}; raise --max_attempts, or leave it out"
        )


def rejection_columns(record: GenerationRecord) -> dict[str, object]:
    """The manifest's columns: {"copy_threshold", "copy_similarity"} of a volume that was compared with the training
    volumes, and of every checked volume {"rejections", "rejected_seeds", "rejected_because"}, several in one with
    semicolons between."""
    if record.rejected is None:
        return {}
    copy = record.checks.get("copy_check", {})
    return {
        **{f"copy_{key}": copy[key] for key in ("threshold", "similarity") if key in copy},
        "rejections": len(record.rejected),
        "rejected_seeds": ";".join(str(refusal["seed"]) for refusal in record.rejected),
        "rejected_because": ";".join(
            f"{refusal['check']} " + " ".join(str(v) for k, v in refusal.items() if k not in ("seed", "check"))
            for refusal in record.rejected
        ),
    }
