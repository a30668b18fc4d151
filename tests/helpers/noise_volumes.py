"""Volumes of noise that is known."""

import numpy as np
from scipy import ndimage

SIDES = (24, 20, 16)


def volumes(count: int = 24, low: float = 0.04, high: float = 0.16) -> list[tuple[np.ndarray, np.ndarray]]:
    """Smooth volumes ("reconstructions") and the same with correlated noise whose level differs from one to the next,
    twice as strong where the volume is bright, and none at -1."""
    random = np.random.default_rng(0)
    pairs = []
    for level in np.linspace(low, high, count):
        smooth = ndimage.gaussian_filter(random.standard_normal(SIDES), 3)
        smooth = 0.5 * np.sign(smooth)
        smooth[:4] = -1
        noise = ndimage.gaussian_filter(random.standard_normal(SIDES), 0.7)
        noise *= level / noise.std() * np.where(smooth > 0, 2.0, 1.0) * (smooth > -1)
        pairs.append(((smooth + noise)[None], smooth[None]))
    return pairs
