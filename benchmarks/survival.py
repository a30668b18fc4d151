"""Kill training, generation and evaluation with SIGKILL at random moments, resume them, and check that nothing is lost.

    python -m benchmarks.survival --kills 30 --output out/survival.json        (or: make survive)

Every job runs once undisturbed, then again with kills at uniformly random moments. After each kill, all visible files
must be readable and no finished work may be missing. The result must equal that of the undisturbed run: every bit of a
training, every voxel of a generation, every score of an evaluation. No unfinished work may be left. While a training
runs, a second job on the same output must be refused; a killed one must release its output. After each kill an entry of
the latent cache is zeroed and must be encoded again, and a prepared volume is truncated or removed and must be prepared
again. The data are phantoms of a few MB; one core suffices.
"""

import argparse
import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveInt, Seed


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=Number(PositiveInt), default=30, help="total kills, shared among the jobs (30)")
    parser.add_argument("--seed", type=Number(Seed), default=0, help="seed of the moments (0)")
    parser.add_argument("--jobs", nargs="+", help="run only these; each needs the results of the trainings before it")
    parser.add_argument("--output", type=Path, required=True, help="report to write, a JSON file")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import nibabel as nib
import numpy as np
import yaml
from safetensors.numpy import load_file

from evaluation.report import check_report, provenance, write_report
from files.atomic import UNFINISHED
from files.cache import cache_root
from files.locks import HOLDER, OutputInUse, only_writer
from training.engine.checkpoints import digest_files

from . import forked
from .phantom_set import write_phantoms

ROOT = Path(__file__).resolve().parents[1]
DATA = ["--data.phantom={count: 7, shape: [16, 16, 16]}", "--data.validation_fraction=0.15"]
LOOP = ["--loop.max_steps=12", "--loop.batch_size=4", "--loop.checkpoint_every=2", "--loop.validate_every=6"]
LOOP += ["--loop.preview_every=0", "--loop.previews=0", "--loop.trackers=[]", "--loop.mixed_precision=no"]
LOOP += ["--loop.log_every=4", "--loop.workers=0"]
VAE = ["--crops.shape=[16, 16, 16]", "--crops.flip_axes=[0]"]
VAE += [
    "--model={class: autoencoder.AutoencoderKL3D, channels: [8, 16], encoder_blocks: [1, 1], decoder_blocks: [1, 1]}"
]
LDM = [
    "--cache.versions=2",
    "--inference_steps=2",
    "--model.channels=[16, 16]",
    "--model.mask_width=4",
    "--model.head_dim=8",
]


@dataclass(frozen=True)
class Job:
    """A job to kill.

    Attributes:
        name: its name.
        script: script to run.
        args: its arguments, for an output folder.
        finished: finished work in a folder, {name: value that must not change}.
        result: everything to compare with the undisturbed run.
        holds: whether it locks its output.
        damage: damages something after a kill, and returns its path.
    """

    name: str
    script: str
    args: Callable[[Path], list[str]]
    finished: Callable[[Path], Mapping[str, object]]
    result: Callable[[Path], Mapping[str, object]]
    holds: bool = False
    damage: Callable[[Path, random.Random], Path | None] = lambda folder, chance: None


def training(name: str, script: str, options: Sequence[str]) -> Job:
    """Return the job of a training."""

    def args(folder: Path) -> list[str]:
        config = ROOT / f"configs/phantom/{'vae' if script == 'train_vae' else 'ldm'}.yaml"
        return [f"--config={config}", f"--output={folder}", "--resume=latest", *DATA, *LOOP, *options]

    def finished(folder: Path) -> dict[str, object]:
        """Return the step of the last checkpoint; older ones are removed."""
        return {"step": max([int(p.name[5:]) for p in (folder / "checkpoints").glob("step_*")], default=0)}

    def result(folder: Path) -> dict[str, object]:
        tensors: dict[str, object] = {}
        last = folder / "checkpoints/step_000012"
        for file in [
            *last.glob("*.safetensors"),
            *folder.glob("vae/*.safetensors"),
            *folder.glob("pipeline/*/*.safetensors"),
            *folder.glob("latents/*/*.safetensors"),
        ]:
            content = load_file(file)
            tensors |= {f"{file.relative_to(folder)}:{key}": value.tobytes() for key, value in content.items()}
        return tensors | {"state": (last / "state.json").read_text(), "metrics": (folder / "metrics.json").read_text()}

    return Job(name, script, args, finished, result, holds=True, damage=damage_caches)


def zero_an_entry(folder: Path, chance: random.Random) -> Path | None:
    """Zero the voxels of a random entry of the latent cache, like a disk that loses sectors: size and times stay."""
    entries = sorted(folder.glob("latents/*/*.safetensors"))
    if not entries:
        return None
    path = chance.choice(entries)
    content, times = path.read_bytes(), path.stat()
    start = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:start] + bytes(len(content) - start))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return path


