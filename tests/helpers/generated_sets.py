"""Files of a data set and of volumes generated from its masks: new draws, blurred ones, and copies."""

import json
from pathlib import Path

import numpy as np
from smooth import smooth, smooth_volumes

from benchmarks.phantom_set import write_section
from pipelines import describe_mask
from pipelines.storage.provenance import sidecar_path
from volumes import Volume, write_volume

SHAPE = (16, 18, 16)
COUNT = {"train": 10, "test": 8}


def write_case(folder, name: str, array: np.ndarray, seed: int) -> None:
    write_volume(Volume((200 * array + 50).astype(np.float32), np.eye(4)), folder / f"images/{name}.nii.gz")
    labels = (smooth(np.random.default_rng(seed).standard_normal((1, *SHAPE)), 2) > 0).astype(np.int16)
    write_volume(Volume(labels, np.eye(4)), folder / f"labels/{name}.nii.gz")


def write_generated(folder, made: str, name: str, array: np.ndarray, *, factor: float = 200.0) -> None:
    """What generate.py writes: the volume in the training files' units, and the sidecar with the mask's hash."""
    path = folder / made / f"{name}_000.nii.gz"
    write_volume(Volume((factor * array + 50).astype(np.float32), np.eye(4)), path)
    mask = describe_mask(folder / f"labels/{name}.nii.gz")
    sidecar_path(path).write_text(json.dumps({"synthetic": True, "mask": {**mask, "file": "renamed.nii.gz"}}))


def write_sets(root: Path) -> Path:
    """18 volumes, two a subject, and of every mask a generated one: "fresh" of the same distribution, "blurred",
    "copies"."""
    rows = []
    real, fresh = smooth_volumes(18, 1, SHAPE), smooth_volumes(18, 2, SHAPE)
    for number in range(18):
        split = "train" if number < COUNT["train"] else "test"
        write_case(root, f"case_{number}", real[number], number)
        write_generated(root, "fresh", f"case_{number}", fresh[number])
        write_generated(root, "blurred", f"case_{number}", smooth(fresh[number], 1.0))
        write_generated(root, "copies", f"case_{number}", real[number % COUNT["train"]], factor=350.0)
        rows.append((f"case_{number}", f"S{number // 2}", split))
    labels = {0: "background", 1: "organ"}
    write_section(root, rows, config="ldm.yaml", validation_fraction=0.0, label_names=labels)
    return root
