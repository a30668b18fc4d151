"""Shared behavior of every script and `python -m` command: arguments, errors and exit status.

A command parses its arguments above its other imports, and then hands over to `run_command`:

    def parse(args=None): ...

    if __name__ == "__main__":
        run_command(parse)

    import torch

so that `--help` and a mistyped option are answered before torch is imported, which takes seconds. `run_command` imports
the file as a module and calls its `main`. A user's mistake ends in one message; `--traceback` adds the traceback.
"""

from __future__ import annotations

import argparse
import builtins
import difflib
import errno
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import re
import runpy
import shlex
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from files.paths import printable

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended: 128 + SIGINT
WRONG_ARGUMENTS = 2  # the exit status of a command whose arguments cannot be used
TRACEBACK = "--traceback"
ROOMS = (
    "files",
    "cli",
    "volumes",
    "autoencoder",
    "diffusion",
    "pipelines",
    "interop",
    "training",
    "evaluation",
    "reader_study",
    "recipes",
    "studio",
    "benchmarks",
    "tools",
)
# Errors of the operating system, and what to do about them.
REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "a file lies where a folder is needed; give another path",
    errno.EEXIST: "give another path",
    errno.EACCES: "change its permissions, or give another path",
    errno.EPERM: "change its permissions, or give another path",
    errno.EROFS: "give a path on a disk that can be written to",
    errno.ENOSPC: "make room, or give a path on another disk",
    errno.EDQUOT: "make room, or give a path on another disk",
    errno.EFBIG: "give a path on another disk",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "allow more open files (ulimit -n), or use fewer workers",
    errno.ENOMEM: "use fewer workers, or smaller batches",
}


class CannotContinue(RuntimeError):
    """A command cannot continue for an external reason, such as a full disk or the end of another process."""


class VisibleFormatter(logging.Formatter):
    """Format log messages with control characters escaped: names in them are untrusted."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; see `files.paths.printable`."""
        return printable(super().format(record))


# Derived from `--version`'s action, it adds nothing to the namespace, also not to jsonargparse's.
class ShowTraceback(argparse._VersionAction):
    """The option `--traceback`, which `run_command` looks for; the parser only accepts and describes it."""

    def __init__(self, option_strings: Sequence[str], dest: str = argparse.SUPPRESS, **_: Any):
        text = "show Python's traceback of an error as well"
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, help=text)

    def __call__(self, *_: Any) -> None:
        """Do nothing: see `run_command`."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with `--traceback` and one-line errors that suggest the nearest option."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **settings})
        self.add_argument(TRACEBACK, action=ShowTraceback)
        self.typed: list[str] = []

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse as argparse does, with `~` expanded."""
        self.typed = at_home(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self.typed, namespace)

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, error_line(self.prog, message, self.typed, self._option_string_actions))


def at_home(words: Sequence[str]) -> list[str]:
    """Expand `~/` where the shell does not: in `--output=~/x`, `NAME=~/x`, `generate:~/x`, and in quotes."""
    return [re.sub(r"^((?:--)?[\w.]+[=:])?(~/.*)$", _expanded, word) for word in words]


def _expanded(found: re.Match[str]) -> str:
    return (found[1] or "") + os.path.expanduser(found[2])


def positive(text: str) -> int:
    """Parse a whole number of at least 1, as the `type` of an argument."""
    value = int(text) if text.lstrip("+-").isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of 1 or more")
    return value


def error_line(program: str, message: str, typed: Sequence[str], options: Iterable[str]) -> str:
    """Return the error for wrong arguments: the message, the nearest options, and where to find the others."""
    options = list(options)
    meant = {word: nearest(word, options) for word in unknown_options(typed, options)}
    if choice := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)$", message):
        names = [name.strip(" '") for name in choice[2].split(",")]
        meant |= {choice[1]: next(iter(difflib.get_close_matches(choice[1], names, n=1)), None)}
    hints = "".join(f"; {word}: did you mean {near}?" for word, near in meant.items() if near)
    return f"{program}: error: {message.strip().rstrip('.')}{hints or '.'} See {program} --help\n"


