"""Measure the figures of README, docs and model cards again, and rewrite the pages that hold them.

    python -m tools.figures --list                                  # each report: of which commit, date and machine
    python -m tools.figures --stale                                 # measure what is absent or behind (make figures)
    python -m tools.figures --only docs/prepared.json docs/cohort.json --data ../shared/data
    python -m tools.figures                                         # rewrite all pages, and measure nothing

Reports are measured one after the other, in --output/COMMIT, and are put in their places at the end: until then the
tree stays as it was committed, and so each report names this commit. What ended is not measured again at this commit,
so a run that was killed goes on; a benchmark that resumes by itself goes on where it was. An error of one report does
not end the others; the status is 1 then. Measure on a machine that does nothing else: all of it takes days.

A report is behind if one of the files that it measures was changed after its commit.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from cli.command import ArgumentParser, run_command

ROOT = Path(__file__).resolve().parents[2]


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print what there is, and measure nothing")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--only", nargs="+", default=[], metavar="REPORT", help="measure these, see --list")
    chosen.add_argument("--stale", action="store_true", help="measure those that are absent or behind")
    parser.add_argument("--data", default="data", help="folder of the data sets hippocampus, ... (data)")
    parser.add_argument("--output", default="out/figures", metavar="DIR", help="folder to measure in (out/figures)")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from files.atomic import atomic_file
from files.documents import read_object
from tools.markdown import table

from .table import FIGURES, NEEDS, PAGES, Figure

CURRENT, ABSENT = "current", "absent"
DONE = "done"  # the folder of the reports that ended


def main(args: Sequence[str] | None = None) -> None:
    """Measure what was asked for, put it in place, and rewrite the pages.

    Raises: ValueError for an unknown report, for changed files in the tree, and at the end if something failed.
    """
    options = parse(args)
    if options.list:
        print(table(("report", "commit", "date", "machine", "seconds", "state"), map(listed, FIGURES)), end="")
        return
    known = {figure.report: figure for figure in FIGURES}
    if unknown := [name for name in options.only if name not in known]:
        raise ValueError(f"--only {' '.join(unknown)}: not in the table; --list prints what is")
    figures = [known[name] for name in options.only]
    if options.stale:
        figures = [figure for figure in FIGURES if not figure.fixed and state(figure) != CURRENT]
    failures = measure_all(figures, options.data, options.output) if figures else {}
    failures |= write_pages({figure.report for figure in figures} or set(known))
    if failures:
        raise ValueError("\n".join([f"{len(failures)} failed:", *(f"{name}: {why}" for name, why in failures.items())]))


def state(figure: Figure) -> str:
    """Say whether a report is there, and how many commits changed what it measures after it."""
    if not (ROOT / figure.report).is_file():
        return ABSENT
    counts = []
    for origin in origins(read_object(ROOT / figure.report)):
        commit = str(origin["commit"]).rstrip("+")
        found = git("rev-list", "--count", f"{commit}..HEAD", "--", *figure.code)
        if found is None:
            return f"of commit {commit}, which is not in this clone"
        counts.append(int(found))
    if not counts:
        return "names no commit"
    behind = max(counts)
    return f"{behind} commit{'s' * (behind > 1)} behind" if behind else CURRENT


def origins(report: object, machine: object = None) -> Iterator[Mapping[str, object]]:
    """Yield where a report, or else each of its parts, was measured: mappings with commit, date and machine."""
    if isinstance(report, Mapping):
        machine = report.get("machine", machine)
        if {"commit", "date"} <= report.keys():
            yield {"machine": machine, **report}
            return
    for part in report.values() if isinstance(report, Mapping) else report if isinstance(report, list) else ():
        yield from origins(part, machine)


def listed(figure: Figure) -> tuple[str, ...]:
    """Return the row of a report: of its oldest part."""
    row = ("", "", "", "")
    if (ROOT / figure.report).is_file():
        report = read_object(ROOT / figure.report)
        oldest = min(origins(report), key=lambda origin: str(origin["date"]))
        machine = oldest["machine"]
        assert isinstance(machine, Mapping)
        cores = f"{machine['processor']}, {machine['cores']} core{'s' * (machine['cores'] != 1)}"
        seconds = duration(report)
        row = (str(oldest["commit"]), str(oldest["date"])[:10], cores, f"{seconds:,.0f}" if seconds else "")
    return (figure.report, *row, f"{state(figure)}; {figure.fixed}" if figure.fixed else state(figure))


def duration(report: Mapping[str, Any]) -> float | None:
    """Return the seconds that a report took, where it says so; for trainings of evaluate.py their sum."""
    if isinstance(report.get("seconds"), int | float):
        return report["seconds"]
    if "evaluation" not in report:
        return None
    trainings = [*report.get("rows", ()), *report.get("seeds", ()), *chain(*report.get("scores", {}).values())]
    return sum(training["seconds"] for training in trainings if "seconds" in training) or None


def git(*words: str) -> str | None:
    """Return what git prints; None if it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def measure_all(figures: Sequence[Figure], data: str, output: str) -> dict[str, str]:
    """Measure reports one after the other, and put those that ended in place. Returns {report: what failed}."""
    commit = git("rev-parse", "--short=12", "HEAD")
    if commit is None or git("status", "--porcelain", "--untracked-files=no"):
        raise ValueError(f"{ROOT}: has changes, and a report names the commit that it measured; commit them first")
    folder = Path(output) / commit
    failures = {}
    for figure in figures:
        try:
            measure(figure, data, folder)
        except (ValueError, OSError) as error:
            failures[figure.report] = str(error)
            print(f"{figure.report}: {error}", file=sys.stderr, flush=True)
    for figure in figures:
        if (ROOT / folder / DONE / figure.report).is_file():
            for name in (figure.report, *figure.also):
                (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(ROOT / name) as unfinished:
                    shutil.copyfile(ROOT / folder / DONE / name, unfinished)
    return failures


def measure(figure: Figure, data: str, folder: Path) -> None:
    """Measure a report in a folder, unless it ended there.

    Raises: ValueError naming what is missing, or the command that failed.
    """
    if (ROOT / folder / DONE / figure.report).is_file():
        print(f"{figure.report}: measured at this commit", flush=True)
        return
    if figure.fixed:
        raise ValueError(f"is not measured again: {figure.fixed}")
    for need in figure.needs:
        if not (ROOT / need.format(data=data)).exists():
            raise ValueError(f"needs {need.format(data=data)}: {NEEDS[need]}")
    report = folder / "unfinished" / figure.report
    (ROOT / report).parent.mkdir(parents=True, exist_ok=True)
    for command in figure.commands:
        line = command.format(report=report, folder=report.parent, work=folder / "work", data=data)
        print(f"\n{figure.report}: {line}", flush=True)
        run(line, figure.threads)
    for name in (*figure.also, figure.report):  # the report last: it says that all is there
        (ROOT / folder / DONE / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(ROOT / folder / "unfinished" / name, ROOT / folder / DONE / name)


def run(line: str, threads: int = 1) -> None:
    """Run a command in the clone. Raises: ValueError if it fails."""
    words = [sys.executable if word == "python" else word for word in shlex.split(line)]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        raise ValueError(f"`{line}` ended with status {done.returncode}")


def write_pages(reports: set[str]) -> dict[str, str]:
    """Rewrite the pages of some reports, and the page of goals, where all that they need is there.

    Returns: {command: what failed}.
    """
    failures = {}
    pages = [page for page in PAGES if page.command and (not page.reports or reports & set(page.reports))]
    ready = [page for page in pages if all((ROOT / name).is_file() for name in page.reports)]
    for command in dict.fromkeys(page.command for page in ready):
        try:
            run(command)
        except ValueError as error:
            failures[command] = str(error)
    return failures