def damage_caches(folder: Path, chance: random.Random) -> Path | None:
    """Truncate or remove a random prepared volume, and zero an entry of the latent cache."""
    if volumes := sorted((cache_root() / "prepared").glob("*.safetensors")):
        path = chance.choice(volumes)
        if chance.random() < 0.5:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
    return zero_an_entry(folder, chance)


def generation(pipeline: Path, masks: Path) -> Job:
    """Return the job of a generation."""

    def args(folder: Path) -> list[str]:
        options = ["--count", "2", "--steps", "4", "--batch_size", "2"]
        return ["--pipeline", str(pipeline), "--masks", str(masks), "--output", str(folder), *options]

    def finished(folder: Path) -> dict[str, object]:
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.nii.gz")}

    def result(folder: Path) -> dict[str, object]:
        voxels: dict[str, object] = {
            path.name: np.asarray(nib.Nifti1Image.from_filename(path).dataobj).tobytes()
            for path in folder.glob("*.nii.gz")
        }
        return voxels | {"manifest": (folder / "manifest.csv").read_text()}

    return Job("generate", "generate", args, finished, result, holds=True)


def evaluation(name: str, config: Path, generated: Path, options: Sequence[str]) -> Job:
    """Return the job of an evaluation."""

    def rows(folder: Path) -> dict[str, object]:
        """Return the scores of every training."""
        path = folder / "report.json"
        report = json.loads(path.read_text()) if path.is_file() else {}
        flat = [(row["arm"], row["labels"], row) for row in report.get("rows", [])]
        flat += [(arm, "any", row) for arm, runs in report.get("scores", {}).items() for row in runs]
        return {f"{arm} {labels} {row['seed']}": row["per_volume"] for arm, labels, row in flat}

    def args(folder: Path) -> list[str]:
        common = [
            "--config",
            str(config),
            "--synthetic",
            str(generated),
            "--output",
            str(folder / "report.json"),
            "--seeds",
            "2",
        ]
        return [
            name,
            *common,
            "--device",
            "cpu",
            "--precision",
            "no",
            "--shape",
            "16",
            "16",
            "16",
            "--iterations",
            "3",
            *options,
        ]

    return Job(name, "evaluate", args, rows, rows)


def broken_files(folder: Path) -> list[str]:
    """List visible files that cannot be read completely. Hidden files are unfinished and never read."""
    messages = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file():
            continue
        try:
            if path.name.endswith(".nii.gz"):
                np.asarray(nib.Nifti1Image.from_filename(path).dataobj)
            elif path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".yaml":
                assert isinstance(yaml.safe_load(path.read_text()), dict)
            elif path.suffix == ".csv":
                list(csv.DictReader(path.open()))
            if path.name == "digests.json":
                assert json.loads(path.read_text()) == digest_files(path.parent)
        except Exception as error:  # any error of a reader
            messages.append(f"{path.relative_to(folder)}: {type(error).__name__}: {error}")
    return messages


def run_undisturbed(job: Job, folder: Path, log: Path) -> tuple[float, list[str]]:
    """Run a job to its end; return its seconds, and what was wrong.

    If it locks its output, it is paused meanwhile, and a second job on the same output must be refused.
    """
    began, paused, wrong = time.perf_counter(), 0.0, []
    process = forked.start(job.script, job.args(folder), log)
    while job.holds and process.exitcode is None and not (folder / HOLDER).exists():
        process.join(0.02)
    if job.holds and process.exitcode is None:
        stopped, second = time.perf_counter(), log.with_suffix(".second")
        os.kill(process.pid, signal.SIGSTOP)
        try:
            status = forked.ended(forked.start(job.script, job.args(folder), second))
        finally:
            os.kill(process.pid, signal.SIGCONT)
        if status != 1 or f"another process writes there: process {process.pid} on " not in second.read_text():
            wrong.append(f"a second job ended with {status}: {second.read_text()[-500:]}")
        paused = time.perf_counter() - stopped
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{job.name} ended with {process.exitcode}:\n{log.read_text()[-3000:]}")
    return time.perf_counter() - began - paused, wrong


def still_held(folder: Path) -> list[str]:
    """Report an output that is still locked by a killed process."""
    try:
        with only_writer(folder):
            return []
    except OutputInUse as error:
        return [str(error)]


class JobReport(TypedDict):
    """What happened to a job: kills, times, and every fault."""

    kills: int
    rounds: int
    seconds_undisturbed: float
    killed_after_seconds: list[float]
    corrupt_files: list[str]
    lost_or_different: list[str]
    compared: int
    damaged_entries: list[str]
    second_job_refused: bool


