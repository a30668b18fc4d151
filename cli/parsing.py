"""Parse settings from a command line and its config files; errors name setting, value and expectation.

jsonargparse reads and merges; cli/settings.py defines the valid values.
"""

from __future__ import annotations

import dataclasses
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace

from files.documents import load_settings

from .config_files import ConfigFile, check_config_file, section_words, sections_of
from .settings import Hint, arms, base_of, construct, faults, faults_of, hints_of, refuse, unknown

Owners = Mapping[str, Callable[..., Any]]  # section ("" for the top) -> its dataclass


def parse_settings(
    parser: ArgumentParser, args: Sequence[str] | None, owners: Owners, files: Sequence[ConfigFile] = ()
) -> Namespace:
    """Parse a command line, and build the dataclass of each section (that of "" in `settings`).

    Args:
        parser: the parser.
        args: the command line; None for the program's own.
        owners: {"": TrainVaeConfig} if the parser's arguments are that class's; {"data": DataConfig} if it has others
            too.
        files: the config files that the command line names, as they were read.

    Raises:
        ValueError: for unreadable config files and for invalid values, naming file, setting, value and what is
            expected.
    """
    words = section_words(sys.argv[1:] if args is None else args, owners)
    try:
        parsed = parser.parse_args(words)
    except (ArgumentError, OverflowError) as error:  # the latter for numbers too large for a float
        explain(owners, files, words)
        raise ValueError(str(error)) from error
    try:
        return built(parsed, owners)
    except ValueError as error:
        explain(owners, files, words, error)  # names the file
        raise


def built(parsed: Namespace, owners: Owners) -> Namespace:
    """Check the sections of `owners` in a namespace, and replace them by instances of their dataclasses."""
    for section, owner in owners.items():
        values = (parsed if section == "" else parsed[section]).as_dict()
        values = {name: values[name] for name in hints_of(owner) if name in values}  # beside `config` and the like
        refuse(faults(owner, values, f"{section}." if section else ""))
        parsed["settings" if section == "" else section] = construct(owner, values, section)
    return parsed


def explain(owners: Owners, files: Sequence[ConfigFile], args: Sequence[str], error: Exception | None = None) -> None:
    """Report invalid settings of the first config file that has any, else of the command line.

    Args:
        owners: see `parse_settings`.
        files: the config files, the first one first.
        args: the command line.
        error: why the settings were refused. If a section of a file alone is refused for the same reason, the file is
            named.

    Raises:
        ValueError: for invalid settings. Without any, nothing is raised.
    """
    for file in files:
        check_config_file(file, owners)
    refuse(_on_command_line(owners, list(args)))
    for file in files:
        for section, owner in sections_of(owners).items():
            try:
                construct(owner, file.settings.get(section), section)
            except (ValueError, TypeError, AttributeError) as alone:  # the latter for a section that is not there
                if isinstance(alone, ValueError) and str(alone) == str(error):
                    raise ValueError(f"{file.file_of(section)}: {error}") from error


def _on_command_line(owners: Owners, args: list[str]) -> Iterator[str]:
    for position, argument in enumerate(args):
        name, equals, text = argument.removeprefix("--").partition("=")
        section = next((key for key in owners if key == "" or name.startswith(f"{key}.")), None)
        if not argument.startswith("--") or section is None or name in ("help", "config", "print_config"):
            continue
        owner = owners[section]
        inner = name.removesuffix("+").removeprefix(f"{section}." if section else "")
        hint = find_hint(owner, inner)
        if hint is None:
            yield unknown(name, owner, f"{section}." if section else "")
        elif equals or position + 1 < len(args):
            text = text if equals else args[position + 1]
            try:
                value = load_settings(text)
            except (yaml.YAMLError, ValueError, KeyError):
                value = text
            if base_of(hint) is not str:  # any text is valid
                yield from faults_of(hint, value, name, raw=True)


def find_hint(owner: Any, name: str) -> Hint | None:
    """Return the annotation of a setting by its dotted name, or None if there is no such setting."""
    first, _, rest = name.partition(".")
    hint = hints_of(owner).get(first)
    if not rest or hint is None:
        return hint
    for arm in arms(hint):
        if dataclasses.is_dataclass(arm) and (inner := find_hint(arm, rest)) is not None:
            return inner
    mapping = next((arm for arm in arms(hint) if get_origin(arm) is dict), None)
    if mapping is None:
        return None
    inner, _, deeper = rest.partition(".")
    value = get_args(mapping)[1]
    return find_hint(value, deeper) if deeper and dataclasses.is_dataclass(value) else value
