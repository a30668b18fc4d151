"""Smooth random volumes that share an anatomy, and generators with one defect each."""

import numpy as np

SHAPE = (20, 22, 18)


def smooth(noise: np.ndarray, sigma: float, axes: tuple[int, ...] = (-3, -2, -1)) -> np.ndarray:
    """`noise` (..., X, Y, Z) under a periodic Gaussian of `sigma` voxels along `axes`."""
    for axis in axes:
        frequency = np.fft.fftfreq(noise.shape[axis])
        gain = np.exp(-2 * (np.pi * sigma * frequency) ** 2)
        gain = gain.reshape([-1 if a == axis % noise.ndim else 1 for a in range(noise.ndim)])
        noise = np.fft.ifft(np.fft.fft(noise, axis=axis) * gain, axis=axis).real
    return noise


def smooth_volumes(count: int, seed: int, shape: tuple[int, int, int] = SHAPE, channels: int = 1) -> np.ndarray:
    """(count, channels, X, Y, Z) in [0, 1]: one anatomy for all, each with variations of its own."""
    anatomy = smooth(np.random.default_rng(12345).standard_normal((1, 1, *shape)), 3)
    own = smooth(np.random.default_rng(seed).standard_normal((count, channels, *shape)), 1.2)
    return np.clip(0.5 + 0.1 * anatomy / anatomy.std() + 0.1 * own / own.std(), 0, 1)


def blurred(volumes: np.ndarray, sigma: float = 0.7) -> np.ndarray:
    return smooth(volumes, sigma)


def shuffled(volumes: np.ndarray, axis: int = -1) -> np.ndarray:
    """Pairs of neighboring slices along `axis` change places."""
    order = np.arange(volumes.shape[axis]).reshape(-1, 2)[:, ::-1].ravel()
    return np.take(volumes, order, axis)


def drifting(volumes: np.ndarray, size: float = 0.03) -> np.ndarray:
    """Every slice along Z brighter or darker by a random amount of its own."""
    random = np.random.default_rng(7)
    return np.clip(volumes + size * random.standard_normal((len(volumes), 1, 1, 1, volumes.shape[-1])), 0, 1)


def collapsed(volumes: np.ndarray, modes: int = 3) -> np.ndarray:
    """The first `modes` volumes over and over, with a little noise."""
    noise = np.random.default_rng(8).standard_normal(volumes.shape)
    return np.clip(volumes[np.arange(len(volumes)) % modes] + 0.005 * noise, 0, 1)
