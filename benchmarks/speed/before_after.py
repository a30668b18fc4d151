"""Compare the speed of two versions of medvolume on this machine.

    git worktree add ../before v0.0
    python -m benchmarks.speed.before_after --before ../before --output out/before_after.json

Each round times the jobs below in a fresh process a version, the versions in turn, so that a drift of the machine
affects both. The report holds all times and the ratio of the medians, after / before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveInt

HERE = Path(__file__).resolve().parents[2]

# Runs in the root of either version, so it uses only what both have: the jobs of the benchmarks and the pipeline.
PROGRAM = """
import json, statistics, sys, time
from pathlib import Path
from diffusers import FlowMatchEulerDiscreteScheduler
from pipelines import MedVolumePipeline
try:
    from benchmarks.speed import jobs
except ImportError:  # the jobs' place until 0.1
    from benchmarks import jobs

def seconds(run, repeats):
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)

def generation(steps=20):
    pipe = MedVolumePipeline.from_pretrained("weights/hippocampus")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.set_progress_bar_config(disable=True)
    masks = sorted(Path("weights/hippocampus/masks").glob("*.nii.gz"))[:4]
    return lambda: [pipe(mask, num_inference_steps=steps, guidance_scale=1.0) for mask in masks]

where = {"device": "cpu", "precision": "float32"}
training = {**where, "model": "ours"}
works = {
    "encode 128^3": lambda: jobs.encoding("ours", (128, 128, 128), **where).run,
    "decode 128^3": lambda: jobs.decoding("ours", (128, 128, 128), **where).run,
    "decode 128^3 in slabs": lambda: jobs.decoding("ours", (128, 128, 128), streamed=True, **where).run,
    "autoencoder, training step": lambda: jobs.training_autoencoder(shape=(40, 56, 40), batch=2, **training).run,
    "U-Net, training step": lambda: jobs.training_unet(shape=(10, 14, 10), batch=8, **training).run,
    "4 volumes from masks, 20 Euler steps": generation,
}
repeats = int(sys.argv[1])
print(json.dumps({name: seconds(work(), repeats) for name, work in works.items()}))
"""


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="clone or worktree of the other version")
    parser.add_argument("--rounds", type=Number(PositiveInt), default=5, help="rounds over both versions (5)")
    parser.add_argument("--repeats", type=Number(PositiveInt), default=3, help="timed runs of a job in a round (3)")
    parser.add_argument("--output", type=Path, required=True, help="report to write, a JSON file")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from tqdm import tqdm

from evaluation.report import check_report, provenance, write_report


def main(args: Sequence[str] | None = None) -> dict[str, object]:
    """Time both versions in turn, write the report and return it."""
    options = parse(args)
    check_report(options.output)
    versions = {"before": options.before, "after": HERE}
    rounds = [
        {name: time_version(folder, options.repeats) for name, folder in versions.items()}
        for _ in tqdm(range(options.rounds), desc="rounds", disable=None)
    ]
    report = {
        "benchmark": "before_after",
        "commits": {name: commit(folder) for name, folder in versions.items()},
        "repeats": options.repeats,
        "jobs": {
            job: compare_job([{v: times[v][job] for v in versions} for times in rounds]) for job in rounds[0]["before"]
        },
        **provenance(),
    }
    write_report(options.output, report)
    return report


def time_version(folder: Path, repeats: int) -> dict[str, float]:
    """Run the program above in a version's root; return its median seconds by job."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", PROGRAM, str(repeats)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder.resolve())},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{folder}: the jobs could not be timed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_job(rounds: Sequence[Mapping[str, float]]) -> dict[str, object]:
    """Return both versions' seconds by round, and the ratio of their medians."""
    seconds = {name: [times[name] for times in rounds] for name in ("before", "after")}
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {"seconds": seconds, "after / before": medians["after"] / medians["before"]}


def commit(folder: Path) -> str:
    """Return the commit of a clone."""
    done = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return done.stdout.strip()
