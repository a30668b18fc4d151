"""Compare ours with two published systems, each trained by its own code for the same minutes.

    python -m benchmarks.seeds --med_ddpm CHECKOUT --medical_diffusion CHECKOUT --minutes 30 --output out/seeds

CHECKOUT is a clone of github.com/mobaidoctor/med-ddpm or github.com/FirasGit/medicaldiffusion. Their code is imported
from there; none of it is in this repository. Look at their licenses before you use it.
A checkout that is not named is left out. Each system runs in a process of its own, one after another, so that it has
the whole machine. Finished parts are kept in --output, so an interrupted comparison resumes.

`hippocampus` generates from label maps: Dice of a segmenter, realism, privacy. Medical Diffusion has no label maps as
conditions, so it has no Dice. `brains` generates without conditions: realism, privacy.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveFloat, PositiveInt

TASKS = ("hippocampus", "brains")


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--med_ddpm", type=Path, help="clone of mobaidoctor/med-ddpm")
    parser.add_argument("--medical_diffusion", type=Path, help="clone of FirasGit/medicaldiffusion")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["hippocampus"], help="(hippocampus)")
    parser.add_argument("--hippocampus.root", dest="hippocampus", type=Path, help="default: that of the recipe")
    parser.add_argument("--brains.root", dest="brains", type=Path, help="default: that of the recipe")
    parser.add_argument("--minutes", type=Number(PositiveFloat), default=30.0, help="minutes of training (30)")
    parser.add_argument("--volumes", type=Number(PositiveInt), help="to generate; default: one per training volume")
    parser.add_argument("--width", type=Number(PositiveInt), help="of the seeds' U-Nets, to make them smaller")
    parser.add_argument("--timesteps", type=Number(PositiveInt), help="of the seeds' diffusions, to make a test run")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
    parser.add_argument("--perceptual", action="store_true", help="Medical Diffusion's loss, which downloads VGG-16")
    parser.add_argument("--no_evaluation", action="store_true", help="only time and memory")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import evaluate
from tools.markdown import table

from .tasks import TASKS as FACTS

COLUMNS = {
    "steps": "steps",
    "seconds_per_volume": "s a volume",
    "peak_mib": "peak MiB",
    "parameters": "parameters",
}


def worker_args(options: argparse.Namespace, system: str, task: str, folder: Path) -> list[str]:
    """Return the command line of one worker."""
    given = {
        "checkout": getattr(options, system, None),
        "data.root": getattr(options, task),
        "volumes": options.volumes,
    }
    if system != "ours":
        given |= {"width": options.width, "timesteps": options.timesteps}
    args = ["--system", system, "--task", task, "--output", str(folder), "--device", options.device]
    args += ["--minutes", str(options.minutes), *(["--perceptual"] if options.perceptual else [])]
    return [*args, *(word for name, value in given.items() if value is not None for word in (f"--{name}", str(value)))]


def evaluated(options: argparse.Namespace, system: str, task: str, folder: Path) -> None:
    """Evaluate the volumes of one system."""
    for part in FACTS[task].parts:
        report = folder / f"{part}.json"
        if report.exists() or (part == "dice" and system == "medical_diffusion"):
            continue
        args = [part, "--config", f"{FACTS[task].recipe}/ldm.yaml", "--synthetic", str(folder / "volumes")]
        args += ["--output", str(report)]
        if root := getattr(options, task):
            args += [f"--data.root={root}"]
        evaluate.main(args)


def main(args: Sequence[str] | None = None) -> None:
    """Run what is missing, and print a table for each task."""
    options = parse(args)
    systems = [name for name in ("med_ddpm", "medical_diffusion") if getattr(options, name)]
    for task in options.tasks:
        rows = []
        for system in [*systems, "ours"]:
            folder = options.output / f"{task}_{options.minutes:g}min" / system
            if not (folder / "figures.json").exists():
                command = [sys.executable, "-m", "benchmarks.seeds.worker"]
                subprocess.run([*command, *worker_args(options, system, task, folder)], check=True)
            if not options.no_evaluation:
                evaluated(options, system, task, folder)
            figures = json.loads((folder / "figures.json").read_text())
            rows.append([system, *(f"{figures[name]:.4g}" for name in COLUMNS)])
        print(f"\n{task}, {options.minutes:g} minutes\n")
        print(table(["system", *COLUMNS.values()], rows))


if __name__ == "__main__":
    run_command(main)
