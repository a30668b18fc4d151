"""Consistency of slices: statistics of adjacent slices along each axis of a volume.

Volumes are (X, Y, Z) in [0, 1]. Slices that were generated separately, or joined from pieces, jump where real ones
change smoothly; a blur along an axis makes them too smooth. Both show only in comparison with real volumes of the same
spacing.
"""

from collections.abc import Sequence

import numpy as np

AXES = ("x", "y", "z")
STATISTICS = ("correlation", "difference", "second_difference", "brightness_step")
FLAT = 1e-6  # standard deviation of intensities below which a slice has no structure to correlate


def names() -> list[str]:
    """Name the figures of `slice_statistics` in their order: "x correlation" and so on."""
    return [f"{axis} {statistic}" for axis in AXES for statistic in STATISTICS]


def check_slices(shape: Sequence[int]) -> None:
    """Raise ValueError for an axis of fewer than 3 slices."""
    if min(shape) < 3:
        raise ValueError(
            f"a volume of {tuple(shape)} voxels: an axis of fewer than 3 slices has no second difference (consistency)"
        )


def slice_statistics(volume: np.ndarray) -> np.ndarray:
    """Compute statistics of the slices s along each axis of (X, Y, Z): (12,).

    - correlation: Pearson's, of adjacent slices, averaged over pairs of them; 1 for two flat slices, 0 if one is flat;
    - difference: mean `|s[i+1] - s[i]|`;
    - second_difference: mean `|s[i+1] - 2 s[i] + s[i-1]|`, large where slices zigzag;
    - brightness_step: mean absolute difference of adjacent slices' means, large where brightness drifts from slice to
    slice.

    Raises: ValueError for an axis of fewer than 3 slices.
    """
    check_slices(volume.shape)
    statistics = []
    for axis in range(3):
        slices = np.moveaxis(np.asarray(volume, np.float64), axis, 0).reshape(volume.shape[axis], -1)
        step = np.diff(slices, axis=0)
        zigzag = np.diff(step, axis=0)
        means = slices.mean(1)
        statistics += [
            adjacent_correlation(slices),
            np.abs(step).mean(),
            np.abs(zigzag).mean(),
            np.abs(np.diff(means)).mean(),
        ]
    return np.array(statistics)


def adjacent_correlation(slices: np.ndarray) -> float:
    """Compute the mean Pearson correlation of adjacent rows of (slices, voxels); 1 for two flat rows, 0 if one of two
    is flat."""
    centered = slices - slices.mean(1, keepdims=True)
    std = centered.std(1)
    flat = std < FLAT
    unit = centered / np.where(flat, 1, std)[:, None]
    correlation = (unit[1:] * unit[:-1]).mean(1)
    correlation = np.where(flat[1:] | flat[:-1], (flat[1:] & flat[:-1]).astype(float), correlation)
    return float(correlation.mean())
