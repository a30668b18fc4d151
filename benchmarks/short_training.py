"""Short trainings in processes of their own, with their peak of memory and the times of their steps."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

ROOT = Path(__file__).resolve().parents[1]
# The section `loop` of a training that writes nothing but its result and its losses.
LOOP = {"checkpoint_every": 0, "validate_every": 0, "preview_every": 0, "previews": 0, "log_every": 1}
LOOP |= {"mixed_precision": "no", "trackers": []}
# Runs a script, and writes `Measured` of this process into a folder.
MEASURED = """
import time
began = time.time()
import importlib, json, os, resource, sys

def measure(script, folder, *arguments):
    main = importlib.import_module(script).main
    from training.engine import tracking
    update, times = tracking.Progress.update, []
    tracking.Progress.update = lambda self, *a: (times.append(time.time()), update(self, *a))[1]
    main(list(arguments))
    with open(f"{folder}/measured.{os.environ.get('RANK', 0)}.json", "w") as file:
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        json.dump({"kib": kib, "began": began, "times": times}, file)

if __name__ == "__main__":
    measure(*sys.argv[1:])
"""


class Measured(TypedDict):
    """What one process of a training took; times are seconds since 1970."""

    kib: int  # peak of resident memory
    began: float
    times: list[float]  # the end of each step


def loop_options(**more: object) -> list[str]:
    """Return `LOOP`, with other entries, as options of a command line."""
    return [f"--loop.{name}={value}" for name, value in {**LOOP, **more}.items()]


def environment(cache: Path) -> dict[str, str]:
    """Return the environment of processes of one thread that prepare volumes in `cache`."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MEDVOLUME_CACHE": str(cache), "PYTHONPATH": str(ROOT)}


def measured_command(script: str, folder: Path, arguments: Sequence[str], processes: int = 1) -> list[str]:
    """Return the command that trains with `script` (train_vae or train_ldm), and measures into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "measured.py").write_text(MEASURED)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    return [sys.executable, *launcher, str(folder / "measured.py"), script, str(folder), *arguments]


def read_measured(folder: Path) -> list[Measured]:
    """Read what each process of the command measured, in the order of their ranks."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("measured.*.json"))]


def logged_losses(run: Path) -> list[float]:
    """Return the losses that a run logged."""
    return [row["loss"] for row in logged(run) if row["kind"] == "train"]


def logged(run: Path) -> list[dict[str, float]]:
    """Return the rows that a run logged."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
