"""Record docs/studio.webp: somebody paints on a mask in the studio, and volumes of it appear.

    python -m tools.studio_animation --pipeline weights/hippocampus-fast --output docs/studio.webp

Each frame is a screenshot of a real run in a browser without a window; only the pointer is added, for such a browser
shows none. How long a frame is shown is set here: the times of this run, with a renderer in software, are not those of
a computer that people use (`tools.studio_times` measures).
"""

import argparse
import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from cli.command import ArgumentParser, run_command

if TYPE_CHECKING:
    from PIL import Image
    from playwright.sync_api import Page

MOST_BYTES = 2 * 2**20
QUALITY = 60  # of WebP
GLANCE, LOOK, READ = 90, 700, 1800  # milliseconds that a frame is shown
MOVES = 2  # of the mouse from one place to the next
SLICES = 2  # up and down from the middle, where the bulge ends
# A bulge at the side of the front part, and an edge of the back part, on the axial slice.
BULGE = [(0.44, 0.30), (0.35, 0.28), (0.29, 0.33), (0.27, 0.41), (0.30, 0.48), (0.36, 0.52), (0.44, 0.51)]
EDGE = [(0.76, 0.57), (0.71, 0.64), (0.66, 0.71), (0.58, 0.78), (0.48, 0.83)]


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="weights/hippocampus-fast", help="folder with example masks")
    parser.add_argument("--output", type=Path, default=Path("docs/studio.webp"), metavar="FILE")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from tools.studio_browser import browser, is_generated, on_axial, opened, paint, served, wait


def smooth(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the places with `MOVES - 1` more between each two."""
    path = [places[0]]
    for (x0, y0), (x1, y1) in pairwise(places):
        path += [(x0 + (x1 - x0) * move / MOVES, y0 + (y1 - y0) * move / MOVES) for move in range(1, MOVES + 1)]
    return path


class Recording:
    """Frames of a page, and how long each is shown."""

    def __init__(self, page: "Page") -> None:
        self.page = page
        self.frames: list[Image.Image] = []
        self.durations: list[int] = []
        self.pointer: tuple[float, float] | None = None

    def frame(self, milliseconds: int) -> None:
        """Add what the page shows, with the pointer."""
        from PIL import Image, ImageDraw

        shot = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        if self.pointer is not None:
            x, y = self.pointer
            arrow = [(x, y), (x, y + 17), (x + 4, y + 13), (x + 7, y + 19), (x + 10, y + 18), (x + 7, y + 12)]
            ImageDraw.Draw(shot).polygon([*arrow, (x + 12, y + 12)], fill="white", outline="black")
        self.frames.append(shot)
        self.durations.append(milliseconds)

    def moved(self, x: float, y: float) -> None:
        """Add a frame of a stroke."""
        self.pointer = (x, y)
        self.frame(GLANCE)

    def stroke(self, tool: str, places: Sequence[tuple[float, float]]) -> None:
        """Choose a tool by its key, and record a stroke."""
        self.page.keyboard.press(tool)
        path = smooth(places)
        self.pointer = on_axial(self.page, path)[0]
        self.frame(LOOK)
        paint(self.page, path, self.moved)
        self.frame(LOOK)

    def scroll(self, slices: int) -> None:
        """Turn the wheel over the axial slice, by so many slices, up or down."""
        for _ in range(abs(slices)):
            self.page.mouse.wheel(0, 120 if slices > 0 else -120)
            self.frame(2 * GLANCE)

    def generation(self, count: int) -> None:
        """Press G, and record until the volume number `count` is there."""
        self.page.keyboard.press("g")
        last = ""
        while not is_generated(self.page, count):
            text = self.page.locator("#progress-text").text_content() or ""
            if text != last:
                last = text
                self.frame(3 * GLANCE)
        self.page.wait_for_timeout(500)  # the thumbnail
        self.frame(READ)

    def save(self, path: Path) -> None:
        """Write the animation. Raises: ValueError if it is larger than `MOST_BYTES`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        first, *others = self.frames
        first.save(
            path, save_all=True, append_images=others, duration=self.durations, loop=0, quality=QUALITY, method=4
        )
        size = path.stat().st_size
        print(f"{path}: {len(self.frames)} frames, {sum(self.durations) / 1000:.0f} s, {size >> 10} kB")
        if size > MOST_BYTES:
            raise ValueError(f"{path}: has {size >> 10} kB, {MOST_BYTES >> 10} at most; lower QUALITY")


def main(args: Sequence[str] | None = None) -> None:
    """Record the animation."""
    options = parse(args)
    with served(options.pipeline) as address, browser() as started:
        page = opened(started, address)
        # The times of a busy machine say nothing.
        page.add_style_tag(content=".time, #progress-text { visibility: hidden }")
        recording = Recording(page)
        recording.frame(READ)
        recording.generation(1)
        page.keyboard.press("1")
        page.mouse.move(*on_axial(page, BULGE)[0])
        recording.scroll(SLICES)
        recording.stroke("f", BULGE)  # an outline, which is filled
        for _ in range(2 * SLICES):
            recording.scroll(-1)
            paint(page, BULGE)
            recording.frame(3 * GLANCE)
        recording.scroll(SLICES)
        recording.frame(LOOK)
        recording.generation(2)
        for _ in range(4):
            page.keyboard.press("]")
        recording.stroke("e", EDGE)
        recording.generation(3)
        page.locator("#left").select_option(index=page.locator("#left option").count() - 3)  # the first volume
        wait(lambda: page.evaluate("studio.left.shows.startsWith('result:')"))
        recording.frame(READ)
        page.keyboard.press("d")
        wait(lambda: page.locator("#difference").get_attribute("aria-pressed") == "true")
        recording.frame(2 * READ)
        recording.save(options.output)