def unknown_options(typed: Sequence[str], options: Iterable[str]) -> list[str]:
    """Return words that look like options, but are not an option, its beginning, or a key of one (`--model.width`)."""
    known, unknown = list(options), []
    keyed = tuple(f"{option}." for option in known if not any(other.startswith(f"{option}.") for other in known))
    for word in (word.partition("=")[0] for word in typed):
        if word == "--":
            break
        if (
            word.startswith("--")
            and not word.startswith(keyed)
            and not any(option.startswith(word) for option in known)
        ):
            unknown.append(word)
    return unknown


def nearest(word: str, options: Iterable[str]) -> str | None:
    """Return the option most similar to a mistyped one, or None; `--max_step` also resembles `--loop.max_steps`."""
    names = {name.lstrip("-"): name for name in options if name.startswith("--") and not word.startswith(f"{name}.")}
    close = difflib.get_close_matches(word.lstrip("-"), names, n=1, cutoff=0.7)
    if not close:
        last = {name.rpartition(".")[2]: name for name in reversed(names)}
        close = [last[name] for name in difflib.get_close_matches(word.lstrip("-"), last, n=1, cutoff=0.8)]
    return names[close[0]] if close else None


def run_command(parse: Callable[[], object]) -> NoReturn:
    """Parse the command line, import the file that Python runs as a module, call its `main`, and end the program.

    The exit status is 0, or the number that `main` returns; 1 after a user's mistake, reported in one message; 2 after
    wrong arguments; 130 after Ctrl-C. Any other exception is a bug and keeps its traceback. `main` parses the arguments
    again, because it is also called from Python.
    """
    program = program_name()
    if not sys.stderr.isatty():  # other libraries draw progress bars into pipes and logs; ours say what they do
        os.environ.setdefault("TQDM_DISABLE", "1")
    if logging.lastResort is not None:  # shows warnings if logging is not set up
        logging.lastResort.setFormatter(VisibleFormatter())
    parsed = False
    try:
        parse()
        parsed = True
        status = imported_main()()
    except KeyboardInterrupt:
        end_interrupted(program)
    except Exception as error:
        message = users_message(error)
        if message is None or TRACEBACK in sys.argv:
            raise
        if first_to_say(message):
            print(f"{program}: error: {printable(message)} ({TRACEBACK} shows where)", file=sys.stderr, flush=True)
        sys.exit(WRONG_ARGUMENTS if not parsed and isinstance(error, ValueError) else 1)
    sys.exit(status if type(status) is int else 0)


def run_module(program: str, module: str, args: Sequence[str]) -> None:
    """Run a module as `python -m` would, under another name: "medvolume doctor" for `evaluation.doctor`.

    The working directory is not searched for modules, so a `volumes.py` of the user's does no harm.
    """
    sys.argv = [program, *args]
    _console[:] = [program, module]
    try:
        runpy.run_module(module, run_name="__main__")
    except KeyboardInterrupt:  # before the module calls `run_command`
        end_interrupted(program)


def end_interrupted(program: str) -> NoReturn:
    """End the program after Ctrl-C, in one line; with `--traceback`, raise the KeyboardInterrupt that is handled."""
    if TRACEBACK in sys.argv:
        raise
    print(f"{program}: interrupted", file=sys.stderr)
    sys.exit(INTERRUPTED)


_console: list[str] = []  # what `run_module` runs: its name, and its module


def console_program() -> str | None:
    """Return the name that `run_module` gave to the program, such as "medvolume doctor", or None for a script."""
    return _console[0] if _console else None


def program_name() -> str:
    """Return the program as it is typed: `train_vae.py`, `python -m evaluation.doctor` or `medvolume doctor`."""
    if _console:
        return _console[0]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return Path(sys.argv[0]).name if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"


