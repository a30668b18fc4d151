"""Write Markdown: tables, and the part of a page between two comments."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from cli.command import ArgumentParser
from files.atomic import write_text


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, with a line break at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def parse_page(description: str | None, report: str, args: Sequence[str] | None, **more: str) -> argparse.Namespace:
    """Parse the command line of a program that writes a report's figures into a page: `report` and `--page`.

    Args:
        report: help of the argument `report`.
        more: help of further reports, by option.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument("report", type=Path, help=report)
    for name, text in more.items():
        parser.add_argument(f"--{name}", type=Path, help=text)
    parser.add_argument("--page", type=Path, required=True, help="Markdown file with the two comments")
    return parser.parse_args(args)


def rewrite_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between the comments `begin` and `end` of a page by `text`, on lines of its own.

    Raises: ValueError naming the page if it does not have the two comments, each once and in this order.
    """
    old = page.read_text(encoding="utf-8")
    before, _, rest = old.partition(begin)
    _, _, after = rest.partition(end)
    if old.count(begin) != 1 or old.count(end) != 1 or end in before:
        raise ValueError(f"{page}: needs the lines {begin} and {end}, once each, between which the figures go")
    write_text(page, f"{before}{begin}\n{text}{end}{after}")
