"""How much of a figure is chance: 95 % intervals over the seeds of repeated trainings, and over the subjects that were judged.

A score that is to be compared is (seeds, volumes): each training's score on each volume. The two intervals answer two questions:
would another training of the same network say so too, and would other patients.
"""

from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np

RESAMPLES = 2000  # of the bootstrap
INTERVAL = (2.5, 97.5)  # percentiles
# Student's t at 97.5 %, by degrees of freedom from 1; beyond the table the expansion of Abramowitz and Stegun (1964), 26.7.5, of
# which three terms are right to 2e-4.
T_TABLE = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
Z = 1.959964
MIN_COUNT = 1e-6  # that a ratio divides by: one to a reference of 0 is absurdly large, and seen to be


def student_t(freedom: int) -> float:
    """97.5 % quantile of Student's t with `freedom` degrees of freedom, at least 1."""
    if freedom <= len(T_TABLE):
        return T_TABLE[freedom - 1]
    first, second = (Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3


def over_seeds(values: Sequence[float] | np.ndarray) -> list[float] | None:
    """Interval of the mean of (S,) values, one a seed, by Student's t; None for one seed, which has none."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return None
    reach = student_t(len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return [float(values.mean() - reach), float(values.mean() + reach)]


def subject_draws(subjects: Sequence[str], seed: int = 0) -> np.ndarray:
    """(RESAMPLES, N): how often each of N volumes counts when subjects are drawn anew with replacement (Efron 1979), all volumes of
    a subject together."""
    names, own = np.unique(np.asarray(subjects), return_inverse=True)
    draws = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
    return np.stack([np.bincount(drawn, minlength=len(names)) for drawn in draws])[:, own]


class PairedComparison(TypedDict):
    """The difference (or ratio) of two sets of scores of the same seeds and volumes."""

    of_means: float
    per_seed: list[float]
    interval_seeds: list[float] | None  # of the mean of `per_seed`, see `over_seeds`
    interval_subjects: list[float]  # of `of_means`, over bootstrapped subjects


def compare_paired(
    values: np.ndarray, reference: np.ndarray, subjects: Sequence[str], how: Literal["difference", "ratio"]
) -> PairedComparison:
    """Compare `values` with `reference`, both (S, N) scores of the same seeds on volumes of the same `subjects` (N,).

    Raises: ValueError for scores that do not pair up.
    """
    if values.shape != reference.shape or values.ndim != 2 or values.shape[1] != len(subjects) or not values.size:
        raise ValueError(
            f"scores of {values.shape} and {reference.shape} for {len(subjects)} volumes do not pair up; (seeds, volumes) is needed"
        )

    def compared(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return first - second if how == "difference" else first / np.maximum(second, MIN_COUNT)

    per_seed = compared(values.mean(1), reference.mean(1))
    draws = subject_draws(subjects)
    resampled = compared(draws @ values.mean(0) / draws.sum(1), draws @ reference.mean(0) / draws.sum(1))
    return {
        "of_means": float(compared(values.mean(), reference.mean())),
        "per_seed": per_seed.tolist(),
        "interval_seeds": over_seeds(per_seed),
        "interval_subjects": np.percentile(resampled, INTERVAL).tolist(),
    }
