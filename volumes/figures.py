"""Orthogonal slices of volumes side by side, for previews during training and for the demo."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))
LABEL_COLOURS = ("#000000", "#e8743b", "#3b8ee8", "#6fbf4a", "#c94fb5", "#e8c53b", "#4fc9c0", "#9b7ae0", "#d9d9d9")
PANEL_INCHES = 1.6
LIGHT = (-0.3, 0.8, 0.6)  # towards it, in RAS: from the viewer, above and to the left


def slices_figure(columns: Sequence[dict[str, Any]]) -> Figure:
    """Three orthogonal slices of every image of every column.

    A column is {"title": str, "images": {row name: (X, Y, Z) array or tensor}, "mask": (X, Y, Z) of labels (optional),
    "spacing": (x, y, z) in mm (optional, 1 mm), "windows": {row name: (black, white)} (optional), "centre": voxel (optional)}.
    Slices go through that voxel, or the centre of what the mask marks (label > 0), or of the volume. The mask has its own rows,
    first, and its outline is drawn on the images. Images without a window share the grey scale of the column's first. Arrays are
    in RAS+ order: the patient's right is on the right, anterior or superior is up.
    """
    if not columns:
        raise ValueError("slices_figure needs at least one column")
    names = list(dict.fromkeys(name for column in columns for name in column["images"]))
    rows = (["mask"] if any(column.get("mask") is not None for column in columns) else []) + names
    figure = Figure(
        figsize=(PANEL_INCHES * len(columns) + 0.4, PANEL_INCHES * len(PLANES) * len(rows) + 0.3), layout="constrained"
    )
    axes = figure.subplots(len(rows) * len(PLANES), len(columns), squeeze=False)
    for x, column in enumerate(columns):
        _draw_column(axes[:, x], column, rows)
        axes[0, x].set_title(column.get("title", ""), fontsize=8)
    for y, name in enumerate(rows):
        for plane, (label, _) in enumerate(PLANES):
            axes[y * len(PLANES) + plane, 0].set_ylabel(f"{name}\n{label}", fontsize=7)
    return figure


def shapes_figure(rows: Mapping[str, Sequence[Any]]) -> Figure:
    """Shapes (X, Y, Z), label > 0, as lit surfaces: a row a name. Anterior faces the viewer, superior is up, and the
    patient's right is on the right, as in `slices_figure`: what is seen is the mirror image of a view from the front."""
    names, count = list(rows), max(map(len, rows.values()), default=0)
    if not count:
        raise ValueError("shapes_figure needs at least one shape")
    figure = Figure(figsize=(PANEL_INCHES * count + 0.4, PANEL_INCHES * len(names) + 0.1), layout="constrained")
    axes = figure.subplots(len(names), count, squeeze=False)
    for panels, name in zip(axes, names, strict=True):
        panels[0].set_ylabel(name, fontsize=8)
        for panel, shape in itertools.zip_longest(panels, rows[name]):
            panel.set(xticks=[], yticks=[], facecolor="black")
            if shape is not None:
                panel.imshow(_lit(_array(shape)).T, "gray", vmin=0, vmax=1, origin="lower")
    return figure


def _lit(shape: np.ndarray) -> np.ndarray:
    """(X, Z) brightness in [0, 1] of a shape's surface as seen from the front (anterior, +Y), lit from above: Lambert's
    law on the normals of the smoothed shape. Background is 0."""
    inside = shape > 0
    smooth = torch.from_numpy(inside.astype(np.float32))[None]
    for _ in range(3):
        smooth = F.avg_pool3d(smooth, 3, stride=1, padding=1)
    slopes = np.stack([np.gradient(smooth[0].numpy(), axis=axis) for axis in range(3)])  # point inwards
    normals = -slopes / np.maximum(np.linalg.norm(slopes, axis=0), 1e-6)
    light = np.array(LIGHT) / np.linalg.norm(LIGHT)
    bright = 0.25 + 0.75 * np.clip(np.tensordot(light, normals, axes=1), 0, 1)
    from_front, seen = bright[:, ::-1], inside[:, ::-1]
    first = seen.argmax(axis=1)[:, None]
    return np.where(seen.any(axis=1), np.take_along_axis(from_front, first, axis=1)[:, 0], 0)


def _draw_column(axes: np.ndarray, column: dict[str, Any], rows: list[str]) -> None:
    images = {name: _array(image) for name, image in column["images"].items()}
    mask = _array(column["mask"]) if column.get("mask") is not None else None
    shape = next(array.shape for array in [*images.values(), mask] if array is not None)
    spacing = [float(length) for length in column["spacing"]] if column.get("spacing") is not None else [1.0] * 3
    centre = column.get("centre") or _centre(mask, shape)
    window = np.percentile(next(iter(images.values())), [0.5, 99.5]) if images else (0, 1)
    for y, name in enumerate(rows):
        for plane, (_, axis) in enumerate(PLANES):
            panel = axes[y * len(PLANES) + plane]
            panel.set_xticks([])
            panel.set_yticks([])
            picture = mask if name == "mask" else images.get(name)
            if picture is None:
                panel.axis("off")
                continue
            across, up = (a for a in range(3) if a != axis)
            aspect = spacing[up] / spacing[across]
            drawn = picture.take(centre[axis], axis=axis).T
            if name == "mask":
                colours = ListedColormap(LABEL_COLOURS)
                # labels beyond the palette start again after the background's black
                wrapped = np.where(drawn > 0, (drawn - 1) % (len(LABEL_COLOURS) - 1) + 1, 0)
                panel.imshow(
                    wrapped,
                    colours,
                    vmin=0,
                    vmax=len(LABEL_COLOURS) - 1,
                    origin="lower",
                    aspect=aspect,
                    interpolation="nearest",
                )
                continue
            low, high = column.get("windows", {}).get(name, window)
            panel.imshow(drawn, "gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", aspect=aspect)
            if mask is not None:
                _outline(panel, mask.take(centre[axis], axis=axis).T)


def _outline(panel: Any, labels: np.ndarray) -> None:
    for label in np.unique(labels[labels > 0]):
        inside = np.pad(labels == label, 1).astype(float)
        lines = np.arange(-1, inside.shape[1] - 1), np.arange(-1, inside.shape[0] - 1)
        colour = LABEL_COLOURS[(int(label) - 1) % (len(LABEL_COLOURS) - 1) + 1]
        panel.contour(*lines, inside, levels=[0.5], colors=[colour], linewidths=0.6)


def _centre(mask: np.ndarray | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    if mask is None or not (mask > 0).any():
        return tuple(n // 2 for n in shape)
    return tuple(int(round(float(indices.mean()))) for indices in np.nonzero(mask > 0))


def _array(values: Any) -> np.ndarray:
    """(X, Y, Z) numpy array from an array or tensor, leading axes of length 1 dropped."""
    array = np.asarray(values.detach().cpu().float() if hasattr(values, "detach") else values)
    while array.ndim > 3 and len(array) == 1:
        array = array[0]
    if array.ndim != 3:
        raise ValueError(f"slices_figure shows (X, Y, Z) volumes, got shape {array.shape}")
    return array