def torture(job: Job, work: Path, kills: int, chance: random.Random) -> JobReport:
    """Run a job undisturbed, then with kills, and compare."""
    undisturbed, folder = work / f"{job.name}_undisturbed", work / job.name
    undisturbed_seconds, lost = run_undisturbed(job, undisturbed, work / f"{job.name}_undisturbed.log")
    whole = undisturbed_seconds
    expected, log = job.result(undisturbed), work / f"{job.name}.log"
    moments: list[float] = []
    broken: list[str] = []
    damaged: list[str] = []
    before: Mapping[str, object] = {}
    rounds = 0
    while len(moments) < kills:
        rounds += 1
        place = folder.with_name(f"{folder.name}_{rounds}")
        before = {}
        while len(moments) < kills:
            started, moment = time.perf_counter(), chance.uniform(0, whole)
            process = forked.start(job.script, job.args(place), log)
            process.join(moment)
            if process.exitcode is not None:  # it ended earlier: another round, with earlier moments
                whole = (whole + time.perf_counter() - started) / 2
                if process.exitcode:
                    lost.append(f"ended with {process.exitcode}: {log.read_text()[-500:]}")
                break
            process.kill()
            process.join()
            moments.append(round(moment, 3))
            broken += broken_files(place) if place.is_dir() else []
            now = job.finished(place) if place.is_dir() else {}
            lost += [f"{key}: {before[key]} -> {now.get(key)}" for key in before if changed(key, before[key], now)]
            before = now
            if job.holds and place.is_dir():
                lost += still_held(place)
            if (path := job.damage(place, chance)) is not None:
                damaged.append(path.name)
        forked.run(job.script, job.args(place), log)
        end = job.finished(place)
        lost += [f"{key} at the end" for key in before if changed(key, before[key], end)]
        broken += broken_files(place)
        lost += [f"left behind: {path.relative_to(place)}" for path in place.rglob(f"{UNFINISHED}*")]
        got = job.result(place)
        if different := sorted(key for key in {*expected, *got} if expected.get(key) != got.get(key)):
            lost.append(f"other than the undisturbed run: {different[:5]}, {len(different)} in all")
    return {
        "kills": len(moments),
        "rounds": rounds,
        "seconds_undisturbed": round(undisturbed_seconds, 2),
        "killed_after_seconds": moments,
        "corrupt_files": broken,
        "lost_or_different": lost,
        "compared": len(expected),
        "damaged_entries": damaged,
        "second_job_refused": job.holds,
    }


def changed(key: str, before: object, now: Mapping[str, object]) -> bool:
    """Return whether finished work is missing or was repeated. A training's step may grow."""
    value = now.get(key, -1)
    return value < before if isinstance(value, int) and isinstance(before, int) and key == "step" else value != before


def prepare(work: Path) -> tuple[Path, Path]:
    """Write a config and its data: files, and a "generated" volume per mask."""
    write_phantoms(work / "data", range(6), tests=2)
    return work / "data/config.yaml", work / "data"


def make_jobs(work: Path) -> list[Job]:
    """Return the jobs in an order in which each finds the results it needs."""
    config, data = prepare(work)
    vae, pipeline = work / "train_vae_undisturbed/vae", work / "train_ldm_undisturbed/pipeline"
    args = config, data / "made"
    return [
        training("train_vae", "train_vae", VAE),
        training("train_ldm", "train_ldm", [*LDM, f"--vae={vae}"]),
        generation(pipeline, data / "labels"),
        evaluation("dice", *args, []),
        evaluation("few_labels", *args, ["--labels", "2", "all", "--train_on", "real", "both"]),
        evaluation(
            "pretrain", *args, ["--labels", "2", "--starts", "scratch", "synthetic", "--pretrain_iterations", "3"]
        ),
    ]


def main(args: Sequence[str] | None = None) -> None:
    """Run all jobs and write the report. Exits with status 1 if anything is lost, corrupt or different."""
    options = parse(args)
    check_report(options.output)
    reports: dict[str, JobReport] = {}
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="survive-") as name:
        work = Path(name)
        os.environ["MEDVOLUME_CACHE"] = str(work / "cache")
        jobs = [job for job in make_jobs(work) if not options.jobs or job.name in options.jobs]
        for number, job in enumerate(jobs):
            share = options.kills // len(jobs) + (number < options.kills % len(jobs))
            reports[job.name] = torture(job, work, share, chance)
            print(job.name, json.dumps(reports[job.name]), flush=True)
            report = {
                "seed": options.seed,
                "kills": sum(job_report["kills"] for job_report in reports.values()),
                "jobs": reports,
            }
            write_report(options.output, {**report, **provenance()})
    if any(job_report["corrupt_files"] or job_report["lost_or_different"] for job_report in reports.values()):
        sys.exit(1)
