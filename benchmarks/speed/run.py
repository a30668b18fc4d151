"""Measure the figures of docs/performance.md, ours and those of the peers.

    python -m benchmarks.speed.run --output out/bench

Run it from the root of the clone. It writes bench.json (after every measurement), plots and performance.md to the
folder. Ours and peers take turns, so a drift of the machine affects both. A part that fails is recorded and does not
stop the others.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveFloat

NAMES = ("peak", "coding", "long_axis", "training", "sampling", "compile", "attention", "equal_time")
NAMES += ("seam", "generation", "choices", "large_decoding")
ON_REQUEST = ("compile", "attention", "large_decoding")  # run by default on a GPU only, and anywhere with `--parts`


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for bench.json, plots and performance.md")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), help=f"comma-separated parts, from {','.join(NAMES)}"
    )
    parser.add_argument(
        "--keep", action="store_true", help="measure --parts again, and keep the other parts of the folder's bench.json"
    )
    parser.add_argument(
        "--resume", action="store_true", help="like --keep, but --parts keep what they have and run what is missing"
    )
    parser.add_argument(
        "--minutes",
        type=Number(PositiveFloat),
        help="time for all parts; a part that takes its share is cut (no limit)",
    )
    parser.add_argument(
        "--equal_time_minutes", type=Number(PositiveFloat), help="minutes of training per autoencoder (5)"
    )
    parser.add_argument(
        "--data.root",
        dest="root",
        default="data/hippocampus",
        help="folder of the volumes that equal_time trains on (data/hippocampus)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to test that everything runs; not for timings"
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
from .parts import PARTS, QUICK, SHARES, Sizes
from .records import line

assert tuple(PARTS) == NAMES  # --help lists them before they are imported


def main(args: Sequence[str] | None = None) -> Path:
    """Measure, and write JSON, plots and tables. Returns the path of the JSON."""
    options = parse(args)
    options.output.mkdir(parents=True, exist_ok=True)
    sizes = replace(QUICK if options.quick else Sizes(), root=options.root)
    if options.equal_time_minutes is not None:
        sizes = replace(sizes, equal_time_minutes=options.equal_time_minutes)
    find_device(options.device)  # raises if unknown
    bench = Bench(options.output, options.device, memory=int(0.85 * available_memory(options.device)))
    if options.keep or options.resume:
        bench.keep(options.parts, resume=options.resume)
    start = time.monotonic()
    for index, part in enumerate(options.parts):
        if options.minutes is not None:
            bench.until = part_end(options.parts[index:], start + 60 * options.minutes)
        try:
            PARTS[part](bench, sizes)
        except Exception as error:  # the other parts still run; the report contains the error
            bench.records.append(
                {"part": part, "job": part, "status": FAILED, "detail": f"{type(error).__name__}: {error}"}
            )
            print(line(bench.records[-1]), flush=True)
    bench.environment["runs"][-1]["minutes"] = round((time.monotonic() - start) / 60, 1)
    path = bench.write()
    report.main([str(path), "--output", str(options.output / "performance.md")])
    return path


def part_end(parts: Sequence[str], end: float) -> float:
    """Return when the first of `parts` is cut, so that the others have their shares of the time until `end`.

    Both are seconds of time.monotonic. What a part leaves is divided among those after it.
    """
    now, shares = time.monotonic(), [SHARES.get(part, 1.0) for part in parts]
    return now + (end - now) * shares[0] / sum(shares)
