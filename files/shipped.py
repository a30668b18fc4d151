"""Names of the shipped weights that hold on every machine: `shipped:hippocampus/vae` in place of a path."""

import os
from pathlib import Path

PREFIX = "shipped:"
WEIGHTS = Path(__file__).resolve().parents[1] / "weights"  # of the clone; a package that pip built has none


def is_shipped(path: str) -> bool:
    """Return whether a path is the name of shipped weights."""
    return path.startswith(PREFIX)


def expand_path(path: str) -> str:
    """Return a path with `~`, or the name of shipped weights, in full. Raises: ValueError for absent weights."""
    return shipped_folder(path) if is_shipped(path) else os.path.expanduser(path)


def shipped_folder(name: str, weights: Path = WEIGHTS) -> str:
    """Return the folder that a name such as `shipped:hippocampus/vae` stands for.

    Args:
        name: with its prefix.
        weights: folder of the shipped pipelines.

    Raises:
        ValueError: if it is not there.
    """
    folder = (weights / name.removeprefix(PREFIX)).resolve()
    if folder.is_relative_to(weights) and folder != weights and folder.is_dir():
        return str(folder)
    if not weights.is_dir():
        raise ValueError(
            f"{name}: this installation has no shipped weights, which are in the folder weights/ of the clone; install "
            "from the clone (pip install -e CLONE), give a folder of trained weights, or null to start from random ones"
        )
    there = ", ".join(sorted(f"{PREFIX}{path.parent.name}" for path in weights.glob("*/model_index.json")))
    raise ValueError(f"{name}: no such shipped weights in {weights}; there are {there}, each with /vae and /unet")
