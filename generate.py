"""Volumes from masks, to disk, in one process or many:

python generate.py --pipeline weights/hippocampus --masks 'masks/*.nii.gz' --output out/generated --count 2 --steps 20
accelerate launch generate.py ...       # divides the masks over the processes

Writes <mask stem>_<k:03d>.nii.gz on the mask's grid, a JSON sidecar that says how it was made, and at the end manifest.csv.
Each volume's seed comes from --seed, the mask's stem and k alone, so batch size, order, processes and interruptions
change nothing. The same command again goes on where it stopped.
"""

import argparse
import csv
import glob
import hashlib
import itertools
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from pipelines import MedVolumePipeline, describe_mask, equal_batches, read_sidecar
from volumes.patterns import SUFFIXES

FOLDER_SUFFIXES = tuple(suffix for suffix in SUFFIXES if not suffix.startswith(".img"))  # of a pair, the .hdr
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LONGEST_RUN = timedelta(days=30)  # processes wait this long for each other at the end
MANIFEST = "manifest.csv"


@dataclass(frozen=True)
class Task:
    """One volume to be: its mask, where it goes, the shape of its padded grid, its seed and its future sidecar."""

    mask: Path
    path: Path
    shape: tuple[int, int, int]
    seed: int
    record: dict[str, Any]


def main(args: Sequence[str] | None = None) -> None:
    """Generate what is not there yet."""
    options = parse(args)
    state = PartialState(timeout=LONGEST_RUN)
    pipe = MedVolumePipeline.from_pretrained(options.pipeline, dtype=DTYPES[options.precision]).to(state.device)
    pipe.set_progress_bar_config(disable=True)

    masks = find_masks(options.masks, options.output)
    tasks = plan(pipe, masks[state.process_index :: state.num_processes], options)
    todo = unfinished(tasks)
    check_writable(options.output)
    with tqdm(
        total=len(tasks), initial=len(tasks) - len(todo), desc="volumes", disable=not state.is_main_process
    ) as bar:
        for indices in equal_batches([task.shape for task in todo], options.batch_size):
            batch = [todo[i] for i in indices]
            pipe(
                mask=[task.mask for task in batch],
                num_inference_steps=options.steps,
                generator=[torch.Generator().manual_seed(task.seed) for task in batch],
                label_map=options.label_map,
                batch_size=options.batch_size,
                paths=[task.path for task in batch],
            )
            bar.update(len(batch))

    state.wait_for_everyone()
    if state.is_main_process:
        count = write_manifest(options.output)
        print(f"{count} volumes in {options.output}, listed in {options.output / MANIFEST}")
    state.destroy_process_group()


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits with a message on what cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="pipeline folder or Hub repository")
    parser.add_argument("--masks", required=True, nargs="+", metavar="DIR_OR_GLOB", help="NIfTI label maps")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--count", type=positive, default=1, help="volumes a mask (1)")
    parser.add_argument("--steps", type=positive, default=20, help="denoising steps (20)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--batch_size", type=positive, default=8, help="volumes denoised together (8)")
    parser.add_argument(
        "--label_map",
        nargs="+",
        type=label_pair,
        default=[],
        metavar="VALUE=LABEL",
        help="read a label value as one that the model knows, by value or name: 3=1 4=tumour",
    )
    parser.add_argument("--precision", choices=DTYPES, default="no", help="no is float32 (no)")
    options = parser.parse_args(args)
    options.label_map = dict(options.label_map)
    return options


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be 1 or more")
    return value


def label_pair(text: str) -> tuple[int, int | str]:
    """VALUE=LABEL, the label by value or by name."""
    value, _, label = text.partition("=")
    if not label:
        raise argparse.ArgumentTypeError(f"{text!r} is not VALUE=LABEL, e.g. 3=1")
    return int(value), int(label) if label.lstrip("-").isdigit() else label


