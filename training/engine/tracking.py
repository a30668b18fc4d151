"""What a run reports: progress, scalars and previews, to the terminal, to metrics.jsonl and to trackers (Accelerate's,
and metrics.csv)."""

import csv
import functools
import io
import json
import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, get_available_trackers, on_main_process
from accelerate.utils import LoggerType
from tqdm.contrib.logging import logging_redirect_tqdm

from cli.command import CannotContinue
from cli.live_bar import LiveBar
from files.atomic import atomic_file

from .config import LoopConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("training")
CSV = "csv"
COLUMNS = ("step", "name", "value")
LOGS = "logs"  # TensorBoard's folder in the output
PACKAGES = {"comet_ml": "comet-ml"}  # whose name for pip differs
# The argument of a tracker's start that names the run; see `name_run` for the others.
RUN_NAMES = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "clearml": "task_name",
    "dvclive": "exp_name",
    "swanlab": "experiment_name",
}
Row = tuple[int, str, Any]  # step, name such as train/loss, value


class RunFile(GeneralTracker, ABC):
    """A file in the run's folder that every report is added to. A resumed run keeps what it says of its steps."""

    requires_logging_directory = True
    file: str

    def __init__(self, folder: str | Path):
        super().__init__()
        self.path = Path(folder) / self.file
        self.kept: set[tuple[int, str]] = set()

    @property
    def tracker(self) -> Path:
        return self.path

    @abstractmethod
    def parse(self, text: str) -> Iterator[Row]:
        """Yield the rows of a file, without lines that are damaged, such as one that was not finished."""

    @abstractmethod
    def format(self, rows: Sequence[Row]) -> str:
        """Return the lines of one report."""

    def head(self) -> str:
        """Return what the file starts with."""
        return ""

    @on_main_process
    def store_init_configuration(self, values: dict[str, object]) -> None:
        """Do nothing: config.yaml is beside the file."""

    @on_main_process
    def keep_until(self, step: int) -> None:
        """Start the file: drop rows of later steps that an interrupted run wrote, because these steps are repeated."""
        rows: list[Row] = []
        if self.path.is_file() and not self.path.is_symlink():
            rows = [row for row in self.parse(self.path.read_text("utf-8", "replace")) if row[0] <= step]
        self.kept = {(at, name) for at, name, _ in rows}
        reports: dict[tuple[int, str], list[Row]] = {}
        for row in rows:
            reports.setdefault((row[0], row[1].partition("/")[0]), []).append(row)
        with atomic_file(self.path) as unfinished:
            text = self.head() + "".join(map(self.format, reports.values()))
            unfinished.write_bytes(text.encode())

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Add a report, without values that are there: of the last validation of a finished run that is resumed.

        Raises: CannotContinue if it cannot be written (a full disk, a link in the file's place).
        """
        at = step or 0
        rows = [(at, name, value) for name, value in values.items() if (at, name) not in self.kept]
        if not rows:
            return
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        try:
            with os.fdopen(os.open(self.path, flags, 0o666), "ab") as file:
                file.write(self.format(rows).encode())
        except OSError as error:
            raise CannotContinue(
                f"{self.path}: could not be written ({error.strerror}). Make room on the disk, and remove a link in "
                "its place; then continue with --resume latest"
            ) from error


class CsvTracker(RunFile):
    """Write scalars as rows of metrics.csv: step, name, value."""

    name = CSV
    file = "metrics.csv"

    def head(self) -> str:
        """Return the names of the columns."""
        return self._lines([COLUMNS])

    def parse(self, text: str) -> Iterator[Row]:
        """Yield the rows of the table."""
        for row in csv.reader(io.StringIO(text, newline="")):
            if len(row) == 3 and row[0].isdecimal():
                yield int(row[0]), row[1], row[2]

    def format(self, rows: Sequence[Row]) -> str:
        """Return a line per value."""
        return self._lines(rows)

    def _lines(self, rows: Sequence[Sequence[Any]]) -> str:
        lines = io.StringIO(newline="")
        csv.writer(lines).writerows(rows)
        return lines.getvalue()


class JsonTracker(RunFile):
    """Write each report as a line of metrics.jsonl: {"step": 20, "kind": "train", "loss": 0.1, ...}.

    The kind is train or validation. null stands for a value that is not finite.
    """

    name = "jsonl"
    file = "metrics.jsonl"

    def parse(self, text: str) -> Iterator[Row]:
        """Yield the values of all lines."""
        for line in text.splitlines():
            try:
                report = json.loads(line)
            except ValueError:
                continue
            if isinstance(report, dict) and type(report.get("step")) is int and isinstance(report.get("kind"), str):
                step, kind = report.pop("step"), report.pop("kind")
                yield from ((step, f"{kind}/{name}", value) for name, value in report.items())

    def format(self, rows: Sequence[Row]) -> str:
        """Return one line; all rows are of one step and kind."""
        step, first, _ = rows[0]
        values = {name.partition("/")[2]: value for _, name, value in rows}
        finite = {name: None if value is None or not math.isfinite(value) else value for name, value in values.items()}
        return json.dumps({"step": step, "kind": first.partition("/")[0], **finite}, allow_nan=False) + "\n"


class Tolerant:
    """A tracker whose failures do not end the training: a server may be out of reach. The first one is reported."""

    def __init__(self, tracker: Any):
        self._tracker, self._failed = tracker, False

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._tracker, name)
        return self._guarded(value) if callable(value) and name != "tracker" else value

    def _guarded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except Exception as error:  # each tracker raises its own kind
                if not self._failed:
                    logger.warning(
                        "tracker %s failed (%s: %s): the training continues, and this is not said again; "
                        "metrics.jsonl has every value",
                        self._tracker.name,
                        type(error).__name__,
                        error,
                    )
                self._failed = True
                return None

        return guarded


def choose_trackers(options: LoopConfig, folder: str | Path) -> list[Any]:
    """Return Accelerate's `log_with` for the names in `loop.trackers`: metrics.jsonl, and these.

    Raises: ValueError for trackers, or entries of `loop.tracker_init`, that are unknown, and for trackers that are not
        installed; it lists those that are available.
    """
    others = [str(kind) for kind in LoggerType if str(kind) != "all"]
    supported, installed = [CSV, *others], [CSV, *(str(kind) for kind in get_available_trackers())]
    names = (tracker for name in options.trackers for tracker in (installed if name == "all" else [name]))
    expanded = list(dict.fromkeys(names))
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
    if unknown := [name for name in options.tracker_init if name not in others]:
        raise ValueError(f"loop.tracker_init: {', '.join(unknown)} takes no arguments; choose from {', '.join(others)}")
    if idle := [name for name in options.tracker_init if name not in expanded]:
        logger.warning("loop.tracker_init: %s is not in loop.trackers, and is not started", ", ".join(idle))
    own = {CSV: CsvTracker(folder)}
    if "tensorboard" in expanded:  # in logs/, whatever the project is called
        arguments = options.tracker_init.get("tensorboard", {})
        own["tensorboard"] = TensorBoardTracker(LOGS, folder, **arguments)  # pyright: ignore[reportArgumentType]
    return [JsonTracker(folder), *(own.get(name, name) for name in expanded)]


def start_trackers(accelerator: Accelerator, options: LoopConfig) -> None:
    """Start logging, before the data are read. Later failures of a tracker do not end the training (`Tolerant`).

    Raises: ValueError if a tracker fails, such as one that needs a login.
    """
    arguments = {name: dict(options.tracker_init.get(name, {})) for name in (*RUN_NAMES, *options.tracker_init)}
    arguments.setdefault("aim", {}).setdefault("experiment", options.tracker_project)  # Accelerate sets its name only
    if options.run_name is not None:
        for name, argument in RUN_NAMES.items():
            arguments[name].setdefault(argument, options.run_name)
    try:
        accelerator.init_trackers(options.tracker_project, init_kwargs=arguments)
        if options.run_name is not None and accelerator.is_main_process:
            for tracker in accelerator.trackers:
                name_run(tracker, options.run_name)
    except Exception as error:  # each tracker raises its own kind
        raise ValueError(
            f"loop.trackers {options.trackers}: could not be started ({type(error).__name__}: {error}); set it up, or "
            "remove it"
        ) from error
    guarded: list[Any] = [each if isinstance(each, RunFile) else Tolerant(each) for each in accelerator.trackers]
    accelerator.trackers = guarded


def name_run(tracker: Any, name: str) -> None:
    """Name the run of a started tracker whose start takes no name."""
    if tracker.name == "comet_ml":
        tracker.tracker.set_name(name)
    elif tracker.name == "aim":  # Accelerate calls it as the project
        tracker.tracker.name = name


class Progress:
    """A progress bar on a terminal, and one line per report in a log file. Both show the loss, rate and remaining time,
    and that a long step, validation or preview is alive. The bar fits 80 columns; lines show every value."""

    def __init__(self, total: int, start: int, enabled: bool):
        self.total, self.start, self.enabled = total, start, enabled
        self.began = time.monotonic()
        self.bar: LiveBar | None = None
        self.shown: dict[str, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Progress":
        self.began = time.monotonic()
        self.bar = self._stack.enter_context(
            LiveBar(
                total=self.total,
                initial=self.start,
                unit="step",
                disable=None if self.enabled else True,
                dynamic_ncols=True,
            )
        )
        if not self.bar.disable:  # log lines above the bar, not in it
            self._stack.enter_context(logging_redirect_tqdm(tqdm_class=LiveBar))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self.bar = None

    def update(self) -> None:
        """Count a step."""
        if self.bar is not None:
            self.bar.update()

    def doing(self, what: str = "") -> None:
        """Show a phase other than the steps, on a bar instead of the values; without a name, the steps continue."""
        if self.bar is not None:
            self.bar.set_postfix({} if what else self.shown, refresh=False)
            self.bar.now(what)

    def show(self, **values: float) -> None:
        """Show values on the bar: two at most, or it is too long for 80 columns."""
        if self.bar is not None:
            self.shown |= {name: f"{value:.3g}" for name, value in values.items()}
            self.bar.set_postfix(self.shown, refresh=False)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Show the latest values: all of them in a log file, the loss on a terminal."""
        assert self.bar is not None
        if "loss" in values:
            self.show(loss=values["loss"])
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
