"""Volumes of a few blobs."""

import numpy as np

SHAPE = (16, 16, 16)


def blobs(count: int, seed: int, shape=SHAPE) -> np.ndarray:
    """(count, 1, X, Y, Z) in [0, 1]: random blocks of 4 voxels, so that blocks of 4 voxels tell them apart."""
    coarse = np.random.default_rng(seed).random((count, 1, *(side // 4 + 1 for side in shape)))
    fine = coarse.repeat(4, 2).repeat(4, 3).repeat(4, 4)
    return fine[..., 2 : shape[0] + 2, 2 : shape[1] + 2, 2 : shape[2] + 2].astype(np.float32)
