"""Whole brains, T1-weighted MR at 2 mm, with the split that all figures of this project use:

    python configs/brain_t1/prepare.py --source FOLDER

FOLDER holds 62 subjects of OpenNeuro ds002748 (Bezmaternykh et al. 2021; CC0) on grids of 80 x 96 x 80 voxels of 2 mm:
t1/sub-NN.nii.gz without skull, brain/ with the brain masks, tissue/ with tissue maps (1 CSF, 2 gray, 3 white matter),
and subjects.csv: subject, age, sex and split of each. t1 and tissue are copied unchanged to the output folder.
The brain masks are checked and not copied: label 0 of a tissue map is what is outside of them.

The split is by subject: 48 are for training, 14 for testing. Validation subjects are some of the 48, see data.yaml.
"""

import argparse
import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

from cli.command import ArgumentParser, run_command

TABLE = Path(__file__).with_name("subjects.csv")


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="the folder with t1, brain and tissue")
    parser.add_argument("--output", type=Path, default=Path("data/brain_t1"), help="folder to write to")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import numpy as np
from tqdm import tqdm

from volumes import read_mask, read_volume

COPIED = ("t1", "tissue")
FOLDERS = (*COPIED, "brain")
LABELS = {0, 1, 2, 3}


def prepare(source: Path, output: Path, table: Path = TABLE) -> list[dict[str, str]]:
    """Copy the volumes and the table; returns its rows.

    Args:
        source: the folder with t1, brain and tissue.
        output: the folder to write.
        table: the subjects to take: a CSV file with the columns subject, age, sex and split.
    Raises:
        ValueError: if `source` lacks a file, and for files that do not fit each other: see `check_subject`.
    """
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    names = [f"{row['subject']}.nii.gz" for row in rows]
    missing = [f"{folder}/{name}" for name in names for folder in FOLDERS if not (source / folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more files" if len(missing) > 3 else ""
        raise ValueError(
            f"{source}: {', '.join(missing[:3])}{more}: no such file; give the folder with t1, brain, tissue"
        )
    for folder in COPIED:
        (output / folder).mkdir(parents=True, exist_ok=True)
    for name in tqdm(names, unit="subject"):
        check_subject(source, name)
        for folder in COPIED:
            shutil.copyfile(source / folder / name, output / folder / name)
    shutil.copyfile(table, output / "subjects.csv")  # last: a folder with it is complete
    return rows


def check_subject(source: Path, name: str) -> None:
    """Raises: ValueError if the files lie on different grids, if the tissue map has other labels than 0 to 3, or if
    it or the image is not 0 exactly where the brain mask is (the image may be 0 inside, too)."""
    image = read_volume(source / "t1" / name)
    tissue, brain = (read_mask(source / folder / name) for folder in ("tissue", "brain"))
    for folder, mask in (("tissue", tissue), ("brain", brain)):
        if mask.shape != image.shape or not np.allclose(mask.affine, image.affine, atol=1e-3):
            raise ValueError(f"{source}/{folder}/{name}: lies on another grid than its image")
    if others := {*np.unique(tissue.array).tolist()} - LABELS:
        raise ValueError(f"{source}/tissue/{name}: has the labels {sorted(others)} beside 0 to 3")
    outside = brain.array == 0
    if wrong := int(((tissue.array == 0) != outside).sum()):
        raise ValueError(
            f"{source}/tissue/{name}: {wrong} voxels are 0 where the brain mask is not, or not where it is"
        )
    if wrong := int((image.array[outside] != 0).sum()):
        raise ValueError(f"{source}/t1/{name}: {wrong} voxels outside of the brain are not 0")


def main(args: Sequence[str] | None = None) -> None:
    """Prepare the data set."""
    options = parse(args)
    print(f"{len(prepare(options.source, options.output))} subjects in {options.output}")


if __name__ == "__main__":
    run_command(main)
