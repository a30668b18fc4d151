"""Reports of many trainings, which are written after each training and resumed where they stopped."""

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from evaluation.data.pairs import LoadedPairs
from evaluation.report import check_report, write_report
from evaluation.studies.training_result import TrainingResult
from files.documents import read_object

# Keys that two runs of one report share.
SAME = ("evaluation", "protocol", "data", "synthetic", "judge_synthetic", "content")
DAMAGED = "holds no trainings as evaluate.py writes them; choose another --output, or delete it"
Job = tuple[str, str, int]  # arm, labels, seed


def describe_job(job: Job) -> str:
    """Return the name of a training for messages."""
    arm, labels, seed = job
    return f"{arm}, labels {labels}, seed {seed}"


def results_of(report: Mapping[str, Any]) -> list[TrainingResult]:
    """Read the rows of a report. Raises: ValueError for anything else, such as a damaged report."""
    if not isinstance(rows := report["rows"], list):
        raise ValueError("rows are a list")
    return [TrainingResult.from_json(row) for row in rows]


class Ledger:
    """The trainings of a report in a file, one row per `TrainingResult`.

    Several processes each add their share of the rows. A process other than the main process keeps its rows in a hidden
    file beside the report until all are done. The next run finds the hidden files of a run that was killed.

    Args:
        path: the report. If it exists, its rows are kept and need no training.
        report: the report without rows. The values of `SAME` must not change; "content" is `content_of` the volumes.
        summarize: makes the part of the report that depends on the rows, the rows included.
        rows_of: reads the rows of a report.
    Raises: ValueError for a file at `path` with figures of something else, or that cannot be written to.
    """

    def __init__(
        self,
        path: Path,
        report: Mapping[str, object],
        summarize: Callable[[Sequence[TrainingResult]], Mapping[str, object]],
        rows_of: Callable[[Mapping[str, Any]], list[TrainingResult]] = results_of,
    ):
        self.state = PartialState()
        self.path = path
        self.report = report
        self.summarize = summarize
        self.rows: list[TrainingResult] = []  # of this process; in the main process also those of earlier runs
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
                print(f"{path}: has {len(self.rows)} trainings, which are not repeated")
                try:
                    self._settle()
                except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
                    raise ValueError(f"{path}: {DAMAGED} ({type(error).__name__}: {error})") from error
        self.state.wait_for_everyone()

    def _checked(self, path: Path) -> Mapping[str, Any]:
        """Read a report that may be resumed."""
        try:
            earlier, expected = read_object(path), json.loads(json.dumps(self.report))
        except ValueError as error:
            raise ValueError(f"{error}; choose another --output, or delete it") from error
        if changed := [key for key in SAME if earlier.get(key) != expected.get(key)]:
            raise ValueError(
                f"{path}: holds figures of another {', '.join(changed)}; choose another --output, or delete it"
            )
        return earlier

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f".{self.path.name}.part*"))

    def _settle(self) -> None:
        """Write all rows to the report and remove the hidden files."""
        self._write(self.rows)
        for part in self._parts():
            part.unlink()

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs without a row, the same in all processes. All processes must call this."""
        self.order = {job: number for number, job in enumerate(jobs)}
        done = {row.job for row in self.rows}
        (missing,) = broadcast_object_list([[job for job in jobs if job not in done]])
        return [(arm, labels, seed) for arm, labels, seed in missing]

    def share(
        self,
        jobs: Sequence[Job],
        cost: Callable[[list[Job]], float],
        together: Callable[[Job], Hashable] = lambda job: job,
    ) -> list[Job]:
        """Return the jobs of this process. Jobs with the same value of `together` stay in one process; the most
        expensive groups are assigned first, each to the process with the least work."""
        groups: dict[Hashable, list[Job]] = {}
        for job in jobs:
            groups.setdefault(together(job), []).append(job)
        loads, share = [0.0] * self.state.num_processes, set()
        for group in sorted(groups.values(), key=cost, reverse=True):
            process = loads.index(min(loads))
            loads[process] += cost(group)
            if process == self.state.process_index:
                share |= set(group)
        return [job for job in jobs if job in share]

    def add(self, row: TrainingResult) -> None:
        """Add a training and write it to the file."""
        self.rows.append(row)
        if self.state.is_main_process:
            self._write(self.rows + [row for part in self._parts() for row in results_of(read_object(part))])
        else:
            write_report(
                self.part, {**{key: self.report.get(key) for key in SAME}, "rows": [row.as_json() for row in self.rows]}
            )
        print(f"{describe_job(row.job)}: Dice {row.dice:.4f}, {row.seconds or 0:.0f} s", flush=True)

    def _write(self, rows: Sequence[TrainingResult]) -> None:
        ordered = sorted(rows, key=lambda row: self.order.get(row.job, -1))
        write_report(self.path, {**self.report, **self.summarize(ordered)})

    def write(self) -> dict[str, object]:
        """Wait for all processes, write the report with all rows, and return it."""
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self.rows += [row for part in self._parts() for row in results_of(read_object(part))]
            self._settle()
        self.state.wait_for_everyone()
        return read_object(self.path)


def _rows(
    path: Path,
    report: Mapping[str, Any],
    rows_of: Callable[[Mapping[str, Any]], list[TrainingResult]] = results_of,
) -> list[TrainingResult]:
    """Read the trainings of a report in a file. Raises: ValueError for anything else, such as a damaged file."""
    try:
        return rows_of(report)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: {DAMAGED}") from error


def content_of(*sources: LoadedPairs) -> str:
    """Return the sha256 of volumes, labels, names and subjects. It changes when the volumes of a folder are generated
    again."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(json.dumps([(case.name, case.subject) for case in source.cases]).encode())
        for tensor in (source.images, source.labels):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
