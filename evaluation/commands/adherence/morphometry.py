"""`evaluate.py morphometry`: whether the tissues of generated volumes have the sizes of real ones."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from jsonargparse import Namespace

from evaluation.commands.common import write_study
from evaluation.commands.sets import describe_sets, load_sets
from evaluation.data.maps import tissue_names
from evaluation.metrics.morphometry import compare_sizes

NAME = "morphometry"


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, object]:
    """Compare the sizes of tissues. Raises: ValueError for data whose background is not empty."""
    start = time.perf_counter()
    sets, skipped = load_sets(options, NAME)
    config = options.data
    result = compare_sizes(sets, tissue_names(config), config.class_names, config.numbers, options.seed)
    study = {
        "volumes": describe_sets(sets, options.unseen),
        "skipped": skipped,
        "seconds": round(time.perf_counter() - start, 2),
    }
    report = write_study(NAME, options, {**result, **study})
    print_summary(result)
    return report


def print_summary(result: Mapping[str, Any]) -> None:
    """Print the mean size of each tissue and its difference from real, and the correlations with numbers."""
    for group, figures in result["groups"].items():
        for tissue, sizes in figures["tissues"].items():
            means = [f"{sizes[source]['mean'] / 1000:.1f}" for source in ("generated", "real")]
            print(
                f"{group}, {tissue}: {means[0]} ml generated, {means[1]} ml real; difference "
                f"{_with_interval(sizes['difference'])} standard deviations"
            )
    for number, tissues in result["numbers"].items():
        for tissue, found in tissues.items():
            generated, real = (_with_interval(found[source]) for source in ("generated", "real"))
            print(f"{tissue} with {number}, correlation: {generated} generated, {real} real")


def _with_interval(value: Mapping[str, Any]) -> str:
    low, high = value["interval"]
    return f"{value['mean']:+.2f} ({low:+.2f} to {high:+.2f})"
