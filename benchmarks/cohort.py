"""Train on a cohort of phantoms that are drawn when they are read, in a cache that holds a small part of them.

    python -m benchmarks.cohort --output docs/cohort.json [--only limited cohort] [--processes 2]

- limited: both trainings with a cache of `--limited` bytes on volumes that take three times as much, and without a
  limit: their losses are the same, and the cache never exceeds its limit;
- cohort: prepare `--cases` volumes of `--shape` in a cache of `--limit` bytes, and train both models for a few steps.

Each part reports the size of all prepared volumes, the largest size of the cache (looked at all the time), peak
resident memory of a process, and seconds. A report that is there already keeps the parts that are not run. The
networks are tiny: what is measured is the path of the data. A whole pass over the cohort draws each phantom again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveInt

PARTS = ("limited", "cohort")


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    count = Number(PositiveInt)
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=count, default=1251, help="volumes of the cohort (1251)")
    parser.add_argument("--shape", type=count, nargs=3, default=[128, 128, 80], help="their voxels (128 128 80)")
    parser.add_argument("--limit", default="2GiB", help="of the cache for the cohort (2GiB)")
    parser.add_argument("--limited", default="1GiB", help="of the cache in the comparison of losses (1GiB)")
    parser.add_argument("--processes", type=count, default=2, help="that prepare and train (2)")
    parser.add_argument("--steps", type=count, default=6, help="of each training (6)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (all)")
    parser.add_argument("--output", type=Path, required=True, help="report to write, a JSON file")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import yaml

from evaluation.report import check_report, provenance, write_report
from files.cache import LIMIT, parse_size

from .short_training import LOOP, ROOT, environment, logged_losses, measured_command, read_measured

BYTES = 5  # a voxel: float32, and a label
VAE = {"class": "autoencoder.AutoencoderKL3D", "patch_size": 8, "channels": [16], "strides": []}
VAE |= {"encoder_blocks": [1], "decoder_blocks": [1]}
UNET = {"class": "diffusion.LatentUNet3D", "channels": [16, 16], "blocks": [1, 1], "mask_width": 4, "head_dim": 8}


class Cohort:
    """A cohort, its config files and its cache, in a folder of its own."""

    def __init__(self, folder: Path, count: int, shape: Sequence[int], limit: str | None, options: argparse.Namespace):
        self.folder, self.processes, self.steps, self.limit = folder, options.processes, options.steps, limit
        self.cache, self.largest = folder / "cache", 0
        self.environment = environment(self.cache)
        self.environment.pop(LIMIT, None)
        if limit:
            self.environment[LIMIT] = limit
        data = {"phantom": {"count": count, "shape": list(shape)}, "validation_fraction": 0.01}
        loop = {**LOOP, "batch_size": 2, "max_steps": options.steps}
        crops = {"shape": [min(64, n) for n in shape]}
        vae, ldm = {"data": data, "model": VAE, "crops": crops, "loop": loop}, {"data": data, "model": UNET}
        ldm |= {"vae": "train_vae/vae", "cache": {"versions": 1}, "inference_steps": 2, "loop": loop}
        folder.mkdir()
        for script, section in (("train_vae", vae), ("train_ldm", ldm)):
            section = {"output": script, "optimizer": {"warmup_steps": 1}, **section}
            (folder / f"{script}.yaml").write_text(yaml.safe_dump(section))

    def prepare(self) -> float:
        """Prepare all volumes, and return the seconds. A cache that cannot hold them all ends the command with 1."""
        script = [str(ROOT / "prepare.py"), f"--config={self.folder}/train_vae.yaml", f"--processes={self.processes}"]
        taken = self._run([sys.executable, *script], "prepare", passing=(0, 1))
        if "volumes are prepared" not in (log := (self.folder / "prepare.log").read_text()):
            raise RuntimeError(f"prepare failed:\n{log[-3000:]}")
        return taken

    def train(self, script: str) -> dict[str, object]:
        """Train, and return losses, the largest peak of a process in MiB, and seconds: of a step, and of all."""
        command = measured_command(script, self.folder, [f"--config={self.folder}/{script}.yaml"], self.processes)
        seconds = self._run(command, script)
        found = read_measured(self.folder)
        assert len(found) == self.processes
        losses = logged_losses(self.folder / script)
        if len(losses) != self.steps:
            raise RuntimeError(f"{script}: logged {len(losses)} of {self.steps} steps")
        return {
            "losses": losses,
            "peak_mib": max(one["kib"] for one in found) / 1024,
            "seconds_a_step": [after - before for before, after in pairwise(found[0]["times"])],
            "seconds": seconds,
        }

    def _run(self, command: Sequence[str], name: str, passing: Sequence[int] = (0,)) -> float:
        start, log = time.time(), self.folder / f"{name}.log"
        with self._watched(), log.open("w") as file:
            ended = subprocess.run(command, env=self.environment, stdout=file, stderr=file, check=False).returncode
        if ended not in passing:
            raise RuntimeError(f"{name} ended with {ended}:\n{log.read_text()[-3000:]}")
        return time.time() - start

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Note the largest size of the cache's voxels during the block, unfinished files included."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                self.largest = max(self.largest, stored_bytes(self.cache))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()

    def sizes(self) -> dict[str, object]:
        """Return the size of all prepared volumes, the largest size of the cache, and its limit, in bytes."""
        facts = [json.loads(path.read_text())["facts"] for path in (self.cache / "prepared").glob("*.json")]
        limit = parse_size(self.limit, 0) if self.limit else None
        return {"prepared": sum(one["nbytes"] for one in facts), "largest_cache": self.largest, "limit": limit}


def stored_bytes(cache: Path) -> int:
    """Return the bytes of all voxels in a cache."""
    used = 0
    for folder, _, names in os.walk(cache):
        for name in names:
            if name.endswith(".safetensors"):
                try:
                    used += os.stat(os.path.join(folder, name)).st_size
                except FileNotFoundError:  # it was just removed, or finished
                    continue
    return used


def limited(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Compare trainings in a limited cache with the same ones in an unlimited one."""
    voxels = options.shape[0] * options.shape[1] * options.shape[2]
    count = -(-3 * parse_size(options.limited, 0) // (BYTES * voxels))
    found: dict[str, object] = {"cases": count, "shape": options.shape}
    losses: dict[str, list[object]] = {}
    for name, limit in (("unlimited", None), ("limited", options.limited)):
        cohort = Cohort(folder / name, count, options.shape, limit, options)
        trainings = {script: cohort.train(script) for script in ("train_vae", "train_ldm")}
        losses[name] = [one["losses"] for one in trainings.values()]
        found[name] = {**cohort.sizes(), **trainings}
    return {**found, "same_losses": losses["limited"] == losses["unlimited"]}


def full_cohort(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Prepare a cohort, and train both models on it."""
    cohort = Cohort(folder / "cohort", options.cases, options.shape, options.limit, options)
    taken = cohort.prepare()
    trainings = {script: cohort.train(script) for script in ("train_vae", "train_ldm")}
    return {"cases": options.cases, "shape": options.shape, "prepare_s": taken, **cohort.sizes(), **trainings}


def main(args: Sequence[str] | None = None) -> None:
    """Run the parts that the command line names, and write the report after each."""
    options = parse(args)
    check_report(options.output)
    report: dict[str, object] = json.loads(options.output.read_text()) if options.output.is_file() else {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as temporary:
            run = limited if name == "limited" else full_cohort
            measured = run(Path(temporary), options)
        report[name] = {"processes": options.processes, **measured, **provenance()}
        write_report(options.output, report)
        print(name, json.dumps(report[name], indent=1))
