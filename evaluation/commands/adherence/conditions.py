"""`evaluate.py conditions`: whether generated volumes show the class or the number that they were conditioned on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from evaluation.commands.common import precision_name, write_study
from evaluation.data.volume_sets import ClassVolumes, generated_cases, load_classes, load_numbers
from evaluation.networks.classifier import BATCH_SIZE, LEARNING_RATE
from evaluation.stats.bootstrap import Estimate
from evaluation.studies.class_adherence import (
    SeedRates,
    describe_sizes,
    measure_class_adherence,
)
from evaluation.studies.limits import check_command
from evaluation.studies.number_adherence import SeedErrors, measure_number_adherence
from volumes import Case, load_cases

NAME = "conditions"
Report = Mapping[str, Any]  # a part of it


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, object]:
    """Train classifiers or regressors on real volumes, and score them on held-out real and on generated volumes."""
    cases = load_sources(options)
    is_class = options.column in options.data.classes
    study, print_result = (_classes, print_summary) if is_class else (_numbers, print_errors)
    result, described = study(cases, options, device, dtype)
    report = write_study(
        NAME,
        options,
        {
            "column": options.column,
            **result,
            **described,
            "protocol": {
                "shape": list(options.shape),
                "iterations": options.iterations,
                "batch_size": BATCH_SIZE,
                "learning_rate": LEARNING_RATE,
                "precision": precision_name(dtype),
            },
        },
    )
    print_result(result)
    return report


def _classes(
    cases: Mapping[str, Sequence[Case]], options: Namespace, device: torch.device, dtype: torch.dtype | None
) -> tuple[Report, Report]:
    """Classify. Returns the figures, and a description of the volumes."""
    config, column, shape = options.data, options.column, tuple(options.shape)
    sources = {source: load_classes(of_source, config, column, shape) for source, of_source in cases.items()}
    names = config.class_names[column]
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
    return result, {
        "volumes": {source: count_classes(volumes, names) for source, volumes in sources.items()},
        "milliliters": {source: describe_sizes(volumes, names, config.channels) for source, volumes in sources.items()},
        "skipped": {name: reason for volumes in sources.values() for name, reason in volumes.skipped},
    }


def _numbers(
    cases: Mapping[str, Sequence[Case]], options: Namespace, device: torch.device, dtype: torch.dtype | None
) -> tuple[Report, Report]:
    """Predict numbers. Returns the figures, and a description of the volumes."""
    config, column, shape = options.data, options.column, tuple(options.shape)
    sources = {source: load_numbers(of_source, config, column, shape) for source, of_source in cases.items()}
    result = measure_number_adherence(
        sources["train"],
        sources["test"],
        sources["generated"],
        seeds=options.seeds,
        iterations=options.iterations,
        device=device,
        dtype=dtype,
        on_seed=print_seed_errors,
    )
    return result, {
        "volumes": {source: describe_values(volumes.numbers) for source, volumes in sources.items()},
        "skipped": {name: reason for volumes in sources.values() for name, reason in volumes.skipped},
    }


def load_sources(options: Namespace) -> dict[str, list[Case]]:
    """List the cases "train", "test" and "generated". Raises: ValueError for data without the column or without a
    split."""
    config = options.data
    cases = load_cases(config)
    check_command(NAME, cases, config, vars(options))
    sources = {split: [case for case in cases if case.split == split] for split in ("train", "test")}
    if empty := [split for split, of_split in sources.items() if not of_split]:
        raise ValueError(f"no case is in split {empty[0]!r}; see `data` in {options.config}")
    return {**sources, "generated": generated_cases(Path(options.synthetic), config)}


def describe_values(numbers: torch.Tensor) -> dict[str, float]:
    """Count the volumes of a set, and describe their numbers."""
    spread = {"mean": numbers.mean(), "std": numbers.std(), "min": numbers.min(), "max": numbers.max()}
    return {"volumes": len(numbers), **{name: float(value) for name, value in spread.items()}}


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


def print_seed_errors(row: SeedErrors) -> None:
    """Print the mean absolute errors of one regressor."""
    print(f"seed {row['seed']}: error {row['real']:.4g} on real, {row['generated']:.4g} on generated", flush=True)


def print_errors(result: Mapping[str, Any]) -> None:
    """Print the errors of the mean prediction, and the difference between generated and real volumes."""

    def text(value: Estimate[float]) -> str:
        low, high = value["interval"]
        return f"{value['mean']:.3g} ({low:.3g} to {high:.3g})"

    for source, errors in (("real", result["real"]), ("generated", result["generated"])):
        print(
            f"{source}: mean absolute error {text(errors['mae'])}, {errors['constant_mae']:.3g} for always the mean; "
            f"R2 {text(errors['r2'])}, correlation {text(errors['correlation'])}"
        )
    print(f"error on generated minus on real: {text(result['difference'])}")
