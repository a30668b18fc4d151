"""Measure the studio in a real browser: from the command to the first volume, and from a stroke to the new volume.

    python -m tools.studio_times --pipeline weights/hippocampus-fast --output docs/studio_times.json

Each round starts the command, opens the page in a browser that runs already, and generates from the first example as
soon as the page is ready. The first time ends when that volume is drawn on the page. Then come strokes of the pen; each
time runs from the end of the stroke, after which G is pressed at once, to the new volume drawn. The browser draws by
software, on the same cores. `--cores` holds command and browser to the first so many cores of this process, on Linux.

The file has each time, the medians, the longest, the pipeline's steps, the machine and the versions. Measure on a
machine that does nothing else.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveInt

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

STROKE = ((0.36, 0.25), (0.36, 0.33), (0.36, 0.41))  # of the axial slice's width and height
EVERY = 0.01  # seconds between two looks at the page
# Resolves when the browser has drawn the frame after this one.
DRAWN = "new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(() => resolve(true))))"


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="weights/hippocampus-fast", help="folder with example masks")
    parser.add_argument("--rounds", type=Number(PositiveInt), default=3, help="starts of the studio (3)")
    parser.add_argument("--strokes", type=Number(PositiveInt), default=5, help="strokes of each round (5)")
    parser.add_argument("--cores", type=Number(PositiveInt), default=2, help="of command and browser (2)")
    parser.add_argument("--output", type=Path, default=Path("docs/studio_times.json"), metavar="FILE")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from evaluation.report import provenance
from files.atomic import write_text
from tools.studio_browser import browser, is_generated, opened, paint, served, wait


def main(args: Sequence[str] | None = None) -> None:
    """Measure, and write the file."""
    options = parse(args)
    hold_to(options.cores)
    rounds: list[dict[str, object]] = []
    first: list[float] = []
    strokes: list[float] = []
    with browser() as started:
        for _ in range(options.rounds):
            to_page, to_volume, after_stroke, settings = measure_round(started, options.pipeline, options.strokes)
            first.append(to_volume)
            strokes += after_stroke
            rounds.append({"to_page": to_page, "to_first_volume": to_volume, "stroke_to_volume": after_stroke})
            print(f"first volume after {to_volume:.1f} s, a stroke's after {median(after_stroke):.2f} s", flush=True)
    document = {
        "pipeline": options.pipeline,
        **settings,
        "cores": options.cores,
        "seconds": {
            "command_to_first_volume": {"median": round(median(first), 2), "longest": round(max(first), 2)},
            "stroke_to_volume": {"median": round(median(strokes), 2), "longest": round(max(strokes), 2)},
        },
        "rounds": rounds,
        **provenance(),
    }
    write_text(options.output, json.dumps(document, indent=1) + "\n")
    print(options.output)


def hold_to(cores: int) -> None:
    """Keep this process, and those that it starts, on so many cores. Raises: ValueError if it has fewer."""
    own = sorted(os.sched_getaffinity(0))
    if len(own) < cores:
        raise ValueError(f"--cores {cores}: this process may use {len(own)}; give --cores {len(own)}")
    os.sched_setaffinity(0, own[:cores])


def measure_round(
    started: "Browser", pipeline: str, strokes: int
) -> tuple[float, float, list[float], dict[str, object]]:
    """Start the studio once.

    Returns: the seconds to the page, to the first volume and after each stroke, and what the pipeline samples with.
    """
    begin = time.perf_counter()
    with served(pipeline) as address:
        page = opened(started, address)
        to_page = time.perf_counter() - begin
        generate(page, 1)
        to_volume = time.perf_counter() - begin
        settings = page.evaluate("({ steps: studio.state.model.steps, guidance: studio.state.model.guidance })")
        after_stroke = []
        for number in range(strokes):
            page.keyboard.press("12"[number % 2])  # another label than before, so that each stroke changes the mask
            end_of_stroke = paint(page, STROKE)
            generate(page, number + 2)
            after_stroke.append(round(time.perf_counter() - end_of_stroke, 3))
        page.close()
    return round(to_page, 3), round(to_volume, 3), after_stroke, settings


def generate(page: "Page", count: int) -> None:
    """Generate, and wait until the volume number `count` is drawn."""
    page.keyboard.press("g")
    wait(lambda: is_generated(page, count), EVERY)
    page.evaluate(DRAWN)
