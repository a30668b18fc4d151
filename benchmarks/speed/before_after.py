"""Compare the speed of two versions of medvolume on this machine.

    git worktree add ../before COMMIT
    python -m benchmarks.speed.before_after --before ../before --output out/before_after.json

Each version has a process. They run each job in turn, so that a drift of the machine affects both. The report holds all
times, and the ratio of the medians.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from cli.command import ArgumentParser, CannotContinue, run_command
from cli.settings import Number, PositiveInt

HERE = Path(__file__).resolve().parents[2]

JOBS = (
    "encode 128^3",
    "decode 128^3",
    "decode 128^3 in slabs",
    "autoencoder, training step",
    "U-Net, training step",
    "4 volumes from masks, 20 Euler steps",
)
# Runs in the root of either version, so it uses only what both have: the jobs of the benchmarks and the pipeline.
# It reads names of jobs, and answers each with the seconds of one run. The first run of a job is not timed.
PROGRAM = """
import sys, time
from pathlib import Path
from diffusers import FlowMatchEulerDiscreteScheduler
from pipelines import MedVolumePipeline
try:
    from benchmarks.speed import jobs
except ImportError:  # the jobs' place until 0.1
    from benchmarks import jobs

def generation():
    pipe = MedVolumePipeline.from_pretrained("weights/hippocampus")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.set_progress_bar_config(disable=True)
    masks = sorted(Path("weights/hippocampus/masks").glob("*.nii.gz"))[:4]
    return lambda: [pipe(mask, num_inference_steps=20, guidance_scale=1.0) for mask in masks]

where = {"model": "ours", "device": "cpu", "precision": "float32"}
cube = (128, 128, 128)
setups = [
    lambda: jobs.encoding(shape=cube, **where).run,
    lambda: jobs.decoding(shape=cube, **where).run,
    lambda: jobs.decoding(shape=cube, streamed=True, **where).run,
    lambda: jobs.training_autoencoder(shape=(40, 56, 40), batch=2, **where).run,
    lambda: jobs.training_unet(shape=(10, 14, 10), batch=8, **where).run,
    generation,
]
ready = {}
for line in sys.stdin:
    job = int(line)
    if job not in ready:
        ready.clear()  # one at a time in memory
        ready[job] = setups[job]()
        ready[job]()
    start = time.perf_counter()
    ready[job]()
    print(time.perf_counter() - start, flush=True)
"""


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="clone or worktree of the other version")
    parser.add_argument("--repeats", type=Number(PositiveInt), default=10, help="timed runs of a job (10)")
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
    folders = {"before": options.before, "after": HERE}
    report = {
        "benchmark": "before_after",
        "commits": {name: commit(folder) for name, folder in folders.items()},
        "jobs": compare(folders, options.repeats),
        **provenance(),
    }
    write_report(options.output, report)
    return report


def compare(folders: Mapping[str, Path], repeats: int) -> dict[str, object]:
    """Time each job in both versions in turn; return its seconds and the ratio of their medians."""
    found = {}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(started(folder)) for name, folder in folders.items()}
        for number, job in enumerate(tqdm(JOBS, desc="jobs", disable=None)):
            seconds: dict[str, list[float]] = {name: [] for name in folders}
            for round_ in range(repeats):
                for name in sorted(folders, reverse=round_ % 2 == 0):  # each is the first one in half of the rounds
                    seconds[name].append(time_once(processes[name], number))
            ratio = statistics.median(seconds["after"]) / statistics.median(seconds["before"])
            found[job] = {"seconds": seconds, "after / before": ratio}
    return found


def started(folder: Path) -> subprocess.Popen[str]:
    """Start the program above in a version's root."""
    environment = {**os.environ, "PYTHONPATH": str(folder.resolve())}
    command = [sys.executable, "-B", "-c", PROGRAM]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def time_once(process: subprocess.Popen[str], job: int) -> float:
    """Return the seconds of one run of a job. Raises: CannotContinue if the process has ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(f"{job}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        raise CannotContinue(f"a version ended at {JOBS[job]!r}; its error stands above")
    return float(answer)


def commit(folder: Path) -> str:
    """Return the commit of a clone, with a + for one that was changed. Raises: ValueError for another folder."""
    command = ["git", "-C", folder, "describe", "--always", "--abbrev=12", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"--before {folder}: is not a clone or a worktree of git: {done.stderr.strip()}")
    return done.stdout.strip()
