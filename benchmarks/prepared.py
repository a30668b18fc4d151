"""Measure what prepared volumes cost and save, on files of phantoms.

    python -m benchmarks.prepared --output out/prepared.json [--cases 100 2000] [--only preparation memory wait]

- preparation: seconds to prepare volumes in one process on one core, in two on two, and in one on two: its threads
  use both;
- memory: peak resident memory of both training commands at few and at many volumes;
- start: seconds from the second start of a training on many volumes to its first step;
- wait: the share of a step that the training of an autoencoder waits for its patches (`data_wait`).

A report that is there already keeps the parts that are not run. Run it on a quiet Linux machine with two cores or more.
It takes about half an hour.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveInt

PARTS = ("preparation", "memory", "wait")
RUNS = (("one_on_one_core", 1, 1), ("two_on_two_cores", 2, 2), ("one_on_two_cores", 1, 2))  # name, processes, cores


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs=2, type=Number(PositiveInt), default=[100, 2000], help="few, many (100 2000)")
    parser.add_argument("--side", type=Number(PositiveInt), default=48, help="voxels a side of these volumes (48)")
    parser.add_argument("--large", type=Number(PositiveInt), default=192, help="voxels a side to prepare (192)")
    parser.add_argument("--count", type=Number(PositiveInt), default=96, help="volumes to prepare (96)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (all)")
    parser.add_argument("--output", type=Path, required=True, help="report to write, a JSON file")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from evaluation.report import check_report, provenance, write_report
from volumes import Volume, make_phantom, write_volume

from .short_training import ROOT, environment, logged, loop_options, measured_command, read_measured

NAMES = "{0: background, 1: body, 2: organ, 3: lesion}"
STEPS = [*loop_options(max_steps=8, batch_size=2, log_every=4, sample_every=0), "--resume=latest"]
VAE = ["--crops.shape=[32, 32, 32]", "--model={class: autoencoder.AutoencoderKL3D, channels: [8, 16]}"]
LDM = ["--inference_steps=2", "--model.channels=[16, 16]", "--model.mask_width=4", "--model.head_dim=8"]


def write_set(folder: Path, count: int, side: int) -> list[str]:
    """Write phantoms as NIfTI files of integers, compressed, and return the options that name them."""
    for number in range(count):
        image, mask, _ = make_phantom(number, (side, side, side))
        rounded = Volume(image.array.round().astype("int16"), image.affine)
        write_volume(rounded, folder / f"images/{number:05d}.nii.gz")
        write_volume(mask, folder / f"masks/{number:05d}.nii.gz")
    images, masks = "images/{name}.nii.gz", "masks/{name}.nii.gz"
    options = [f"--data.root={folder}", f"--data.images={images}", f"--data.masks={masks}", "--data.phantom=null"]
    return [*options, f"--data.label_names={NAMES}", "--data.validation_fraction=0.1"]


def preparation(folder: Path, count: int, side: int) -> dict[str, float]:
    """Return seconds to prepare `count` volumes by processes and cores; twice each, the faster one.

    They include the start of the second process, 4 s, most of it the import of torch.
    """
    write_set(folder / "large", count, side)
    code = (
        "import os, sys, time; from volumes import DataConfig, load_cases; "
        "from volumes.prepared.preparation import prepare_cases\n"
        "if __name__ == '__main__':\n"
        "    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[3])])\n"
        "    config = DataConfig(root=sys.argv[1], images='images/{name}.nii.gz', masks='masks/{name}.nii.gz', "
        "label_names={0: 'background', 1: 'body', 2: 'organ', 3: 'lesion'}, validation_fraction=0)\n"
        "    cases = load_cases(config); start = time.time()\n"
        "    prepare_cases(cases, config, processes=int(sys.argv[2])); print(time.time() - start)\n"
    )
    (folder / "prepare_set.py").write_text(code)
    taken: dict[str, float] = {}
    for turn in range(2):
        for name, processes, cores in RUNS:
            arguments = [str(folder / "prepare_set.py"), str(folder / "large"), str(processes), str(cores)]
            cache = environment(folder / f"cache_{turn}_{name}")
            done = subprocess.run([sys.executable, *arguments], env=cache, check=True, stdout=-1, text=True)
            taken[name] = min(float(done.stdout), taken.get(name, float("inf")))
    return {"volumes": count, **taken, "speedup": taken["one_on_one_core"] / taken["two_on_two_cores"]}


def train(script: str, folder: Path, options: Sequence[str]) -> dict[str, float]:
    """Train for a few steps, and return peak memory in MiB, seconds to the first step, and the share of waiting."""
    config = ROOT / f"configs/phantom/{'vae' if script == 'train_vae' else 'ldm'}.yaml"
    arguments = [f"--config={config}", f"--output={folder}", *options, *STEPS]
    command = measured_command(script, folder.parent / f"measured_{folder.name}", arguments)
    start = time.time()
    subprocess.run(command, env=environment(folder.parent / "cache"), check=True, stdout=subprocess.DEVNULL)
    whole = time.time() - start
    (one,) = read_measured(folder.parent / f"measured_{folder.name}")
    waits = [row["data_wait"] for row in logged(folder) if "data_wait" in row]
    found = {"peak_mib": one["kib"] / 1024, "first_step_s": one["times"][0] - one["began"], "whole_s": whole}
    return found | ({"data_wait": waits[-1]} if waits else {})


def memory(folder: Path, counts: Sequence[int], side: int) -> dict[str, object]:
    """Measure both trainings at each count of volumes, and the autoencoder's again, when all is prepared."""
    found: dict[str, object] = {}
    for count in counts:
        place = folder / f"set_{count}"
        data = write_set(place / "data", count, side)
        found[f"vae_{count}"] = train("train_vae", place / "vae", [*data, *VAE])
        found[f"second_start_{count}"] = train("train_vae", place / "again", [*data, *VAE])
        found[f"ldm_{count}"] = train("train_ldm", place / "ldm", [*data, *LDM, f"--vae={place}/vae/vae"])
    return found


def wait(folder: Path, side: int) -> dict[str, float]:
    """Measure the share of waiting with a network of the usual width and patches of 64 voxels."""
    data = write_set(folder / "wait/data", 12, side)
    model = "--model={class: autoencoder.AutoencoderKL3D, channels: [32, 64]}"
    return train("train_vae", folder / "wait/vae", [*data, "--crops.shape=[64, 64, 64]", model])


def main(args: Sequence[str] | None = None) -> None:
    """Run the parts that the command line names, and write the report."""
    options = parse(args)
    check_report(options.output)
    report: dict[str, object] = json.loads(options.output.read_text()) if options.output.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parts: dict[str, Callable[[], Mapping[str, object]]] = {
            "preparation": lambda: preparation(folder, options.count, options.large),
            "memory": lambda: memory(folder, options.cases, options.side),
            "wait": lambda: wait(folder, options.large),
        }
        for part in options.only:
            report[part] = {**parts[part](), **provenance()}
            print(part, json.dumps(report[part], indent=1))
            write_report(options.output, report)
