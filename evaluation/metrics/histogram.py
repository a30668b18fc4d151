"""Distributions of intensities over voxels, by quantiles, bins and ranges of Hounsfield units, and of detail over
frequencies.

Volumes are (X, Y, Z) in [0, 1] without padding: their grid is their field of view.
"""

import math

import numpy as np

from .spectrum import BAND_EDGES, band_power, ratio_db

BINS = 100
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# Hounsfield units below which a voxel of CT is called so. Air at the skin and partial volume lie between lung and fat.
HOUNSFIELD = {"air": -900, "lung": -500, "partial volume": -190, "fat": -30, "soft tissue": 200, "bone": math.inf}
COARSE_BAND_EDGES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # cycles/voxel, for volumes too small for BAND_EDGES


def names() -> list[str]:
    """Name the figures of `intensity_statistics` in their order."""
    return ["mean", "std", *(f"quantile {q:g}" for q in QUANTILES)]


def intensity_statistics(volume: np.ndarray) -> np.ndarray:
    """Compute the mean, the standard deviation and `QUANTILES` of the intensities of (X, Y, Z): (9,)."""
    volume = np.asarray(volume, np.float64)
    return np.array([volume.mean(), volume.std(), *np.quantile(volume, QUANTILES)])


def histogram(volume: np.ndarray) -> np.ndarray:
    """Compute the share of voxels of (X, Y, Z) in each of equal bins over [0, 1]: (BINS,)."""
    return np.histogram(volume, BINS, (0, 1))[0] / volume.size


def histogram_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the Wasserstein-1 distance of the intensities of two sets, in units of intensity: the area between the
    distribution functions of their mean histograms. (N, BINS) and (M, BINS): each volume weighs the same, whatever its
    size."""
    difference = first.mean(0) - second.mean(0)
    return float(np.abs(np.cumsum(difference)).sum() / first.shape[1])


def hounsfield_ranges(window: tuple[float, float]) -> dict[str, float]:
    """Name the ranges of Hounsfield units that a window tells apart, each with its upper end.

    A window cuts off what is beyond it: ranges that end below it share a name with the first that does not, and the
    last has the name of all above.
    """
    low, high = window
    ranges: dict[str, float] = {}
    merged: list[str] = []
    bottom = -math.inf
    for name, top in HOUNSFIELD.items():
        merged.append(name)
        if low < top < high:
            below, between = f"below {top:g} HU", f"{bottom:g} to {top:g} HU"
            ranges[f"{' or '.join(merged)}, {below if bottom == -math.inf else between}"] = top
            merged, bottom = [], top
    ranges[f"{' or '.join(merged)}, {'all' if bottom == -math.inf else f'above {bottom:g} HU'}"] = math.inf
    return ranges


def hounsfield_shares(volume: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Compute the share of voxels of (X, Y, Z) in each of `hounsfield_ranges`; intensities 0 and 1 are the window's
    ends."""
    low, high = window
    ends = np.array([*hounsfield_ranges(window).values()])
    place = np.searchsorted(ends, low + np.asarray(volume, np.float64).ravel() * (high - low), side="right")
    return np.bincount(place, minlength=len(ends)) / volume.size


def band_edges_for(crop: tuple[int, ...]) -> tuple[float, ...]:
    """Return bands of 0.05 cycles/voxel, or of 0.1 if a crop of this size has no frequency in the lowest."""
    return BAND_EDGES if max(crop) * BAND_EDGES[1] > 1 else COARSE_BAND_EDGES


def power(volume: np.ndarray, crop: tuple[int, int, int]) -> np.ndarray:
    """Compute the power of (X, Y, Z) in each radial band, see `spectrum.band_power`: (bands,)."""
    return band_power(volume, crop, band_edges_for(crop))


def power_ratio_db(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Divide the mean power of the first set by that of the second, band by band, in dB: (N, bands), (M, bands) ->
    (bands,)."""
    return ratio_db(first.mean(0), second.mean(0))
