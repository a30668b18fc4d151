"""How much detail a set of volumes has, frequency by frequency, against real ones.

Frequencies are in cycles/voxel along each axis, so 0.5 is the Nyquist frequency. A blurred volume has less power at high frequencies
than a real one: a negative ratio in dB. Voxel grids, not millimeters, decide what a decoder can draw, hence cycles/voxel.
"""

import itertools
from collections.abc import Iterable

import numpy as np

CROP = (28, 36, 28)
BAND_EDGES = tuple(round(0.05 * i, 2) for i in range(11))  # 0, 0.05, ..., 0.5 cycles/voxel


def center_crop(volume: np.ndarray, crop: tuple[int, int, int]) -> np.ndarray:
    """The middle of (X, Y, Z), `crop` voxels large, or the volume's own size along axes where it is smaller."""
    window = []
    for size, wanted in zip(volume.shape, crop, strict=True):
        kept = min(size, wanted)
        start = (size - kept) // 2
        window.append(slice(start, start + kept))
    return volume[tuple(window)]


def hann_window(shape: tuple[int, ...]) -> np.ndarray:
    """Product of periodic Hann windows, one an axis: it keeps the crop's edges from leaking into every frequency."""
    window = np.ones(shape)
    for axis, size in enumerate(shape):
        profile = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
        window *= profile.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return window


def band_power(
    volume: np.ndarray, crop: tuple[int, int, int] = CROP, band_edges: tuple[float, ...] = BAND_EDGES
) -> np.ndarray:
    """Mean spectral power of one (X, Y, Z) volume in each radial frequency band, shape (bands,).

    The crop's mean is removed, the crop is windowed, and |FFT|^2 is divided by the window's energy, so that white noise of variance v has
    power v in every band whatever the crop. A band holds `low <= |f| < high`; the zero frequency is in none.
    Raises ValueError where a band holds no frequency of so small a crop.
    """
    cropped = center_crop(np.asarray(volume, np.float64), crop)
    window = hann_window(cropped.shape)
    power = np.abs(np.fft.fftn((cropped - cropped.mean()) * window)) ** 2 / (window**2).sum()
    axes = np.meshgrid(*(np.fft.fftfreq(n) for n in cropped.shape), indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    band = np.digitize(radius, band_edges) - 1  # -1 below the first edge, len(band_edges) - 1 above the last
    band[radius == 0] = -1
    kept = (band >= 0) & (band < len(band_edges) - 1)
    count = np.bincount(band[kept], minlength=len(band_edges) - 1)
    if (count == 0).any():
        empty = int(np.argmin(count))
        raise ValueError(
            f"a crop of {cropped.shape} voxels has no frequency in [{band_edges[empty]}, {band_edges[empty + 1]}) cycles/voxel: "
            "use wider bands or larger crops"
        )
    return np.bincount(band[kept], weights=power[kept], minlength=len(band_edges) - 1) / count


def mean_band_power(
    volumes: Iterable[np.ndarray], crop: tuple[int, int, int] = CROP, band_edges: tuple[float, ...] = BAND_EDGES
) -> np.ndarray:
    """`band_power` averaged over volumes; raises ValueError when there are none."""
    powers = [band_power(volume, crop, band_edges) for volume in volumes]
    if not powers:
        raise ValueError("no volume to take a spectrum of")
    return np.mean(powers, axis=0)


def ratio_db(power: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """`10 log10(power / reference)`: 0 where they agree, -3 at half the power."""
    return 10 * np.log10(power / reference)


def band_names(band_edges: tuple[float, ...] = BAND_EDGES) -> list[str]:
    """Names of the bands for a report: "0.20-0.25"."""
    return [f"{low:.2f}-{high:.2f}" for low, high in itertools.pairwise(band_edges)]
