"""Volumes that are refused once they are made, such as copies of training volumes, are made again from a next seed; their
records say so.

A record's `copy_check` is {"fingerprints": sha256 of the file they came from, "threshold", "similarity": of the volume
that was kept, "rejected": [{"seed", "similarity"}] in the order in which they were made}; `seed` is that of the volume kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Made = tuple[Sequence[Any], Sequence[dict[str, Any]]]  # images as `output_type="nifti"` has them, and their records


class Found(Protocol):
    """What is said of a volume: whether it is a copy, and how similar it is to the nearest that it might be a copy of."""

    @property
    def copy(self) -> bool: ...

    @property
    def similarity(self) -> float: ...


@dataclass(frozen=True)
class Rejection:
    """Which volumes are refused, and how often.

    Args:
        judge: says of an image, as the pipeline returns it, whether it is a copy.
        settings: {"fingerprints", "threshold"}, for the records.
        most: rejections of one volume after which it is given up.
    """

    judge: Callable[[Any], Found]
    settings: Mapping[str, Any]
    most: int = 10

    def accepted(
        self, make: Callable[[Sequence[int], Sequence[int]], Made], seed_of: Callable[[int, int], int], count: int
    ) -> Iterator[tuple[int, Any, dict[str, Any]]]:
        """(number, image, record) of each of `count` volumes as soon as it is no copy; of one that is given up the image is
        None, and the record {"copy_check"} alone.

        `make(numbers, seeds)` makes those volumes from those seeds, and `seed_of(number, rejections)` is the seed of a
        volume that was rejected so often. Neither depends on what became of other volumes, so nor does any volume.
        """
        rejected: list[list[dict[str, Any]]] = [[] for _ in range(count)]
        waiting = list(range(count))
        while waiting:
            seeds = [seed_of(number, len(rejected[number])) for number in waiting]
            again = []
            for number, seed, image, record in zip(waiting, seeds, *make(waiting, seeds), strict=True):
                found = self.judge(image)
                if not found.copy:
                    check = {**self.settings, "similarity": found.similarity, "rejected": rejected[number]}
                    yield number, image, {**record, "copy_check": check}
                    continue
                rejected[number].append({"seed": seed, "similarity": found.similarity})
                if len(rejected[number]) < self.most:
                    again.append(number)
                else:
                    yield number, None, {"copy_check": {**self.settings, "rejected": rejected[number]}}
            waiting = again

    def given_up(self, name: str, record: Mapping[str, Any]) -> str:
        """What to say of a volume of which `accepted` gave no image."""
        highest = max(one["similarity"] for one in record["copy_check"]["rejected"])
        return (
            f"{name}: each of {self.most} volumes was a copy of a training volume (similarity up to {highest:.3f}, threshold "
            f"{self.settings['threshold']:.3f}); raise --most_rejections, or leave its mask out"
        )


def as_planned(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as it was before its volume was made: with the first seed, and nothing of what was rejected."""
    check = record.get("copy_check")
    if check is None:
        return dict(record)
    first = next((one["seed"] for one in check["rejected"]), record["seed"])
    settings = {key: check[key] for key in ("fingerprints", "threshold")}
    return {**record, "seed": first, "copy_check": settings}


def rejection_columns(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of it: {"copy_threshold", "copy_similarity", "rejections", "rejected_seeds", "rejected_similarities"},
    several in one with semicolons between; {} of a volume that was not checked."""
    check = record.get("copy_check")
    if check is None:
        return {}
    rejected = check["rejected"]
    return {
        "copy_threshold": check["threshold"],
        "copy_similarity": check["similarity"],
        "rejections": len(rejected),
        "rejected_seeds": ";".join(str(one["seed"]) for one in rejected),
        "rejected_similarities": ";".join(str(one["similarity"]) for one in rejected),
    }
