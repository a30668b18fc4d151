"""`evaluate.py report`: one page from the reports of the other commands."""

from pathlib import Path

import torch
from jsonargparse import Namespace

from evaluation.html import build_page, write_page

NAME = "report"


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, object]:
    """Write the page, and print the verdict on each claim."""
    output = Path(options.output)
    page = build_page([Path(path) for path in options.reports])
    report = write_page(page, output, options.title)
    for claim in page.claims:
        verdict = "" if claim.row is None else f" {claim.row.verdict}".rstrip()
        print(f"{claim.title}:{verdict} {claim.sentence}")
    print(f"page: {output / 'report.html'}")
    return report
