"""Hippocampus MR of the Medical Segmentation Decathlon with the split that all figures of this project use:

    tar xf Task04_Hippocampus.tar
    python configs/hippocampus/prepare.py --source Task04_Hippocampus

Reads imagesTr/hippocampus_NNN.nii.gz and labelsTr/ with the same names, and copies 206 pairs unchanged to images/ and
labels/ of the output folder, with subjects.csv beside them: volume, subject and split of each. The archive is at
http://medicaldecathlon.com (Antonelli et al. 2022; CC BY-SA 4.0).

Volumes 2k-1 and 2k are of the same person, called S followed by k: both have the same step between intensities. The
split keeps them together: 172 volumes of 112 subjects are for training, 34 volumes of 24 subjects for testing. The
other volumes of imagesTr are not used; imagesTs has no labels. Some label files hold float32 numbers, all of them 0, 1
or 2; they are read as labels like the others.
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
    parser.add_argument("--source", type=Path, required=True, help="the folder that Task04_Hippocampus.tar unpacks to")
    parser.add_argument("--output", type=Path, default=Path("data/hippocampus"), help="folder to write to")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from tqdm import tqdm

from files.documents import read_object
from volumes import read_mask, read_volume

FOLDERS = {"imagesTr": "images", "labelsTr": "labels"}  # theirs: ours
LABELS = {"0": "background", "1": "anterior", "2": "posterior"}


def prepare(source: Path, output: Path, table: Path = TABLE) -> list[dict[str, str]]:
    """Copy the pairs and the table; returns its rows.

    Args:
        source: the unpacked archive.
        output: the folder to write.
        table: the volumes to take: a CSV file with the columns volume, subject and split.
    Raises:
        ValueError: if `source` is not Task04 or lacks a file, and for a label map that does not fit its image.
    """
    check_source(source)
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    names = [f"{row['volume']}.nii.gz" for row in rows]
    missing = [f"{theirs}/{name}" for name in names for theirs in FOLDERS if not (source / theirs / name).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more files" if len(missing) > 3 else ""
        raise ValueError(f"{source}: {', '.join(missing[:3])}{more}: no such file; unpack Task04_Hippocampus.tar again")
    for ours in FOLDERS.values():
        (output / ours).mkdir(parents=True, exist_ok=True)
    for name in tqdm(names, unit="volume"):
        check_pair(source, name)
        for theirs, ours in FOLDERS.items():
            shutil.copyfile(source / theirs / name, output / ours / name)
    shutil.copyfile(table, output / "subjects.csv")  # last: a folder with it is complete
    return rows


def check_source(source: Path) -> None:
    """Raises: ValueError if a folder is not that of Task04."""
    remedy = "give the folder that Task04_Hippocampus.tar unpacks to"
    if not (source / "dataset.json").is_file():
        raise ValueError(f"{source}: has no dataset.json; {remedy}")
    described = read_object(source / "dataset.json")
    labels = described.get("labels")
    found = {key: str(name).lower() for key, name in labels.items()} if isinstance(labels, dict) else {}
    if str(described.get("name")).lower() != "hippocampus" or found != LABELS:
        raise ValueError(f"{source}: dataset.json describes {described.get('name')!r}, not Hippocampus; {remedy}")


def check_pair(source: Path, name: str) -> None:
    """Raises: ValueError if image and labels cannot be read, lie on different grids, or have other labels than 0 to
    2."""
    image, mask = read_volume(source / "imagesTr" / name), read_mask(source / "labelsTr" / name)
    if image.shape != mask.shape:
        raise ValueError(f"{source}/labelsTr/{name}: has {mask.shape} voxels, its image {image.shape}")
    if others := {int(value) for value in set(mask.array.ravel().tolist())} - {0, 1, 2}:
        raise ValueError(f"{source}/labelsTr/{name}: has the labels {sorted(others)} beside 0, 1 and 2")


def main(args: Sequence[str] | None = None) -> None:
    """Prepare the data set."""
    options = parse(args)
    print(f"{len(prepare(options.source, options.output))} volumes in {options.output}")
