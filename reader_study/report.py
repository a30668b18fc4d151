"""Write the report of a study: report.html, report.json and answers.csv."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from evaluation.html.plots import BAD, GOOD, INK, STYLE, svg
from evaluation.html.render import shown
from evaluation.report import provenance
from files.atomic import write_text

from .answers import Reading
from .questions import LETTERS, SCALES

COLORS = ("#3b6fb0", BAD, GOOD, "#7a5ea8", "#8895a3", "#b08a2e")
COLUMNS: tuple[str, ...] = (
    "reader",
    "item",
    "section",
    "repeat_of",
    "source",
    "decision",
    "confidence",
    "appearance",
    "consistency",
)
COLUMNS += ("anatomy", "choice", "seconds", "visits", "comment")


def write_study_report(result: Mapping[str, Any], readings: Sequence[Reading], output: Path) -> None:
    """Write the report of `analysis.analyze` to a folder: a page without scripts, the figures, and the answers."""
    output.mkdir(parents=True, exist_ok=True)
    document = _finite(shown({**result, **provenance()}))
    environment = Environment(
        loader=PackageLoader("reader_study.html", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number, "p": p_value, "interval": interval}
    page = environment.get_template("report.html.jinja").render(
        result=document, scales=SCALES, letters=LETTERS, roc=roc_picture(result), ratings=ratings_picture(result)
    )
    write_text(output / "report.html", page)
    write_text(output / "report.json", json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    # A comment may hold one half of a character, such as of an emoji that was cut: a question mark then.
    write_text(output / "answers.csv", _table(readings).encode("utf-8", "replace").decode("utf-8"))


def percent(value: float | None) -> str:
    """Format a share."""
    return "not defined" if value is None else f"{100 * value:.1f} %"


def number(value: float | None, digits: int = 2) -> str:
    """Format a figure."""
    # "+ 0.0" turns -0.0, of which Python writes the sign, into 0.0
    return "not defined" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def p_value(value: float | None) -> str:
    """Format a p value."""
    return "not defined" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def interval(ends: Sequence[float] | None, share: bool = False) -> str:
    """Format an interval, or say that there is none."""
    if ends is None:
        return "no interval: nothing varies"
    form = percent if share else number
    return f"{form(ends[0])} to {form(ends[1])}"


def roc_picture(result: Mapping[str, Any]) -> str:
    """Draw the ROC curve of each reader, as a data URI."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="#c9d2dc", linewidth=1)
        for place, (reader, own) in enumerate(result["readers"].items()):
            label = f"{reader.replace('_', ' ')}: {own['auc']:.2f}"
            axes.plot(*own["roc"], "o-", markersize=3, color=COLORS[place % len(COLORS)], label=label)
        axes.set_xlabel("real volumes called generated")
        axes.set_ylabel("generated volumes called generated")
        axes.set_aspect("equal")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
        return svg(figure)


def ratings_picture(result: Mapping[str, Any]) -> str:
    """Draw the shares of the answers on the three scales, by source, all readers together, as a data URI."""
    shades = ("#b4552d", "#dfa37f", "#9fb7d8", "#3b6fb0")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.subplots()
        names = []
        for scale in SCALES:
            by_source: dict[str, list[int]] = {}
            for own in result["scales"][scale.name]["counts"].values():
                for source, counts in own.items():
                    summed = zip(by_source.get(source, [0] * len(LETTERS)), counts, strict=True)
                    by_source[source] = [a + b for a, b in summed]
            for source, counts in by_source.items():
                place, left, total = len(names), 0.0, max(sum(counts), 1)
                for shade, count, letter in zip(shades, counts, LETTERS, strict=True):
                    axes.barh(place, count / total, left=left, color=shade, label=letter if place == 0 else None)
                    left += count / total
                names.append(f"{scale.text}: {source}")
        axes.set_yticks(range(len(names)), names, color=INK)
        axes.invert_yaxis()
        axes.set_xlabel("share of the answers")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return svg(figure)


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by None, which JSON has."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(readings: Sequence[Reading]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for one in readings:
        # A leading apostrophe keeps spreadsheets from running a comment as a formula.
        comment = f"'{one.comment}" if one.comment[:1] in tuple("=+-@\t\r") else one.comment
        place = {"reader": one.reader, "item": one.item.id, "section": one.item.section, "source": one.source}
        times = {"seconds": f"{one.seconds:.1f}", "visits": one.visits, "comment": comment}
        writer.writerow({**place, "repeat_of": one.item.repeat_of or "", **one.answers, **times})
    return stream.getvalue()
