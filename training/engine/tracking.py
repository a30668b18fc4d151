"""What a run says while it goes: progress, scalars and previews."""

import logging
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from accelerate import Accelerator

from cli.live_bar import LiveBar
from files.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("training")


class Progress:
    """A bar on a terminal; in a log file one line per report. Both give the losses, the rate and the time left, and show that a long step,
    validation or preview is alive."""

    def __init__(self, total: int, start: int, enabled: bool):
        self.total, self.start, self.enabled = total, start, enabled
        self.began = time.monotonic()
        self.bar: LiveBar | None = None

    def __enter__(self) -> "Progress":
        self.began = time.monotonic()
        self.bar = LiveBar(
            total=self.total,
            initial=self.start,
            unit="step",
            disable=None if self.enabled else True,
            dynamic_ncols=True,
        )
        return self

    def __exit__(self, *error: object) -> None:
        assert self.bar is not None
        self.bar.close()
        self.bar = None

    def update(self) -> None:
        """One step was made."""
        if self.bar is not None:
            self.bar.update()

    def doing(self, what: str = "") -> None:
        """Something beside the steps begins; without a name they go on."""
        if self.bar is not None:
            self.bar.now(what)

    def report(self, step: int, values: dict[str, float]) -> None:
        """Show the latest values."""
        assert self.bar is not None
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
        if self.bar.lines:
            seconds = (time.monotonic() - self.began) / max(1, step - self.start)
            left = timedelta(seconds=round(seconds * (self.total - step)))
            text = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
            logger.info("step %d/%d  %s  %.3f s/step  %s left", step, self.total, text, seconds, left)


def log_figure(accelerator: Accelerator, figure: "Figure", name: str, step: int, folder: Path) -> None:
    """Save a preview as folder/<name>_<step>.png and give it to every tracker that takes images. Main process only."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    prepared = FigureCanvasAgg(figure)
    with atomic_file(folder / f"{name}_{step:06d}.png") as unfinished:
        prepared.print_png(str(unfinished))
    image = np.asarray(prepared.buffer_rgba())[None, :, :, :3]
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: image}, step=step, **layout)  # pyright: ignore[reportAttributeAccessIssue]
