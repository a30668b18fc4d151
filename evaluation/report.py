"""Writing reports with the provenance of their figures, and reading the configs that name the data."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar

import jsonargparse

from cli.command import console_program
from cli.config_files import check_config_file
from cli.settings import NonNegativeFloat, Number
from files.atomic import remove_leftovers, write_text
from files.documents import read_object
from files.locks import only_writer
from files.shipped import expand_path
from training.ldm_config import TrainLdmConfig
from training.vae_config import TrainVaeConfig
from volumes import DataConfig
from volumes.data.config_parser import ConfigParser, config_files, data_of_run, read_training_config
from volumes.data.preprocessing import inherited

ROOT = Path(__file__).resolve().parents[1]
Report = TypeVar("Report")  # a TypedDict


class Machine(TypedDict):
    """The hardware of a measurement."""

    processor: str
    cores: int | None
    threads: int
    accelerator: NotRequired[str]
    instructions: NotRequired[list[str]]  # of the processor, in benchmarks


class Provenance(TypedDict):
    """What is needed to repeat a measurement."""

    command: str
    date: str
    commit: str | None
    machine: Machine
    versions: dict[str, str]


def provenance() -> Provenance:
    """Record the command, the date, the commit, the machine and the versions."""
    import torch  # here, because commands parse their arguments before it is imported

    return {
        "command": f"{console_program() or f'python {program()}'} {shlex.join(sys.argv[1:])}".rstrip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def program() -> str:
    """Return the script that runs, relative to the clone if it is inside it: a report must not name folders of one
    machine. A module that was started by its name is `-m NAME`."""
    path = Path(sys.argv[0]).resolve()
    if not path.is_relative_to(ROOT):
        return path.name
    script = path.relative_to(ROOT)
    module = ".".join(script.with_suffix("").parts).removesuffix(".__main__")
    return f"-m {module}" if ["-m", module] in map(list, pairwise(sys.orig_argv)) else str(script)


def machine() -> Machine:
    """Describe the processor, the cores that this process may use, torch's threads, and the accelerator if there is
    one."""
    import torch

    result = Machine(processor=processor(), cores=cores(), threads=torch.get_num_threads())
    if torch.cuda.is_available():
        result["accelerator"] = torch.cuda.get_device_name()
    return result


def cores() -> int | None:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor() -> str:
    """Return the name of the processor, or its architecture where the system does not give the name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Return the commit of the clone, with `+` if tracked files differ from it; None outside a clone."""
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
    """Write `report` as JSON, completely or not at all.

    Raises: OSError naming the file, for example on a full disk. An older report stays as it was.
    """
    path = Path(path)
    try:
        write_text(path, json.dumps(report, indent=2) + "\n")
    except OSError as error:
        error.filename = str(path)  # Python does not name the file of a write that fails
        raise
    return path


def read_report(path: Path, kind: type[Report], program: str) -> Report:
    """Read a report that `write_report` wrote.

    Args:
        kind: TypedDict of the report.
        program: that writes such reports, for the message.
    Raises: ValueError naming the file if it is not such a report: not a JSON object, or without a key of `kind`.
    """
    content: Any = read_object(path)
    if missing := sorted(getattr(kind, "__required_keys__", frozenset()) - content.keys()):
        raise ValueError(f"{path}: has no {', '.join(missing)}; give a report of {program}")
    return content


@contextmanager
def only_writer_of(path: str | Path, wait_minutes: float) -> Iterator[None]:
    """Lock the report at `path` against other processes, as `files.locks.only_writer`, and remove the leftovers of
    killed processes.

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
        help="minutes to wait for another process that writes to the same output; 0 refuses at once",
    )


def check_report(path: str | Path) -> None:
    """Check before hours of work that a report can be written, and remove the leftovers of killed processes beside it.

    Raises: ValueError if its folder cannot be written to, or if `path` is a folder.
    """
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
    """Read all sections of a training config; paths are relative to the working directory (`cli.config_files`).
    Settings that `data` omits come from the autoencoder of `vae` or `init_from`, and without `data` all of it comes
    from the run of `vae`, as in training (`volumes.data.preprocessing`).

    Raises: ValueError for a config without a section `data`, and for unreadable files and invalid values, by name.
    """
    file = read_training_config(path, TrainVaeConfig, TrainLdmConfig)
    content = file.settings
    for name in ("vae", "init_from", "output"):
        if isinstance(content.get(name), str):
            content[name] = expand_path(content[name])
    if "data" not in content and isinstance(content.get("vae"), str):
        content["data"] = data_of_run(content["vae"])
    if not isinstance(content.get("data"), dict):
        raise ValueError(f"{path}: has no section `data`; give a training config")
    check_config_file(file, {"data": DataConfig})
    source = content.get("vae") or content.get("init_from")
    if isinstance(source, str):
        content["data"] |= inherited(source, content["data"])
    return content


def config_parser(program: str, description: str | None, args: Sequence[str] | None) -> ConfigParser:
    """Make a parser for `python -m PROGRAM` with `--config`; the config's section `data` gives the defaults of
    `--data.*`.

    Args:
        args: the command line (None: of this process), which is read for `--config` alone.
    Raises: ValueError as `read_config` does.
    """
    files = config_files(args)
    parser = ConfigParser(prog=console_program() or f"python -m {program}", description=description)
    parser.add_argument(
        "--config", type=str, required=True, help="training config; its section `data` names the volumes"
    )
    parser.add_class_arguments(DataConfig, "data", help="overrides of the config's section `data`")
    if files:
        parser.set_defaults({f"data.{key}": value for key, value in read_config(files[-1].path)["data"].items()})
    return parser


def add_overlap_argument(parser: argparse.ArgumentParser | jsonargparse.ArgumentParser) -> None:
    """Add `--accept_overlap`."""
    parser.add_argument(
        "--accept_overlap",
        action="store_true",
        help="continue although a model was trained on subjects of the same names, because they are other people",
    )
