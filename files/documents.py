"""Read JSON and YAML files from untrusted sources; errors name the file."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from .paths import open_regular, printable


class FileError(OSError, ValueError):
    """A missing or damaged file or folder of a model.

    It is an OSError, as in diffusers, and a ValueError, as all errors here that a user can fix.
    """


MAX_BYTES = 1 << 28  # of a JSON file, or a table
MAX_YAML_BYTES = 1 << 24
MAX_DEPTH = 100  # of nesting in a YAML file
MAX_VALUES = 20_000  # in a YAML file, each counted as often as aliases repeat it
SHOWN = 60  # letters of a name in a message
NUMBER = r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"""
# Types of text without quotation marks, as in YAML 1.2: in PyYAML's 1.1 `no` is false, `010` eight and `1:30` ninety.
PLAIN = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+", "-+0123456789"),
    "float": (NUMBER, "-+.0123456789"),
}


# libyaml's loader is ten times faster, if PyYAML was built with it.
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class SettingsLoader(Loader):
    """Loads YAML with unique keys, in which `no`, `yes`, `on` and `off` are text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping. Raises: ConstructorError for a duplicate key, which PyYAML would accept."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    problem = f"{key.value!r} is set twice, in line {lines[key.value]} and here; remove one"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


SettingsLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, (_pattern, _first) in PLAIN.items():
    SettingsLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z", re.X), list(_first)
    )


class SettingsDumper(yaml.SafeDumper):
    """Writes YAML in which text that this or YAML 1.1's readers would take for another type is in quotes."""


SettingsDumper.yaml_implicit_resolvers = {
    first: [
        *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
        *SettingsLoader.yaml_implicit_resolvers.get(first, []),
    ]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *SettingsLoader.yaml_implicit_resolvers}
}


def dump_settings(values: Any, one_line: bool = False) -> str:
    """Return plain values as YAML, which `load_settings` reads. `one_line` is for a word of a command line."""
    style: dict[str, Any] = {"default_flow_style": True, "width": math.inf} if one_line else {}
    return yaml.dump(values, Dumper=SettingsDumper, sort_keys=False, **style)


def load_settings(text: str) -> Any:
    """Parse YAML text. `{case}` alone is text: a pattern of files. Raises: yaml.YAMLError, ValueError or KeyError."""
    _check_events(text)
    loader = SettingsLoader(text)
    try:
        node = loader.get_single_node()
        if _count(node, {}) > MAX_VALUES:
            raise ValueError(f"its aliases repeat values more than {MAX_VALUES} times; write them out")
        value = None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()
    return text if isinstance(value, dict) and re.fullmatch(r"\s*\{\w+\}\s*", text) else value


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Read a regular file. Raises: FileError if it is a pipe, a folder or the like, or larger than `limit` bytes."""
    try:
        with open_regular(path) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise FileError(str(error)) from error
    if len(data) > limit:
        raise FileError(f"{path}: is larger than {limit >> 20} MiB, the limit for files of this kind")
    return data


def parse_json(text: str) -> Any:
    """Parse JSON text.

    Raises: ValueError if it is not JSON, is nested too deeply, or has duplicate names in an object.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse duplicate names: JSON readers disagree on which value counts."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has two values called {', '.join(twice[:4])!r:.{SHOWN}}; remove one")
    return values


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises: FileError naming the file if it is not JSON, or as `read_bytes`."""
    data = read_bytes(path)
    try:
        return parse_json(data.decode("utf-8-sig"))
    except ValueError as error:
        raise FileError(f"{path}: {path.name} is not JSON: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object {name: value}; see `read_json`."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object {{name: value}}, got {type(content).__name__}")
    return content


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        ValueError: naming the file if it is not YAML, is nested too deeply, or has more than `MAX_VALUES` values, which
            aliases can produce from a few ("billion laughs").
    """
    data = read_bytes(path, MAX_YAML_BYTES)
    try:
        return load_settings(data.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError(f"{path}: is nested too deeply, or contains itself") from error
    except Exception as error:  # of many kinds: a KeyError for `!!bool maybe`, a ValueError for the date 2001-02-30
        raise ValueError(f"{path}: is not readable YAML: {type(error).__name__}: {printable(str(error))}") from error


def _check_events(text: str) -> None:
    """Refuse YAML that is nested too deeply or has too many values, before anything is built. Raises: ValueError."""
    depth = count = 0
    for event in yaml.parse(text, Loader=SettingsLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        count += isinstance(event, yaml.NodeEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"is nested more than {MAX_DEPTH} deep")
        if count > MAX_VALUES:
            raise ValueError(f"has more than {MAX_VALUES} values, the limit for settings")


def _count(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Count the values of a node with aliases expanded. An alias to its own parent recurses until Python stops it."""
    if node is None:
        return 0
    if id(node) not in known:
        pairs = isinstance(node, yaml.MappingNode)
        parts = [part for pair in node.value for part in pair] if pairs else node.value
        known[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_count(part, known) for part in parts))
    return known[id(node)]
