"""Distances between two sets of volumes, each volume a row of figures, beside the distance between real and real.

Samples are (N, F) arrays with one row per volume; N may differ. A distance is a function of two samples that returns
one figure or several. `compare_sets` adds the interval and the real-against-real floor to any distance.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NotRequired, TypedDict, overload

import numpy as np

from evaluation.stats.bootstrap import (
    Estimate,
    Figure,
    Units,
    estimate,
    estimate_columns,
    group_numbers,
    interval_of,
    resample_subjects,
    subjects_or_volumes,
)
from training.encoder_distance import checked_samples, standardize
from training.encoder_distance import kernel_distance as kernel_distance

SUBSETS = 200  # pairs of subsets that are compared
MIN_SIZE = 4  # volumes in a set: halves of two
Distance = Callable[[np.ndarray, np.ndarray], Any]
SETS = ("training", "test", "generated")


class SetComparison(TypedDict, Generic[Figure]):
    """A distance from the test set to the generated set and to the training set (the floor), see `compare_sets`.

    `whole` is the distance of all generated from all test volumes; all others are between subsets of `count` volumes.
    `excess` is `generated_to_test` less `training_to_test`, subset by subset; `test_halves` is another floor.
    """

    count: int
    whole: Figure
    generated_to_test: Estimate[Figure]
    training_to_test: Estimate[Figure]
    test_halves: Estimate[Figure]
    excess: Estimate[Figure]
    caveat: NotRequired[str]


class MeanStd(TypedDict):
    """Mean and standard deviation over volumes."""

    mean: float
    std: float


class ColumnComparison(TypedDict):
    """One statistic of volumes in the three sets, see `compare_columns`."""

    training: MeanStd
    test: MeanStd
    generated: MeanStd
    shift: float  # of the generated mean from the mean of the test set
    wasserstein: SetComparison[float]


class Closeness(TypedDict):
    """The area under the ROC curve of `closer_than_test`."""

    auc: float
    interval: list[float]


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the squared Frechet distance of the Gaussians with the means and covariances of two samples (Heusel et
    al. 2017, Eq. 6).

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` in squared units of the features, covariances divided by N - 1. With
    C = A^T A, the trace of the root is the sum of the singular values of `A1 A2^T`, which needs no root of a singular
    matrix. It is biased upwards, the more so the fewer samples: compare at equal counts, and see `frechet_caveat`.

    Raises: ValueError for samples of different features, of fewer than 2, or that are not finite.
    """
    first, second = checked_samples(first, second)
    shift = first.mean(0) - second.mean(0)
    centered = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (first, second)]
    factors = [np.asarray(np.linalg.qr(x, mode="r")) for x in centered]
    root = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    return max(float(shift @ shift + (factors[0] ** 2).sum() + (factors[1] ** 2).sum() - 2 * root), 0.0)


def frechet_caveat(samples: int, features: int) -> str | None:
    """Return a warning for the Frechet distance of so few samples, or None if they determine the covariance."""
    if samples > features:
        return None
    return (
        f"{samples} volumes do not determine the covariance of {features} features: the Frechet distance is mostly "
        "bias and only comparable at equal counts; the kernel distance is unbiased"
    )


