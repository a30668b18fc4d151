"""Reports of many trainings: written anew after each, and taken up where they stopped."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..report import write_report
from ..segmentation_data import LoadedPairs

SAME = ("evaluation", "protocol", "data", "synthetic", "content")  # of two runs of one report


class Ledger:
    """The rows of a report (`evaluation.few_labels` says what a row is), in a file.

    Args:
        path: the report's. If it is there, its rows are kept and need no training.
        report: all but the rows; `SAME` must not change; its "content" is `content_of` the volumes.
        summarise: from the rows to what the report says of them; added to it with every row.
    Raises: ValueError for a file at `path` that holds other figures than these.
    """

    def __init__(self, path: Path, report: dict[str, Any], summarise: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.path, self.report, self.summarise = path, report, summarise
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            earlier, wanted = json.loads(path.read_text()), json.loads(json.dumps(report))
            if "content" not in earlier:  # as of reports from before it was recorded
                print(f"note: {path} does not say of which volumes it is: taken to be of these")
                earlier["content"] = wanted["content"]
            if changed := [key for key in SAME if earlier.get(key) != wanted[key]]:
                raise ValueError(
                    f"{path}: holds figures of another {', '.join(changed)}; choose another --output, or delete it"
                )
            self.rows = earlier["rows"]
            print(f"{path}: has {len(self.rows)} trainings, which are not done again")

    def missing(self, jobs: Sequence[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
        """Those (arm, labels, seed) that have no row yet."""
        done = {(row["arm"], row["labels"], row["seed"]) for row in self.rows}
        return [job for job in jobs if job not in done]

    def add(self, row: dict[str, Any]) -> None:
        """Add a training and write the report."""
        self.rows.append(row)
        self.write()
        print(
            f"{row['arm']}, labels {row['labels']}, seed {row['seed']}: Dice {row['dice']:.4f}, {row['seconds']:.0f} s",
            flush=True,
        )

    def write(self) -> dict[str, Any]:
        """Write the report and return it."""
        report = {**self.report, **self.summarise(self.rows), "rows": self.rows}
        write_report(self.path, report)
        return report


def content_of(*sources: LoadedPairs) -> str:
    """sha256 of volumes, labels, names and subjects: volumes made anew in the same folder are other volumes."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(json.dumps([(case.name, case.subject) for case in source.cases]).encode())
        for tensor in (source.images, source.labels):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def tell(report: dict[str, Any], how: str) -> None:
    """Print the mean Dice of every arm and budget, and their ratios or differences with the intervals over seeds and subjects."""
    for arm, budgets in report["dice"].items():
        for labels, found in budgets.items():
            print(f"{arm}, labels {labels}: Dice {found['mean']:.4f}{told(found['interval_seeds'])} over seeds")
    for name, budgets in report[how].items():
        for labels, found in budgets.items():
            seeds, subjects = told(found["interval_seeds"]), told(found["interval_subjects"])
            print(f"{name}, labels {labels}: {found['of_means']:.4f}{seeds} over seeds,{subjects} over subjects")


def told(interval: list[float] | None) -> str:
    """An interval in words."""
    return " (one: no interval)" if interval is None else f" ({interval[0]:.4f} to {interval[1]:.4f})"
