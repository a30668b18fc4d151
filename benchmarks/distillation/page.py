"""Write the figures of distillation.json, and of a trained student, into docs/distillation.md, between two comments.

python -m benchmarks.distillation.page docs/distillation.json --student docs/distillation_student.json \
    --page docs/distillation.md
"""

import argparse
from collections.abc import Sequence

from cli.command import run_command
from tools.markdown import parse_page, rewrite_between, table


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    student = "JSON file of benchmarks.distillation.measure"
    return parse_page(__doc__, "JSON file of benchmarks.distillation.compare", args, student=student)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import numpy as np

from evaluation.report import read_report

from .compare import Report
from .measure import Report as StudentReport

BEGIN = "<!-- distillation: written by benchmarks.distillation.page -->"
END = "<!-- end of distillation -->"


def losses_text(report: Report) -> str:
    """Return the table of the losses, as means over the seeds."""
    rows = report["rows"]
    keys = list(dict.fromkeys((row["model"], row["calls"], row["seconds"]) for row in rows))
    cells = []
    for model, calls, seconds in keys:
        same = [row for row in rows if (row["model"], row["calls"], row["seconds"]) == (model, calls, seconds)]
        mean = {name: np.mean([row[name] for row in same]) for name in ("distance", "power", "kernel")}
        counts = [row["steps"] for row in same if row["steps"] is not None]
        steps = f"{np.mean(counts):.0f}" if counts else ""
        figures = [f"{mean['distance']:.3f}", f"{mean['power']:+.1f}", f"{mean['kernel']:.3f}"]
        cells.append([model, "" if seconds is None else f"{seconds:g}", steps, str(calls), *figures])
    header = ["model", "seconds", "steps", "calls", "distance", "fine power, dB", "kernel distance"]
    floor = rows[0]["floor"]
    return (
        f"{table(header, cells)}\nThe kernel distance of training phantoms is {floor:.3f}. "
        f"Measured by `{report['command']}` on {report['machine']['processor']} ({report['date'][:10]}).\n"
    )


def student_text(report: StudentReport) -> str:
    """Return the table of a trained student beside its teacher."""
    bands = [f"{low:.2f}-{high:.2f}" for low, high in zip(report["bands"], report["bands"][1:], strict=False)]
    shown = [index for index, band in enumerate(bands) if band in ("0.10-0.15", "0.20-0.25", "0.30-0.35", "0.40-0.45")]
    cells = []
    for row in report["rows"]:
        power = [f"{row['power'][index]:+.1f}" for index in shown]
        cells.append([row["model"], str(row["calls"]), f"{row['distance']:.3f}", f"{row['kernel']:.3f}", *power])
    header = ["model", "calls", "distance", "kernel distance", *(f"power {bands[index]}" for index in shown)]
    return (
        f"\n{table(header, cells)}\nThe kernel distance of training volumes is {report['rows'][0]['floor']:.3f}; "
        f"{report['volumes']} validation volumes, power in dB by cycles per voxel. "
        f"Measured by `{report['command']}` ({report['date'][:10]}).\n"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Rewrite the part of the page. Raises: ValueError if the page does not have the two comments."""
    options = parse(args)
    text = losses_text(read_report(options.report, Report, "benchmarks.distillation.compare"))
    if options.student is not None:
        text += student_text(read_report(options.student, StudentReport, "benchmarks.distillation.measure"))
    rewrite_between(options.page, BEGIN, END, f"\n{text}\n")
