"""`evaluate.py report`: one page from the reports of the other commands."""

from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from ..page import write_page

NAME = "report"
HELP = "One page that needs nothing beside it (report.html), report.md and report.json, from JSON reports of the other commands."
READS_DATA = False


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("reports", nargs="+", type=str, help="JSON reports, one of each command at most")
    parser.add_argument("--output", type=str, required=True, help="folder to write to")
    parser.add_argument(
        "--title", type=str, default="Are the generated volumes good, useful and private?", help="heading"
    )


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Write the page and say what the claims come to."""
    output = Path(options.output)
    page = write_page([Path(path) for path in options.reports], output, options.title)
    for claim in page["claims"]:
        row = claim["row"]
        verdict = "" if row is None or row["within"] is None else (" within" if row["within"] else " outside")
        print(f"{claim['title']}:{verdict} {claim['sentence']}")
    print(f"page: {output / 'report.html'}")
    return page
