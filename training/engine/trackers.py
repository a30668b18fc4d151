"""Where a run's scalars and previews go: the trackers that Accelerate knows, and a table of our own, metrics.csv."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers, on_main_process
from accelerate.utils import LoggerType

from files.atomic import atomic_file

CSV = "csv"
TABLE, COLUMNS = "metrics.csv", ("step", "name", "value")
PACKAGES = {"comet_ml": "comet-ml"}  # whose name for pip is another


class CsvTracker(GeneralTracker):
    """Scalars as rows of metrics.csv in the run's folder: step, name, value. A run that is resumed goes on with the rows of its steps."""

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
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """config.yaml is beside the table."""

    @on_main_process
    def keep_until(self, step: int) -> None:
        """Begin: drop what an interrupted run wrote of later steps, which are made again."""
        rows = []
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdecimal() and int(row[0]) <= step]
        self.kept = {(step_, name) for step_, name, _ in rows}
        with atomic_file(self.path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows])

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Add a row for each value; of a run that had ended and is resumed, its last validation is there."""
        rows = [[step, name, value] for name, value in values.items() if (str(step), name) not in self.kept]
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with os.fdopen(os.open(self.path, flags, 0o666), "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


def choose_trackers(names: Sequence[str], folder: str | Path) -> list[Any]:
    """What Accelerate takes as `log_with` for the names in `loop.trackers`.

    Raises: ValueError for names that are unknown, and trackers that are not installed, with what there is.
    """
    known = [str(one) for one in LoggerType if str(one) != "all"]
    there = [CSV, *(str(one) for one in get_available_trackers())]
    wanted = list(dict.fromkeys(name for one in names for name in (there if one == "all" else [one])))
    if unknown := [name for name in wanted if name not in (CSV, *known)]:
        raise ValueError(
            f"loop.trackers: {', '.join(unknown)} is unknown; there are {', '.join([CSV, *known])}, of which work here: "
            f"{', '.join(there)} (--loop.trackers [] for none)"
        )
    if absent := [name for name in wanted if name not in there]:
        raise ValueError(
            f"loop.trackers: {', '.join(absent)} is not installed: pip install "
            f"{' '.join(PACKAGES.get(name, name) for name in absent)}; or take of {', '.join(there)}, which work here "
            "(--loop.trackers [] for none)"
        )
    return [CsvTracker(folder) if name == CSV else name for name in wanted]


def start_trackers(accelerator: Accelerator, names: Sequence[str]) -> None:
    """Begin to log, before the data are read. Raises: ValueError where a tracker cannot, such as one that asks for a login."""
    try:
        accelerator.init_trackers("logs")
    except Exception as error:  # each tracker has its own
        raise ValueError(
            f"loop.trackers {list(names)}: could not be started ({type(error).__name__}: {error}); set it up, or leave it out"
        ) from error
