"""Sizes, forms and neighborhoods of the labels of a label map as a row of figures, and generated maps compared with
real ones."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from scipy import ndimage

from evaluation.data.volume_sets import VolumeSet
from volumes.map_checks import count_pieces

from .set_distances import (
    Closeness,
    ColumnComparison,
    SetComparison,
    closer_than_test,
    compare_columns,
    compare_sets,
    kernel_distance,
    standardize,
)

PER_LABEL = ("volume", "surface", "sphericity", "length", "width", "thickness", "roughness", "pieces")
PER_PAIR = ("contact", "distance")


def shape_names(labels: Sequence[str]) -> list[str]:
    """Name the figures of `shape_figures` in their order: "anterior volume", ..., "anterior, posterior contact"."""
    names = [f"{label} {name}" for label in labels for name in PER_LABEL]
    return names + [f"{a}, {b} {name}" for a, b in itertools.combinations(labels, 2) for name in PER_PAIR]


def shape_figures(channels: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Measure the figures (F,) of one label map.

    For each label: volume (mm^3); surface (mm^2, of the voxels' faces); sphericity pi^(1/3) (6 V)^(2/3) / A (Wadell
    1935; 2/3 for a ball of voxels); length, width and thickness, four standard deviations of the voxels along the
    principal axes (mm; 4/sqrt(12) of the side of a box); roughness, the fraction of its voxels that a Gaussian of one
    voxel removes or adds; pieces (26 neighbors). For each pair of labels: contact (mm^2 of shared faces) and distance
    of their centers (mm). All are 0 for an absent label.

    Args:
        channels: one per label, (C, X, Y, Z): above 0.5 inside the label.
        spacing: mm between voxels.
    """
    masks = [channel > 0.5 for channel in np.asarray(channels)]
    figures: list[float] = []
    for mask in masks:
        figures += _label_figures(mask, np.asarray(spacing, float))
    for first, second in itertools.combinations(masks, 2):
        contact = _shared_faces(first, second, spacing) + _shared_faces(second, first, spacing)
        distance = 0.0
        if first.any() and second.any():
            centers = [np.argwhere(mask).mean(0) * spacing for mask in (first, second)]
            distance = float(np.linalg.norm(centers[0] - centers[1]))
        figures += [contact, distance]
    return np.array(figures)


class ShapeComparison(TypedDict):
    """Distances of shapes, see `compare_shapes`."""

    figures: dict[str, ColumnComparison]
    kernel: SetComparison[float]
    closer_to_training: Closeness


def compare_shapes(sets: Mapping[str, VolumeSet], labels: Sequence[str], seed: int = 0) -> ShapeComparison:
    """Compare the shapes of "training", "test" and "generated" label maps.

    Every figure alone and all figures together (a kernel distance): the distance of generated from unseen real maps,
    beside that of real training maps. And whether generated maps are nearer to training maps than unseen real maps are.
    """
    rows = {}
    for name, maps in sets.items():
        pairs = zip(maps.volumes, maps.spacings, strict=True)
        rows[name] = np.stack([shape_figures(volume, spacing) for volume, spacing in pairs])
    subjects = {name: maps.subjects for name, maps in sets.items()}
    scaled = standardize(rows, "test", least=0.01)
    return {
        "figures": compare_columns(rows, shape_names(labels), subjects=subjects, seed=seed),
        "kernel": compare_sets(kernel_distance, scaled, subjects=subjects, seed=seed),
        "closer_to_training": closer_than_test(scaled, subjects=subjects, seed=seed),
    }


def _label_figures(mask: np.ndarray, spacing: np.ndarray) -> list[float]:
    if not mask.any():
        return [0.0] * len(PER_LABEL)
    volume = float(mask.sum() * spacing.prod())
    inside = np.pad(mask, 1)
    surface = _shared_faces(inside, ~inside, spacing) + _shared_faces(~inside, inside, spacing)
    places = np.argwhere(mask) * spacing
    spread = np.cov(places.T) if len(places) > 1 else np.zeros((3, 3))
    axes = 4 * np.sqrt(np.maximum(np.linalg.eigvalsh(spread)[::-1], 0))
    smooth = ndimage.gaussian_filter(mask.astype(np.float32), 1.0, mode="nearest") > 0.5
    sphericity = np.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / surface
    return [
        volume,
        surface,
        float(sphericity),
        *axes.tolist(),
        float((smooth != mask).sum() / mask.sum()),
        float(count_pieces(mask)),
    ]


def _shared_faces(first: np.ndarray, second: np.ndarray, spacing: Sequence[float] | np.ndarray) -> float:
    """Measure the faces (mm^2) with `first` on the lower side and `second` on the upper, along all axes."""
    area = 0.0
    for axis in range(3):
        low, high = [slice(None)] * 3, [slice(None)] * 3
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        face = float(np.prod([side for other, side in enumerate(spacing) if other != axis]))
        area += face * float((first[tuple(low)] & second[tuple(high)]).sum())
    return area