def wasserstein1(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Compute the Wasserstein-1 distance of two samples of numbers, column by column: the area between their
    distribution functions.

    (N, S) and (M, S) -> (S,), in the columns' units.

    Raises: ValueError for samples of different features, of fewer than 2, or that are not finite.
    """
    first, second = checked_samples(first, second)
    values = np.sort(np.concatenate([first, second]), axis=0)
    areas = []
    for ours, theirs, grid in zip(first.T, second.T, values.T, strict=True):
        below = [np.searchsorted(np.sort(x), grid[:-1], side="right") / len(x) for x in (ours, theirs)]
        areas.append(np.abs(below[0] - below[1]) @ np.diff(grid))
    return np.array(areas)


@overload
def compare_sets(
    distance: Callable[[np.ndarray, np.ndarray], float],
    sets: Mapping[str, np.ndarray],
    *,
    subjects: Mapping[str, Units] | None = None,
    subsets: int = SUBSETS,
    seed: int = 0,
) -> SetComparison[float]: ...


@overload
def compare_sets(
    distance: Callable[[np.ndarray, np.ndarray], np.ndarray],
    sets: Mapping[str, np.ndarray],
    *,
    subjects: Mapping[str, Units] | None = None,
    subsets: int = SUBSETS,
    seed: int = 0,
) -> SetComparison[list[float]]: ...


def compare_sets(
    distance: Distance,
    sets: Mapping[str, np.ndarray],
    *,
    subjects: Mapping[str, Units] | None = None,
    subsets: int = SUBSETS,
    seed: int = 0,
) -> Any:
    """Compare the distance of generated from real test volumes with that of real training from real test volumes.

    Distances are taken between subsets of `count` volumes, half of the smallest set, `subsets` times without
    replacement: a distance that depends on counts is then compared at equal ones. (A mean over half a sample spreads as
    the mean over the whole does from sample to sample: McCarthy 1969. The intervals of the larger sets are too wide.)

    Args:
        sets: rows (N, F) of "training", "test" and "generated".
        subjects: of the volumes of some of the sets; volumes of one subject stay together.
    Raises: ValueError for a set of fewer than `MIN_SIZE` volumes.
    """
    random = np.random.default_rng(seed)
    check_counts({name: len(sets[name]) for name in SETS})
    whose = {name: subjects_or_volumes(len(sets[name]), (subjects or {}).get(name)) for name in SETS}
    groups = {name: group_numbers(of_set) for name, of_set in whose.items()}
    count = min(len(sets[name]) for name in SETS) // 2
    distances: dict[str, list[Any]] = {"generated_to_test": [], "training_to_test": [], "test_halves": []}
    for _ in range(subsets):
        subset = {name: sets[name][_shuffled(groups[name], random)] for name in SETS}
        half = subset["test"][:count]
        distances["generated_to_test"].append(distance(subset["generated"][:count], half))
        distances["training_to_test"].append(distance(subset["training"][:count], half))
        distances["test_halves"].append(distance(subset["test"][count : 2 * count], half))
    resampled = {name: np.asarray(values) for name, values in distances.items()}
    resampled["excess"] = resampled["generated_to_test"] - resampled["training_to_test"]
    summarized = {
        name: estimate(values) if values.ndim == 1 else estimate_columns(values) for name, values in resampled.items()
    }
    return {"count": count, "whole": np.asarray(distance(sets["generated"], sets["test"])).tolist(), **summarized}


def check_counts(counts: Mapping[str, int]) -> None:
    """Raise ValueError for sets of too few volumes to compare, by name."""
    if few := [f"{count} {name} volumes" for name, count in counts.items() if count < MIN_SIZE]:
        raise ValueError(f"{' and '.join(few)} are too few to compare; give {MIN_SIZE} or more")


def compare_columns(
    sets: Mapping[str, np.ndarray],
    names: Sequence[str],
    *,
    subjects: Mapping[str, Units] | None = None,
    subsets: int = SUBSETS,
    seed: int = 0,
) -> dict[str, ColumnComparison]:
    """Compare statistics of volumes, one per column, with those of real ones; other arguments as in `compare_sets`.

    Returns: by name, with "shift" and "wasserstein" in standard deviations of the test volumes.
    """
    scaled = standardize(sets, "test")
    compared = columns_of(compare_sets(wasserstein1, scaled, subjects=subjects, subsets=subsets, seed=seed), names)
    report: dict[str, ColumnComparison] = {}
    for column, name in enumerate(names):
        report[name] = {
            "training": _mean_std(sets["training"][:, column]),
            "test": _mean_std(sets["test"][:, column]),
            "generated": _mean_std(sets["generated"][:, column]),
            "shift": float(scaled["generated"][:, column].mean()),
            "wasserstein": compared[name],
        }
    return report


def columns_of(compared: SetComparison[list[float]], names: Sequence[str]) -> dict[str, SetComparison[float]]:
    """Split a comparison of several figures into one for each, by name."""
    return {
        name: {
            "count": compared["count"],
            "whole": compared["whole"][column],
            "generated_to_test": _column(compared["generated_to_test"], column),
            "training_to_test": _column(compared["training_to_test"], column),
            "test_halves": _column(compared["test_halves"], column),
            "excess": _column(compared["excess"], column),
        }
        for column, name in enumerate(names)
    }


def closer_than_test(
    sets: Mapping[str, np.ndarray], *, subjects: Mapping[str, Units] | None = None, seed: int = 0
) -> Closeness:
    """Measure how often a generated volume is nearer to its nearest training volume than an unseen real one is to its
    own.

    The area under the ROC curve of the Euclidean distance to the nearest row of "training": 0.5 for volumes distributed
    as real ones, 1 for copies, 0 for volumes far from all real ones. Frechet and kernel distances cannot see copies:
    these are best for them.

    Args:
        subjects: of the volumes of some of the sets; the interval resamples the subjects of both sets.
    """
    generated, unseen = (nearest(sets[name], sets["training"]) for name in ("generated", "test"))
    wins = (generated[:, None] < unseen) + 0.5 * (generated[:, None] == unseen)
    random = np.random.default_rng(seed)
    shares = []
    for name in ("generated", "test"):
        counts = resample_subjects(subjects_or_volumes(len(sets[name]), (subjects or {}).get(name)), random)
        shares.append(counts / counts.sum(1, keepdims=True))
    resampled = ((shares[0] @ wins) * shares[1]).sum(1)
    return {"auc": float(wins.mean()), "interval": interval_of(resampled)}


def nearest(queries: np.ndarray, reference: np.ndarray, chunk: int = 256) -> np.ndarray:
    """Return the Euclidean distance of each row of `queries` (N, F) to the nearest row of `reference` (M, F): (N,)."""
    distances = []
    for start in range(0, len(queries), chunk):
        rows = queries[start : start + chunk]
        squared = (rows**2).sum(1)[:, None] + (reference**2).sum(1) - 2 * rows @ reference.T
        best = squared.argmin(1)
        distances.append(np.linalg.norm(rows - reference[best], axis=1))  # exact, where the squares above are rounded
    return np.concatenate(distances)


def _mean_std(values: np.ndarray) -> MeanStd:
    return {"mean": float(values.mean()), "std": float(values.std())}


def _column(columns: Estimate[list[float]], column: int) -> Estimate[float]:
    low, high = columns["interval"]
    return {"mean": columns["mean"][column], "interval": [low[column], high[column]]}


def _shuffled(groups: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return a random order of the volumes that keeps those of one group together."""
    order = random.permutation(len(groups))
    return order[np.argsort(random.permutation(groups.max() + 1)[groups[order]], kind="stable")]
