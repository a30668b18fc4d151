"""Every figure of README's performance section, each with its peer:  python -m benchmarks.speed.run --output out/bench

Run it from the root of the clone. Writes bench.json (after every measurement), plots and performance.md to the
folder. Ours and peers take turns, so that a drift of the machine hits both. A part that fails is written down as such
and does not stop the rest.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveFloat

NAMES = ("peak", "coding", "long_axis", "training", "sampling", "compile", "attention", "equal_time")
NAMES += ("seam", "generation", "choices")
ON_REQUEST = ("compile", "attention")  # by default on a GPU only; `--parts` runs them anywhere


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for bench.json, plots and performance.md")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--parts", type=lambda text: text.split(","), help=f"comma-separated, of {','.join(NAMES)}")
    parser.add_argument(
        "--keep", action="store_true", help="measure --parts again, and keep the others of the folder's bench.json"
    )
    parser.add_argument("--equal_time_minutes", type=Number(PositiveFloat), help="training of each autoencoder (5)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows that everything runs, says nothing of speed"
    )
    options = parser.parse_args(args)
    if options.parts is None:
        options.parts = [p for p in NAMES if options.device.startswith("cuda") or p not in ON_REQUEST]
    if unknown := set(options.parts) - set(NAMES):
        parser.error(f"unknown parts {sorted(unknown)}; there are {', '.join(NAMES)}")
    return options


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from volumes.devices import find_device

from . import report
from .bench import Bench
from .measure import FAILED, available_memory
from .parts import PARTS, QUICK, Sizes
from .records import line

assert NAMES == tuple(PARTS)  # which --help names before they are imported


def main(args: Sequence[str] | None = None) -> Path:
    """Measure, write JSON, plots and table. Returns the JSON's path."""
    options = parse(args)
    options.output.mkdir(parents=True, exist_ok=True)
    sizes = QUICK if options.quick else Sizes()
    if options.equal_time_minutes is not None:
        sizes = replace(sizes, equal_time_minutes=options.equal_time_minutes)
    find_device(options.device)  # or it is refused
    bench = Bench(options.output, options.device, memory=int(0.85 * available_memory(options.device)))
    if options.keep:
        bench.keep(options.parts)
    start = time.monotonic()
    for part in options.parts:
        try:
            PARTS[part](bench, sizes)
        except Exception as error:  # the other parts are still wanted; what went wrong is in the report
            bench.records.append(
                {"part": part, "job": part, "status": FAILED, "detail": f"{type(error).__name__}: {error}"}
            )
            print(line(bench.records[-1]), flush=True)
    bench.environment["runs"][-1]["minutes"] = round((time.monotonic() - start) / 60, 1)
    path = bench.write()
    report.main([str(path), "--output", str(options.output / "performance.md")])
    return path
