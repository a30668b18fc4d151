"""Record docs/studio.webp: somebody paints on a mask in the studio, and volumes of it appear.

    python -m tools.studio_animation --pipeline weights/hippocampus-fast --output docs/studio.webp

Each frame is a screenshot of a real run in a browser without a window; only the pointer is added, for such a browser
shows none. How long a frame is shown is set here: the times of this run, with a renderer in software, are not those of
a computer that people use (`tools.studio_times` measures).
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli.command import ArgumentParser, run_command

if TYPE_CHECKING:
    from PIL import Image
    from playwright.sync_api import Page

MOST_BYTES = 2 * 2**20
WIDTH = 960  # of the frames; the page has 1280
QUALITY = 60  # of WebP
GLANCE, LOOK, READ = 90, 700, 1800  # milliseconds that a frame is shown
LARGER = [(0.37, 0.22), (0.36, 0.26), (0.355, 0.30), (0.36, 0.34), (0.365, 0.38), (0.38, 0.41), (0.40, 0.44)]
SMALLER = [(0.62, 0.20), (0.63, 0.25), (0.64, 0.30), (0.645, 0.35), (0.64, 0.40), (0.63, 0.45)]


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="weights/hippocampus-fast", help="folder with example masks")
    parser.add_argument("--output", type=Path, default=Path("docs/studio.webp"), metavar="FILE")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from tools.studio_browser import browser, is_generated, on_axial, opened, paint, served, wait


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
        self.frames.append(shot.resize((WIDTH, round(WIDTH * shot.height / shot.width)), Image.Resampling.LANCZOS))
        self.durations.append(milliseconds)

    def moved(self, x: float, y: float) -> None:
        """Add a frame of a stroke."""
        self.pointer = (x, y)
        self.frame(GLANCE)

    def stroke(self, tool: str, places: Sequence[tuple[float, float]]) -> None:
        """Choose a tool by its key, and record a stroke."""
        self.page.keyboard.press(tool)
        self.pointer = on_axial(self.page, places)[0]
        self.frame(LOOK)
        paint(self.page, places, self.moved)
        self.frame(LOOK)

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
            path, save_all=True, append_images=others, duration=self.durations, loop=0, quality=QUALITY, method=6
        )
        size = path.stat().st_size
        print(f"{path}: {len(self.frames)} frames, {sum(self.durations) / 1000:.0f} s, {size >> 10} kB")
        if size > MOST_BYTES:
            raise ValueError(f"{path}: has {size >> 10} kB, {MOST_BYTES >> 10} at most; lower QUALITY or WIDTH")


def main(args: Sequence[str] | None = None) -> None:
    """Record the animation."""
    options = parse(args)
    with served(options.pipeline) as address, browser() as started:
        page = opened(started, address)
        page.add_style_tag(content=".time, #progress-text { visibility: hidden }")  # those of a busy machine say nothing
        recording = Recording(page)
        recording.frame(READ)
        recording.generation(1)
        page.keyboard.press("1")
        recording.stroke("p", LARGER)
        recording.generation(2)
        page.keyboard.press("2")
        recording.stroke("e", SMALLER)
        recording.generation(3)
        page.locator("#left").select_option(index=page.locator("#left option").count() - 3)  # the first volume
        wait(lambda: page.evaluate("studio.left.shows.startsWith('result:')"))
        recording.frame(READ)
        page.keyboard.press("d")
        wait(lambda: page.locator("#difference").get_attribute("aria-pressed") == "true")
        recording.frame(2 * READ)
        recording.save(options.output)
