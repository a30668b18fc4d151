"""`evaluate.py all`: the chosen commands one after the other, and the page."""

import dataclasses
import hashlib
import json
import re
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from jsonargparse import ArgumentError, Namespace

from cli.live_bar import LiveBar
from evaluation.html import write_page
from evaluation.report import write_report
from evaluation.studies.limits import Data, problems
from files.documents import read_object
from volumes import load_cases

from . import arguments, privacy, realism, shapes
from .arguments import COMMANDS, Command, make_parser
from .common import run_command
from .progress import progress_disabled

NAME = "all"
PARTS = {name: COMMANDS[name] for name in arguments.PARTS}
MANIFEST = "manifest.csv"  # generate.py writes it anew, from the sidecars
FOR_ALL = (
    "config",
    "data",
    "output",
    "precision",
    "device",
    "models",
    "accept_overlap",
    "wait_minutes",
)  # are given once, and hold for every part


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Run the parts that are not done, and write the page of all that were asked for; `--output` is a folder.

    Raises: ValueError at the end, with what could not be measured; the page shows the rest, and names them.
    """
    if not options.synthetic:
        raise ValueError("--synthetic is missing: give folders of generated volumes, or --pipeline to generate them")
    folder, state = Path(options.output), PartialState()
    jobs, missing = plan(options)
    with LiveBar(total=len(jobs), unit="part", disable=progress_disabled(), desc="parts") as progress:
        for name, (part, inputs) in jobs.items():
            progress.set_postfix_str(name)
            if name in missing:
                progress.update()
                continue
            path = Path(part.output)
            there = is_measured(path, inputs)
            if broadcast_object_list([there])[0]:  # as the main process saw it
                progress.write(f"{name}: {path} is there, of the same inputs; not measured again")
            else:
                failed = attempt(PARTS[name], part, device, dtype)
                if failed:
                    missing[name] = failed
                elif state.is_main_process:  # the mark of a part that ended
                    write_report(path, {**read_object(path), "inputs": inputs})
            progress.update()
    state.wait_for_everyone()
    paths = [Path(part.output) for name, (part, _) in jobs.items() if name not in missing]
    page = write_page(paths, folder, options.title, missing) if state.is_main_process else {}
    if state.is_main_process:
        print(f"page: {folder / 'report.html'}", flush=True)
    if missing:
        told = "\n".join(f"  {name}: {reason}" for name, reason in missing.items())
        raise ValueError(f"{folder / 'report.html'} lacks what could not be measured:\n{told}")
    return page


def is_measured(path: Path, inputs: str) -> bool:
    """Whether there is a report of a part that ended, of these inputs. One that is damaged is not: its part is measured again, or says
    itself that it cannot go on with it."""
    try:
        return path.is_file() and read_object(path).get("inputs") == inputs
    except ValueError:
        return False


def plan(options: Namespace) -> tuple[dict[str, tuple[Namespace, str]], dict[str, str]]:
    """Each part's options and hash (`part_options`), and why parts cannot be measured on these data, which is said; before any work.

    Raises: ValueError for options that are wrong, and if no part can be measured.
    """
    folder = Path(options.output)
    jobs = {name: part_options(name, options, folder) for name in options.parts}
    if unused := sorted({_split(entry)[0] for entry in options.set} - set(jobs)):
        raise ValueError(f"--set names {unused}, which is not among --parts {list(jobs)}")
    data = Data(load_cases(options.data), options.data)
    found = {name: problems(name, data, vars(part)) for name, (part, _) in jobs.items()}
    missing = {name: "; ".join(reasons) for name, reasons in found.items() if reasons}
    told = "\n".join(f"{name}: cannot be measured: {reason}" for name, reason in missing.items())
    if len(missing) == len(jobs):
        raise ValueError(f"nothing can be measured:\n{told}")
    if missing and PartialState().is_main_process:
        print(f"{told}\nthe others can: {', '.join(name for name in jobs if name not in missing)}", flush=True)
    return jobs, missing


def attempt(command: Command, part: Namespace, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Run one part; why it ended without a report, in all processes alike, or None.

    One that the processes share must be ended by an error in any of them: there the error is raised, as nobody knows where the others
    are. What earlier parts found is in their reports.
    """
    state, failed = PartialState(), None
    try:
        run_command(command, part, device, dtype)
    except Exception as error:  # whatever it is, the other parts are not to be lost by it
        if state.num_processes > 1 and command.divides:
            raise
        failed = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
        if not isinstance(error, (ValueError, OSError)):
            traceback.print_exc()
        print(f"{command.name}: was not measured: {failed}", flush=True)
    return broadcast_object_list([failed])[0]


def part_options(name: str, options: Namespace, folder: Path) -> tuple[Namespace, str]:
    """The options of one part, as its own command line would give them, and a hash of them and of the files that they name.

    Raises: ValueError for several folders of generated volumes where the part takes one, and for an unknown option in `--set`.
    """
    parser = make_parser(PARTS[name], None)
    known = parser.get_defaults()
    args = ["--config", options.config, "--output", str(folder / f"{name}.json"), "--precision", options.precision]
    args += ["--device", options.device] if options.device else []
    args += ["--models", *options.models] if options.models else []
    args += ["--accept_overlap"] if options.accept_overlap else []
    if "synthetic" in known:
        several = name in (realism.NAME, shapes.NAME, privacy.NAME)
        if not several and len(options.synthetic) > 1:
            raise ValueError(
                f"{name} takes one folder of --synthetic, not {len(options.synthetic)}; leave it out of --parts"
            )
        args += ["--synthetic", *options.synthetic]
    for key in ("vae", "pipeline"):
        if key in known and options[key]:
            args += [f"--{key}", options[key]]
    for entry in options.set:
        part, option, value = _split(entry)
        if part == name:
            if option not in known or option.partition(".")[0] in FOR_ALL:
                raise ValueError(f"--set {entry}: {name} has no option {option} that can be set")
            args += [f"--{option}", *value.split()]
    try:
        parsed = make_parser(PARTS[name], None, exit_on_error=False).parse_args(args)
    except ArgumentError as error:
        said = re.sub(r"(?<=arguments are required: ).*", lambda missing: f"--{missing[0]}", str(error))
        raise ValueError(f"{name}: {said}") from error
    parsed.data, parsed.wait_minutes = options.data, options.wait_minutes
    words = [word for part, _, value in map(_split, options.set) if part == name for word in value.split()]
    words += [word.partition("=")[2] for word in words]  # NAME=PATH
    named = [Path(one) for one in (*options.synthetic, options.vae, options.pipeline, *words) if one]
    files = [file for path in named for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    cases = load_cases(options.data)
    for case in cases:
        files += [*case.images.values(), *([case.mask] if case.mask else [])]
    content = {
        "arguments": args[4:],
        "data": dataclasses.asdict(options.data),
        "cases": [(case.name, case.subject, case.split, case.metadata) for case in cases],  # what a table says
        "files": [stamp(file) for file in files if file.is_file() and file.name != MANIFEST],
    }
    return parsed, hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def stamp(file: Path) -> list[Any]:
    """Name, size and time of a file."""
    found = file.stat()
    return [file.name, found.st_size, found.st_mtime_ns]


def _split(entry: str) -> tuple[str, str, str]:
    """ "dice.seeds=5" -> ("dice", "seeds", "5"). Raises: ValueError for anything else."""
    left, equals, value = entry.partition("=")
    part, dot, option = left.partition(".")
    if not (equals and dot and option and value):
        raise ValueError(f"--set {entry}: give PART.OPTION=VALUE, such as dice.seeds=5")
    return part, option, value
