"""What a run reports: progress, scalars and previews, to the terminal and to trackers (Accelerate's, and
metrics.csv)."""

import csv
import logging
import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers, on_main_process
from accelerate.utils import LoggerType

from cli.live_bar import LiveBar
from files.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("training")
CSV = "csv"
TABLE = "metrics.csv"
COLUMNS = ("step", "name", "value")
PACKAGES = {"comet_ml": "comet-ml"}  # whose name for pip differs


class CsvTracker(GeneralTracker):
    """Write scalars as rows of metrics.csv in the run's folder: step, name, value. A resumed run keeps the rows of its
    steps."""

    name = CSV
    requires_logging_directory = True

    def __init__(self, folder: str | Path):
        super().__init__()
        self.path = Path(folder) / TABLE
        self.kept: set[tuple[str, str]] = set()

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def store_init_configuration(self, values: dict[str, object]) -> None:
        """Do nothing: config.yaml is beside the table."""

    @on_main_process
    def keep_until(self, step: int) -> None:
        """Start the table: drop rows of later steps that an interrupted run wrote, because these steps are repeated."""
        rows = []
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdecimal() and int(row[0]) <= step]
        self.kept = {(step_, name) for step_, name, _ in rows}
        with atomic_file(self.path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows])

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Add a row per value, except for rows that are there: the last validation of a finished run that is
        resumed."""
        rows = [[step, name, value] for name, value in values.items() if (str(step), name) not in self.kept]
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with os.fdopen(os.open(self.path, flags, 0o666), "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


def choose_trackers(names: Sequence[str], folder: str | Path) -> list[Any]:
    """Return Accelerate's `log_with` for the names in `loop.trackers`.

    Raises: ValueError for trackers that are unknown or not installed; it lists those that are available.
    """
    supported = [CSV, *(str(kind) for kind in LoggerType if str(kind) != "all")]
    installed = [CSV, *(str(kind) for kind in get_available_trackers())]
    expanded = list(dict.fromkeys(tracker for name in names for tracker in (installed if name == "all" else [name])))
    if unknown := [name for name in expanded if name not in supported]:
        raise ValueError(
            f"loop.trackers: {', '.join(unknown)} is unknown; choose from {', '.join(supported)}. Installed: "
            f"{', '.join(installed)} (--loop.trackers [] for none)"
        )
    if absent := [name for name in expanded if name not in installed]:
        raise ValueError(
            f"loop.trackers: {', '.join(absent)} is not installed: pip install "
            f"{' '.join(PACKAGES.get(name, name) for name in absent)}; or choose from {', '.join(installed)}, which "
            "are installed (--loop.trackers [] for none)"
        )
    return [CsvTracker(folder) if name == CSV else name for name in expanded]


def start_trackers(accelerator: Accelerator, names: Sequence[str]) -> None:
    """Start logging, before the data are read. Raises: ValueError if a tracker fails, such as one that needs a
    login."""
    try:
        accelerator.init_trackers("logs")
    except Exception as error:  # each tracker raises its own kind
        raise ValueError(
            f"loop.trackers {list(names)}: could not be started ({type(error).__name__}: {error}); set it up, or "
            "remove it"
        ) from error


class Progress:
    """A progress bar on a terminal, and one line per report in a log file. Both show losses, rate and remaining time,
    and that a long step, validation or preview is alive."""

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
        """Count a step."""
        if self.bar is not None:
            self.bar.update()

    def doing(self, what: str = "") -> None:
        """Show a phase other than the steps; without a name, the steps continue."""
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
    """Save a preview as folder/<name>_<step>.png and log it to every tracker that takes images. Main process only."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    prepared = FigureCanvasAgg(figure)
    with atomic_file(folder / f"{name}_{step:06d}.png") as unfinished:
        prepared.print_png(str(unfinished))
    image = np.asarray(prepared.buffer_rgba())[None, :, :, :3]
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: image}, step=step, **layout)
