"""Adrenal glands of AdrenalMNIST3D as label maps and a table:

    python configs/adrenal_shapes/prepare.py --npz adrenalmnist3d_64.npz

Writes shapes/NAME.nii.gz (uint8, 1 in the gland, else 0) and shapes.csv with name, split (train, validation, test) and
diagnosis (normal, hyperplasia); and, for generate.py, conditions.csv of 1,000 rows with the test split's share of each
diagnosis. Source: Yang et al., MedMNIST v2, Scientific Data 2023; CC BY 4.0.

Voxels are 1 mm a side: the file does not say so, but the paper does, which cut a box of 64 mm around each gland's
center; that center is put at (0, 0, 0). The file does not say which axis points where, so the array's are taken as they
are. It does not say either whose the glands are: two are of each patient, and the authors' split keeps them together.
"""

import argparse
import csv
import zipfile
from collections.abc import Sequence
from pathlib import Path

from cli.command import ArgumentParser, run_command


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--npz", type=Path, required=True, help="adrenalmnist3d_64.npz of MedMNIST+")
    parser.add_argument("--output", type=Path, default=Path("data/adrenal_shapes"), help="folder to write to")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import numpy as np
from tqdm import tqdm

from volumes import Volume, write_volume

SPLITS = {"train": "train", "val": "validation", "test": "test"}  # the file's names: ours
DIAGNOSES = ("normal", "hyperplasia")  # the file's labels 0 and 1
BOX = 64.0  # mm, of each side
REQUESTS = 1000


def prepare(npz: Path, output: Path) -> list[dict[str, str]]:
    """Write the shapes and the tables; returns the rows of shapes.csv."""
    rows = []
    if not zipfile.is_zipfile(npz):
        raise ValueError(f"{npz}: is not a .npz file, or not a whole one; give adrenalmnist3d_64.npz of MedMNIST+")
    with np.load(npz) as file:
        for theirs, ours in SPLITS.items():
            shapes, labels = file[f"{theirs}_images"], file[f"{theirs}_labels"].ravel()
            affine = np.diag([*(BOX / n for n in shapes.shape[1:]), 1.0])
            affine[:3, 3] = [-BOX / 2 + BOX / n / 2 for n in shapes.shape[1:]]  # the center of the first voxel
            for number, (shape, label) in enumerate(zip(tqdm(shapes, desc=ours), labels, strict=True)):
                row = {"name": f"{ours}_{number:04d}", "split": ours, "diagnosis": DIAGNOSES[label]}
                write_volume(
                    Volume((shape > 0).astype(np.uint8)[None], affine), output / f"shapes/{row['name']}.nii.gz"
                )
                rows.append(row)
    write_table(rows, output / "shapes.csv")
    tested = [row["diagnosis"] for row in rows if row["split"] == "test"]
    wanted = [name for name in DIAGNOSES for _ in range(round(REQUESTS * tested.count(name) / len(tested)))]
    requests = [{"name": f"gland_{number:04d}", "diagnosis": name} for number, name in enumerate(wanted)]
    write_table(requests, output / "conditions.csv")
    return rows


def write_table(rows: list[dict[str, str]], path: Path) -> None:
    with open(path, "w", newline="") as table:
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main(args: Sequence[str] | None = None) -> None:
    """Prepare the data set."""
    options = parse(args)
    print(f"{len(prepare(options.npz, options.output))} shapes in {options.output}")
