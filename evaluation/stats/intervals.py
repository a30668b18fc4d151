"""95 % intervals over the seeds of repeated trainings, over test subjects, and of rates.

Scores to compare are (seeds, volumes): the score of each training on each volume. The two intervals answer two
questions: whether another training of the same network would say the same, and whether other patients would.
"""

from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np

from .bootstrap import interval_of, resample_subjects

# Student's t at 97.5 %, by degrees of freedom from 1. Beyond the table: the expansion of Abramowitz and Stegun (1964),
# 26.7.5, whose first three terms are right to 2e-4.
T_TABLE = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
Z = 1.959964  # the standard normal distribution at 97.5 %
ROUNDING = 1e-20  # of the mean square of a sample: a smaller variance is that of equal numbers
MIN_REFERENCE = 1e-6  # of a ratio: relative to a reference of 0, any score is absurdly large, and seen to be


def student_t(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t with `freedom` degrees of freedom, at least 1."""
    if freedom <= len(T_TABLE):
        return T_TABLE[freedom - 1]
    first, second = (Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3


def over_seeds(values: Sequence[float] | np.ndarray) -> list[float] | None:
    """Compute the 95 % interval of the mean of (S,) values, one per seed, by Student's t; None for a single seed."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return None
    reach = student_t(len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return [float(values.mean() - reach), float(values.mean() + reach)]


def wilson(rate: float, count: int) -> list[float]:
    """Compute the 95 % interval of a rate that was measured on `count` independent units (Wilson 1927)."""
    center = rate + Z**2 / (2 * count)
    reach = Z * np.sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    return [float(max(center - reach, 0) / (1 + Z**2 / count)), float(min((center + reach) / (1 + Z**2 / count), 1))]


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
            f"scores of {values.shape} and {reference.shape} for {len(subjects)} volumes do not pair up; give (seeds, "
            "volumes)"
        )

    def compared(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return first - second if how == "difference" else first / np.maximum(second, MIN_REFERENCE)

    per_seed = compared(values.mean(1), reference.mean(1))
    counts = resample_subjects(subjects, np.random.default_rng(0), one_by_one=True)
    resampled = compared(counts @ values.mean(0) / counts.sum(1), counts @ reference.mean(0) / counts.sum(1))
    return {
        "of_means": float(compared(values.mean(), reference.mean())),
        "per_seed": per_seed.tolist(),
        "interval_seeds": over_seeds(per_seed),
        "interval_subjects": interval_of(resampled),
    }


def correlations(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute Pearson's correlation of two samples (N,) under each row of weights (R, N): (R,), 0 where either does
    not vary."""
    shares = weights / weights.sum(1, keepdims=True)
    x, y = (sample - (shares @ sample)[:, None] for sample in (first, second))
    covariance, x_variance, y_variance = ((shares * product).sum(1) for product in (x * y, x * x, y * y))
    varies = (x_variance > ROUNDING * (first**2).mean()) & (y_variance > ROUNDING * (second**2).mean())
    return np.divide(covariance, np.sqrt(x_variance * y_variance), out=np.zeros(len(weights)), where=varies)
