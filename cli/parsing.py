"""Settings from a command line and its config files, with errors that name the setting, its value and what is expected.

jsonargparse reads and merges; cli/settings.py says what each setting may be.
"""

from __future__ import annotations

import dataclasses
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace

from files.documents import load_settings, read_yaml

from .settings import Hint, arms, base_of, construct, faults, faults_of, hints_of, refuse, unknown

Owners = Mapping[str, Callable[..., Any]]  # section ("" for the top) -> its dataclass


def parse_settings(
    parser: ArgumentParser, args: Sequence[str] | None, owners: Owners, files: Sequence[Path] = ()
) -> Namespace:
    """The command line, with each owner's section as an instance of its dataclass (that of "" in `settings`).

    Args:
        owners: {"": TrainVaeConfig} if the parser's arguments are that class's; {"data": DataConfig} if it has others too.
        files: config files that the command line names.
    Raises: ValueError for files that `read_yaml` refuses, and for values that are not what they are declared to be: it
        names file, setting, value and what is expected.
    """
    try:
        parsed = parser.parse_args(args if args is None else list(args))
    except (ArgumentError, OverflowError) as error:  # the latter of numbers that no float can hold
        explain(owners, files, args or ())
        raise ValueError(str(error)) from error
    try:
        return built(parsed, owners)
    except ValueError:
        explain(owners, files, args or ())  # it knows which file
        raise


def built(parsed: Namespace, owners: Owners) -> Namespace:
    """A parsed namespace with the sections of `owners` checked and made instances of their dataclasses."""
    for section, owner in owners.items():
        values = (parsed if section == "" else parsed[section]).as_dict()
        values = {name: values[name] for name in hints_of(owner) if name in values}  # beside `config` and the like
        refuse(faults(owner, values, f"{section}." if section else ""))
        parsed["settings" if section == "" else section] = construct(owner, values, section)
    return parsed


def explain(owners: Owners, files: Sequence[Path], args: Sequence[str]) -> None:
    """Raises: ValueError for the first config file with settings that are wrong, else for those on the command line."""
    for file in filter(Path.is_file, files):
        content = read_yaml(file)
        content = content if isinstance(content, dict) else {}
        for section, owner in owners.items():
            values = content if section == "" else content.get(section)
            if isinstance(values, Mapping):
                refuse(faults(owner, values, f"{section}." if section else "", raw=True), f"{file}: ")
    refuse(_on_command_line(owners, list(args)))


def _on_command_line(owners: Owners, args: list[str]) -> Iterator[str]:
    for position, argument in enumerate(args):
        name, equals, text = argument.removeprefix("--").partition("=")
        section = next((one for one in owners if one == "" or name.startswith(f"{one}.")), None)
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
            if base_of(hint) is not str:  # all text is text
                yield from faults_of(hint, value, name, raw=True)


def find_hint(owner: Any, name: str) -> Hint | None:
    """The annotation of a setting by its dotted name; None for one that is not there."""
    first, _, rest = name.partition(".")
    hint = hints_of(owner).get(first)
    if not rest or hint is None:
        return hint
    for arm in arms(hint):
        if dataclasses.is_dataclass(arm) and (found := find_hint(arm, rest)) is not None:
            return found
    mapping = next((arm for arm in arms(hint) if get_origin(arm) is dict), None)
    if mapping is None:
        return None
    inner, _, deeper = rest.partition(".")
    value = get_args(mapping)[1]
    return find_hint(value, deeper) if deeper and dataclasses.is_dataclass(value) else value
