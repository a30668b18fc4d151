"""Reports of many trainings: written anew after each, and taken up where they stopped."""

import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from evaluation.data.pairs import LoadedPairs
from evaluation.report import check_report, write_report
from evaluation.studies.training_result import TrainingResult
from files.documents import read_object
from files.paths import printable

SAME = ("evaluation", "protocol", "data", "synthetic", "judge_synthetic", "content")  # of two runs of one report
DAMAGED = "holds no trainings as evaluate.py writes them; choose another --output, or delete it"
Job = tuple[str, str, int]  # arm, labels, seed


def results_of(report: dict[str, Any]) -> list[TrainingResult]:
    """Read the rows of a report. Raises: ValueError for anything else, such as a damaged report."""
    if not isinstance(rows := report["rows"], list):
        raise ValueError("rows are a list")
    return [TrainingResult.from_json(row) for row in rows]


class Ledger:
    """The trainings of a report in a file, one row per `TrainingResult`.

    Several processes each make their share of the rows. What another one than the main process has is in a hidden file beside
    the report until all are done; of a run that was killed, it is found there by the next.

    Args:
        path: the report's. If it is there, its rows are kept and need no training.
        report: all but the rows; `SAME` must not change; its "content" is `content_of` the volumes.
        summarize: from the rows to what the report says of them, themselves included; added to it with every row.
        rows_of: from a report to its rows.
    Raises: ValueError for a file at `path` that holds other figures than these, or that cannot be written to.
    """

    def __init__(
        self,
        path: Path,
        report: dict[str, Any],
        summarize: Callable[[list[TrainingResult]], dict[str, Any]],
        rows_of: Callable[[dict[str, Any]], list[TrainingResult]] = results_of,
    ):
        self.state = PartialState()
        self.path, self.report, self.summarize = path, report, summarize
        self.rows: list[TrainingResult] = []  # this process's; of the main process also those of earlier runs
        self.order: dict[Job, int] = {}
        self.part = path.with_name(f".{path.name}.part{self.state.process_index}")
        if self.state.is_main_process:
            check_report(path)
            if path.is_file():
                self.rows = _rows(path, self._checked(path), rows_of)
            of_others = [row for part in self._parts() for row in _rows(part, self._checked(part))]
            known = {row.job for row in self.rows}
            self.rows += [row for row in of_others if row.job not in known]
            if self.rows:
                print(f"{path}: has {len(self.rows)} trainings, which are not done again")
                try:
                    self._settle()
                except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
                    raise ValueError(f"{path}: {DAMAGED} ({type(error).__name__}: {error})") from error
        self.state.wait_for_everyone()

    def _checked(self, path: Path) -> dict[str, Any]:
        """A report that may be gone on with."""
        try:
            earlier, wanted = read_object(path), json.loads(json.dumps(self.report))
        except ValueError as error:
            raise ValueError(f"{error}; choose another --output, or delete it") from error
        if "content" not in earlier and "rows" in earlier:  # as of reports from before it was recorded
            print(f"note: {path} does not say of which volumes it is: taken to be of these")
            earlier["content"] = wanted.get("content")
        if changed := [key for key in SAME if earlier.get(key) != wanted.get(key)]:
            raise ValueError(
                f"{path}: holds figures of another {', '.join(changed)}; choose another --output, or delete it"
            )
        return earlier

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f".{self.path.name}.part*"))

    def _settle(self) -> None:
        """The report holds all rows: nothing beside it is needed any more."""
        self._write(self.rows)
        for part in self._parts():
            part.unlink()

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """Those that have no row yet; the same in all processes, which all must ask."""
        self.order = {job: number for number, job in enumerate(jobs)}
        done = {row.job for row in self.rows}
        (left,) = broadcast_object_list([[job for job in jobs if job not in done]])
        return [(arm, labels, seed) for arm, labels, seed in left]

    def share(
        self,
        jobs: Sequence[Job],
        cost: Callable[[list[Job]], float],
        together: Callable[[Job], Hashable] = lambda job: job,
    ) -> list[Job]:
        """The jobs of this process: groups of those that belong `together`, the costly ones first, each to the process that
        has least to do yet."""
        groups: dict[Hashable, list[Job]] = {}
        for job in jobs:
            groups.setdefault(together(job), []).append(job)
        loads, own = [0.0] * self.state.num_processes, set()
        for group in sorted(groups.values(), key=cost, reverse=True):
            process = loads.index(min(loads))
            loads[process] += cost(group)
            if process == self.state.process_index:
                own |= set(group)
        return [job for job in jobs if job in own]

    def add(self, row: TrainingResult) -> None:
        """Add a training and write it down."""
        self.rows.append(row)
        if self.state.is_main_process:
            self._write(self.rows + [row for part in self._parts() for row in results_of(read_object(part))])
        else:
            write_report(
                self.part, {**{key: self.report.get(key) for key in SAME}, "rows": [one.as_json() for one in self.rows]}
            )
        print(
            f"{row.arm}, labels {row.labels}, seed {row.seed}: Dice {row.dice:.4f}, {row.seconds or 0:.0f} s",
            flush=True,
        )

    def _write(self, rows: Sequence[TrainingResult]) -> dict[str, Any]:
        ordered = sorted(rows, key=lambda row: self.order.get(row.job, -1))
        report = {**self.report, **self.summarize(ordered)}
        write_report(self.path, report)
        return report

    def write(self) -> dict[str, Any]:
        """Wait for all processes, write the report with all rows, and return it."""
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self.rows += [row for part in self._parts() for row in results_of(read_object(part))]
            self._settle()
        self.state.wait_for_everyone()
        return read_object(self.path)


def _rows(
    path: Path,
    report: dict[str, Any],
    rows_of: Callable[[dict[str, Any]], list[TrainingResult]] = results_of,
) -> list[TrainingResult]:
    """Read the trainings of a report in a file. Raises: ValueError for anything else, such as a damaged file."""
    try:
        return rows_of(report)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: {DAMAGED}") from error


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
            print(
                f"{printable(arm)}, labels {printable(labels)}: Dice {found['mean']:.4f}{told(found['interval_seeds'])} over seeds"
            )
    for name, budgets in report[how].items():
        for labels, found in budgets.items():
            seeds, subjects = told(found["interval_seeds"]), told(found["interval_subjects"])
            print(
                f"{printable(name)}, labels {printable(labels)}: {found['of_means']:.4f}{seeds} over seeds,{subjects} over subjects"
            )


def told(interval: list[float] | None) -> str:
    """An interval in words."""
    return " (one: no interval)" if interval is None else f" ({interval[0]:.4f} to {interval[1]:.4f})"
