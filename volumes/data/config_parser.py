"""jsonargparse's parser, for commands with a config file, with what every command has: see `command`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml
from jsonargparse import Namespace, set_dumper, set_loader

from cli.command import (
    TRACEBACK,
    ArgumentParser,
    ShowTraceback,
    at_home,
    error_line,
)
from cli.config_files import ConfigFile, check_config_file, from_folder, read_config_file, section_words
from cli.explained import SettingsHelpFormatter, commented, explain_options
from cli.parsing import built, explain
from files.documents import dump_settings, load_settings

from .config import DataConfig

set_loader("settings", load_settings, exceptions=(yaml.YAMLError, ValueError, KeyError))
set_dumper("settings", dump_settings)


@dataclass
class WithData:
    """Settings of which a program reads the section `data` alone."""

    data: DataConfig


class ConfigParser(jsonargparse.ArgumentParser):
    """Add `--traceback` and errors of one line, with the option that may have been meant and without a page of usage.
    Options are not abbreviated, because `config_files` looks for the full name.

    Args:
        args, settings: as jsonargparse's.
        owners: the classes of the settings in config files.
    """

    def __init__(self, *args: Any, owners: Sequence[Callable[..., Any]] = (), **settings: Any):
        usual = {"parser_mode": "settings", "allow_abbrev": False, "formatter_class": SettingsHelpFormatter}
        super().__init__(*args, **{**usual, **settings})
        self.owners = owners
        self.add_argument(TRACEBACK, action=ShowTraceback)
        self.typed: list[str] = []

    def add_class_arguments(
        self, theclass: Any, nested_key: str | None = None, *args: Any, **settings: Any
    ) -> list[str]:
        """Add the settings of a class as jsonargparse does, with the texts of its docstring."""
        added = super().add_class_arguments(theclass, nested_key, *args, **settings)
        explain_options(self, theclass, f"{nested_key}." if nested_key else "")
        return added

    def dump(self, namespace: Namespace, *args: Any, **settings: Any) -> str:
        """Write settings as YAML; those of a config file each below a comment."""
        text = super().dump(namespace, *args, **settings)
        return commented(load_settings(text), self.owners[0]) if len(self.owners) == 1 else text

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **settings: Any) -> Any:
        """Parse as jsonargparse does; `--data FILE` names a file that holds the section."""
        self.typed = section_words(at_home(sys.argv[1:] if args is None else args), {"data": DataConfig})
        return super().parse_args(self.typed, *others, **settings)

    def parse_path(self, path: Any, *_: Any, **settings: Any) -> Any:
        """Parse a config file: see `read_training_config`."""
        file = read_training_config(Path(path), *self.owners)
        return self.parse_string(dump_settings(file.settings), **settings)

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


def config_files(args: Sequence[str] | None, *owners: Callable[..., Any]) -> list[ConfigFile]:
    """Read the files that a command line (None: the program's) names with `--config`.

    Args:
        args: the command line.
        owners: the classes of the files' settings.
    Raises:
        ValueError: as `read_training_config`.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=lambda text: Path(os.path.expanduser(text)), action="append", default=[])
    return [read_training_config(file, *owners) for file in parser.parse_known_args(args)[0].config]


def read_training_config(path: Path, *owners: Callable[..., Any]) -> ConfigFile:
    """Read a config with a section `data`, as all programs do. A section with `images` and without `root` means files
    in the folder of the file that holds the section.

    Args:
        path: the file.
        owners: the classes of the file's settings.
    Raises:
        ValueError: as `read_config_file`.
    """
    file = read_config_file(path, *(owners or (WithData,)))
    section = file.settings.get("data")
    if isinstance(section, dict) and section.get("images") and not section.get("phantom"):
        section.setdefault("root", from_folder(".", file.file_of("data").parent))
    return file


def data_of_run(folder: str | Path) -> dict[str, object]:
    """Return the data section of the run that trained the autoencoder in `folder` (or in its vae/), from the run's
    config.yaml.

    Raises:
        ValueError: if there is no such run.
    """
    home = Path(folder)
    for path in (home / "config.yaml", home.parent / "config.yaml"):
        if path.is_file():
            file = read_training_config(path)
            check_config_file(file, {"data": DataConfig})
            if isinstance(section := file.settings.get("data"), dict):
                return section
    raise ValueError(
        f"data: is not set, and there is no config.yaml of a run in {home} or beside it to take it from; write "
        "`data: data.yaml` in the config, a file that names the volumes"
    )
