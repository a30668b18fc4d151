"""JSON and YAML files that others may have written: refused by name unless they hold what is expected."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from .paths import open_regular, printable


class FileError(OSError, ValueError):
    """A file or folder of a model that is missing or damaged: an OSError, as diffusers raises, and a ValueError, as all errors
    here that a user can mend."""


MAX_BYTES = 1 << 28  # of a JSON file, or a table
MOST_YAML = 1 << 24  # bytes of a YAML file
MOST_DEPTH = 100  # of nesting in it
MAX_VALUES = 20_000  # in a YAML file, each counted as often as aliases repeat it
SHOWN = 60  # letters of what was found, in a message
NUMBER = r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"""
PLAIN = {  # what text without quotation marks may be, as in YAML 1.2: in PyYAML's 1.1 `no` is false, `010` eight and `1:30` ninety
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+", "-+0123456789"),
    "float": (NUMBER, "-+.0123456789"),
}


Loader: Any = getattr(
    yaml, "CSafeLoader", yaml.SafeLoader
)  # libyaml's is ten times faster, where PyYAML was built with it


class SettingsLoader(Loader):
    """YAML whose words `no`, `yes`, `on` and `off` are text, as settings and classes are called, and whose keys are unique."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML's. Raises: ConstructorError for a key that stands there twice, of which PyYAML would take the last."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    problem = f"{key.value!r} is set twice, in line {lines[key.value]} and here; remove one"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


SettingsLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] in ("null", "merge")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, (_pattern, _first) in PLAIN.items():
    SettingsLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z", re.X), list(_first)
    )


def load_settings(text: str) -> Any:
    """What YAML text holds; `{case}` alone is text, of a pattern of files. Raises: yaml.YAMLError, ValueError or KeyError."""
    _check_events(text)
    loader = SettingsLoader(text)
    try:
        node = loader.get_single_node()
        if _count(node, {}) > MAX_VALUES:
            raise ValueError(f"its aliases repeat values more than {MAX_VALUES} times; write them out")
        found = None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()
    return text if isinstance(found, dict) and re.fullmatch(r"\s*\{\w+\}\s*", text) else found


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """The content of a regular file. Raises: FileError for what is none (a pipe, a folder), or is larger than `most` bytes."""
    try:
        with open_regular(path) as file:
            data = file.read(most + 1)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise FileError(str(error)) from error
    if len(data) > most:
        raise FileError(f"{path}: is larger than {most >> 20} MiB, which no file of its kind is")
    return data


def parse_json(text: str) -> Any:
    """What JSON text holds. Raises: ValueError if it is none, nested too deeply, or names one thing twice in an object."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("is nested too deeply for JSON of ours") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values by one name, which counts depends on who reads."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has two values called {', '.join(twice[:4])!r:.{SHOWN}}; remove one")
    return found


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises: FileError naming the file if it is no JSON, or as `read_bytes` and `parse_json`."""
    data = read_bytes(path)
    try:
        return parse_json(data.decode("utf-8-sig"))
    except ValueError as error:
        raise FileError(f"{path}: {path.name} is no JSON: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """As `read_json`, of a file that holds an object: names and values."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object {{name: value}}, got {type(found).__name__}")
    return found


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises: ValueError naming the file if it is none, nested too deeply, or if it holds more than
    `MAX_VALUES`, which aliases can make of few ("billion laughs")."""
    data = read_bytes(path, MOST_YAML)
    try:
        found = load_settings(data.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError(f"{path}: is nested too deeply, or holds itself") from error
    except Exception as error:  # of many kinds: a KeyError for `!!bool maybe`, a ValueError for the date 2001-02-30
        raise ValueError(
            f"{path}: is no YAML that can be read: {type(error).__name__}: {printable(str(error))}"
        ) from error
    return found


def _check_events(text: str) -> None:
    """Raises: ValueError for YAML that is nested too deeply or holds too many values, before any is built."""
    depth = count = 0
    for event in yaml.parse(text, Loader=SettingsLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        count += isinstance(event, yaml.NodeEvent)
        if depth > MOST_DEPTH:
            raise ValueError(f"is nested more than {MOST_DEPTH} deep")
        if count > MAX_VALUES:
            raise ValueError(f"holds more than {MAX_VALUES} values, which no settings are")


def _count(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Values below a node and with it, aliases written out. An alias to a node that holds it recurses until Python stops it."""
    if node is None:
        return 0
    if id(node) not in known:
        pairs = isinstance(node, yaml.MappingNode)
        parts = [part for pair in node.value for part in pair] if pairs else node.value
        known[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_count(part, known) for part in parts))
    return known[id(node)]
