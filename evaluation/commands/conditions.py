"""`evaluate.py conditions`: whether generated volumes are of the class that was asked for."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from evaluation import provenance, write_report
from evaluation.data.volume_sets import generated_cases, load_classes
from evaluation.networks.classifier import BATCH_SIZE, LEARNING_RATE
from evaluation.studies.class_adherence import (
    SeedRates,
    describe_sizes,
    measure_class_adherence,
)
from evaluation.studies.limits import check_command
from volumes import load_cases

from .common import precision_name

NAME = "conditions"


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Train the classifiers on real volumes, and let them judge unseen real and generated ones."""
    config, column, shape = options.data, options.column, tuple(options.shape)
    cases = load_cases(config)
    check_command(NAME, cases, config, vars(options))
    chosen = {split: [case for case in cases if case.split == split] for split in ("train", "test")}
    if empty := [split for split, of_split in chosen.items() if not of_split]:
        raise ValueError(f"no case is in split {empty[0]!r}; see `data` in {options.config}")
    chosen["generated"] = generated_cases(Path(options.synthetic), config)
    loaded = {source: load_classes(of_source, config, column, shape) for source, of_source in chosen.items()}
    names = config.classes[column]

    def tell(row: SeedRates) -> None:
        print(f"seed {row['seed']}: right on real {row['real']:.4f}, on generated {row['generated']:.4f}", flush=True)

    result = measure_class_adherence(
        loaded["train"],
        loaded["test"],
        loaded["generated"],
        names,
        seeds=options.seeds,
        iterations=options.iterations,
        device=device,
        dtype=dtype,
        on_seed=tell,
    )
    report = {
        "evaluation": "conditions",
        "column": column,
        **result,
        "volumes": {
            source: dict(zip(names, torch.bincount(volumes.classes, minlength=len(names)).tolist(), strict=True))
            for source, volumes in loaded.items()
        },
        "milliliters": {source: describe_sizes(volumes, names, config.channels) for source, volumes in loaded.items()},
        "protocol": {
            "shape": list(shape),
            "iterations": options.iterations,
            "batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
            "precision": precision_name(dtype),
        },
        "skipped": {name: reason for volumes in loaded.values() for name, reason in volumes.skipped},
        "synthetic": options.synthetic,
        "data": dataclasses.asdict(config),
        **provenance(),
    }
    write_report(options.output, report)
    for source in ("real", "generated"):
        found, (low, high) = result[source], result[source]["interval"]
        per_class = ", ".join(f"{name} {rate:.4f}" for name, rate in found["per_class"].items())
        print(
            f"{source}: {found['right']:.4f} ({low:.4f} to {high:.4f}); {per_class}; balanced {found['balanced']:.4f}"
        )
    gap = result["difference_points"]
    print(f"generated minus real: {gap['right']:+.1f} points ({gap['interval'][0]:+.1f} to {gap['interval'][1]:+.1f})")
    print(f"report: {options.output}")
    return report
