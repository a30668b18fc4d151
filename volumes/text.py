"""JSON files that others may have written: refused by name unless they hold what is expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises: ValueError naming the file if it is no JSON, or nested too deeply."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {path.name} is no JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: is nested too deeply for JSON of ours") from error


def read_object(path: Path) -> dict[str, Any]:
    """As `read_json`, of a file that holds an object: names and values."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object {{name: value}}, got {type(found).__name__}")
    return found
