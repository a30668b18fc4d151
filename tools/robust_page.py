"""Write what kills and damaged files did into docs/many_machines.md and docs/security.md, between two comments each.

    python -m tools.robust_page

The figures are those of docs/survival.json and docs/fuzz.json, of `benchmarks.survival` and tests/helpers/fuzz.py. A
page whose report is absent stays as it is.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.command import ArgumentParser, run_command

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN = "<!-- robust: written by tools.robust_page -->"
END = "<!-- end of robust -->"


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    return ArgumentParser(description=__doc__).parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from files.documents import read_object

from .markdown import rewrite_between, table
from .scale_page import origin


def main(args: Sequence[str] | None = None) -> None:
    """Write the pages whose reports are there."""
    parse(args)
    for page, text in pages().items():
        rewrite_between(page, BEGIN, END, f"\n{text}\n")
        print(page)


def pages() -> dict[Path, str]:
    """Return what stands between the comments of each page whose report is there."""
    texts = {"many_machines": ("survival", survival_text), "security": ("fuzz", fuzz_text)}
    reports = {page: (DOCS / f"{name}.json", text) for page, (name, text) in texts.items()}
    return {DOCS / f"{page}.md": text(read_object(path)) for page, (path, text) in reports.items() if path.is_file()}


def survival_text(report: Mapping[str, Any]) -> str:
    """Describe what was corrupt, lost or different after kills, by job."""
    rows = [
        (f"`{name}`", f"{job['kills']}", f"{len(job['corrupt_files'])}", f"{len(job['lost_or_different'])}")
        for name, job in report["jobs"].items()
    ]
    damaged = sum(len(job["damaged_entries"]) for job in report["jobs"].values())
    return (
        f"{table(('job', 'kills', 'corrupt files', 'lost or different'), rows)}\n"
        f"{damaged} entries of caches were damaged in between.\nMeasured by {origin(report)}.\n"
    )


def fuzz_text(report: Mapping[str, Any]) -> str:
    """Describe the outcomes of damaged files."""
    read, refused = (
        sum(one["counts"].get(outcome, 0) for one in report["targets"].values()) for outcome in ("read", "refused")
    )
    memory = max(one["peak_bytes"] for one in report["targets"].values()) / 1e9
    return (
        f"{origin(report)}, {report['seconds']:,} s: {report['cases']:,} cases, {len(report['findings'])} findings; "
        f"{refused:,} refused, {read:,} read; at most {memory:.2f} GB resident.\n"
    )
