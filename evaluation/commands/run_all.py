"""`evaluate.py all`: the chosen commands one after the other, and the page."""

import dataclasses
import hashlib
import json
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from jsonargparse import ArgumentError, Namespace

from cli.live_bar import LiveBar
from evaluation.html import build_page, write_page
from evaluation.report import write_report
from evaluation.studies.limits import Data, problems
from files.documents import read_object
from files.shipped import expand_path
from volumes import load_cases

from . import arguments, privacy, realism, shapes
from .adherence import maps, morphometry
from .arguments import COMMANDS, Command, make_parser
from .common import run_command
from .trainings import progress_disabled

NAME = "all"
PARTS = {name: COMMANDS[name] for name in arguments.PARTS}
REWRITTEN = ("manifest.csv", "preview.png")  # generate.py writes them again each time, from the volumes
# These options are given once, and hold for every part.
FOR_ALL = (
    "config",
    "data",
    "output",
    "precision",
    "device",
    "models",
    "accept_overlap",
    "wait_minutes",
)
SEVERAL_FOLDERS = (
    realism.NAME,
    shapes.NAME,
    privacy.NAME,
    maps.NAME,
    morphometry.NAME,
)  # parts whose `--synthetic` takes several folders


@dataclass(frozen=True)
class Part:
    """One command of the page.

    Args:
        options: the options as the command's own command line would give them.
        digest: sha256 of the options and of the files that they name. A report with the same digest is not measured
            again.
    """

    options: Namespace
    digest: str

    @property
    def path(self) -> Path:
        """The JSON report."""
        return Path(self.options.output)


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, object]:
    """Run the parts that have no report yet, and write the page of all parts. `--output` is a folder.

    Raises: ValueError at the end, with what could not be measured; the page shows the other parts, and names these.
    """
    if not options.synthetic:
        raise ValueError("--synthetic is missing: give folders of generated volumes, or --pipeline to generate them")
    folder, state = Path(options.output), PartialState()
    parts, missing = plan(options)
    with LiveBar(total=len(parts), unit="part", disable=progress_disabled(), desc="parts") as progress:
        for name, part in parts.items():
            progress.set_postfix_str(name)
            if name not in missing and (reason := run_part(name, part, progress, device, dtype)):
                missing[name] = reason
            progress.update()
    state.wait_for_everyone()
    page = {}
    if state.is_main_process:
        paths = [part.path for name, part in parts.items() if name not in missing]
        page = write_page(build_page(paths), folder, options.title, missing)
        print(f"page: {folder / 'report.html'}", flush=True)
    if missing:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in missing.items())
        raise ValueError(f"{folder / 'report.html'} lacks what could not be measured:\n{reasons}")
    return page


