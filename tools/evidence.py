"""Write docs/evidence.md from the reports of evaluate.py.

    python -m tools.evidence [--reports DIR]

The text is in docs/evidence.in.md. In it, `{report.a.b:.3f}` is reports/report.json ["a"]["b"], and `{tables}` are
the tables of `evaluate.py report`. A missing figure is an error.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cli.command import ArgumentParser, run_command

ROOT = Path(__file__).resolve().parents[1]


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--reports", type=Path, default=ROOT / "weights/hippocampus/results", help="folder of JSON reports"
    )
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from evaluation.html import build_page, write_page
from evaluation.html.realism import consistent_claim
from evaluation.html.render import ORDER
from files.documents import read_object
from tools.ship import fill, summaries


def main(args: Sequence[str] | None = None) -> None:
    """Write docs/evidence.md."""
    options = parse(args)
    reports = {path.stem: read_object(path) for path in sorted(options.reports.glob("*.json"))}
    if not any(name in reports for name in ORDER):
        raise ValueError(f"--reports {options.reports}: no JSON reports of evaluate.py there")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{name}.json") for name in ORDER if name in reports]
        for path in paths:  # without the pictures of pairs, which show scans and are not beside them
            path.write_text(json.dumps({k: v for k, v in reports[path.stem].items() if k != "pictures"}))
        write_page(build_page(paths), Path(folder), "Evidence")
        tables = Path(folder, "report.md").read_text()
    tables = tables[tables.index("\n## ") :]  # the title and the summary are written by hand
    text = fill((ROOT / "docs/evidence.in.md").read_text(), {**reports, **summaries(reports)} | {
        "slices": consistent_claim(reports.get("realism")).sentence.partition(" statistics")[0],
        "tables": re.sub(r"^##", "###", tables, flags=re.MULTILINE).strip(),
    })  # fmt: skip
    (ROOT / "docs/evidence.md").write_text(text)
    print(ROOT / "docs/evidence.md")
