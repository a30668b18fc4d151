"""Write a phantom data set with a "generated" volume per mask, for benchmarks and tests."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from volumes import make_phantom, write_volume

SHAPE = (16, 16, 16)


def write_phantoms(
    folder: Path, subjects: Sequence[int], tests: int, *, first: int = 0, **options: Any
) -> dict[str, object]:
    """Write images, labels, subjects.csv, config.yaml, and in made/ each volume twice as bright, as if generated.

    Args:
        folder: folder to write to.
        subjects: subject of each volume.
        tests: how many of the last volumes are the test set.
        first: number of the first volume in the file names.
        options: further settings of the config's section `data`.

    Returns:
        The section `data`.
    """
    rows = []
    for number, subject in enumerate(subjects):
        (image, mask, _), name = make_phantom(number, SHAPE), f"case_{first + number}"
        write_volume(image, folder / f"images/{name}.nii.gz")
        write_volume(mask, folder / f"labels/{name}.nii.gz")
        write_volume(image.replace(image.array * 2 + 1), folder / f"made/{name}_000.nii.gz")
        rows.append((name, f"S{subject}", "test" if number >= len(subjects) - tests else "train"))
    labels = {0: "background", 1: "body", 2: "organ", 3: "lesion"}
    return write_section(folder, rows, **{"label_names": labels, **options})


def write_section(
    folder: Path, rows: Iterable[tuple[str, str, str]], *, config: str = "config.yaml", **options: Any
) -> dict[str, object]:
    """Write the table and the config of the images and labels in a folder.

    Args:
        rows: volume, subject and split of each.
        config: name of the YAML file.
        options: further settings of the section `data`; None leaves out the setting of that name.

    Returns:
        The section `data`.
    """
    with open(folder / "subjects.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("volume", "subject", "split"), *rows])
    section = {
        "root": str(folder),
        "table": "subjects.csv",
        "images": "images/{volume}.nii.gz",
        "masks": "labels/{volume}.nii.gz",
        "subject": "subject",
        "split": "split",
        **options,
    }
    section = {name: value for name, value in section.items() if value is not None}
    (folder / config).write_text(yaml.safe_dump({"data": section}))
    return section
