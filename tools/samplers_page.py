"""Write the reports of evaluation.studies.samplers on a teacher and its student into a page, between two comments.

python -m tools.samplers_page weights/hippocampus/results/samplers_validation.json \
        --student weights/hippocampus-fast/results/samplers_validation.json --page docs/quality_and_speed.md
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from cli.command import run_command
from tools.markdown import parse_page, rewrite_between


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    of_samplers = "report of evaluation.studies.samplers"
    return parse_page(__doc__, f"{of_samplers} on the teacher", args, student=f"{of_samplers} on the student")


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from evaluation.studies.sampler_report import markdown, read_report

BEGIN = "<!-- samplers: written by tools.samplers_page -->"
END = "<!-- end of samplers -->"


def measured(path: Path) -> str:
    """Return the table of a report, and how it was measured. Raises: ValueError for another file."""
    report = read_report(path)
    settings = cast(Mapping[str, Any], report["settings"])
    sources: list[Mapping[str, Any]] = [entry["measured"] for entry in report["combinations"]]
    commands = " and ".join(f"`{command}`" for command in dict.fromkeys(str(one["command"]) for one in sources))
    masks = f"{len(settings['masks'])} {settings.get('split', 'test')} masks"
    return (
        f"{markdown(report)}\nMeasured by {commands} on {masks}, "
        f"seed {settings['seed']}; {sources[0]['machine']['processor']}, {str(sources[0]['date'])[:10]}.\n"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Rewrite the page. Raises: ValueError for a page without the comments, or other files."""
    options = parse(args)
    text = f"\nThe teacher:\n\n{measured(options.report)}"
    if options.student:
        text += f"\nThe student, which needs no guidance:\n\n{measured(options.student)}"
    rewrite_between(options.page, BEGIN, END, f"{text}\n")
    print(options.page)
