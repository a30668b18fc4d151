"""Figures for the page, as SVG data URIs: no script, and nothing from the net."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from files.paths import open_regular, path_inside

from .model import Picture, Row

INK, FAINT, GOOD, BAD = "#1f2933", "#c9d2dc", "#2f7d5b", "#b4552d"
MOST_ROWS = 500  # of a figure, whose height grows with them
PNG, MAX_BYTES = b"\x89PNG\r\n\x1a\n", 1 << 25  # how a picture begins, and how large it is at most
STYLE: dict[Any, Any] = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "svg.hashsalt": "medvolume"}


def interval_plot(rows: Sequence[Row], caption: str, label: str = "") -> Picture:
    """A line a row: the generated volumes' figure with its interval as a dot, the floor with its as a gray bar."""
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
    """A line for each name, a point a tick, with its interval where it has one."""
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
    """The figure as a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _check_size(rows: int) -> None:
    if rows > MOST_ROWS:
        raise ValueError(f"{rows} figures are more than a picture shows ({MOST_ROWS})")


def png(folder: Path, named: str, what: str) -> str:
    """The picture of that name in a report's folder, or below it, as a data URI.

    Args:
        what: what names it, for the message.
    Raises: ValueError for a name that leads out of the folder (`files.paths.path_inside`), and for what is no PNG.
    """
    path = path_inside(folder, named, what)
    with open_regular(path) as file:
        data = file.read(MAX_BYTES + 1)
    if not data.startswith(PNG) or len(data) > MAX_BYTES:
        raise ValueError(
            f"{what}: {named!r} is no picture (PNG) of up to {MAX_BYTES >> 20} MiB; keep the pictures with the JSON"
        )
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
