"""What a run says while it goes: progress, scalars and previews."""

import logging
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("training")


class Progress:
    """A bar on a terminal; in a log file one line per report. Both give the losses, the rate and the time left."""

    def __init__(self, total: int, start: int, enabled: bool):
        self.total, self.start, self.enabled = total, start, enabled
        self.began = time.monotonic()
        self.bar = tqdm(
            total=total, initial=start, unit="step", disable=not (enabled and sys.stderr.isatty()), dynamic_ncols=True
        )

    def update(self) -> None:
        """One step was made."""
        self.bar.update()

    def report(self, step: int, values: dict[str, float]) -> None:
        """Show the latest values."""
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
        if self.bar.disable and self.enabled:
            seconds = (time.monotonic() - self.began) / max(1, step - self.start)
            left = timedelta(seconds=round(seconds * (self.total - step)))
            text = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
            logger.info("step %d/%d  %s  %.3f s/step  %s left", step, self.total, text, seconds, left)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def log_figure(accelerator: Accelerator, figure: "Figure", name: str, step: int, folder: Path) -> None:
    """Save a preview as folder/<name>_<step>.png and give it to every tracker that takes images. Main process only."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    folder.mkdir(parents=True, exist_ok=True)
    canvas = FigureCanvasAgg(figure)
    partial = folder / f".partial_{name}.png"
    canvas.print_png(str(partial))
    partial.replace(folder / f"{name}_{step:06d}.png")
    image = np.asarray(canvas.buffer_rgba())[None, :, :, :3]
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: image}, step=step, **layout)  # pyright: ignore[reportAttributeAccessIssue]
