"""Sagittal knee MR of MRNet as NIfTI files and a table:

    python configs/medical_diffusion/mrnet/prepare.py --source MRNet-v1.0 --output data/mrnet

Reads {train,valid}/sagittal/NNNN.npy (uint8: slices, rows, columns) and writes images/NNNN.nii.gz and exams.csv with
exam and split. MRNet's own validation set is the test split; a tenth of the training exams is for validation. MRNet
does not say whose the exams are, so a few patients of two exams may be on both sides of that.

The arrays have no geometry. Slices are taken to go from left to right, rows from top to bottom, columns from front to
back, and voxels to measure `--spacing` mm: sizes of what is generated mean no more than that.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveFloat


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="MRNet-v1.0, as it was downloaded")
    parser.add_argument("--output", type=Path, default=Path("data/mrnet"), help="folder to write to")
    parser.add_argument(
        "--spacing",
        type=Number(PositiveFloat),
        nargs=3,
        default=(3.0, 0.6, 0.6),
        help="mm between slices, columns, rows",
    )
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import numpy as np
from tqdm import tqdm

from volumes import Volume, write_volume

SPLITS = {"train": "train", "valid": "test"}  # MRNet's folders: our splits
VALIDATION = 10  # every tenth training exam


def prepare(source: Path, output: Path, spacing: tuple[float, float, float] = (3.0, 0.6, 0.6)) -> list[dict[str, str]]:
    """Write the volumes and the table; returns its rows. Raises: ValueError if there is no exam in `source`."""
    rows, affine = [], np.diag([*spacing, 1.0])
    for theirs, ours in SPLITS.items():
        for number, path in enumerate(tqdm(sorted((source / theirs / "sagittal").glob("*.npy")), desc=theirs)):
            array = np.load(path, allow_pickle=False)
            upright = array.transpose(0, 2, 1)[:, ::-1, ::-1]  # left to right, back to front, bottom to top
            write_volume(Volume(np.ascontiguousarray(upright)[None], affine), output / f"images/{path.stem}.nii.gz")
            validation = ours == "train" and number % VALIDATION == VALIDATION - 1
            rows.append({"exam": path.stem, "split": "validation" if validation else ours})
    if not rows:
        raise ValueError(f"{source}: no train/sagittal/*.npy there; give the folder MRNet-v1.0")
    with open(output / "exams.csv", "w", newline="") as table:
        writer = csv.DictWriter(table, ["exam", "split"])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def main(args: Sequence[str] | None = None) -> None:
    """Prepare the data set."""
    options = parse(args)
    print(f"{len(prepare(options.source, options.output, tuple(options.spacing)))} exams in {options.output}")
