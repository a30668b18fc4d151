"""Power spectra of volumes: how much detail they have at each frequency, compared with real ones.

Frequencies are in cycles/voxel along each axis, so 0.5 is the Nyquist frequency. A blurred volume has less power at
high frequencies than a real one: a negative ratio in dB. Voxel grids, not millimeters, limit a decoder, hence
cycles/voxel.
"""

import itertools
from collections.abc import Iterable

import numpy as np

from volumes.placement import center_crop

CROP = (28, 36, 28)
BAND_EDGES = tuple(round(0.05 * i, 2) for i in range(11))  # 0, 0.05, ..., 0.5 cycles/voxel


def hann_window(shape: tuple[int, ...]) -> np.ndarray:
    """Multiply periodic Hann windows, one per axis: they keep the crop's edges from leaking into every frequency.

    `autoencoder.spectrum_loss` has the same window in torch, differentiable and in float32; its mean is not removed,
    for its bands begin at 0.1 cycles/voxel. `autoencoder.residual_noise` says why it has another.
    """
    window = np.ones(shape)
    for axis, size in enumerate(shape):
        profile = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
        window *= profile.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return window


def band_power(
    volume: np.ndarray, crop: tuple[int, int, int] = CROP, band_edges: tuple[float, ...] = BAND_EDGES
) -> np.ndarray:
    """Compute the mean spectral power of one (X, Y, Z) volume in each radial frequency band, (bands,).

    The crop's mean is removed, the crop is windowed, and |FFT|^2 is divided by the window's energy, so that white noise
    of variance v has power v in every band, whatever the crop. A band contains `low <= |f| < high`; the zero frequency
    is in none.

    Raises: ValueError if the crop is too small for a frequency in every band.
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
            f"a crop of {cropped.shape} voxels has no frequency in [{band_edges[empty]}, {band_edges[empty + 1]}) "
            "cycles/voxel: use wider bands or larger crops"
        )
    return np.bincount(band[kept], weights=power[kept], minlength=len(band_edges) - 1) / count


def mean_band_power(
    volumes: Iterable[np.ndarray], crop: tuple[int, int, int] = CROP, band_edges: tuple[float, ...] = BAND_EDGES
) -> np.ndarray:
    """Average `band_power` over volumes. Raises: ValueError for no volumes."""
    powers = [band_power(volume, crop, band_edges) for volume in volumes]
    if not powers:
        raise ValueError("no volumes: there is no spectrum to compute")
    return np.mean(powers, axis=0)


def ratio_db(power: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Compute `10 log10(power / reference)`: 0 for equal powers, -3 for half the power."""
    return 10 * np.log10(power / reference)


def band_names(band_edges: tuple[float, ...] = BAND_EDGES) -> list[str]:
    """Name the bands for a report: "0.20-0.25"."""
    return [f"{low:.2f}-{high:.2f}" for low, high in itertools.pairwise(band_edges)]
