"""Names of the shipped weights that hold on every machine: `shipped:hippocampus/vae` in place of a path."""

import os
from pathlib import Path

PREFIX = "shipped:"
WEIGHTS = Path(__file__).resolve().parents[1] / "weights"  # of the clone; a package that pip built has none
PARTS = ("vae", "unet")


def is_shipped(path: str) -> bool:
    """Return whether a path is the name of shipped weights."""
    return path.startswith(PREFIX)


def expand_path(path: str) -> str:
    """Return a path with `~`, or the name of shipped weights, in full. Raises: ValueError for absent weights."""
    return shipped_folder(path) if is_shipped(path) else os.path.expanduser(path)


def shipped_folder(name: str, weights: Path = WEIGHTS) -> str:
    """Return the folder that `shipped:hippocampus`, `shipped:hippocampus/vae` or `shipped:hippocampus/unet` means.

    Args:
        name: with its prefix.
        weights: folder of the shipped pipelines; it may be a link.

    Raises:
        ValueError: if it is not there.
    """
    pipelines = sorted(path.parent.name for path in weights.glob("*/model_index.json"))
    known = {name for one in pipelines for name in (one, *(f"{one}/{part}" for part in PARTS))}
    asked = name.removeprefix(PREFIX)
    if asked in known:
        return str(weights / asked)
    if not pipelines:
        raise ValueError(
            f"{name}: this installation has no shipped weights, which are in the folder weights/ of the clone; install "
            "from the clone (pip install -e CLONE), give a folder of trained weights, or null to start from random ones"
        )
    there = ", ".join(f"{PREFIX}{one}" for one in pipelines)
    raise ValueError(f"{name}: no such shipped weights in {weights}; there are {there}, each with /vae and /unet")
