"""Read and write config files.

A path is relative to the place where it is written: on a command line to the working directory, in a file to the folder
of that file. A section may be in a file of its own: `data: data.yaml`. `read_config_file` reads both, and returns paths
relative to the working directory; `written_in` is the inverse for a file that is written. Absolute paths, URLs, names
of shipped weights (`files.shipped`) and `~` stay as they are; `~` of a section's file is the home folder.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from files.documents import dump_settings, read_yaml
from files.remote import URL
from files.shipped import expand_path, is_shipped

from .settings import Hint, PathMark, arms, faults, hints_of, marks, refuse


class ConfigFile(NamedTuple):
    """The settings of a config file.

    Attributes:
        path: the file.
        settings: its settings, with the sections that it names as files; paths are relative to the working directory.
        sections: {section: file} of the sections that are in files of their own.
    """

    path: Path
    settings: dict[str, Any]
    sections: dict[str, Path]

    def file_of(self, section: str) -> Path:
        """Return the file that a section is written in."""
        return self.sections.get(section, self.path)


def read_config_file(path: Path, *owners: Callable[..., Any]) -> ConfigFile:
    """Read a config file, with the sections that it names as files.

    Args:
        path: the YAML file.
        owners: the classes of its settings; the file may have settings of each of them.

    Raises:
        ValueError: naming the file, if it is missing or is not a mapping in YAML. The same for the files of sections.
    """
    hints = {name: hint for owner in owners for name, hint in hints_of(owner).items()}
    settings, sections = _read_mapping(path, str(path)), {}
    for name, value in settings.items():
        if (owner := section_class(hints.get(name))) and isinstance(value, str):
            sections[name] = Path(os.path.expanduser(from_folder(value, path.parent)))
            section = _read_mapping(sections[name], f"{path}: {name}: {value}")
            settings[name] = paths_changed(owner, section, _mover(sections[name].parent))
        elif name in hints:
            settings[name] = paths_changed(hints[name], value, _mover(path.parent))
    return ConfigFile(path, settings, sections)


def check_config_file(file: ConfigFile, owners: Mapping[str, Callable[..., Any]]) -> None:
    """Check the values of a config file.

    Args:
        file: the file.
        owners: {section: its class}; "" is the class of the whole file.

    Raises:
        ValueError: naming the file that holds the invalid settings, the settings, and what is expected.
    """
    parts = sections_of(owners)
    for name, part in parts.items():
        if isinstance(values := file.settings.get(name), Mapping):
            prefix = "" if name in file.sections else f"{name}."
            refuse(faults(part, values, prefix, raw=True), f"{file.file_of(name)}: ")
    if "" in owners:
        rest = {name: value for name, value in file.settings.items() if name not in file.sections}
        refuse(faults(owners[""], rest, raw=True), f"{file.path}: ")


def sections_of(owners: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """Return {section: its dataclass}.

    Args:
        owners: {section: its class}; "" is the class of all settings, whose dataclasses are sections.
    """
    named = {section: owner for section, owner in owners.items() if section}
    hints = hints_of(owners[""]) if "" in owners else {}
    return named | {name: part for name, hint in hints.items() if (part := section_class(hint))}


def section_words(args: Sequence[str], owners: Mapping[str, Callable[..., Any]]) -> list[str]:
    """Return a command line in which `--data FILE` is replaced by what the file holds.

    Args:
        args: the command line.
        owners: {section: its class}; "" is the class of all settings.

    Raises:
        ValueError: as `read_config_file`.
    """
    classes = sections_of(owners)
    words, waiting = [], None
    for word in args:
        option, equals, value = word.partition("=")
        if waiting is not None:
            option, value, equals = waiting, word, "="
        waiting = None
        if (owner := classes.get(option.removeprefix("--"))) is None or not option.startswith("--"):
            words.append(word)
        elif not equals:
            waiting = option
        elif Path(value).suffix in (".yaml", ".yml"):
            file = Path(os.path.expanduser(value))
            section = paths_changed(owner, _read_mapping(file, f"{option} {value}"), _mover(file.parent))
            refuse(faults(owner, section, raw=True), f"{file}: ")
            words.append(f"{option}={dump_settings(section, one_line=True)}")
        else:
            words.append(f"{option}={value}")
    return words if waiting is None else [*words, waiting]


def section_class(hint: Hint | None) -> Any:
    """Return the dataclass of a section's annotation; None for other settings."""
    return next((arm for arm in arms(hint) if dataclasses.is_dataclass(arm)), None) if hint is not None else None


def paths_changed(hint: Hint, value: Any, change: Callable[[str], str]) -> Any:
    """Return settings in plain values with `change(path)` in place of each `UserPath`; other values stay as they are.

    Args:
        hint: the annotation of the settings, or their class.
        value: plain values: mappings, lists, text and numbers.
        change: what to make of a path.
    """
    if isinstance(value, str):
        mark = next((mark for mark in marks(hint) if isinstance(mark, PathMark)), None)
        return change(value) if mark is not None and mark.moves and value and value not in mark.words else value
    for arm in arms(hint):
        origin, inner = get_origin(arm), get_args(arm)
        if dataclasses.is_dataclass(arm) and isinstance(value, Mapping):
            hints = hints_of(arm)
            return {
                key: paths_changed(hints[key], item, change) if key in hints else item for key, item in value.items()
            }
        if origin is dict and isinstance(value, Mapping):
            return {key: paths_changed(inner[1], item, change) for key, item in value.items()}
        if origin in (list, tuple, Sequence) and isinstance(value, list | tuple):
            return [paths_changed(inner[0], item, change) for item in value]
    return value


def from_folder(path: str, folder: str | Path) -> str:
    """Return a path that is written in a file of `folder`, relative to the working directory."""
    return path if _stays(path) else _relative(os.path.join(folder, path), os.curdir)


def written_in(path: str, folder: str | Path) -> str:
    """Return a path that is relative to the working directory, as a file in `folder` names it."""
    return path if _stays(path) else _relative(path, folder)


def resolved(path: str) -> str:
    """Return the absolute path without links that a path relative to the working directory leads to; URLs stay."""
    return path if URL.match(path) else os.path.realpath(expand_path(path))


def _stays(path: str) -> bool:
    return URL.match(path) is not None or is_shipped(path) or os.path.isabs(os.path.expanduser(path))


def _relative(path: str, start: str | Path) -> str:
    try:
        return os.path.relpath(path, start)
    except ValueError:  # on another drive of Windows
        return os.path.abspath(path)


def _mover(folder: Path) -> Callable[[str], str]:
    return lambda path: from_folder(path, folder)


def _read_mapping(path: Path, what: str) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{what}: no such file; check the path (the project's own configs are in configs/)")
    if not path.is_file():
        raise ValueError(f"{what}: is not a file; give a YAML file, such as configs/hippocampus/vae.yaml")
    content = read_yaml(path)
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds {type(content).__name__}, not settings by name"
        raise ValueError(f"{what}: {found}; give a config such as configs/hippocampus/vae.yaml")
    return content
