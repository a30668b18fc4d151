"""Take the pictures of docs/studio.md from a real run of the studio, in a browser without a window.

    python -m tools.studio_pictures --pipeline weights/hippocampus --output docs

Starts the studio, opens the first example mask, paints on it, generates two volumes, and writes studio_paint.webp and
studio_compare.webp. `tools.studio_browser` says what it needs.
"""

import argparse
import io
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from cli.command import ArgumentParser, run_command

if TYPE_CHECKING:
    from playwright.sync_api import Page

QUALITY = 82  # of WebP
STROKE = ((0.37, 0.24), (0.36, 0.31), (0.37, 0.38), (0.42, 0.43))  # along the side of the first label


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="weights/hippocampus", help="folder of a pipeline with example masks")
    parser.add_argument("--address", help="of a studio that runs already, with its token (one is started)")
    parser.add_argument(
        "--output", type=Path, default=Path("docs"), metavar="DIR", help="folder of the pictures (docs)"
    )
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from tools.studio_browser import browser, generate, opened, paint, served, wait


def main(args: Sequence[str] | None = None) -> None:
    """Take the pictures."""
    options = parse(args)
    running = served(options.pipeline) if options.address is None else nullcontext(options.address)
    with running as address, browser() as started:
        page = opened(started, address)
        page.keyboard.press("1")
        paint(page, STROKE)
        generate(page, 1)
        page.locator("#left").select_option(label="over #1 hippocampus_015_v2")
        wait(lambda: page.evaluate("studio.left.shows.length > 6"))
        save(page, options.output / "studio_paint.webp")
        page.locator("#seed").fill("1")
        page.locator("#right-canvas").focus()
        generate(page, 2)
        page.locator("#left").select_option(label="#1 hippocampus_015_v2")
        wait(lambda: page.evaluate("studio.left.shows.startsWith('result:')"))
        page.locator("[data-do=accept]").first.click()
        wait(lambda: page.locator("#accepted").inner_text() == "1")
        save(page, options.output / "studio_compare.webp")


def save(page: "Page", path: Path) -> None:
    """Write what is shown."""
    from PIL import Image

    page.add_style_tag(content=".time, #progress-text { visibility: hidden }")  # those of a busy machine say nothing
    page.wait_for_timeout(1500)  # thumbnails, and the last frame
    Image.open(io.BytesIO(page.screenshot())).save(path, quality=QUALITY, method=6)
    print(f"{path}: {path.stat().st_size >> 10} kB")