def run_part(name: str, part: Part, progress: LiveBar, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Run one part unless its report exists. Returns why there is no report, or None."""
    if broadcast_object_list([is_measured(part)])[0]:  # as the main process saw it
        progress.write(f"{name}: {part.path} exists, from the same inputs; not measured again")
        return None
    reason = attempt(PARTS[name], part.options, device, dtype)
    if not reason and PartialState().is_main_process:
        write_report(part.path, {**read_object(part.path), "inputs": part.digest})  # marks a part that ended
    return reason


def is_measured(part: Part) -> bool:
    """Return whether there is a report of a finished part with the same inputs. A damaged report does not count: its
    part is measured again, or refuses the report.
    """
    try:
        return part.path.is_file() and read_object(part.path).get("inputs") == part.digest
    except ValueError:
        return False


def plan(options: Namespace) -> tuple[dict[str, Part], dict[str, str]]:
    """Plan the parts before any work. Returns them, and why some cannot be measured on these data, which is also
    printed.

    Raises: ValueError for options that are wrong, and if no part can be measured.
    """
    folder = Path(options.output)
    parts = {name: plan_part(name, options, folder) for name in options.parts}
    if unused := sorted({_split(entry)[0] for entry in options.set} - set(parts)):
        raise ValueError(f"--set names {unused}, which is not among --parts {list(parts)}")
    data = Data(load_cases(options.data), options.data)
    reasons = {name: problems(name, data, vars(part.options)) for name, part in parts.items()}
    missing = {name: "; ".join(found) for name, found in reasons.items() if found}
    message = "\n".join(f"{name}: cannot be measured: {reason}" for name, reason in missing.items())
    if len(missing) == len(parts):
        raise ValueError(f"nothing can be measured:\n{message}")
    if missing and PartialState().is_main_process:
        print(f"{message}\nthe others can: {', '.join(name for name in parts if name not in missing)}", flush=True)
    return parts, missing


def attempt(command: Command, options: Namespace, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Run one command. Returns why it ended without a report, the same in all processes, or None.

    A command that the processes share must end with an error in any of them: the error is raised there, because nobody
    knows where the other processes are. The reports of earlier parts stay.
    """
    state, reason = PartialState(), None
    try:
        run_command(command, options, device, dtype)
    except Exception as error:  # no error of one part may cost the other parts
        if state.num_processes > 1 and command.divides:
            raise
        reason = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
        if not isinstance(error, (ValueError, OSError)):
            traceback.print_exc()
        print(f"{command.name}: was not measured: {reason}", flush=True)
    return broadcast_object_list([reason])[0]


def plan_part(name: str, options: Namespace, folder: Path) -> Part:
    """Make the options of one part, as its own command line would give them.

    Raises: ValueError for several folders of generated volumes where the part takes one, and for an unknown option in
    `--set`.
    """
    settings = [(option, value.split()) for part, option, value in map(_split, options.set) if part == name]
    args = part_arguments(name, options, settings)
    output = ["--config", options.config, "--output", str(folder / f"{name}.json")]
    try:
        parsed = make_parser(PARTS[name], None, exit_on_error=False).parse_args([*output, *args])
    except ArgumentError as error:
        message = re.sub(r"(?<=arguments are required: ).*", lambda missing: f"--{missing[0]}", str(error))
        raise ValueError(f"{name}: {message}") from error
    parsed.data, parsed.wait_minutes = options.data, options.wait_minutes
    words = [word for _, values in settings for word in values]
    words += [word.partition("=")[2] for word in words]  # NAME=PATH
    paths = [
        Path(expand_path(str(path))) for path in (*options.synthetic, options.vae, options.pipeline, *words) if path
    ]
    return Part(parsed, digest_inputs(args, options, paths))


def part_arguments(name: str, options: Namespace, settings: Sequence[tuple[str, list[str]]]) -> list[str]:
    """Make the command line of one part, without `--config` and `--output`. `settings` are the part's options in
    `--set`.

    Raises: ValueError as `plan_part`.
    """
    defaults = make_parser(PARTS[name], None).get_defaults()
    args = ["--precision", options.precision]
    args += ["--device", options.device] if options.device else []
    args += ["--models", *options.models] if options.models else []
    args += ["--accept_overlap"] if options.accept_overlap else []
    if "synthetic" in defaults:
        if name not in SEVERAL_FOLDERS and len(options.synthetic) > 1:
            raise ValueError(
                f"{name} takes one folder of --synthetic, not {len(options.synthetic)}; leave it out of --parts"
            )
        args += ["--synthetic", *options.synthetic]
    for key in ("vae", "pipeline"):
        if key in defaults and options[key]:
            args += [f"--{key}", options[key]]
    for option, values in settings:
        if option not in defaults or option.partition(".")[0] in FOR_ALL:
            raise ValueError(f"--set {name}.{option}={' '.join(values)}: {name} has no option {option} that can be set")
        args += [f"--{option}", *values]
    return args


def digest_inputs(args: Sequence[str], options: Namespace, paths: Sequence[Path]) -> str:
    """Return the sha256 of a command line, of the data, and of the names, sizes and times of all files that are
    read."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    cases = load_cases(options.data)
    for case in cases:
        files += [*case.images.values(), *([case.mask] if case.mask else [])]
    content = {
        "arguments": args,
        "data": {**dataclasses.asdict(options.data), "label_map": [*map(str, options.data.label_map.items())]},
        "cases": [(case.name, case.subject, case.split, case.metadata) for case in cases],  # the content of a table
        "files": [stamp(file) for file in files if file.is_file() and file.name not in REWRITTEN],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def stamp(file: Path) -> tuple[str, int, int]:
    """Return the name, size and time of a file."""
    stat = file.stat()
    return file.name, stat.st_size, stat.st_mtime_ns


def _split(entry: str) -> tuple[str, str, str]:
    """Split "dice.seeds=5" into ("dice", "seeds", "5"). Raises: ValueError for anything else."""
    left, equals, value = entry.partition("=")
    part, dot, option = left.partition(".")
    if not (equals and dot and option and value):
        raise ValueError(f"--set {entry}: give PART.OPTION=VALUE, such as dice.seeds=5")
    return part, option, value
