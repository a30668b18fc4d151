"""JSON and YAML files that others may have written: refused by name unless they hold what is expected."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from files.paths import open_regular


class FileError(OSError, ValueError):
    """A file or folder of a model that is missing or damaged: an OSError, as diffusers raises, and a ValueError, as all errors
    here that a user can mend."""


MOST_VALUES = 100_000  # in a YAML file, each counted as often as aliases repeat it
NUMBER = r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"""
PLAIN = {  # what text without quotation marks may be, as in YAML 1.2: in PyYAML's 1.1 `no` is false, `010` eight and `1:30` ninety
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+", "-+0123456789"),
    "float": (NUMBER, "-+.0123456789"),
}


class SettingsLoader(yaml.SafeLoader):
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
    found = yaml.load(text, Loader=SettingsLoader)
    return text if isinstance(found, dict) and re.fullmatch(r"\s*\{\w+\}\s*", text) else found


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises: FileError naming the file if it is no JSON, or nested too deeply."""
    try:
        return json.loads(_read_text(path))
    except (ValueError, OSError) as error:
        raise FileError(f"{path}: {path.name} is no JSON: {error}") from error
    except RecursionError as error:
        raise FileError(f"{path}: is nested too deeply for JSON of ours") from error


def read_object(path: Path) -> dict[str, Any]:
    """As `read_json`, of a file that holds an object: names and values."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object {{name: value}}, got {type(found).__name__}")
    return found


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises: ValueError naming the file if it is none, nested too deeply, or if aliases make more than
    `MOST_VALUES` of it ("billion laughs")."""
    try:
        text = _read_text(path)
        values = _count(yaml.compose(text, Loader=SettingsLoader), {})
        found = load_settings(text) if values <= MOST_VALUES else None
    except RecursionError as error:
        raise ValueError(f"{path}: is nested too deeply, or holds itself") from error
    except Exception as error:  # of many kinds: a KeyError for `!!bool maybe`, a ValueError for the date 2001-02-30
        raise ValueError(f"{path}: is no YAML that can be read: {type(error).__name__}: {error}") from error
    if values > MOST_VALUES:
        raise ValueError(f"{path}: its aliases repeat values more than {MOST_VALUES} times; write them out")
    return found


def _read_text(path: Path) -> str:
    with open_regular(path) as file:
        return file.read().decode("utf-8-sig")


def _count(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Values below a node and with it, aliases written out. An alias to a node that holds it recurses until Python stops it."""
    if node is None:
        return 0
    if id(node) not in known:
        pairs = isinstance(node, yaml.MappingNode)
        parts = [part for pair in node.value for part in pair] if pairs else node.value
        known[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_count(part, known) for part in parts))
    return known[id(node)]
