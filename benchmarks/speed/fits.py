"""Fit growth: power laws, and the deviation of values from proportionality."""

from collections.abc import Sequence

import numpy as np


def power_law(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Fit value = factor * size ** exponent by least squares in logarithms; return (factor, exponent).

    Raises:
        ValueError: for fewer than two points.
    """
    if len(sizes) < 2 or len(sizes) != len(values):
        raise ValueError(f"a power law needs two points or more, got sizes {list(sizes)} and values {list(values)}")
    exponent, logarithm = np.polyfit(np.log(sizes), np.log(values), 1)
    return float(np.exp(logarithm)), float(exponent)


def predict(sizes: Sequence[float], values: Sequence[float], size: float) -> float:
    """Evaluate the power law through the points at `size`."""
    factor, exponent = power_law(sizes, values)
    return factor * size**exponent


def deviation_from_proportional(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the largest relative deviation from the best fit value = a * size (relative least squares)."""
    ratios = np.asarray(values, float) / np.asarray(sizes, float)
    scale = ratios.sum() / (ratios**2).sum()  # minimizes sum (scale * ratio - 1) ** 2
    return float(np.abs(scale * ratios - 1).max())


def rise(values: Sequence[float]) -> float:
    """Return the relative increase from the first to the last value."""
    return values[-1] / values[0] - 1
