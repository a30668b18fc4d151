"""Are generated label maps shaped as real ones: sizes, forms and neighborhoods of the labels, as a row of figures a map."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from evaluation.data.volume_sets import VolumeSet
from volumes.map_checks import count_pieces

from .set_distances import (
    closer_than_test,
    compare_columns,
    compare_sets,
    kernel_distance,
    standardize,
)

PER_LABEL = ("volume", "surface", "sphericity", "length", "width", "thickness", "roughness", "pieces")
PER_PAIR = ("contact", "distance")


def shape_names(labels: Sequence[str]) -> list[str]:
    """What `shape_figures` gives, in its order: "anterior volume", ..., "anterior, posterior contact"."""
    names = [f"{label} {name}" for label in labels for name in PER_LABEL]
    return names + [f"{a}, {b} {name}" for a, b in itertools.combinations(labels, 2) for name in PER_PAIR]


def shape_figures(channels: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Figures (F,) of one label map.

    Of each label: volume (mm^3); surface (mm^2, of the voxels' faces); sphericity pi^(1/3) (6 V)^(2/3) / A (Wadell 1935; of voxel
    faces a ball has 2/3); length, width and thickness, four standard deviations of the voxels along the principal axes (mm; of a
    box 4/sqrt(12) of its side); roughness, the fraction of its voxels that a Gaussian of one voxel takes away or adds; pieces
    (26 neighbors). Of each pair of labels: contact (mm^2 of faces that they share) and distance of their centers (mm). All are
    0 of a label that is not there.

    Args:
        channels: one a label, (C, X, Y, Z): above 0.5 where it is.
        spacing: mm between voxels.
    """
    masks = [channel > 0.5 for channel in np.asarray(channels)]
    figures: list[float] = []
    for mask in masks:
        figures += _label_figures(mask, np.asarray(spacing, float))
    for first, second in itertools.combinations(masks, 2):
        between = _shared_faces(first, second, spacing) + _shared_faces(second, first, spacing)
        apart = 0.0
        if first.any() and second.any():
            centers = [np.argwhere(mask).mean(0) * spacing for mask in (first, second)]
            apart = float(np.linalg.norm(centers[0] - centers[1]))
        figures += [between, apart]
    return np.array(figures)


def compare_shapes(sets: Mapping[str, VolumeSet], labels: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """ "training", "test" and "generated" label maps: every figure's distance from unseen real maps and of all together, each
    beside that of real training maps; and whether generated ones lie nearer to training ones than unseen real ones do.

    Returns: {"figures": `compare_columns`, "kernel": `compare_sets`, "closer_to_training": `closer_than_test`}.
    """
    rows = {
        name: np.stack(
            [shape_figures(volume, spacing) for volume, spacing in zip(one.volumes, one.spacings, strict=True)]
        )
        for name, one in sets.items()
    }
    subjects = {name: one.subjects for name, one in sets.items()}
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
    """mm^2 of faces with `first` on the lower side and `second` on the upper, along all axes."""
    area = 0.0
    for axis in range(3):
        low, high = [slice(None)] * 3, [slice(None)] * 3
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        face = float(np.prod([side for other, side in enumerate(spacing) if other != axis]))
        area += face * float((first[tuple(low)] & second[tuple(high)]).sum())
    return area
