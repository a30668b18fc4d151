"""Write the figures of learning_per_step.json into docs/quality_and_speed.md, between two comments.

python -m benchmarks.learning.per_step_page docs/learning_per_step.json --page docs/quality_and_speed.md
"""

import argparse
from collections.abc import Sequence

from cli.command import run_command
from tools.markdown import parse_page, rewrite_between, table


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    return parse_page(__doc__, "JSON file of benchmarks.learning.per_step", args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from evaluation.report import read_report

from .per_step import Figure, Report

BEGIN = "<!-- learning per step: written by benchmarks.learning.per_step_page -->"
END = "<!-- end of learning per step -->"


def percent(figure: Figure) -> str:
    """Return a relative difference with its interval."""
    interval = figure["interval"]
    reach = "one seed" if interval is None else f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"
    return f"{100 * figure['mean']:+.2f} % ({reach})"


def page_text(report: Report) -> str:
    """Return the part of the page between the two comments: one row for each change."""
    rows = []
    for name, found in report["compared"].items():
        shares = [share for share in found["share_of_steps"] if share is not None]
        reached = f"{len(shares)} of {len(found['share_of_steps'])}"
        after = f", after {100 * sum(shares) / len(shares):.0f} % of the steps" if shares else ""
        rows.append([name, percent(found["loss"]), percent(found["even"]), f"{reached}{after}"])
    header = ["change", "validation loss", "loss at even timesteps", "trainings that reached the plain one's end"]
    machine = report["machine"]["processor"]
    return (
        f"\n{table(header, rows)}\n"
        f"Relative to the plain training of the same seed, with 95 % intervals over the seeds; negative is better. "
        f"{report['steps']} steps of {report['batch']} latents each. "
        f"Alignment takes {100 * (report['arithmetic']['align'] - 1):.1f} % more arithmetic in a step. "
        f"Measured by `{report['command']}` on {machine} ({report['date'][:10]}; docs/learning_per_step.json).\n"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Rewrite the part of the page. Raises: ValueError if the page does not have the two comments."""
    options = parse(args)
    report = read_report(options.report, Report, "benchmarks.learning.per_step")
    rewrite_between(options.page, BEGIN, END, page_text(report))
