"""What settings mean: the texts of docstrings, for `--help`, the comments of `--print_config`, and docs/settings.md.

A class explains its settings in the section `Args:` of its docstring, by Google's convention. Two names may share a
text (`channels, layers: size of the discriminators.`).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import jsonargparse

from files.documents import dump_settings

from .config_files import section_class
from .settings import arms, describe, hints_of

SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):", re.MULTILINE)
WIDTH = 100  # of comments


def summary(owner: Callable[..., Any]) -> str:
    """Return the docstring of a class up to its first section."""
    return SECTION.split(inspect.cleandoc(owner.__doc__ or ""), maxsplit=1)[0].strip()


def first_sentence(owner: Callable[..., Any]) -> str:
    """Return the first sentence of a class's docstring, without its period."""
    return " ".join(summary(owner).split()).partition(". ")[0].rstrip(".")


def argument_texts(owner: Callable[..., Any]) -> dict[str, str]:
    """Return {argument: its text} from the section `Args:` of a class's docstring, each text on one line."""
    found = re.search(r"^Args:\n((?:[ ].*\n|\n)*)", inspect.cleandoc(owner.__doc__ or "") + "\n", re.MULTILINE)
    texts: dict[str, str] = {}
    for entry in re.split(r"^ {4}(?=\S)", found[1], flags=re.MULTILINE)[1:] if found else []:
        names, _, text = " ".join(entry.split()).partition(": ")
        texts |= {name.strip(): text for name in names.split(",")}
    return texts


def explain_options(parser: argparse.ArgumentParser, owner: Callable[..., Any], prefix: str = "") -> None:
    """Set the help of the options that are the settings of a class, and of the sections in it.

    Args:
        parser: the parser with the options.
        owner: the class.
        prefix: text before the names of all options, such as "data.".
    """
    texts, options = argument_texts(owner), parser._option_string_actions
    if prefix and (whole := options.get(f"--{prefix[:-1]}")) is not None:
        whole.help = "YAML file that holds this section"
    for name, hint in hints_of(owner).items():
        if (action := options.get(f"--{prefix}{name}")) is None:
            continue
        action.help, section = texts.get(name, ""), section_class(hint)
        if section and any(option.startswith(f"--{prefix}{name}.") and option[-5:] != ".help" for option in options):
            explain_options(parser, section, f"{prefix}{name}.")
            if (group := (getattr(parser, "groups", None) or {}).get(f"{prefix}{name}")) is not None:
                group.title = f"{name}: {first_sentence(section)}"
            continue
        setattr(action, "expected", expected(hint))  # noqa: B010
        if section:
            action.help += "".join(f"\n{name}.{line}" for line in _lines(section))


def _lines(owner: Callable[..., Any], prefix: str = "") -> list[str]:
    """Return a line for each setting of a class and of the sections in it."""
    lines, texts = [], argument_texts(owner)
    for name, hint in hints_of(owner).items():
        default = default_of(owner, name)
        lines.append(f"{prefix}{name}: {texts.get(name, '')} [{expected(hint)}; {default}]")
        if (section := section_class(hint)) is not None:
            lines += _lines(section, f"{prefix}{name}.")
    return lines


def expected(hint: Any) -> str:
    """Describe the valid values of a setting in words; of a section, that it is one."""
    section = section_class(hint)
    if section is None:
        return describe(hint)
    return "settings, or null" if type(None) in arms(hint) else "settings"


def default_of(owner: Callable[..., Any], name: str) -> str:
    """Return the default of a setting in words: "required", or "default: " and the value as YAML."""
    if dataclasses.is_dataclass(owner):
        field = next(field for field in dataclasses.fields(owner) if field.name == name)
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        missing = value is dataclasses.MISSING
    else:
        value = inspect.signature(owner).parameters[name].default
        missing = value is inspect.Parameter.empty
    return "required" if missing else f"default: {as_yaml(value)}"


def as_yaml(value: Any) -> str:
    """Return a default as a config would have it; of a section, only what differs from the defaults of its class."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        usual = {name: default_of(type(value), name) for name in pairs}
        return as_yaml({name: own for name, own in pairs.items() if usual[name] != f"default: {as_yaml(own)}"})
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {as_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    if isinstance(value, float) and value:
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class SettingsHelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Format help with valid values in words, and with line breaks as they are in the texts."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if (expected := getattr(action, "expected", None)) is None:
            return super()._get_help_string(action)
        first, *more = (action.help or "").replace("%", "%%").split("\n")
        default = "required" if action.required else f"default: {as_yaml(action.default)}"
        return "\n".join([f"{first} [{expected}; {default.replace('%', '%%')}]".strip(), *more])

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [
            line for part in text.splitlines() for line in super(SettingsHelpFormatter, self)._split_lines(part, width)
        ]

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())


def commented(values: Mapping[str, Any], owner: Callable[..., Any] | None, depth: int = 0) -> str:
    """Return settings as YAML, each below a comment with its text and its valid values.

    Args:
        values: plain values; those of sections are mappings.
        owner: the class of the settings; None for one that is not known.
        depth: number of sections around these settings.
    """
    hints = hints_of(owner) if owner else {}
    texts, margin, written = argument_texts(owner) if owner else {}, 2 * depth * " ", []
    for name, value in values.items():
        section = section_class(hints.get(name)) or (model_class(value) if name == "model" else None)
        valid = f" [{describe(hints[name])}]" if name in hints and section is None else ""
        if said := f"{texts.get(name, '')}{valid}".strip():
            written += textwrap.wrap(said, WIDTH, initial_indent=f"{margin}# ", subsequent_indent=f"{margin}# ")
        if section and isinstance(value, Mapping) and value and all(isinstance(key, str) for key in value):
            written += [f"{margin}{name}:", commented(value, section, depth + 1).rstrip("\n")]
        else:
            written.append(textwrap.indent(dump_settings({name: value}), margin).rstrip("\n"))
    return "\n".join(written) + "\n"


def model_class(section: Any) -> Callable[..., Any] | None:
    """Return the class that a section `model` names; None if there is no such class, which training reports."""
    path = section.get("class") if isinstance(section, Mapping) else None
    module, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
    try:
        return getattr(importlib.import_module(module), name) if module else None
    except (ImportError, AttributeError):
        return None
