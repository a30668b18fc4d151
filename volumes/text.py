"""JSON and YAML files that others may have written: refused by name unless they hold what is expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


class FileError(OSError, ValueError):
    """A file or folder of a model that is missing or damaged: an OSError, as diffusers raises, and a ValueError, as all errors
    here that a user can mend."""


MOST_VALUES = 100_000  # in a YAML file, each counted as often as aliases repeat it


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises: FileError naming the file if it is no JSON, or nested too deeply."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
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
        text = path.read_text(encoding="utf-8-sig")
        values = _count(yaml.compose(text, Loader=yaml.SafeLoader), {})
        found = yaml.safe_load(text) if values <= MOST_VALUES else None
    except RecursionError as error:
        raise ValueError(f"{path}: is nested too deeply, or holds itself") from error
    except Exception as error:  # of many kinds: a KeyError for `!!bool maybe`, a ValueError for the date 2001-02-30
        raise ValueError(f"{path}: is no YAML that can be read: {type(error).__name__}: {error}") from error
    if values > MOST_VALUES:
        raise ValueError(f"{path}: its aliases repeat values more than {MOST_VALUES} times; write them out")
    return found


def _count(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Values below a node and with it, aliases written out. An alias to a node that holds it recurses until Python stops it."""
    if node is None:
        return 0
    if id(node) not in known:
        pairs = isinstance(node, yaml.MappingNode)
        parts = [part for pair in node.value for part in pair] if pairs else node.value
        known[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_count(part, known) for part in parts))
    return known[id(node)]
