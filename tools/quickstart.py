"""Run the quickstart as a new user would, time it, and write docs/quickstart.md.

    python -m tools.quickstart --data ../shared/data/sarcoma

Copies patients of the sarcoma set into a folder each, runs the six commands as each prints the next one, and writes
docs/quickstart.json, docs/quickstart.png and, from docs/quickstart.in.md, docs/quickstart.md. Run it on a machine that
does nothing else. `--steps 2 --output DIR` tries the script in a minute; no page is written then.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cli.command import ArgumentParser, positive, run_command

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sarcoma set")
    parser.add_argument("--patients", type=positive, default=16, help="how many (16)")
    parser.add_argument("--output", type=Path, help="folder of the report and the picture (docs)")
    parser.add_argument("--steps", type=positive, help="steps of training and denoising, to try this script")
    options = parser.parse_args(args)
    if options.steps and options.output is None:
        parser.error("--steps tries the script; say --output DIR as well")
    options.output = options.output or DOCS
    return options


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import csv
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import TypedDict

from evaluation.report import Provenance, provenance, write_report
from evaluation.stats.bootstrap import Estimate
from files.documents import read_object
from tools.ship import fill

FILES = {"CT_image": "CT", "PET_image": "PET", "CT_mask": "tumour"}  # of the set, and in a patient's folder
COLUMNS = {"patient": "patient", "sex": "sex", "age_years": "age", "weight_kg": "weight"}
SHORT = {
    "train-vae": ["--loop.max_steps", "--optimizer.warmup_steps=0"],
    "train-ldm": ["--loop.max_steps", "--optimizer.warmup_steps=0"],
    "generate": ["--steps"],
}
COUNTS = re.compile(r"^(\d+) OK, (\d+) WARN, (\d+) FAIL$", re.MULTILINE)
NEXT = re.compile(r"^next: (medvolume .*)$", re.MULTILINE)


class Distance(TypedDict):
    """A kernel distance and the ends of its interval."""

    mean: float
    low: float
    high: float


class Figures(TypedDict):
    """What docs/quickstart.in.md shows of a run: by command, but for `doctor` (findings) and `psnr` (dB)."""

    patients: int
    commands: dict[str, str]
    seconds: dict[str, float]
    minutes: dict[str, float]  # and of the first picture
    printed: str
    doctor: dict[str, int]
    psnr: dict[str, float]
    generated: Distance
    real: Distance


class Report(Provenance, Figures):
    """The JSON file; `steps` is None for those of the recipe."""

    steps: int | None


@dataclass
class Run:
    """The commands that were run in a folder.

    Attributes:
        folder: the working directory, with `scans`.
        steps: of trainings and denoising; None for those of the recipe.
        commands: as they are typed.
        seconds: of each.
        printed: what each wrote to standard output.
        picture: seconds from the start until the first picture of generated volumes.
    """

    folder: Path
    steps: int | None = None
    commands: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    printed: dict[str, str] = field(default_factory=dict)
    picture: float | None = None

    def command(self, line: str) -> str:
        """Run a command as it was printed, and return its standard error. Raises: ValueError if it fails."""
        words = shlex.split(line)
        name, more = words[1], []
        if self.steps is not None and name in SHORT:
            first, *others = SHORT[name]
            more = [first, str(self.steps), *others]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            began = time.perf_counter()
            program = [sys.executable, str(ROOT / "medvolume.py"), *words[1:], *more]
            running = subprocess.Popen(program, cwd=self.folder, stdout=out, stderr=err)
            while running.poll() is None:
                time.sleep(0.1)
                if self.picture is None and (self.folder / "recipe/generated/preview.png").is_file():
                    self.picture = sum(self.seconds.values()) + time.perf_counter() - began
            self.seconds[name] = time.perf_counter() - began
            out.seek(0)
            err.seek(0)
            self.printed[name], said = out.read(), err.read()
        if running.returncode:
            raise ValueError(f"{line}: ended with {running.returncode}:\n{said[-2000:]}")
        self.commands.append(line)
        return said


def main(args: Sequence[str] | None = None) -> None:
    """Run the commands, and write the report, the picture and the page."""
    options = parse(args)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_patients(options.data, folder / "scans", options.patients)
        run = run_commands(folder, options.steps)
        report: Report = {**provenance(), **measured(run, options.patients), "steps": options.steps}
        options.output.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "recipe/generated/preview.png", options.output / "quickstart.png")
        write_report(options.output / "quickstart.json", report)
    if options.steps is None:
        (options.output / "quickstart.md").write_text(page(report))
    print(", ".join(f"{name} {seconds:.0f} s" for name, seconds in report["seconds"].items()))


def copy_patients(source: Path, scans: Path, count: int) -> None:
    """Copy the first patients into a folder each, with a table of them. Raises: ValueError for another set."""
    table = source / "participants.csv"
    if not table.is_file():
        raise ValueError(f"--data {source}: has no participants.csv; give the folder of the sarcoma set")
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:count]
    for row in rows:
        patient = row["patient"]
        (scans / patient).mkdir(parents=True)
        for old, new in FILES.items():
            shutil.copyfile(source / f"volumes/{patient}_{old}.nii.gz", scans / patient / f"{new}.nii.gz")
    with (scans / "patients.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS.values())
        writer.writerows([row[column] for column in COLUMNS] for row in rows)


def run_commands(folder: Path, steps: int | None = None) -> Run:
    """Run `init --quick`, and then each command that was printed, to the report."""
    run = Run(folder, steps)
    run.command("medvolume init scans --quick")
    planned = run.printed["init"].partition("next, in this order:")[2].split("\n")
    for line in filter(None, map(str.strip, planned)):
        said = run.command(line)
    (report,) = NEXT.findall(said)[-1:]
    run.command(report)
    return run


def measured(run: Run, patients: int) -> Figures:
    """Return the figures of a run that docs/quickstart.in.md shows."""
    ok, warn, fail = (int(count) for count in COUNTS.findall(run.printed["doctor"])[-1])
    report = run.folder / shlex.split(run.commands[-1])[-1]
    kernel = read_object(report / "realism.json")["features"]["random"]["kernel"]  # without --vae there are no others
    psnr = read_object(run.folder / "recipe/vae/metrics.json")
    return {
        "patients": patients,
        "commands": {line.split()[1]: line for line in run.commands},
        "seconds": run.seconds,
        "minutes": {name: seconds / 60 for name, seconds in run.seconds.items()} | {"picture": (run.picture or 0) / 60},
        "printed": run.printed["init"].partition("\nwrote ")[0].strip(),
        "doctor": {"ok": ok, "warn": warn, "fail": fail},
        "psnr": {name.replace("psnr/", ""): value for name, value in psnr.items() if name.startswith("psnr")},
        "generated": distance(kernel["generated_to_test"]),
        "real": distance(kernel["training_to_test"]),
    }


def distance(found: Estimate[float]) -> Distance:
    """Return a kernel distance and the ends of its interval, by name."""
    low, high = found["interval"]
    return {"mean": found["mean"], "low": low, "high": high}


def page(report: Report) -> str:
    """Return docs/quickstart.md with the figures of a report. Raises: ValueError naming a missing figure."""
    printed = "\n".join(f"    {line}".rstrip() for line in report["printed"].splitlines())
    return fill((DOCS / "quickstart.in.md").read_text(), {**report, "printed": printed})
