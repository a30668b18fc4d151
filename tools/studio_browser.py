"""A studio, a browser without a window, and what somebody does on the page: for pictures, times and the animation.

It needs playwright (extra dev), chromium and the extra studio. The renderer is software.
"""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--headless=new", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
SIZE = {"width": 1280, "height": 720}
PATIENCE = 600  # seconds
Places = Sequence[tuple[float, float]]  # of the axial slice, in shares of its width and height


@contextmanager
def served(*pipelines: str) -> Iterator[str]:
    """Run the studio, and yield its address."""
    command = [sys.executable, str(ROOT / "medvolume.py"), "studio", "--pipeline", *pipelines, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            yield next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
        finally:
            process.terminate()


@contextmanager
def browser() -> "Iterator[Browser]":
    """Start a browser. Raises: ValueError if there is none."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise ValueError(f"no browser: install one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield started
        started.close()


def opened(started: "Browser", address: str) -> "Page":
    """Open the studio in a browser, and return its page when it is ready."""
    page = started.new_page(viewport=SIZE)  # pyright: ignore[reportArgumentType]
    page.set_default_timeout(PATIENCE * 1000)
    page.goto(address)
    wait(lambda: page.evaluate("document.body.dataset.ready === 'true'"))
    return page


def wait(true: Callable[[], object], every: float = 0.05) -> None:
    """Wait for something, and look every so many seconds. Raises: ValueError if it does not come."""
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end:
            raise ValueError("the page did not get there in time; is the machine busy?")
        time.sleep(every)


def on_axial(page: "Page", places: Places) -> list[tuple[float, float]]:
    """Return where places of the left view's axial slice are on the page."""
    x, y, width, height = page.evaluate(
        "(() => { const nv = studio.left.nv, one = nv.screenSlices.find((one) => one.axCorSag === 0);"
        " return [...one.leftTopWidthHeight].map((value) => value / nv.uiData.dpr); })()"
    )
    canvas = page.locator("#left-canvas").bounding_box()
    assert canvas is not None
    return [(canvas["x"] + x + across * width, canvas["y"] + y + down * height) for across, down in places]


def paint(page: "Page", places: Places, after: Callable[[float, float], object] = lambda x, y: None) -> float:
    """Make one stroke with the chosen tool.

    Args:
        after: is called after each move, with its place on the page.
    Returns: when the stroke ended, by `time.perf_counter`.
    """
    strokes = page.evaluate("studio.undo.past.length")
    first, *others = on_axial(page, places)
    page.mouse.move(*first)
    after(*first)
    page.mouse.down()
    for place in others:
        page.mouse.move(*place)
        after(*place)
    page.mouse.up()
    end = time.perf_counter()
    wait(lambda: page.evaluate("studio.undo.past.length") == strokes + 1)
    return end


def is_generated(page: "Page", count: int) -> bool:
    """Return whether there are `count` volumes, the last of which is shown."""
    return page.evaluate("studio.state.results.size") == count and page.locator("#generate").is_enabled()


def generate(page: "Page", count: int) -> None:
    """Generate, and wait until there are `count` volumes."""
    page.keyboard.press("g")
    wait(lambda: is_generated(page, count))
