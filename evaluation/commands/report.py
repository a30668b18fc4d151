"""`evaluate.py report`: one page from the reports of the other commands."""

from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from evaluation.html import write_page

NAME = "report"


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
