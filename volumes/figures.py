"""Orthogonal slices of volumes side by side, for previews during training, pairs of volumes and the demo."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Required, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))
LABEL_COLORS = ("#000000", "#e8743b", "#3b8ee8", "#6fbf4a", "#c94fb5", "#e8c53b", "#4fc9c0", "#9b7ae0", "#d9d9d9")
MARK = "#ffd54a"  # of the letters for the patient's sides
RAS = ("R", "A", "S")
OPPOSITE = {"R": "L", "L": "R", "A": "P", "P": "A", "S": "I", "I": "S"}
PANEL_INCHES = 1.6  # the longest side of a panel
NARROWEST_INCHES, MAX_INCHES = 0.6, 4.0  # what long volumes get: a width, at a length of at most this
PAGE_INCHES = 24.0  # the longest side of a figure
LIGHT = (-0.3, 0.8, 0.6)  # toward it, in RAS: from the viewer, above and to the left


class FigureCase(TypedDict, total=False):
    """A case of `slices_figure`.

    Attributes:
        title: text before the first row.
        images: {name: (X, Y, Z) or (C, X, Y, Z) array or tensor}.
        channels: names of the C channels.
        mask: (X, Y, Z) of labels.
        region: (X, Y, Z), not 0 in the part that an edit changed; `contact_sheet` outlines it.
        spacing: (x, y, z) in mm; 1 mm if absent.
        windows: {channel or image name: (black, white)} in the images' units.
        center: voxel.
        axes: directions of the array's axes, as nibabel's `aff2axcodes` gives them; ("R", "A", "S") if absent.
        labels: whether the images are label maps too.
    """

    title: str
    images: Required[Mapping[str, Any]]
    channels: Sequence[str]
    mask: Any
    region: Any
    spacing: Sequence[float] | None
    windows: Mapping[str, tuple[float, float]]
    center: Sequence[int] | None
    axes: Sequence[str]
    labels: bool


def slices_figure(cases: Sequence[FigureCase]) -> Figure:
    """Draw three orthogonal slices of every image of every case. There is a row for each channel of a case. For each
    plane it shows the mask and the images side by side, in the proportions of the body.

    Slices go through the center voxel, or the center of the mask (label > 0), or of the volume. The outline of the mask
    is drawn on the images. Without a window, a row's gray scale goes from percentile 0.5 to 99.5 of its first image; it
    is written beside the row. With axes that point to R, A and S, the patient's right is on the right (neurological
    convention), and anterior or superior is up; L and R are marked.

    Raises: ValueError for no cases, and arrays of other dimensions.
    """
    if not cases:
        raise ValueError("slices_figure needs at least one case")
    names = list(dict.fromkeys(name for case in cases for name in case["images"]))
    parts = (["mask"] if any(case.get("mask") is not None for case in cases) else []) + names
    rows = [row for case in cases for row in _rows_of(case)]
    sides = np.max([row.sides for row in rows], axis=0)  # mm
    widths = [sides[_across(axis)[0]] for _, axis in PLANES for _ in parts]
    heights = [max(row.sides[_across(axis)[1]] for _, axis in PLANES) for row in rows]
    inches = _inches_per_mm(widths, heights)
    size = inches * sum(widths) + 0.06 * len(widths) + 1.3, inches * sum(heights) + 0.06 * len(heights) + 0.9
    figure = Figure(figsize=size, layout="constrained")
    ratios = {"width_ratios": widths, "height_ratios": heights}
    axes = figure.subplots(len(rows), len(widths), squeeze=False, gridspec_kw=ratios)
    for panels, row in zip(axes, rows, strict=True):
        _draw_row(panels, row, parts)
        panels[0].set_ylabel(row.label, fontsize=7, rotation=0, ha="right", va="center", labelpad=6)
    for x, (plane, part) in enumerate((plane, part) for plane, _ in PLANES for part in parts):
        axes[0, x].set_title(f"{plane}\n{part}" if not x % len(parts) else f"\n{part}", fontsize=7)
    right = cases[0].get("axes", RAS)[0] == "R"
    convention = "right is on the right (neurological" if right else "left is on the right (radiological"
    footnote = f"The patient's {convention} convention); gray scales beside the rows, in the images' units"
    figure.supxlabel(textwrap.fill(footnote, max(20, int(16 * size[0]))), fontsize=7)
    return figure


@dataclass(frozen=True)
class _Row:
    """One channel of a case, to be drawn."""

    label: str
    images: dict[str, np.ndarray]
    windows: dict[str, tuple[float, float]]
    mask: np.ndarray | None
    spacing: tuple[float, ...]
    sides: tuple[float, ...]  # mm
    center: tuple[int, ...]
    axes: Sequence[str]
    labels: bool


def _rows_of(case: FigureCase) -> list[_Row]:
    arrays = {name: _channels(image) for name, image in case["images"].items()}
    mask = None if (labels := case.get("mask")) is None else _channels(labels)[0]
    shape = next(array.shape[-3:] for array in [*arrays.values(), mask] if array is not None)
    lengths = case.get("spacing")
    spacing = (1.0,) * 3 if lengths is None else tuple(map(float, lengths))
    count = max((len(array) for array in arrays.values()), default=1)
    channels = list(case.get("channels") or ([""] if count == 1 else [f"channel {c}" for c in range(count)]))
    given, rows = case.get("windows", {}), []
    for index, channel in enumerate(channels):
        images = {name: array[index] for name, array in arrays.items() if index < len(array)}
        usual = tuple(np.percentile(next(iter(images.values())), [0.5, 99.5]).tolist()) if images else (0.0, 1.0)
        windows = {name: given.get(channel, given.get(name, usual)) for name in images}
        several = len(set(map(tuple, windows.values()))) > 1
        told = [f"{name + ' ' if several else ''}{low:.4g} to {high:.4g}" for name, (low, high) in windows.items()]
        told = [] if case.get("labels") else dict.fromkeys(told)
        label = "\n".join(part for part in (case.get("title", ""), channel, *told) if part)
        center = tuple(case.get("center") or _center(mask, shape))
        extent = tuple(n * mm for n, mm in zip(shape, spacing, strict=True))
        shown = None if case.get("labels") and mask is None else mask
        rows.append(
            _Row(
                label, images, windows, shown, spacing, extent, center, case.get("axes", RAS), bool(case.get("labels"))
            )
        )
    return rows


def _inches_per_mm(widths: Sequence[float], heights: Sequence[float]) -> float:
    """Return the scale at which the longest side of a panel is `PANEL_INCHES`: more if a panel would be too narrow,
    less if the page would be too large.
    """
    longest, narrowest = max(*widths, *heights), min(widths)
    inches = PANEL_INCHES / longest
    if narrowest * inches < NARROWEST_INCHES:
        inches = min(NARROWEST_INCHES / narrowest, MAX_INCHES / longest)
    return min(inches, PAGE_INCHES / sum(widths), PAGE_INCHES / sum(heights))


def _across(axis: int) -> tuple[int, int]:
    """Return the axes that a plane shows: to the right, and up."""
    across, up = (a for a in range(3) if a != axis)
    return across, up


def shapes_figure(rows: Mapping[str, Sequence[Any]]) -> Figure:
    """Draw shapes (X, Y, Z), label > 0, as lit surfaces: one row per name. Anterior faces the viewer, superior is up,
    and the patient's right is on the right, as in `slices_figure`: the picture is the mirror image of a view from the
    front.
    """
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
    """Return the brightness (X, Z) in [0, 1] of a shape's surface seen from the front (anterior, +Y) and lit from
    above: Lambert's law on the normals of the smoothed shape. Background is 0.
    """
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


@dataclass(frozen=True)
class _Slice:
    """A slice, to be drawn; arrays are (up, across).

    Attributes:
        window: black and white; None for a picture of labels.
        outlines: labels whose outlines are drawn.
        ends: letters of the patient's sides, at the left and at the right.
    """

    picture: np.ndarray
    window: tuple[float, float] | None
    outlines: np.ndarray | None
    aspect: float
    ends: tuple[str, str]


def _slice_of(row: _Row, part: str, axis: int) -> _Slice | None:
    """Return the slice of a row's mask or image across an axis; None if the row has no such part."""
    picture = row.mask if part == "mask" else row.images.get(part)
    if picture is None:
        return None
    across, up = _across(axis)
    flat = part == "mask" or row.labels
    outlined = None if flat or row.mask is None else row.mask.take(row.center[axis], axis=axis).T
    drawn = picture.take(row.center[axis], axis=axis).T
    window, end = None if flat else row.windows[part], row.axes[across]
    return _Slice(drawn, window, outlined, row.spacing[up] / row.spacing[across], (OPPOSITE[end], end))


