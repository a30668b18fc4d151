"""Plant faults in the code, one at a time, and check that the tests notice: `make mutants`.

Every fault is a row of tests/mutants/<package>.yaml: the file, a piece of its code that occurs once, its replacement,
and the tests that should fail. Each is tried in a copy of the working tree. Results are kept in a file with one line
per fault, keyed by the fault, the code and its tests, so that an interrupted run resumes and an unchanged fault is not
tried twice.

    python -m tools.mutants --output out/mutants.jsonl --workers 2
    python -m tools.mutants --rooms volumes diffusion

A fault is caught if a test that passes without it fails with it. A fault without any visible effect stays in the table,
with the reason as `equivalent`.
"""

import argparse
import gc
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveInt

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "mutants"
REQUIRED = 0.95  # of the faults of every room
SECONDS = 600  # a fault whose tests take longer counts as caught: they hang
# Imported once and inherited by each run: torch alone takes seconds. None of them is ours.
PRELOADED = ("pytest", "torch", "nibabel", "scipy.stats", "safetensors.torch", "monai.data", "jsonargparse", "yaml")
PRELOADED += ("accelerate", "diffusers", "diffusers.schedulers", "diffusers.pipelines.pipeline_utils", "matplotlib")
PRELOADED += ("hypothesis", "pydicom", "monai.networks.nets.unet", "monai.losses.dice", "peft")
CAUGHT = "caught"
MISSED = "missed"
INVALID = "invalid"


@dataclass(frozen=True)
class Mutant:
    """One fault: `code`, which occurs once in `file`, is replaced by `replacement`; `tests` should notice."""

    room: str
    file: str
    code: str
    replacement: str
    tests: tuple[str, ...]
    equivalent: str = ""

    def mutated(self, root: Path) -> str:
        """Return the file's text with the fault. Raises: ValueError unless `code` occurs exactly once."""
        text = (root / self.file).read_text()
        if (count := text.count(self.code)) != 1:
            raise ValueError(f"{self.file}: {self.code!r} occurs {count} times; name a piece that occurs once")
        return text.replace(self.code, self.replacement)

    def key(self, root: Path) -> str:
        """Return the digest of all that decides the outcome: the fault, the file and the tests' files."""
        files = [self.file, *sorted({test.split("::")[0] for test in self.tests})]
        contents = [hashlib.sha256((root / name).read_bytes()).hexdigest() for name in files]
        return hashlib.sha256(json.dumps([self.code, self.replacement, self.tests, *contents]).encode()).hexdigest()[
            :16
        ]


def load_mutants(folder: Path, root: Path = ROOT) -> list[Mutant]:
    """Read the tables of a folder, one YAML list per room.

    Raises: ValueError naming table and row for unknown or missing fields, code that does not occur once, a replacement
    that changes nothing or is not Python, a test file that does not exist, and a fault that stands twice.
    """
    mutants: dict[Mutant, None] = {}  # in order
    for path in sorted(folder.glob("*.yaml")):
        for number, row in enumerate(yaml.safe_load(path.read_text()) or [], 1):
            try:
                mutant = Mutant(room=path.stem, **{**row, "tests": tuple(row["tests"])})
                if mutant in mutants:
                    raise ValueError("stands in the table twice")
                if mutant.code == mutant.replacement:
                    raise ValueError("the replacement changes nothing")
                compile(mutant.mutated(root), mutant.file, "exec")
                if absent := [test for test in mutant.tests if not (root / test.split("::")[0]).is_file()]:
                    raise ValueError(f"no such tests: {', '.join(absent)}")
            except (KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
                raise ValueError(f"{path.name}, fault {number}: {error}") from error
            mutants[mutant] = None
    return [*mutants]


def copy_tree(root: Path, folder: Path) -> Path:
    """Copy what git tracks or would track into folder/tree, with `shared` beside it where it stands beside `root`."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=True,
        text=True,
    ).stdout.split("\0")
    tree = folder / "tree"
    tree.mkdir(parents=True)
    for name in filter(None, names):
        if (root / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, tree / name)
    if (root.parent / "shared").is_dir():
        (folder / "shared").symlink_to(root.parent / "shared")
    return tree


def start_tests(tree: Path, tests: Sequence[str], log: Path) -> int:
    """Fork a process that runs tests in a copy, and return its id. It exits with pytest's code."""
    sys.stdout.flush()
    if process := os.fork():
        return process
    code = 70
    try:
        os.setsid()
        os.chdir(tree)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.dont_write_bytecode = True  # a stale .pyc would hide a fault of equal size written within the same second
        os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
        sys.path.insert(0, str(tree))
        import pytest

        options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "--assert=plain"]
        options.append(f"--basetemp={tree.parent / 'pytest'}")
        code = int(pytest.main([*options, *tests]))
    finally:
        os._exit(code)


@dataclass
class Run:
    """Tests that are running in a copy of the tree."""

    mutant: Mutant | None  # None: the tests as they are, to see that they pass
    tests: Sequence[str]
    tree: Path
    started: float
    process: int


