"""Tissues by intensity: a k-means of the voxels inside a mask, as maps of gray and white matter are often derived.

Volumes are (X, Y, Z) of any linear scale of intensity. Maps are (X, Y, Z): 0 outside, then 1, 2, ... from the darkest
tissue to the brightest.
"""

import math

import numpy as np
import torch

from .dice import dice_per_volume

BINS = 256  # of the histogram whose best clusters are the start
TOLERANCE = 1e-6  # of the range of intensities, by which borders still move at the end


def cluster(values: np.ndarray, count: int) -> np.ndarray:
    """Cluster numbers (N,) by k-means: (N,) indices from 0 in the order of the clusters' means.

    In one dimension clusters are intervals, so the best can be found without a random start: those of a histogram by
    dynamic programming (Wang, Song 2011), moved as by Lloyd (1982) until they are those of the numbers. A cluster may
    be empty where many numbers are equal, and where one is so far from the others that they fill a few bins.

    Raises: ValueError for fewer than 2 clusters and for values that are not finite.
    """
    values = np.asarray(values, np.float64)
    if count < 2:
        raise ValueError(f"{count} cluster of intensities says nothing; give 2 or more")
    if not np.isfinite(values).all():
        raise ValueError("there are voxels without a finite intensity; they cannot be clustered")
    if not len(values) or np.ptp(values) == 0:
        return np.zeros(len(values), np.int64)
    borders, tolerance = _best_borders(values, count), TOLERANCE * np.ptp(values)
    while True:
        index = np.searchsorted(borders, values, side="right")
        members = np.bincount(index, minlength=count)
        if not members.all():
            return index
        centers = np.bincount(index, values, count) / members
        moved = (centers[1:] + centers[:-1]) / 2
        if np.abs(moved - borders).max() <= tolerance:
            return index
        borders = moved


def _best_borders(values: np.ndarray, count: int) -> np.ndarray:
    """Find the borders (count - 1,) that leave the smallest sum of squares about the means between them, among those of
    the histogram's bins."""
    edges = np.histogram_bin_edges(values, BINS)
    centered = values - values.mean()
    number, total, square = (
        np.append(0, np.cumsum(np.histogram(values, edges, weights=centered**power)[0])) for power in range(3)
    )
    within = np.maximum(number - number[:, None], 1)  # of bins i to j - 1 at [i, j]
    cost = square - square[:, None] - (total - total[:, None]) ** 2 / within
    cost[np.tril_indices(BINS + 1, -1)] = np.inf
    best, cuts = cost[0], []
    for _ in range(count - 1):
        sums = best[:, None] + cost
        cuts.append(sums.argmin(0))
        best = sums.min(0)
    borders, end = [], BINS
    for cut in reversed(cuts):
        end = int(cut[end])
        borders.append(edges[end])
    return np.array(borders[::-1])


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
