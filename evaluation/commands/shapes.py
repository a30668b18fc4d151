"""`evaluate.py shapes`: whether the labels of generated label maps are shaped like those of real ones."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from jsonargparse import Namespace

from evaluation.metrics.label_shapes import compare_shapes

from .common import write_study
from .sets import describe_sets, load_sets

NAME = "shapes"


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, object]:
    """Compare the sets. Raises: ValueError for data whose images are not label maps."""
    start = time.perf_counter()
    sets, skipped = load_sets(options, NAME)
    shapes = compare_shapes(sets, options.data.channels, options.seed)
    study = {
        "shapes": shapes,
        "volumes": describe_sets(sets, options.unseen),
        "skipped": skipped,
        "seconds": round(time.perf_counter() - start, 2),
    }
    report = write_study(NAME, options, study)
    print_summary(shapes)
    return report


def print_summary(shapes: Mapping[str, Any]) -> None:
    """Print the distance of each measure of shape beside that of real training maps."""
    distances = {name: column["wasserstein"] for name, column in shapes["figures"].items()}
    for name, distance in [*distances.items(), ("all measures, kernel distance", shapes["kernel"])]:
        generated, real = distance["generated_to_test"], distance["training_to_test"]
        verdict = "outside" if distance["excess"]["interval"][0] > 0 else "within"
        print(f"{name}: {generated['mean']:.3f}; real against real {real['mean']:.3f}: {verdict}")
    auc, (low, high) = (shapes["closer_to_training"][key] for key in ("auc", "interval"))
    print(
        f"generated maps nearer to training maps than held-out real maps are, AUC: {auc:.3f} ({low:.3f} to {high:.3f})"
    )
