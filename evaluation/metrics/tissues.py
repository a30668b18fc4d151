"""Tissues by intensity: a k-means of the voxels inside a mask, as maps of gray and white matter are often derived.

Volumes are (X, Y, Z) of any linear scale of intensity. Maps are (X, Y, Z): 0 outside, then 1, 2, ... from the darkest
tissue to the brightest.
"""

import math

import numpy as np
import torch

from .dice import dice_per_volume

TOLERANCE = 1e-6  # of the range of intensities, by which centers still move at the end


def cluster(values: np.ndarray, count: int) -> np.ndarray:
    """Cluster numbers (N,) by k-means (Lloyd 1982): (N,) indices from 0 in the order of the clusters' means.

    The centers begin at equally spaced quantiles, so equal values always give equal clusters, without a seed. In one
    dimension clusters are intervals. One may be empty where many values are equal.

    Raises: ValueError for fewer than 2 clusters and for values that are not finite.
    """
    values = np.asarray(values, np.float64)
    if count < 2:
        raise ValueError(f"{count} cluster of intensities says nothing; give 2 or more")
    if not np.isfinite(values).all():
        raise ValueError("there are voxels without a finite intensity; they cannot be clustered")
    if not len(values):
        return np.zeros(0, np.int64)
    centers = np.quantile(values, (np.arange(count) + 0.5) / count)
    tolerance = TOLERANCE * np.ptp(values)
    while True:
        index = np.searchsorted((centers[1:] + centers[:-1]) / 2, values)
        members = np.bincount(index, minlength=count)
        sums = np.bincount(index, values, count)
        moved = np.where(members > 0, sums / np.maximum(members, 1), centers)
        if np.abs(moved - centers).max() <= tolerance:
            return index
        centers = moved


def tissue_map(volume: np.ndarray, inside: np.ndarray, count: int) -> np.ndarray:
    """Make the tissue map of (X, Y, Z) from its intensities where `inside` (X, Y, Z) is True: int16, 0 elsewhere, then
    1 to `count`, the brightest.

    Raises: ValueError as `cluster`.
    """
    tissues = np.zeros(volume.shape, np.int16)
    tissues[inside] = cluster(volume[inside], count) + 1
    return tissues


def tissue_dice(tissues: np.ndarray, expected: np.ndarray, count: int) -> np.ndarray:
    """Compute the Dice of each tissue of two maps (X, Y, Z): (count,), NaN for one that `expected` does not have.

    Voxels where `expected` is negative (padding, or an unknown label) do not count.
    """
    known = expected >= 0
    pair = [torch.from_numpy(np.where(known, one, 0).astype(np.int16))[None] for one in (tissues, expected)]
    return np.array(
        [
            dice_per_volume(pair[0], pair[1], label).item() if (expected == label).any() else math.nan
            for label in range(1, count + 1)
        ]
    )


def outside_share(volume: np.ndarray, outside: np.ndarray, lowest: float = 0.0) -> float:
    """Compute the fraction of voxels of (X, Y, Z) that are above the lowest intensity, of those where `outside` is
    True. It is 0 if there are none."""
    return float((volume[outside] > lowest).mean()) if outside.any() else 0.0
