"""Figures for the page, as SVG data URIs: without scripts, and without anything from the network."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from files.paths import open_regular, path_inside

from .model import Picture, Row

INK = "#1f2933"
FAINT = "#c9d2dc"
GOOD = "#2f7d5b"
BAD = "#b4552d"
MAX_ROWS = 500  # a figure grows with its rows
PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of a picture
MAX_BYTES = 1 << 25  # of a picture
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "svg.hashsalt": "medvolume",
}


def interval_plot(rows: Sequence[Row], caption: str, label: str = "") -> Picture:
    """Draw one line per row: the figure of generated volumes as a dot with its interval, the floor as a gray bar."""
    _check_size(len(rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.55 + 0.3 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(reversed(rows)):
            color = INK if row.within is None else (GOOD if row.within else BAD)
            if row.floor_interval is not None:
                low, high = row.floor_interval
                axes.barh(place, high - low, left=low, height=0.56, color=FAINT)
            if row.floor is not None:
                axes.plot([row.floor] * 2, [place - 0.28, place + 0.28], color="#8895a3", linewidth=1.5)
            if row.interval is not None:
                axes.plot(row.interval, [place] * 2, color=color, linewidth=1.6)
            axes.plot(row.value, place, "o", color=color, markersize=5)
        axes.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(label)
        return Picture(svg(figure), caption)


def line_plot(
    lines: Mapping[str, Sequence[tuple[float, tuple[float, float] | None]]],
    ticks: Sequence[str],
    caption: str,
    label: str,
) -> Picture:
    """Draw one line per name with one point per tick, and the point's interval if it has one."""
    _check_size(max(len(lines), len(ticks)))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.8), layout="constrained")
        axes = figure.subplots()
        for number, (name, points) in enumerate(lines.items()):
            color = (GOOD, "#8895a3", BAD, "#3b6fb0", "#7a5ea8")[number % 5]
            values = [value for value, _ in points]
            axes.plot(range(len(values)), values, "o-", color=color, markersize=4, label=name)
            for place, (_, interval) in enumerate(points):
                if interval is not None:
                    axes.plot([place] * 2, interval, color=color, linewidth=1)
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        return Picture(svg(figure), caption)


def svg(figure: Figure) -> str:
    """Convert a figure to a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _check_size(rows: int) -> None:
    if rows > MAX_ROWS:
        raise ValueError(f"{rows} figures are too many for a picture, which shows up to {MAX_ROWS}")


def png(folder: Path, name: str, key: str) -> str:
    """Read a picture in a report's folder, or below it, as a data URI.

    Args:
        name: path of the picture, relative to the folder.
        key: key of the report that holds the name, for messages.
    Raises: ValueError for a name that leads out of the folder (`files.paths.path_inside`), and for a file that is not a
    PNG.
    """
    path = path_inside(folder, name, key)
    with open_regular(path) as file:
        data = file.read(MAX_BYTES + 1)
    if not data.startswith(PNG) or len(data) > MAX_BYTES:
        raise ValueError(
            f"{key}: {name!r} is not a picture (PNG) of up to {MAX_BYTES >> 20} MiB; keep the pictures beside the JSON"
        )
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
