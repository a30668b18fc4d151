"""Reports: what a figure was measured on, written beside the figure; and the configs that say on which data."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonargparse

from cli.settings import (
    NonNegativeFloat,
    Number,
    faults,
    refuse,
)
from files.atomic import remove_leftovers, write_text
from files.documents import read_yaml
from files.locks import only_writer
from volumes import DataConfig
from volumes.data.config_parser import ConfigParser, config_files
from volumes.data.preprocessing import inherited

ROOT = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, Any]:
    """The command, when, the machine, and the versions: what it takes to run a measurement again."""
    import torch  # here, for commands parse their arguments before it is imported

    return {
        "command": " ".join(["python", program(), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def program() -> str:
    """The script that runs, relative to the clone where it lies in it (a report names no folder of one machine)."""
    path = Path(sys.argv[0]).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, torch's threads, and the accelerator if there is one."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"processor": processor(), "cores": cores, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Commit of the clone, with `+` where tracked files differ from it; None outside a clone."""
    try:
        commit = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:  # no git on this machine
        return None
    return commit.stdout.strip() or None if commit.returncode == 0 else None


def write_report(path: str | Path, report: Mapping[str, object]) -> Path:
    """Write `report` as JSON, whole or not at all.

    Raises: OSError naming the file, such as on a full disk: an older report is left as it was.
    """
    path = Path(path)
    try:
        write_text(path, json.dumps(report, indent=2) + "\n")
    except OSError as error:
        error.filename = str(path)  # of a write that fails Python names no file
        raise
    return path


@contextmanager
def only_writer_of(path: str | Path, wait_minutes: float) -> Iterator[None]:
    """Hold the report at `path` against other processes, as `files.locks.only_writer`, and remove what killed ones left beside it.

    Raises: ValueError as `check_report`; OutputInUse.
    """
    path = Path(path)
    check_report(path)
    with only_writer(path.parent, wait_minutes, file=path.name):
        remove_leftovers(path.parent)
        yield


def add_wait_argument(parser: argparse.ArgumentParser | jsonargparse.ArgumentParser) -> None:
    """Add `--wait_minutes`."""
    parser.add_argument(
        "--wait_minutes",
        type=Number(NonNegativeFloat),
        default=0.0,
        help="how long to wait for another process that writes to the same output; 0 refuses at once",
    )


def check_report(path: str | Path) -> None:
    """Try the folder of a report before hours of work, and remove what killed processes left half written there.

    Raises: ValueError if nothing can be written there, or if it is a folder."""
    if Path(path).is_dir():
        raise ValueError(f"--output {path}: is a folder; give a file in it")
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        remove_leftovers(folder)
    except OSError as error:
        raise ValueError(f"--output {path}: cannot be written to: {error.strerror}; choose another folder") from error


def read_config(path: Path) -> dict[str, Any]:
    """All sections of a training config, `data` with what it leaves out as the autoencoder of `vae` or `init_from` learned it
    (`volumes.data.preprocessing.inherited`). Raises: ValueError where there is no section `data`, and as `read_yaml`."""
    if not path.is_file():
        raise ValueError(f"{path}: no such config")
    content = read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("data"), dict):
        raise ValueError(f"{path}: has no section `data`; give a training config")
    for name in ("vae", "init_from", "output"):
        if isinstance(content.get(name), str):
            content[name] = os.path.expanduser(content[name])
    refuse(faults(DataConfig, content["data"], "data.", raw=True), f"{path}: ")
    source = content.get("vae") or content.get("init_from")
    if isinstance(source, str):
        content["data"] |= inherited(source, content["data"])
    return content


def config_parser(program: str, description: str | None, args: Sequence[str] | None) -> ConfigParser:
    """A parser for `python -m PROGRAM` with `--config`, whose section `data` is the default of `--data.*`.

    Args:
        args: the command line (None: the program's own), read once for `--config` alone.
    Raises: ValueError as `read_config` does.
    """
    files = config_files(args)
    parser = ConfigParser(
        prog=f"python -m {program}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=str, required=True, help="training config whose section `data` says which volumes"
    )
    parser.add_class_arguments(DataConfig, "data", help="overrides of the config's section `data`")
    if files:
        parser.set_defaults({f"data.{key}": value for key, value in read_config(files[-1])["data"].items()})
    return parser


def add_overlap_argument(parser: argparse.ArgumentParser | jsonargparse.ArgumentParser) -> None:
    """Add `--accept_overlap`."""
    parser.add_argument(
        "--accept_overlap",
        action="store_true",
        help="go on although a model has seen subjects of the same names: they are other people",
    )
