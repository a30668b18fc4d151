"""`evaluate.py conditions`: whether generated volumes show the class that they were conditioned on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from evaluation.data.volume_sets import ClassVolumes, generated_cases, load_classes
from evaluation.networks.classifier import BATCH_SIZE, LEARNING_RATE
from evaluation.studies.class_adherence import (
    SeedRates,
    describe_sizes,
    measure_class_adherence,
)
from evaluation.studies.limits import check_command
from volumes import load_cases

from .common import precision_name, write_study

NAME = "conditions"


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, object]:
    """Train classifiers on real volumes, and score them on held-out real and on generated volumes."""
    config = options.data
    sources = load_sources(options)
    names = config.class_names[options.column]
    result = measure_class_adherence(
        sources["train"],
        sources["test"],
        sources["generated"],
        names,
        seeds=options.seeds,
        iterations=options.iterations,
        device=device,
        dtype=dtype,
        on_seed=print_seed,
    )
    report = write_study(
        NAME,
        options,
        {
            "column": options.column,
            **result,
            "volumes": {source: count_classes(volumes, names) for source, volumes in sources.items()},
            "milliliters": {
                source: describe_sizes(volumes, names, config.channels) for source, volumes in sources.items()
            },
            "protocol": {
                "shape": list(options.shape),
                "iterations": options.iterations,
                "batch_size": BATCH_SIZE,
                "learning_rate": LEARNING_RATE,
                "precision": precision_name(dtype),
            },
            "skipped": {name: reason for volumes in sources.values() for name, reason in volumes.skipped},
        },
    )
    print_summary(result)
    return report


def load_sources(options: Namespace) -> dict[str, ClassVolumes]:
    """Load the volumes "train", "test" and "generated". Raises: ValueError for data without the class or without a
    split."""
    config, shape = options.data, tuple(options.shape)
    cases = load_cases(config)
    check_command(NAME, cases, config, vars(options))
    sources = {split: [case for case in cases if case.split == split] for split in ("train", "test")}
    if empty := [split for split, of_split in sources.items() if not of_split]:
        raise ValueError(f"no case is in split {empty[0]!r}; see `data` in {options.config}")
    sources["generated"] = generated_cases(Path(options.synthetic), config)
    return {source: load_classes(of_source, config, options.column, shape) for source, of_source in sources.items()}


def count_classes(volumes: ClassVolumes, names: list[str]) -> dict[str, int]:
    """Count the volumes of each class."""
    return dict(zip(names, torch.bincount(volumes.classes, minlength=len(names)).tolist(), strict=True))


def print_seed(row: SeedRates) -> None:
    """Print how often one classifier was right."""
    print(f"seed {row['seed']}: right on real {row['real']:.4f}, on generated {row['generated']:.4f}", flush=True)


def print_summary(result: Mapping[str, Any]) -> None:
    """Print how often the classifiers were right, and the difference between generated and real volumes."""
    for source in ("real", "generated"):
        rates, (low, high) = result[source], result[source]["interval"]
        per_class = ", ".join(f"{name} {rate:.4f}" for name, rate in rates["per_class"].items())
        print(
            f"{source}: {rates['right']:.4f} ({low:.4f} to {high:.4f}); {per_class}; balanced {rates['balanced']:.4f}"
        )
    gap = result["difference_points"]
    print(f"generated minus real: {gap['right']:+.1f} points ({gap['interval'][0]:+.1f} to {gap['interval'][1]:+.1f})")
