"""Compare fine-tuning the shipped weights with training from scratch, on 16 volumes of another label set.

    python -m benchmarks.learning.finetuning --output out/finetuning/finetuning.json

For each seed, 16 volumes of the training split are sampled, and a U-Net is trained on them with the shipped autoencoder
in three ways of equally many steps: fine-tuning all weights, a LoRA, and training from scratch. Each U-Net generates
ten volumes per mask. A segmenter is trained on these and tested on the real volumes of the test split. Another
segmenter is trained on the 16 real volumes. Finished parts are kept beside --output, so an interrupted run resumes.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveInt


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="report to write, a JSON file")
    parser.add_argument(
        "--seeds", type=Number(PositiveInt), default=3, help="samples of volumes, each with its trainings (3)"
    )
    parser.add_argument("--k", type=Number(PositiveInt), default=16, help="labeled volumes (16)")
    parser.add_argument("--count", type=Number(PositiveInt), default=10, help="generated volumes per mask (10)")
    parser.add_argument("--steps", type=Number(PositiveInt), default=400, help="training steps of each U-Net (400)")
    parser.add_argument(
        "--iterations", type=Number(PositiveInt), default=600, help="training steps of each segmenter (600)"
    )
    parser.add_argument(
        "--data.root", dest="root", default="data/hippocampus", help="folder of the volumes (data/hippocampus)"
    )
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import numpy as np

from evaluation import provenance, write_report
from evaluation.stats.intervals import over_seeds

CONFIGS = Path("configs/whole_hippocampus")
PIPELINE = "weights/hippocampus"
ARMS: dict[str, list[str]] = {
    "fine-tuned": ["--config", str(CONFIGS / "finetune.yaml")],
    "LoRA": ["--config", str(CONFIGS / "lora.yaml")],
    "from scratch": [
        "--config",
        str(CONFIGS / "finetune.yaml"),
        "--init_from",
        "null",
        "--optimizer.learning_rate",
        "1e-3",
    ],
}
REAL = "16 real volumes"
SETTINGS = ("k", "count", "steps", "iterations")  # of all trainings beside one report
MERGED = "{0: background, 1: hippocampus}"  # labels of the segmenter


def main(args: Sequence[str] | None = None) -> dict[str, object]:
    """Run the trainings that are missing, evaluate, write the report and return it."""
    options = parse(args)
    check_settings(options)
    scores: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        for arm in (REAL, *ARMS):
            scores.setdefault(arm, []).append(score(arm, seed, options))
            print(f"{arm}, seed {seed}: Dice {scores[arm][-1]:.4f}", flush=True)
            write_report(options.output, summarize(scores, options))
    return summarize(scores, options)


def check_settings(options: argparse.Namespace) -> None:
    """Write the settings before the first training. Raises: ValueError if the report has other settings."""
    if not options.output.exists():
        write_report(options.output, summarize({}, options))
    earlier = json.loads(options.output.read_text())
    if changed := [key for key in SETTINGS if earlier.get(key) != getattr(options, key)]:
        raise ValueError(
            f"{options.output}: was begun with another {', '.join(changed)}; choose another folder for --output"
        )


def score(arm: str, seed: int, options: argparse.Namespace) -> float:
    """Return the Dice on real test volumes of a segmenter trained on this arm's volumes, or on the 16 real ones."""
    folder = options.output.parent / f"seed_{seed}"
    config = ARMS["fine-tuned"][:2]
    table = folder / "table.csv"
    arm_folder = folder / arm.replace(" ", "_")
    root = ["--data.root", options.root]
    named = os.path.relpath(table.resolve(), Path(options.root).resolve())
    only = [*root, "--data.table", named, "--data.split", "split"]
    report = arm_folder / "dice.json"
    if not table.exists():
        run("-m", "evaluation.data.label_budget", *config, *root, "--k", options.k, "--seed", seed, "--output", table)
    judge = ["evaluate.py", "dice", *config, *only, "--data.label_names", MERGED, "--seeds", 1, "--output", report]
    judge += ["--iterations", options.iterations]
    if arm == REAL:
        judge += ["--train_on", "real"]
    else:
        make_volumes(arm, seed, arm_folder, folder / "table_masks.csv", only, options)
        judge += ["--train_on", "synthetic", "--synthetic", arm_folder / "volumes"]
    if not report.exists():
        run(*judge)
    scores = json.loads(report.read_text())["scores"]
    return next(iter(scores.values()))[0]["dice"]


def make_volumes(
    arm: str, seed: int, folder: Path, masks: Path, only: Sequence[Any], options: argparse.Namespace
) -> None:
    """Train the arm's U-Net and generate `options.count` volumes per mask."""
    steps = ["--loop.max_steps", options.steps, "--loop.seed", seed]
    result = folder / "run" / ("lora" if arm == "LoRA" else "pipeline")
    if not result.exists():
        run("train_ldm.py", *ARMS[arm], *only, *steps, "--resume", "latest", "--output", folder / "run")
    source = ["--pipeline", PIPELINE, "--lora", result] if arm == "LoRA" else ["--pipeline", result]
    run(
        *("generate.py", *source, "--conditions", masks, "--count", options.count, "--seed", seed),
        *("--label_map", "2=1", "--output", folder / "volumes"),
    )


def run(*command: Any) -> None:
    """Run a Python script or module of this repository. Raises: CalledProcessError if it fails."""
    subprocess.run([sys.executable, *map(str, command)], check=True)


def summarize(scores: dict[str, list[float]], options: argparse.Namespace) -> dict[str, object]:
    """Build the report: each arm's Dice, and its difference from training from scratch, paired by seed."""
    scratch = scores.get("from scratch", [])
    differences = {
        arm: [value - base for value, base in zip(values, scratch, strict=False)]
        for arm, values in scores.items()
        if arm != "from scratch" and scratch
    }
    return {
        "evaluation": "finetuning",
        **{key: getattr(options, key) for key in SETTINGS},
        "dice": {
            arm: {"mean": float(np.mean(values)), "per_seed": values, "interval_seeds": over_seeds(values)}
            for arm, values in scores.items()
        },
        "less_from_scratch": {
            arm: {"mean": float(np.mean(values)), "per_seed": values, "interval_seeds": over_seeds(values)}
            for arm, values in differences.items()
        },
        **provenance(),
    }
