"""Fidelity of a reconstruction to its volume: PSNR and mean gradients inside the field of view.

Arrays are (..., X, Y, Z); intensities are in [0, 1], so the peak is 1.
"""

import math

import numpy as np


def psnr(reconstruction: np.ndarray, target: np.ndarray, field_of_view: np.ndarray | None = None) -> float:
    """Compute the peak signal-to-noise ratio in dB, `-10 log10(mean squared error)`, for intensities in [0, 1].

    `field_of_view` is boolean and broadcasts to the arrays: voxels where it is False (padding) are ignored. Identical
    arrays give infinity.

    Raises: ValueError for arrays of different shapes and for an empty field of view.
    """
    if reconstruction.shape != target.shape:
        raise ValueError(f"shapes differ: reconstruction {reconstruction.shape}, target {target.shape}")
    squared = (reconstruction.astype(np.float64) - target.astype(np.float64)) ** 2
    if field_of_view is not None:
        squared = squared[np.broadcast_to(field_of_view, squared.shape)]
    if squared.size == 0:
        raise ValueError("the field of view is empty: there is no voxel to compare")
    error = float(squared.mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def mean_gradient(volume: np.ndarray, field_of_view: np.ndarray | None = None) -> float:
    """Compute the mean magnitude of the gradient by forward differences along X, Y and Z, per voxel: the strength of
    edges and texture.

    Voxels of (..., X, Y, Z) count if `field_of_view` (broadcast to it) contains them and their three next neighbors. A
    blur lowers it, a factor scales it, brightness does not change it.

    Raises: ValueError if no voxel has its neighbors inside.
    """
    here, ahead = (..., slice(-1), slice(-1), slice(-1)), []
    for axis in range(3):
        ahead.append((..., *(slice(1, None) if a == axis else slice(-1) for a in range(3))))
    volume = volume.astype(np.float64)
    magnitude = np.sqrt(sum((volume[next_] - volume[here]) ** 2 for next_ in ahead))
    if field_of_view is not None:
        inside = np.broadcast_to(field_of_view, volume.shape)
        magnitude = magnitude[np.logical_and.reduce([inside[part] for part in (here, *ahead)])]
    if magnitude.size == 0:
        raise ValueError("the field of view contains no voxel with its neighbors: there is no gradient to compute")
    return float(magnitude.mean())