def next_step(script: str, *words: str | Path) -> None:
    """Print the command that usually comes next to standard error, on rank 0 only. Arguments: as `command_line`."""
    if os.environ.get("RANK", "0") == "0":
        print(f"next: {printable(command_line(script, *words))}", file=sys.stderr, flush=True)


def command_line(script: str, *words: str | Path) -> str:
    """Return a command for the shell: `medvolume train-ldm ...` under the console command, else `python ...`.

    Args:
        script: a script at the root of the clone, such as "train_ldm.py", or a module, such as "evaluation.doctor".
        words: its arguments, which are quoted where the shell needs it. A `Path` inside the working directory is shown
            relative to it.
    """
    is_script = script.endswith(".py")
    if _console:
        name = script.removesuffix(".py").rpartition(".")[2]
        program = ["medvolume", name.replace("_", "-")]
    elif is_script:
        program = ["python", _from_here(Path(__file__).resolve().parents[1] / script)]
    else:
        program = ["python", "-m", script]
    return shlex.join([*program, *(_from_here(word) if isinstance(word, Path) else word for word in words)])


def _from_here(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def imported_main() -> Callable[[], object]:
    """Import the file that runs as `__main__` by its own name, and return its `main`.

    Its classes are then the same objects that other modules import.
    """
    if _console:
        return _main_of(importlib.import_module(_console[1]))
    running: ModuleType = sys.modules["__main__"]
    if (spec := getattr(running, "__spec__", None)) is not None:
        return importlib.import_module(spec.name).main
    path = Path(running.__file__ or "").resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module.main


def _main_of(module: ModuleType) -> Callable[[], object]:
    """Return the `main` of a module, or of a package's `__main__`."""
    return (importlib.import_module(f"{module.__name__}.__main__") if hasattr(module, "__path__") else module).main


def users_message(error: BaseException) -> str | None:
    """Return the message for an error that a user can fix, or None for a bug.

    Users' errors are ValueError, OSError, `CannotContinue`, damaged files, too little memory, and missing packages.
    """
    if "\nOriginal Traceback" in str(error):  # from a data-loading process of PyTorch, as text
        return workers_message(str(error))
    notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
    name, kinds = type(error).__name__, {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        remedy = REMEDIES.get(error.errno)
        where = "".join(f"{file}: " for file in (error.filename,) if file is not None)
        return f"{where}{error.strerror}{'; ' + remedy if remedy else ''}{notes}"
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        return None if package in ("", *ROOMS) else f"{error}; pip install it, or run this with .venv/bin/python"
    if isinstance(error, MemoryError) or "OutOfMemoryError" in kinds:  # torch's
        return (
            f"out of memory ({str(error).strip().splitlines()[0] if str(error) else name}); use smaller batches or "
            "volumes"
        )
    damaged = isinstance(error, (EOFError, zlib.error, zipfile.BadZipFile)) or kinds & {"SafetensorError", "YAMLError"}
    if damaged or isinstance(error, (ValueError, OSError, CannotContinue)):
        return f"{str(error).strip() or name}{notes}"
    return None


def workers_message(text: str) -> str | None:
    """Return the error of a data-loading process without its frames: the last lines of its traceback."""
    lines = text.rpartition("Traceback (most recent call last):\n")[2].splitlines()
    while lines and lines[0].startswith(" "):
        lines.pop(0)
    name, _, message = "\n".join(lines).partition(": ")
    known = getattr(builtins, name.rpartition(".")[2], None)
    ours = isinstance(known, type) and not issubclass(known, (ValueError, OSError, MemoryError, EOFError))
    return None if ours or not re.fullmatch(r"[\w.]+", name) else message.strip()


def first_to_say(message: str) -> bool:
    """Return whether this process is the first under torchrun to report; hand `message` to the launcher too."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not place:
        return True
    mine = Path(place)
    try:
        extra = {"timestamp": str(int(time.time()))}
        mine.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
        (mine.parent.parent / hashlib.sha256(message.encode()).hexdigest()[:16]).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # a launcher without such a folder, or a full disk: report it twice rather than never
        return True
    return True
