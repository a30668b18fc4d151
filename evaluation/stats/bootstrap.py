"""Bootstrap over subjects, and the intervals that come of it (Efron 1979).

Volumes of one subject are not independent, so subjects are resampled with replacement, each with all its volumes.
"""

from collections.abc import Sequence
from typing import Generic, TypedDict, TypeVar

import numpy as np

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles: intervals are of 95 %
Units = Sequence[str] | Sequence[int] | np.ndarray  # (N,) names or numbers of subjects, one per volume
Figure = TypeVar("Figure", float, list[float])


class Estimate(TypedDict, Generic[Figure]):
    """The mean of a figure, or of a list of figures, and its interval: [low, high]."""

    mean: Figure
    interval: list[Figure]


def resample(count: int, random: np.random.Generator, *, one_by_one: bool = False) -> np.ndarray:
    """Resample `count` units with replacement `RESAMPLES` times: (RESAMPLES, count), how often each unit is picked.

    Args:
        one_by_one: pick unit after unit. The distribution is the same as that of the multinomial, the random numbers
            are not: published intervals of Dice and of class adherence were computed so.
    """
    if not one_by_one:
        return random.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    picks = random.integers(count, size=(RESAMPLES, count))
    return np.stack([np.bincount(row, minlength=count) for row in picks])


def resample_subjects(subjects: Units, random: np.random.Generator, *, one_by_one: bool = False) -> np.ndarray:
    """Resample the subjects of N volumes: (RESAMPLES, N), how often each volume is picked with its subject
    (`resample`)."""
    groups = group_numbers(subjects)
    return resample(groups.max() + 1, random, one_by_one=one_by_one)[:, groups]


def resample_weights(subjects: Units, random: np.random.Generator) -> np.ndarray:
    """Resample as `resample_subjects`, times `subject_weights`: every picked subject weighs 1."""
    return resample_subjects(subjects, random) * subject_weights(subjects)


def group_numbers(subjects: Units) -> np.ndarray:
    """Number the subjects from 0 in the order of their names: (N,), the number of each volume's subject."""
    return np.unique(np.asarray(subjects), return_inverse=True)[1]


def subjects_or_volumes(count: int, subjects: Units | None) -> Units:
    """Return the subjects of `count` volumes; every volume is its own subject if they are not given.

    Raises: ValueError for another number of subjects.
    """
    if subjects is None:
        return np.arange(count)
    if len(subjects) != count:
        raise ValueError(f"{len(subjects)} subjects for {count} volumes; give one per volume")
    return subjects


def subject_weights(subjects: Units) -> np.ndarray:
    """Weigh volumes (N,) so that the volumes of each subject weigh 1 together."""
    groups = group_numbers(subjects)
    return 1 / np.bincount(groups)[groups]


def subject_mean(values: np.ndarray, subjects: Units) -> float:
    """Average values (N,) over the volumes of each subject, then over subjects."""
    return float(np.average(values, weights=subject_weights(subjects)))


def mean_over_subjects(values: np.ndarray, subjects: Units, seed: int = 0) -> Estimate[float]:
    """Average values (N,) over volumes. The interval resamples the subjects."""
    counts = resample_subjects(subjects, np.random.default_rng(seed))
    return {"mean": float(values.mean()), "interval": interval_of(counts @ values / counts.sum(1))}


def interval_of(resampled: np.ndarray | Sequence[float]) -> list[float]:
    """Take the 95 % interval of resampled figures."""
    return np.percentile(resampled, INTERVAL).tolist()


def estimate(resampled: np.ndarray) -> Estimate[float]:
    """Take the mean and the interval of resampled figures (RESAMPLES,)."""
    return {"mean": float(resampled.mean()), "interval": interval_of(resampled)}


def estimate_columns(resampled: np.ndarray) -> Estimate[list[float]]:
    """Take the mean and the interval of each column of resampled figures (RESAMPLES, F)."""
    return {"mean": resampled.mean(0).tolist(), "interval": np.percentile(resampled, INTERVAL, axis=0).tolist()}
