"""jsonargparse's parser, for commands with a config file, with what every command has: see `command`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml
from jsonargparse import Namespace, set_loader

from cli.command import (
    TRACEBACK,
    ArgumentParser,
    ShowTraceback,
    at_home,
    error_line,
)
from cli.parsing import built, explain
from files.documents import load_settings, read_yaml

from .config import DataConfig

set_loader("settings", load_settings, exceptions=(yaml.YAMLError, ValueError, KeyError))


class ConfigParser(jsonargparse.ArgumentParser):
    """With `--traceback`, and errors of one line: no page of usage, and the option that may have been meant. Options
    are written out: what `config_files` looks for would be passed over otherwise."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **{"parser_mode": "settings", "allow_abbrev": False, **settings})
        self.add_argument(TRACEBACK, action=ShowTraceback)
        self.typed: list[str] = []

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **settings: Any) -> Any:
        """As jsonargparse's."""
        self.typed = at_home(sys.argv[1:] if args is None else args)
        return super().parse_args(self.typed, *others, **settings)

    def instantiate(self, cfg: Namespace, *_: Any, **__: Any) -> Namespace:
        """Check `data` in a namespace, or in that of its subcommand, and make it a `DataConfig`. The rest stays as it
        is.

        Raises: ValueError for settings of another type than declared.
        """
        for part in (cfg, *(value for value in vars(cfg).values() if isinstance(value, Namespace))):
            if isinstance(part.get("data"), Namespace):
                built(part, {"data": DataConfig})
        return cfg

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with status 2; raise as jsonargparse does with `exit_on_error=False`."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser: argparse.ArgumentParser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        try:
            explain({"data": DataConfig}, [], self.typed)
        except ValueError as error:  # says which setting, and what is expected of it
            message = str(error)
        options = [*self._option_string_actions, *parser._option_string_actions]
        head, required, names = message.partition("arguments are required: ")
        flags = [f"--{name}" if f"--{name}" in options else name for name in names.split(", ")]
        message = f"{head}{required}{', '.join(flags)}" if required else message
        self.exit(2, error_line(program, message, self.typed, options))


def config_files(args: Sequence[str] | None) -> list[Path]:
    """The files that a command line (None: the program's) names with `--config`.

    Raises: ValueError for one that is not there, or does not hold settings by name.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=lambda text: Path(os.path.expanduser(text)), action="append", default=[])
    files = parser.parse_known_args(args)[0].config
    for file in files:
        if not file.exists():
            raise ValueError(f"--config {file}: no such file; check the path (the project's own are in configs/)")
        if not file.is_file():
            raise ValueError(f"--config {file}: no such file; give a YAML file, such as configs/hippocampus/vae.yaml")
        content = read_yaml(file)
        if not isinstance(content, dict):
            found = "is empty" if content is None else f"holds {type(content).__name__}, not settings by name"
            raise ValueError(f"--config {file}: {found}; give a config such as configs/hippocampus/vae.yaml")
    return files
