"""Take the pictures of docs/studio.md from a real run of the studio, in a browser without a window.

    python -m tools.studio_pictures --pipeline weights/hippocampus --output docs

Starts the studio, opens the first example mask, paints on it, generates two volumes, and writes studio_paint.webp and
studio_compare.webp. It needs playwright (extra dev), chromium and the extra studio. The renderer
is software, so it takes a minute or more.
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from cli.command import ArgumentParser, run_command

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--headless=new", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
SIZE = {"width": 1280, "height": 720}
PATIENCE = 600  # seconds
QUALITY = 82  # of WebP
STROKE = ((0.37, 0.24), (0.36, 0.31), (0.37, 0.38), (0.42, 0.43))  # of the axial slice's width and height


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


def main(args: Sequence[str] | None = None) -> None:
    """Take the pictures."""
    options = parse(args)
    running = served(options.pipeline) if options.address is None else nullcontext(options.address)
    with running as address, opened(address) as page:
        paint(page)
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


@contextmanager
def served(pipeline: str) -> Iterator[str]:
    """Run the studio, and yield its address."""
    command = [sys.executable, str(ROOT / "medvolume.py"), "studio", "--pipeline", pipeline, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            yield next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
        finally:
            process.terminate()


@contextmanager
def opened(address: str) -> "Iterator[Page]":
    """Open the page in a browser, and yield it when it is ready. Raises: ValueError without a browser."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise ValueError(f"no browser: install one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        page = browser.new_page(viewport=SIZE)  # pyright: ignore[reportArgumentType]
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(address)
        wait(lambda: page.evaluate("document.body.dataset.ready === 'true'"))
        yield page
        browser.close()


def wait(true: Callable[[], object]) -> None:
    """Wait for something. Raises: ValueError if it does not come."""
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end:
            raise ValueError("the page did not get there in time; is the machine busy?")
        time.sleep(0.2)


def paint(page: "Page") -> None:
    """Enlarge the first label on the axial slice, by a stroke along its side."""
    x, y, width, height = page.evaluate(
        "(() => { const nv = studio.left.nv, one = nv.screenSlices.find((one) => one.axCorSag === 0);"
        " return [...one.leftTopWidthHeight].map((value) => value / nv.uiData.dpr); })()"
    )
    canvas = page.locator("#left-canvas").bounding_box()
    assert canvas is not None
    page.keyboard.press("1")
    places = [(canvas["x"] + x + a * width, canvas["y"] + y + b * height) for a, b in STROKE]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place)
    page.mouse.up()
    wait(lambda: page.evaluate("studio.undo.past.length === 1"))


def generate(page: "Page", count: int) -> None:
    """Generate, and wait until there are `count` volumes."""
    page.keyboard.press("g")
    wait(lambda: page.evaluate("studio.state.results.size") == count and page.locator("#generate").is_enabled())


def save(page: "Page", path: Path) -> None:
    """Write what is shown."""
    from PIL import Image

    page.add_style_tag(content=".time, #progress-text { visibility: hidden }")  # those of a busy machine say nothing
    page.wait_for_timeout(1500)  # thumbnails, and the last frame
    Image.open(io.BytesIO(page.screenshot())).save(path, quality=QUALITY, method=6)
    print(f"{path}: {path.stat().st_size >> 10} kB")