def find_masks(patterns: Sequence[str], output: Path) -> list[Path]:
    """Mask files in folders, or matching patterns, sorted by stem.

    Raises: ValueError if there are none, if two have the same stem (their volumes would have one name), or if masks lie
    in the output folder (volumes would become masks in the next run).
    """
    found: set[Path] = set()
    for pattern in patterns:
        paths = [path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file()]
        if Path(pattern).is_dir():
            paths = [path for path in Path(pattern).iterdir() if path.name.endswith(FOLDER_SUFFIXES)]
        found |= {path for path in paths if not path.name.startswith(".")}
    if not found:
        raise ValueError(
            f"no masks found in {' '.join(patterns)}; give a folder with .nii or .nii.gz files, or a quoted glob"
        )
    masks = sorted(found, key=lambda path: (mask_stem(path), str(path)))
    for first, second in itertools.pairwise(masks):
        if mask_stem(first) == mask_stem(second):
            raise ValueError(f"{first} and {second} have the same stem, so their volumes would too; rename one")
    for mask in masks:
        if mask.parent.resolve() == output.resolve():
            raise ValueError(f"{mask}: lies in --output {output}; write volumes to another folder than the masks'")
    return masks


def mask_stem(path: Path) -> str:
    """The file's name without .nii.gz, .nii, .hdr or .img (.gz)."""
    suffix = next((s for s in SUFFIXES if path.name.endswith(s)), path.suffix)
    return path.name.removesuffix(suffix)


def volume_seed(seed: int, stem: str, k: int) -> int:
    """63 bits of a hash of (seed, stem, k): the same everywhere and always, different for every volume."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stem}/{k}".encode()).digest()[:8], "big") >> 1


def plan(pipe: MedVolumePipeline, masks: Sequence[Path], options: argparse.Namespace) -> list[Task]:
    """Read every mask once, so that a bad one is found before hours of work.

    Raises: ValueError naming all bad ones, or if the model takes no masks.
    """
    if pipe.unet.config["num_labels"] == 0:
        raise ValueError("no mask conditions this model: call the pipeline itself, with shape=(X, Y, Z)")
    tasks, refused = [], []
    for mask in masks:
        try:
            shape = pipe.volume_processor.preprocess(mask, options.label_map).shape
        except ValueError as error:
            refused.append(str(error))
            continue
        stem, description = mask_stem(mask), describe_mask(mask)
        for k in range(options.count):
            seed = volume_seed(options.seed, stem, k)
            record = pipe.provenance(
                description, seed=seed, num_inference_steps=options.steps, label_map=options.label_map
            )
            tasks.append(Task(mask, options.output / f"{stem}_{k:03d}.nii.gz", shape, seed, record))
    if refused:
        raise ValueError("masks that cannot be used:\n" + "\n".join(refused))
    return tasks


def unfinished(tasks: Sequence[Task]) -> list[Task]:
    """The tasks whose volume is not on disk yet.

    Raises: ValueError if a volume is there that other settings made, or that this script did not make at all.
    """
    todo, refused = [], []
    for task in tasks:
        if not task.path.exists():
            todo.append(task)
            continue
        record = read_sidecar(task.path)
        if record is None:
            refused.append(f"{task.path}: has no sidecar, so it was not generated by this script")
            continue
        different = sorted(key for key in task.record if key != "software" and record.get(key) != task.record[key])
        if different:
            refused.append(f"{task.path}: was made with another {', another '.join(different)}")
    if refused:
        raise ValueError("choose another --output, or remove these first:\n" + "\n".join(refused))
    return todo


def check_writable(output: Path) -> None:
    """Make the output folder, and try it before hours of work.

    Raises: ValueError if nothing can be written there.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ValueError(f"--output {output}: cannot be written to: {error.strerror}") from error


def write_manifest(output: Path) -> int:
    """manifest.csv: a row for every generated volume in the folder, from its sidecar. Returns their number."""
    columns = ("file", "mask", "mask_sha256", "seed", "num_inference_steps", "scheduler", "dtype", "model", "software")
    rows = []
    for path in sorted(output.glob("*.nii.gz")):
        try:
            record = read_sidecar(path)
        except ValueError:  # somebody else's volume with a JSON of its own
            continue
        if record is not None:
            mask, scheduler = record["mask"], record["scheduler"]["class"]
            flat = {"file": path.name, "mask": mask["file"], "mask_sha256": mask["sha256"], "scheduler": scheduler}
            rows.append({column: flat.get(column, record.get(column)) for column in columns})
    unfinished_manifest = output / f".{MANIFEST}"
    with open(unfinished_manifest, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished_manifest, output / MANIFEST)
    return len(rows)


if __name__ == "__main__":
    main()