def _draw_row(panels: np.ndarray, row: _Row, parts: Sequence[str]) -> None:
    for x, (panel, part) in enumerate(zip(panels, list(parts) * len(PLANES), strict=True)):
        panel.set(anchor="N")
        _draw_slice(panel, _slice_of(row, part, PLANES[x // len(parts)][1]))


def _draw_slice(panel: Axes, drawn: _Slice | None) -> None:
    panel.set(xticks=[], yticks=[])
    if drawn is None:
        panel.spines[:].set_visible(False)
        return
    picture, aspect = drawn.picture, drawn.aspect
    if drawn.window is None:
        # labels beyond the palette start again after the background's black
        wrapped = np.where(picture > 0, (picture - 1) % (len(LABEL_COLORS) - 1) + 1, 0)
        colors = ListedColormap(LABEL_COLORS)
        top = len(LABEL_COLORS) - 1
        panel.imshow(wrapped, colors, vmin=0, vmax=top, interpolation="nearest", origin="lower", aspect=aspect)
    else:
        low, high = drawn.window
        panel.imshow(picture, "gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", aspect=aspect)
        if drawn.outlines is not None:
            _outline(panel, drawn.outlines)
    for place, letter in zip((0.02, 0.98), drawn.ends, strict=True):
        side = "left" if place < 0.5 else "right"
        mark = panel.text(place, 0.02, letter, transform=panel.transAxes, ha=side, va="bottom", fontsize=6, color=MARK)
        mark.set_path_effects([withStroke(linewidth=1, foreground="black")])  # readable on white too


def label_color(label: int) -> str:
    """Return the color of a label above 0; colors beyond the palette start again."""
    return LABEL_COLORS[(label - 1) % (len(LABEL_COLORS) - 1) + 1]


def _outline(panel: Axes, labels: np.ndarray, color: str | None = None) -> None:
    """Draw the outline of each label above 0, in its own color or in `color`."""
    limits = panel.get_xlim(), panel.get_ylim()
    for label in np.unique(labels[labels > 0]):
        inside = np.pad(labels == label, 1).astype(float)
        lines = np.arange(-1, inside.shape[1] - 1), np.arange(-1, inside.shape[0] - 1)
        panel.contour(*lines, inside, levels=[0.5], colors=[color or label_color(int(label))], linewidths=0.6)
    panel.set(xlim=limits[0], ylim=limits[1])


def _center(mask: np.ndarray | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    if mask is None or not (mask > 0).any():
        return tuple(n // 2 for n in shape)
    return tuple(round(float(indices.mean())) for indices in np.nonzero(mask > 0))


def _channels(values: Any) -> np.ndarray:
    """Return a (C, X, Y, Z) numpy array of an array or tensor, without further leading axes of length 1."""
    array = np.asarray(values.detach().cpu().float() if hasattr(values, "detach") else values)
    while array.ndim > 4 and len(array) == 1:
        array = array[0]
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or not array.size:
        raise ValueError(f"a picture shows (X, Y, Z) or (C, X, Y, Z) volumes, got shape {array.shape}")
    return array


def _array(values: Any) -> np.ndarray:
    """Return a (X, Y, Z) numpy array of one channel."""
    array = _channels(values)
    if len(array) != 1:
        raise ValueError(f"a picture shows (X, Y, Z) volumes, got shape {array.shape}")
    return array[0]
