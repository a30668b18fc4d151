"""Contact sheets: volumes side by side in one picture, to look a whole set over.

The drawing of slices, outlines and surfaces is that of `figures`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .figures import (
    PLANES,
    FigureCase,
    _across,
    _channels,
    _draw_slice,
    _inches_per_mm,
    _lit,
    _outline,
    _Row,
    _rows_of,
    _Slice,
    _slice_of,
    label_color,
)

LEFT_INCHES, GAP_INCHES, LINE_INCHES = 1.15, 0.05, 0.13  # room for the rows' labels, between panels, for a line of text
LETTERS_PER_INCH = 16  # of text of 7 points
SURFACE = "surface"
REGION_COLOR = "#ffffff"
MOST_LABELS = 24  # in the legend
WHITE = "White: the region that was generated."
RIGHT = "The patient's right is on the right (neurological convention); L and R are marked."


@dataclass(frozen=True)
class _Key:
    """What a row of the sheet shows: a part of a channel in a plane."""

    channel: str
    plane: str
    part: str


@dataclass(frozen=True)
class _Cell:
    """A panel: a slice (with the region of an edit), or a surface (X, Z) with brightness in [0, 1]; size in mm."""

    size: tuple[float, float]
    drawn: _Slice | None = None
    region: np.ndarray | None = None
    surface: np.ndarray | None = None


@dataclass(frozen=True)
class _Column:
    """A case without its voxels: the panels, the window of each channel, and the label values of its mask."""

    title: str
    cells: dict[_Key, _Cell]
    windows: dict[str, str]
    labels: list[int]


def contact_sheet(cases: Iterable[FigureCase], label_names: Mapping[int, str] | None = None) -> Figure:
    """Draw volumes side by side: a column per case, its title below it, all at one scale.

    The rows are the planes (axial, coronal, sagittal) through the center of the region of an edit, or else of the
    largest label, or through the middle of a volume without a mask. Each plane shows the last image with the outlines
    of the labels and of the region, then each image alone. Several channels have a block of rows each. Label maps are
    drawn in colors, and as lit surfaces. Windows are in the images' units. Directions are as in `slices_figure`, for
    axes that point to R, A and S.

    Args:
        cases: taken one after the other; of each, only the slices are held.
        label_names: names for the legend.
    Raises: ValueError for no cases, and arrays of other dimensions.
    """
    columns = list(map(_column, cases))  # which keeps no case while the next is read
    if not columns:
        raise ValueError("contact_sheet needs at least one case")
    keys = _in_order(list(dict.fromkeys(key for column in columns for key in column.cells)))
    cells = [cell for column in columns for cell in column.cells.values()]
    width = max(cell.size[0] for cell in cells)
    heights = [max(column.cells[key].size[1] for column in columns if key in column.cells) for key in keys]
    inches = _inches_per_mm([width] * len(columns), heights)
    shared = {channel: _shared(columns, channel) for channel in dict.fromkeys(key.channel for key in keys)}
    letters = max(8, int(width * inches * LETTERS_PER_INCH))
    titles = [_lines(_title(column, shared), letters) for column in columns]
    page = LEFT_INCHES + len(columns) * (width * inches + GAP_INCHES)
    white = WHITE if any(cell.region is not None for cell in cells) else ""
    footer = textwrap.wrap(
        f"{RIGHT} Windows are in the units of the files. {white}", max(30, int(LETTERS_PER_INCH * page))
    )
    below = LINE_INCHES * (max(map(len, titles)) + len(footer) + 1)
    values = sorted({value for column in columns for value in column.labels})[:MOST_LABELS]
    legend = 0.0 if not values else LINE_INCHES * (-(-len(values) // _legend_columns(page)) + 1.5)
    height = below + legend + sum(heights) * inches + GAP_INCHES * (len(heights) + 1)
    figure = Figure(figsize=(page, height))
    top = height - GAP_INCHES
    for row, (key, tall) in enumerate(zip(keys, heights, strict=True)):
        bottom = top - tall * inches
        figure.text(0.05 / page, (top + bottom) / 2 / height, _row_label(keys, row, shared), fontsize=7, va="center")
        for number, column in enumerate(columns):
            if (cell := column.cells.get(key)) is not None:
                left = LEFT_INCHES + number * (width * inches + GAP_INCHES) + (width - cell.size[0]) * inches / 2
                _draw_cell(figure, cell, (left, top, inches), (page, height))
        top = bottom - GAP_INCHES
    for number, lines in enumerate(titles):
        middle = LEFT_INCHES + number * (width * inches + GAP_INCHES) + width * inches / 2
        figure.text(middle / page, top / height, "\n".join(lines), fontsize=7, ha="center", va="top")
    figure.text(0.05 / page, 0.05 / height, "\n".join(footer), fontsize=7, va="bottom")
    if values:
        _draw_legend(figure, values, label_names or {}, page, (len(footer) + 0.5) * LINE_INCHES / height)
    return figure


def central_voxel(labels: np.ndarray) -> tuple[int, ...] | None:
    """Return a voxel (x, y, z) of the largest label above 0: the one nearest to its center; None without labels."""
    values, counts = np.unique(labels[labels > 0], return_counts=True)
    if not len(values):
        return None
    voxels = np.argwhere(labels == values[counts.argmax()])
    return tuple(voxels[((voxels - voxels.mean(axis=0)) ** 2).sum(axis=1).argmin()].tolist())


def _column(case: FigureCase) -> _Column:
    mask = None if (given := case.get("mask")) is None else _channels(given)[0]
    flat, region = bool(case.get("labels")), case.get("region")
    labels = _channels(list(case["images"].values())[-1])[0] if flat else mask
    marked = labels if region is None else _channels(region)[0]
    if case.get("center") is None and marked is not None:
        case = {**case, "center": central_voxel(marked)}
    cells: dict[_Key, _Cell] = {}
    windows = {}
    for number, row in enumerate(_rows_of({**case, "title": ""})):
        channel = (list(case.get("channels") or []) or [""] * (number + 1))[number]
        windows[channel] = row.label.removeprefix(channel).strip()
        for plane, axis in PLANES:
            across, up = _across(axis)
            size = row.sides[across], row.sides[up]
            outlined = mask is not None or region is not None
            for part in [*(["mask"] if outlined and not flat else []), *row.images]:
                drawn = _slice_of(row if part == "mask" else _plain(row), _shown(row, part), axis)
                here = None if region is None or part != "mask" else _channels(region)[0]
                cut = None if here is None else here.take(row.center[axis], axis=axis).T != 0
                cells[_Key(channel, plane, part)] = _Cell(size, drawn, cut)
        if flat and labels is not None:
            cells[_Key(channel, SURFACE, "")] = _Cell((row.sides[0], row.sides[2]), surface=_lit(labels))
    found = [] if labels is None else [int(value) for value in np.unique(labels) if value > 0]
    return _Column(case.get("title", ""), cells, windows, found)


def _shown(row: _Row, part: str) -> str:
    """Return the image that a part shows: the last one, under the outlines."""
    return list(row.images)[-1] if part == "mask" else part


def _plain(row: _Row) -> _Row:
    """Return the row without its mask, so that nothing is outlined."""
    return _Row(**{**vars(row), "mask": None})


def _in_order(keys: Sequence[_Key]) -> list[_Key]:
    """Sort the rows of the sheet: by channel, plane and part, each in order of first appearance."""
    channels = list(dict.fromkeys(key.channel for key in keys))
    planes = [*(plane for plane, _ in PLANES), SURFACE]
    parts = sorted(dict.fromkeys(key.part for key in keys), key=lambda part: part != "mask")
    return sorted(keys, key=lambda key: (channels.index(key.channel), planes.index(key.plane), parts.index(key.part)))


def _shared(columns: Sequence[_Column], channel: str) -> str | None:
    """Return the window of a channel if all cases have the same; None if they differ."""
    found = {column.windows[channel] for column in columns if channel in column.windows}
    return found.pop() if len(found) == 1 else None


def _title(column: _Column, shared: Mapping[str, str | None]) -> str:
    """Return the text below a column: its title, and the windows that others do not share."""
    own = [f"{channel} {text}".strip() for channel, text in column.windows.items() if shared[channel] is None]
    return "\n".join([column.title, *own])


def _lines(text: str, letters: int) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, letters) or [""]]


def _row_label(keys: Sequence[_Key], row: int, shared: Mapping[str, str | None]) -> str:
    """Return the text beside a row; the first of a channel has its name and window too."""
    key = keys[row]
    first = row == 0 or keys[row - 1].channel != key.channel
    several = len({one.part for one in keys if one.plane == key.plane}) > 1
    plane = "from the front" if key.plane == SURFACE else key.plane
    head = [key.channel, shared[key.channel] or ""] if first else []
    return "\n".join(text for text in [*head, plane, key.part if several else ""] if text)


def _draw_cell(figure: Figure, cell: _Cell, place: tuple[float, float, float], page: tuple[float, float]) -> None:
    """Draw a panel whose upper left corner is at `place`: inches from the left and the bottom, and inches per mm."""
    left, top, inches = place
    across, up = (side * inches for side in cell.size)
    panel = figure.add_axes((left / page[0], (top - up) / page[1], across / page[0], up / page[1]))
    if cell.surface is not None:
        panel.set(xticks=[], yticks=[], facecolor="black")
        panel.imshow(cell.surface.T, "gray", vmin=0, vmax=1, origin="lower", aspect="auto")
        return
    _draw_slice(panel, cell.drawn)
    if cell.region is not None:
        _outline(panel, cell.region.astype(int), REGION_COLOR)


def _legend_columns(page: float) -> int:
    return max(1, int(page / 1.6))


def _draw_legend(figure: Figure, values: Sequence[int], names: Mapping[int, str], page: float, bottom: float) -> None:
    """Name the colors of the labels."""
    handles = [Patch(color=label_color(value), label=f"{value} {names.get(value, '')}".strip()) for value in values]
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.0, bottom),
        ncols=min(len(values), _legend_columns(page)),
        fontsize=7,
        frameon=False,
        borderaxespad=0.2,
        handlelength=1.0,
    )
