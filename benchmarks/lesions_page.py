"""Write the figures of small_lesions.json into docs/small_structures.md, between two comments.

python -m benchmarks.lesions_page docs/small_lesions.json --page docs/small_structures.md
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.command import ArgumentParser, run_command


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="JSON file of benchmarks.small_lesions")
    parser.add_argument("--page", type=Path, required=True, help="Markdown file with the two comments")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from .small_lesions import Figures
from .speed.report import table

BEGIN = "<!-- small lesions: written by benchmarks.lesions_page -->"
END = "<!-- end of small lesions -->"
PARTS = {"real": "real phantoms", "autoencoders": "reconstructions", "generated": "generated volumes"}


def page_text(report: Mapping[str, Any]) -> str:
    """Return the part of the page between the two comments: one table of all that was measured."""
    real: Figures = report["real"]["real"]
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
    text = options.page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{options.page}: needs the lines {BEGIN} and {END}, between which the figures go")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    options.page.write_text(f"{before}{BEGIN}\n{page_text(json.loads(options.report.read_text()))}{END}{after}")


if __name__ == "__main__":
    main()