class Workers:
    """Run tests in several copies of the tree at a time.

    `root` is a copy as well: edits of the working tree meanwhile change neither the tests nor the keys of the results.
    """

    def __init__(self, root: Path, count: int, folder: Path):
        self.root = copy_tree(root, folder / "origin") if count else root
        self.free = [folder / f"copy_{i}" / "tree" for i in range(count)]
        for tree in self.free:
            shutil.copytree(folder / "origin", tree.parent, symlinks=True)
        self.running: list[Run] = []

    def start(self, mutant: Mutant | None, tests: Sequence[str]) -> None:
        """Start the tests of a fault in a free copy."""
        tree = self.free.pop()
        if mutant is not None:
            (tree / mutant.file).write_text(mutant.mutated(self.root))
        process = start_tests(tree, tests, tree.parent / "log")
        self.running.append(Run(mutant, tests, tree, time.monotonic(), process))

    def finish_one(self) -> tuple[Run, str, str]:
        """Wait for a run to end; return it, its outcome and the last line that pytest printed."""
        while True:
            for run in self.running:
                process, status = os.waitpid(run.process, os.WNOHANG)
                late = time.monotonic() - run.started > SECONDS
                if not process and not late:
                    continue
                if not process:
                    os.killpg(run.process, signal.SIGKILL)
                    os.waitpid(run.process, 0)
                self.running.remove(run)
                if run.mutant is not None:
                    shutil.copy2(self.root / run.mutant.file, run.tree / run.mutant.file)
                shutil.rmtree(run.tree.parent / "pytest", ignore_errors=True)
                self.free.append(run.tree)
                lines = (run.tree.parent / "log").read_text(errors="replace").splitlines()
                failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
                code = os.waitstatus_to_exitcode(status) if process else 1
                outcome = {0: MISSED, 1: CAUGHT}.get(code, INVALID)
                return (
                    run,
                    outcome,
                    "takes too long" if not process else (failed or lines or [f"exit {code}"])[-1][:300],
                )
            time.sleep(0.1)


def run_all(workers: Workers, jobs: Iterable[tuple[Mutant | None, Sequence[str]]]) -> Iterable[tuple[Run, str, str]]:
    """Run jobs, as many at a time as there are copies, and yield each as it ends."""
    for mutant, tests in jobs:
        if not workers.free:
            yield workers.finish_one()
        workers.start(mutant, tests)
    while workers.running:
        yield workers.finish_one()


def check_tests_pass(workers: Workers, mutants: Sequence[Mutant]) -> None:
    """Run the tests that the faults name without any fault. Raises: ValueError naming those that fail."""
    files = sorted({test.split("::")[0] for mutant in mutants for test in mutant.tests})
    outcomes = run_all(workers, [(None, [file]) for file in files])
    if failing := [f"{run.tests[0]}: {line}" for run, outcome, line in outcomes if outcome != MISSED]:
        raise ValueError("these tests fail without any fault:\n  " + "\n  ".join(sorted(failing)))


def score(mutants: Sequence[Mutant], outcomes: dict[Mutant, str]) -> bool:
    """Print how many faults of each room were caught; return whether each room reaches `REQUIRED`."""
    enough = True
    for room in sorted({mutant.room for mutant in mutants}):
        counted = [mutant for mutant in mutants if mutant.room == room and not mutant.equivalent]
        found = Counter(outcomes[mutant] for mutant in counted)
        equivalent = sum(mutant.room == room for mutant in mutants) - len(counted)
        share = found[CAUGHT] / max(len(counted), 1)
        enough &= share >= REQUIRED
        print(f"{room:12} {found[CAUGHT]:4} of {len(counted):4} caught ({share:.1%}), {equivalent} argued equivalent")
    return enough


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "mutants.jsonl", help="results; resumed if there")
    parser.add_argument("--rooms", nargs="*", help="tables to run; all by default")
    parser.add_argument("--workers", type=Number(PositiveInt), default=2, help="copies tested at a time (2)")
    parser.add_argument("--no-baseline", action="store_true", help="trust that the tests pass without any fault")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> int:
    """Try the faults that have no result yet. Returns 0 if every room reaches `REQUIRED`, else 1."""
    options = parse(args)
    mutants = [one for one in load_mutants(TABLE) if not options.rooms or one.room in options.rooms]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.touch()
    kept = {row["key"]: row for row in map(json.loads, options.output.read_text().splitlines())}
    outcomes = {one: kept[one.key(ROOT)]["outcome"] for one in mutants if one.key(ROOT) in kept}
    left = [one for one in mutants if one not in outcomes]
    print(f"{len(mutants)} faults, {len(left)} to try")
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in PRELOADED if left else ():
        importlib.import_module(name)
    gc.freeze()  # pytest collects garbage at its end, and would look at all that was imported
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
        workers = Workers(ROOT, options.workers if left else 0, Path(folder))
        if left and not options.no_baseline:
            check_tests_pass(workers, left)
        with options.output.open("a") as results:
            for run, outcome, line in run_all(workers, [(one, one.tests) for one in left]):
                assert run.mutant is not None
                outcomes[run.mutant] = outcome
                row = {"key": run.mutant.key(workers.root), "file": run.mutant.file, "code": run.mutant.code}
                row |= {"outcome": outcome, "seconds": round(time.monotonic() - run.started, 1), "line": line}
                results.write(json.dumps(row) + "\n")
                results.flush()
                print(f"{outcome:8} {run.mutant.file}: {run.mutant.code.strip()[:60]!r}: {line}", flush=True)
    return 0 if score(mutants, outcomes) else 1


if __name__ == "__main__":
    run_command(lambda: parse(None))
