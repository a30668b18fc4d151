"""Class adherence: whether a classifier trained on real volumes assigns generated ones to the requested class."""

import math
import time
from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import torch

from evaluation.data.volume_sets import ClassVolumes
from evaluation.networks.classifier import classify, train_classifier
from evaluation.stats.bootstrap import RESAMPLES, interval_of, resample


class SizeRange(TypedDict):
    p5: float
    median: float
    p95: float


class ClassRates(TypedDict):
    """How often the classifiers are right about one set of volumes.

    `right` weighs classes by their share of the real test volumes, `balanced` weighs them equally. `per_class` has no
    entry for a class without volumes.
    """

    right: float
    interval: list[float]
    balanced: float
    per_class: dict[str, float]


class RateDifference(TypedDict):
    """Generated less real, in percentage points."""

    right: float
    interval: list[float]
    balanced: float


class ClassComparison(TypedDict):
    """Real test volumes and generated ones. Intervals are of 95 %, over the volumes."""

    real: ClassRates
    generated: ClassRates
    difference_points: RateDifference


class SeedRates(TypedDict):
    """How often the classifier of one seed is right, and its training time."""

    seed: int
    real: float
    generated: float
    seconds: float


class ClassAdherence(ClassComparison):
    """The comparison of the mean over the seeds, and the rates of each seed."""

    seeds: list[SeedRates]


def describe_sizes(
    volumes: ClassVolumes, names: Sequence[str], labels: Sequence[str]
) -> dict[str, dict[str, SizeRange]]:
    """Describe the label sizes of label maps in milliliters: {class: {label: range}}; {} for other volumes."""
    if volumes.sizes is None:
        return {}
    ranges: dict[str, dict[str, SizeRange]] = {}
    for index, name in enumerate(names):
        members = volumes.classes == index
        if not members.any():
            continue
        percentiles = np.percentile(volumes.sizes[members].numpy(), (5, 50, 95), axis=0).T.tolist()
        ranges[name] = {
            label: {"p5": low, "median": middle, "p95": high}
            for label, (low, middle, high) in zip(labels, percentiles, strict=True)
        }
    return ranges


def rates(right: np.ndarray, classes: np.ndarray, shares: np.ndarray) -> tuple[float, list[float]]:
    """Compute how often the classifier is right: over all classes weighted by share, and per class (NaN without a
    volume).

    Args:
        right: (N,) in [0, 1], how often each volume was.
        classes: (N,) indices.
        shares: (num_classes,) that sum to 1; classes with a share of 0 need no volume.
    """
    of_class = [float(right[classes == i].mean()) if (classes == i).any() else math.nan for i in range(len(shares))]
    return float(sum(rate * share for rate, share in zip(of_class, shares, strict=True) if share)), of_class


def resample_rates(right: np.ndarray, classes: np.ndarray, shares: np.ndarray, seed: int) -> np.ndarray:
    """Resample the volumes within each class: (RESAMPLES,) times the first figure of `rates`."""
    random = np.random.default_rng(seed)
    resampled = np.zeros(RESAMPLES)
    for index, share in enumerate(shares):
        if share:
            of_class = right[classes == index]
            resampled += share * (resample(len(of_class), random, one_by_one=True) @ of_class / len(of_class))
    return resampled


def compare_class_rates(
    real: np.ndarray,
    real_classes: np.ndarray,
    generated: np.ndarray,
    generated_classes: np.ndarray,
    names: Sequence[str],
) -> ClassComparison:
    """Compare real test volumes with generated ones, each (N,) of how often the classifiers were right, and (N,)
    classes."""
    shares = np.bincount(real_classes, minlength=len(names)) / len(real_classes)
    equal = (shares > 0) / (shares > 0).sum()

    def summarize(right: np.ndarray, classes: np.ndarray, resampled: np.ndarray) -> ClassRates:
        overall, of_class = rates(right, classes, shares)
        return {
            "right": overall,
            "interval": interval_of(resampled),
            "balanced": rates(right, classes, equal)[0],
            "per_class": {name: rate for name, rate in zip(names, of_class, strict=True) if not math.isnan(rate)},
        }

    of_real = resample_rates(real, real_classes, shares, seed=0)
    of_generated = resample_rates(generated, generated_classes, shares, seed=1)
    on_real = summarize(real, real_classes, of_real)
    on_generated = summarize(generated, generated_classes, of_generated)
    return {
        "real": on_real,
        "generated": on_generated,
        "difference_points": {
            "right": 100 * (on_generated["right"] - on_real["right"]),
            "interval": [100 * end for end in interval_of(of_generated - of_real)],
            "balanced": 100 * (on_generated["balanced"] - on_real["balanced"]),
        },
    }


def measure_class_adherence(
    train_set: ClassVolumes,
    test_set: ClassVolumes,
    generated: ClassVolumes,
    names: Sequence[str],
    *,
    seeds: int,
    iterations: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    on_seed: Callable[[SeedRates], None] | None = None,
) -> ClassAdherence:
    """Train `seeds` classifiers on real volumes, and classify the real test volumes and the generated ones.

    `on_seed` is called after each seed.

    Raises: ValueError for a class that has real test volumes but no generated ones.
    """
    if lost := [names[i] for i in sorted(set(test_set.classes.tolist()) - set(generated.classes.tolist()))]:
        raise ValueError(f"class {lost}: has real test volumes, but no generated ones; generate some")
    shares = np.bincount(test_set.classes.numpy(), minlength=len(names)) / len(test_set.classes)
    right: list[tuple[np.ndarray, np.ndarray]] = []
    rows: list[SeedRates] = []
    for seed in range(seeds):
        start = time.perf_counter()
        classifier = train_classifier(
            train_set.images,
            train_set.classes,
            len(names),
            seed=seed,
            iterations=iterations,
            device=device,
            dtype=dtype,
        )
        on_real, on_generated = (
            (classify(classifier, volumes.images, dtype=dtype) == volumes.classes).numpy().astype(np.float64)
            for volumes in (test_set, generated)
        )
        right.append((on_real, on_generated))
        rows.append(
            {
                "seed": seed,
                "real": rates(on_real, test_set.classes.numpy(), shares)[0],
                "generated": rates(on_generated, generated.classes.numpy(), shares)[0],
                "seconds": round(time.perf_counter() - start, 2),
            }
        )
        if on_seed is not None:
            on_seed(rows[-1])
    mean_real, mean_generated = (np.mean(of_source, axis=0) for of_source in zip(*right, strict=True))
    compared = compare_class_rates(
        mean_real, test_set.classes.numpy(), mean_generated, generated.classes.numpy(), names
    )
    return {**compared, "seeds": rows}
