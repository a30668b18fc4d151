"""Write a phantom data set with a "generated" volume per mask, for benchmarks and tests."""

from collections.abc import Sequence
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
    rows = ["volume,subject,split"]
    for number, subject in enumerate(subjects):
        (image, mask, _), name = make_phantom(number, SHAPE), f"case_{first + number}"
        write_volume(image, folder / f"images/{name}.nii.gz")
        write_volume(mask, folder / f"labels/{name}.nii.gz")
        write_volume(image.replace(image.array * 2 + 1), folder / f"made/{name}_000.nii.gz")
        rows.append(f"{name},S{subject},{'test' if number >= len(subjects) - tests else 'train'}")
    (folder / "subjects.csv").write_text("\n".join(rows) + "\n")
    section = {
        "root": str(folder),
        "table": "subjects.csv",
        "images": "images/{volume}.nii.gz",
        "masks": "labels/{volume}.nii.gz",
        "subject": "subject",
        "split": "split",
        "label_names": {0: "background", 1: "body", 2: "organ", 3: "lesion"},
        **options,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": section}))
    return section
