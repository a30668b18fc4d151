"""Measure the memory and the time of `evaluate.py realism` and `privacy` by the number of volumes.

    python -m benchmarks.evaluation_size --counts 500 2000 --output docs/evaluation_size.json

For each count, writes as many real phantoms (four fifths to train on, one fifth to test with) and as many "generated"
ones as NIfTI files to a temporary folder, and runs each command on them in a process of its own.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveInt

SIDE, CROP = 48, 24


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    count = Number(PositiveInt)
    parser.add_argument("--counts", type=count, nargs="+", default=[500, 2000], help="real volumes, and generated ones")
    parser.add_argument("--side", type=count, default=SIDE, help=f"voxels per side ({SIDE})")
    parser.add_argument("--crop", type=count, default=CROP, help=f"voxels per side that privacy compares ({CROP})")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is; default: $TMPDIR")
    parser.add_argument("--output", type=Path, required=True, help="report to write, a JSON file")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import nibabel as nib
import numpy as np
import torch
import yaml

from cli.live_bar import LiveBar
from evaluation.report import check_report, provenance, write_report
from pipelines.storage.provenance import write_synthetic
from pipelines.storage.record import GenerationRecord
from volumes import make_phantom, write_volume

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("realism", "privacy")
TESTS = 5  # one of so many real volumes is a test volume


class Cost(TypedDict):
    """What a command took: the highest resident memory of its process, and seconds."""

    peak_mib: int
    seconds: float


def write_sets(folder: Path, count: int, side: int) -> None:
    """Write `count` real phantoms with a table and config.yaml, and `count` others with sidecars to generated/."""
    rows, shape = ["volume,subject,split"], (side, side, side)
    for number in LiveBar(range(count), unit="volume", desc=f"writing {count} + {count} volumes", disable=None):
        name = f"case_{number:06d}"
        write_volume(make_phantom(number, shape)[0], folder / f"images/{name}.nii.gz")
        rows.append(f"{name},S{number},{'train' if number % TESTS else 'test'}")
        volume = make_phantom(10_000_000 + number, shape)[0]
        record = GenerationRecord("benchmark", "phantoms", number, 1, scheduler={"class": "none"})
        image = nib.Nifti1Image(np.asarray(volume.array[0], np.float32), volume.affine)
        write_synthetic(image, record.to_json(), folder / f"generated/{name}_000.nii.gz")
    (folder / "subjects.csv").write_text("\n".join(rows) + "\n")
    data = {
        "root": str(folder),
        "table": "subjects.csv",
        "images": "images/{volume}.nii.gz",
        "subject": "subject",
        "split": "split",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))


def cost(command: str, folder: Path, options: Sequence[str] = ()) -> Cost:
    """Run a command of evaluate.py on the volumes of `write_sets`.

    Raises: RuntimeError with the end of its output if it fails.
    """
    log = folder / f"{command}.log"
    inputs = ["--config", str(folder / "config.yaml"), "--synthetic", str(folder / "generated")]
    line = [sys.executable, str(ROOT / "evaluate.py"), command, *inputs, "--output", str(folder / f"{command}.json")]
    start = time.perf_counter()
    with open(log, "wb") as output:
        caches = {"MEDVOLUME_CACHE": str(folder / "cache"), "TMPDIR": str(folder)}
        process = subprocess.Popen(
            [*line, *options], stdout=output, stderr=output, cwd=ROOT, env={**os.environ, **caches}
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"evaluate.py {command} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return {"peak_mib": usage.ru_maxrss * unit >> 20, "seconds": round(time.perf_counter() - start, 1)}


def measure(count: int, side: int, crop: int, folder: Path | None = None) -> dict[str, Cost]:
    """Return the cost of each command at `count` real and `count` generated volumes."""
    options = {
        "realism": [],
        "privacy": ["--crop", *[str(crop)] * 3, "--spaces", "image", "features", "--alpha", "0.1"],
    }
    with tempfile.TemporaryDirectory(dir=folder) as name:
        write_sets(Path(name), count, side)
        costs = {command: cost(command, Path(name), options[command]) for command in COMMANDS}
    for command, found in costs.items():
        print(f"{command} at {count} + {count}: {found['peak_mib']} MiB, {found['seconds']:.0f} s", flush=True)
    return costs


def main(args: Sequence[str] | None = None) -> None:
    """Measure, and write the report."""
    options = parse(args)
    check_report(options.output)
    load = os.getloadavg()[0]
    found = {str(count): measure(count, options.side, options.crop, options.folder) for count in options.counts}
    report = {
        "side": options.side,
        "crop": options.crop,
        "costs": found,
        "threads": torch.get_num_threads(),
        "load_before": load,
        "load_after": os.getloadavg()[0],
        **provenance(),
    }
    write_report(options.output, report)
