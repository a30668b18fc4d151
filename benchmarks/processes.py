"""Compare losses and speed of two and four processes to one of the same global batch.

    python -m benchmarks.processes --steps 50 --output out/processes.json

Trains the autoencoder on phantoms, then a U-Net on its latents: in one process, in two, in two with sharded weights,
and in four. The processes of a run prepare the volumes together, in an empty cache. Each process uses one thread, so
several can use several cores.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveInt


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=Number(PositiveInt), default=50, help="training steps (50)")
    parser.add_argument("--output", type=Path, required=True, help="report to write, a JSON file")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from evaluation.report import Provenance, check_report, provenance, write_report

from . import forked
from .short_training import ROOT, loop_options

DATA = ["--data.phantom={count: 10, shape: [16, 16, 16]}", "--data.validation_fraction=0.2"]
LOOP = loop_options(workers=0)
VAE = [f"--config={ROOT / 'configs/phantom/vae.yaml'}", "--crops.shape=[16, 16, 16]", "--crops.flip_axes=[0]"]
LDM = [f"--config={ROOT / 'configs/phantom/ldm.yaml'}", "--cache.versions=1", "--cache.shift=false"]

RUNS = {"one": (1, False), "two": (2, False), "sharded": (2, True), "four": (4, False)}  # processes, with loop.fsdp
ALL: Mapping[str, Collection[str]] = {"train_vae": RUNS, "train_ldm": RUNS}


def losses_of(
    script: str, args: list[str], folder: Path, processes: int, global_batch: int
) -> tuple[list[float], float]:
    """Return the losses of all steps, and the seconds per step from the second step on."""
    log, lines = folder / "log.txt", folder / "losses.jsonl"
    args = [*args, f"--output={folder / 'run'}", f"--loop.batch_size={global_batch // processes}"]
    folder.mkdir(parents=True)
    cache = {"MEDVOLUME_CACHE": str(folder / "cache")}
    if processes == 1:
        running = [forked.start(script, args, log, losses=lines, **cache)]
    else:
        running = forked.start_group(script, args, log, processes, losses=lines, **cache)
    times: list[float] = []
    while any(process.is_alive() for process in running):
        time.sleep(0.01)
        times += [time.perf_counter()] * (lines.is_file() and len(lines.read_text().splitlines()) > len(times))
    for process in running:
        if forked.ended(process):
            texts = [path.read_text()[-2000:] for path in folder.glob("log.*")]
            raise RuntimeError(f"{script}: ended with {process.exitcode}\n" + "\n".join(texts))
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    values = [row["train/loss"] for row in rows if "train/loss" in row]
    return values, (times[-1] - times[0]) / max(1, len(times) - 1)


class Comparison(TypedDict):
    """Figures of each run of `RUNS`."""

    losses: dict[str, list[float]]
    largest_relative_difference: dict[str, float]  # from the losses of one process
    seconds_a_step: dict[str, float]
    samples_a_second: dict[str, float]


class Report(Provenance):
    """The JSON file."""

    steps: int
    train_vae: Comparison
    train_ldm: Comparison
    load_before: float
    load_after: float


def compare(steps: int, folder: Path, chosen: Mapping[str, Collection[str]] = ALL) -> dict[str, Comparison]:
    """Train with both scripts as `RUNS` says. `chosen`: the runs of each script, "one" among them."""
    comparisons: dict[str, Comparison] = {}
    global_batch = 4
    length = [f"--loop.max_steps={steps}", "--optimizer.warmup_steps=5"]
    for script, runs in chosen.items():
        options = VAE if script == "train_vae" else [*LDM, f"--vae={folder / 'train_vae/one/run/vae'}"]
        losses, seconds = {}, {}
        for run in runs:
            processes, sharded = RUNS[run]
            args = [*options, *DATA, *LOOP, *length, *["--loop.fsdp=true"] * sharded]
            losses[run], seconds[run] = losses_of(script, args, folder / script / run, processes, global_batch)
        pairs = {run: zip(losses["one"], values, strict=True) for run, values in losses.items()}
        comparisons[script] = {
            "losses": losses,
            "largest_relative_difference": {
                run: max(abs(a - b) / abs(a) for a, b in both) for run, both in pairs.items()
            },
            "seconds_a_step": seconds,
            "samples_a_second": {run: global_batch / value for run, value in seconds.items()},
        }
    return comparisons


def main(args: Sequence[str] | None = None) -> None:
    """Measure, and write the report."""
    options = parse(args)
    check_report(options.output)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        comparisons = compare(options.steps, Path(folder))
    report: Report = {
        "steps": options.steps,
        "train_vae": comparisons["train_vae"],
        "train_ldm": comparisons["train_ldm"],
        "load_before": load,
        "load_after": os.getloadavg()[0],
        **provenance(),
    }
    write_report(options.output, report)
    for script, comparison in comparisons.items():
        print(script, {key: value for key, value in comparison.items() if key != "losses"})
