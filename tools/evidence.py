"""Write docs/evidence.md and the cards of the shipped models from the reports of evaluate.py.

    python -m tools.evidence [--reports DIR]

The text is in docs/evidence.in.md. In it, `{report.a.b:.3f}` is reports/report.json ["a"]["b"], and `{tables}` are
the tables of `evaluate.py report`. The cards are filled as in `tools.ship`. A missing figure is an error.
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
        "--reports", type=Path, default=ROOT / "weights/hippocampus/results", help="JSON reports for the page"
    )
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from evaluation.html import build_page, write_page
from evaluation.html.realism import consistent_claim
from evaluation.html.render import ORDER
from files.atomic import write_text
from files.documents import read_object
from tools.ship import card_text, fill, summaries

CARDS = {  # of weights/, and their templates in configs/
    "hippocampus": "hippocampus/card.md",
    "hippocampus-fast": "hippocampus/card_fast.md",
    "hippocampus-masks": "hippocampus_masks/card.md",
    "adrenal-shapes": "adrenal_shapes/card.md",
}


def main(args: Sequence[str] | None = None) -> None:
    """Write the page and the cards."""
    options = parse(args)
    for path, text in {ROOT / "docs/evidence.md": page(options.reports), **cards()}.items():
        write_text(path, text)
        print(path)


def cards() -> dict[Path, str]:
    """Return the model cards by their files."""
    folders = {ROOT / "weights" / name: ROOT / "configs" / template for name, template in CARDS.items()}
    return {folder / "README.md": card_text(template, folder) for folder, template in folders.items()}


def page(folder: Path) -> str:
    """Return docs/evidence.md with the figures of the reports in a folder. Raises: ValueError if there are none."""
    reports = {path.stem: read_object(path) for path in sorted(folder.glob("*.json"))}
    if not any(name in reports for name in ORDER):
        raise ValueError(f"--reports {folder}: no JSON reports of evaluate.py there")
    with tempfile.TemporaryDirectory() as out:
        paths = [Path(out, f"{name}.json") for name in ORDER if name in reports]
        for path in paths:  # without the pictures of pairs, which show scans and are not beside them
            path.write_text(json.dumps({k: v for k, v in reports[path.stem].items() if k != "pictures"}))
        write_page(build_page(paths), Path(out), "Evidence")
        tables = Path(out, "report.md").read_text()
    tables = tables[tables.index("\n## ") :]  # the title and the summary are written by hand
    return fill((ROOT / "docs/evidence.in.md").read_text(), {**reports, **summaries(reports)} | {
        "slices": consistent_claim(reports.get("realism")).sentence.partition(" statistics")[0],
        "tables": re.sub(r"^##", "###", tables, flags=re.MULTILINE).strip(),
    })  # fmt: skip
