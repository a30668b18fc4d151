"""Write the figures of small_lesions.json into docs/small_structures.md, between two comments.

python -m benchmarks.learning.lesions_page docs/small_lesions.json --page docs/small_structures.md
"""

import argparse
from collections.abc import Sequence

from cli.command import run_command
from tools.markdown import parse_page, rewrite_between, table


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    return parse_page(__doc__, "JSON file of benchmarks.learning.small_lesions", args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from evaluation.report import read_report

from .small_lesions import Report

BEGIN = "<!-- small lesions: written by benchmarks.learning.lesions_page -->"
END = "<!-- end of small lesions -->"
PARTS = {"real": "real phantoms", "autoencoders": "reconstructions", "generated": "generated volumes"}


def page_text(report: Report) -> str:
    """Return the part of the page between the two comments: one table of all that was measured."""
    real = report["real"]["real"]
    sizes = list(real["by_voxels"])
    header = ["volumes", "lesions", "less than real", "contrast", *(f"{size} voxels" for size in sizes), "organ"]
    rows = []
    for part, title in PARTS.items():
        for name, found in report.get(part, {}).items():
            by_size = [found["by_voxels"].get(size) for size in sizes]
            cells = ["-" if one is None else f"{one['dice']:.3f}" for one in by_size]
            organ = found["labels"].get("organ")
            named = title if part == "real" else f"{title}: {name}"
            less = f"{real['dice'] - found['dice']:.3f}"
            cells.append("-" if organ is None else f"{organ:.3f}")
            rows.append([named, f"{found['dice']:.3f}", less, f"{found['contrast']:.2f}", *cells])
    counts = ", ".join(f"{one['lesions']} of {size}" for size, one in real["by_voxels"].items())
    steps, machine = report["steps"], report["machine"]["processor"]
    return (
        f"\n{table(header, rows)}\n"
        f"Dice of the segmenter by lesion, on {report['test_phantoms']} test phantoms ({counts} voxels); autoencoders "
        f"of {steps['autoencoder']} steps, diffusion models of {steps['diffusion']}, on the weighted autoencoder of "
        f"stride 2. Measured by `{report['command']}` on {machine} ({report['date'][:10]}; docs/small_lesions.json).\n"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Rewrite the part of the page. Raises: ValueError if the page does not have the two comments."""
    options = parse(args)
    report = read_report(options.report, Report, "benchmarks.learning.small_lesions")
    rewrite_between(options.page, BEGIN, END, page_text(report))
