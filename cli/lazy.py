"""Import the exports of a package on first use (PEP 562), so that command lines answer before torch is loaded."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy_exports(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package that imports its exports under `if TYPE_CHECKING:`.

    That block is the only list of exports: type checkers and editors read it, and so does this function.

    Args:
        package: its `__name__`.
        file: its `__file__`.
    """
    modules: dict[str, str] = {}
    for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            continue
        for statement in node.body:
            assert isinstance(statement, ast.ImportFrom) and statement.module, f"{file}: from MODULE import NAMES"
            module = "." * statement.level + statement.module
            modules |= {alias.name: module for alias in statement.names}
    # Importing a module of the same name would replace the export by the module.
    assert not (same := [name for name, module in modules.items() if module == f".{name}"]), f"import {same} at once"

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(modules[name], package), name)
        setattr(sys.modules[package], name, value)  # found without this function from now on
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *modules})
