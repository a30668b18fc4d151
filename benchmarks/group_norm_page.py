"""Write the figures of group_norm_streaming.json into docs/large_volumes.md, between two comments.

python -m benchmarks.group_norm_page docs/group_norm_streaming.json --page docs/large_volumes.md
"""

import argparse
from collections.abc import Sequence

from cli.command import run_command
from tools.markdown import parse_page, rewrite_between, table


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    return parse_page(__doc__, "JSON file of benchmarks.group_norm_streaming", args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from evaluation.report import read_report

from .group_norm_streaming import Report, Row

BEGIN = "<!-- GroupNorm in slabs: written by benchmarks.group_norm_page -->"
END = "<!-- end of GroupNorm in slabs -->"
NAMES = {"whole": "ours, in one piece", "slabs": "ours, in slabs", "monai": "MONAI's own class, in one piece"}


def page_text(report: Report) -> str:
    """Return the part between the two comments: a table of all codings, and how they were measured."""
    header = ["", "volume", "network", "memory", "core", "elapsed", "temporary file", "from ours in one piece"]
    rows = sorted(report["rows"], key=lambda row: (row["job"], row["side"], list(NAMES).index(row["network"])))
    load = max(report["load_before"], report["load_after"])
    return (
        f"\n{table(header, (_cells(row) for row in rows))}\n"
        f"Memory is the peak above weights and input, of {report['parameters']:,} parameters in float32; "
        f"slab_bytes is {report['slab_bytes'] >> 20} MiB.\n"
        "Core is the time that the process computed on its one core, elapsed includes the wait for disk and other "
        f"jobs (load {load:.0f} on the machine); each was measured once, in a process of its own.\n"
        "The last column is the largest difference, in the range of the result; the weights are random.\n"
        f"Measured by `{report['command']}` on {report['machine']['processor']} ({report['date'][:10]}; "
        "docs/group_norm_streaming.json).\n"
    )


def _cells(row: Row) -> list[str]:
    cells = [row["job"], f"{row['side']}^3", NAMES[row["network"]]]
    if "memory_bytes" not in row or "cpu_seconds" not in row or "seconds" not in row:
        return [*cells, row["status"], "-", "-", "-", "-"]
    file, difference = row.get("file_bytes", 0), row.get("difference")
    return [
        *cells,
        f"{row['memory_bytes'] / 1e9:.2f} GB",
        f"{row['cpu_seconds']:.0f} s",
        f"{row['seconds']:.0f} s",
        f"{file / 1e9:.2f} GB" if file else "-",
        "-" if difference is None else f"{difference:.1e}",
    ]


def main(args: Sequence[str] | None = None) -> None:
    """Rewrite the part of the page. Raises: ValueError if the page does not have the two comments."""
    options = parse(args)
    report = read_report(options.report, Report, "benchmarks.group_norm_streaming")
    rewrite_between(options.page, BEGIN, END, page_text(report))


if __name__ == "__main__":
    run_command(main)
