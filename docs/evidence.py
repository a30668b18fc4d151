"""docs/evidence.md from the reports of evaluate.py and evaluation.samplers:  python -m docs.evidence [--reports DIR]

What people wrote is in evidence.in.md; `{report.a.b:.3f}` there is reports/report.json ["a"]["b"], `{tables}` are the tables of
`evaluate.py report`, and `{samplers}` is the table of `evaluation.samplers`. A figure that no report holds is an error.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path

from evaluation.page import write_page
from evaluation.page.render import ORDER
from evaluation.samplers import markdown
from weights.ship import fill, summaries

ROOT = Path(__file__).resolve().parents[1]


def main(args: list[str] | None = None) -> None:
    """Write docs/evidence.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--reports", type=Path, default=ROOT / "weights/hippocampus/results", help="folder of JSON reports"
    )
    options = parser.parse_args(args)
    found = {path.stem: json.loads(path.read_text()) for path in sorted(options.reports.glob("*.json"))}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{name}.json") for name in ORDER if name in found]
        for path in paths:  # without the pictures of pairs, which show scans and are not beside them
            path.write_text(json.dumps({k: v for k, v in found[path.stem].items() if k != "pictures"}))
        write_page(paths, Path(folder), "Evidence")
        tables = Path(folder, "report.md").read_text()
    tables = tables[tables.index("\n## ") :]  # the title and the claims are written by hand
    text = fill((ROOT / "docs/evidence.in.md").read_text(), {**found, **summaries(found)} | {
        "tables": re.sub(r"^##", "###", tables, flags=re.MULTILINE).strip(),
        "samplers": markdown(found["samplers"]) if "samplers" in found else "",
    })  # fmt: skip
    (ROOT / "docs/evidence.md").write_text(text)
    print(ROOT / "docs/evidence.md")


if __name__ == "__main__":
    main()
