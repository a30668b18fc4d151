"""Functions above 60 lines of code have a reason beside them, folders are small, and few dicts hold `Any`."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 60
REASON = "# Long: "  # begins the comment right above the function, or above its decorators
MAX_MODULES = 16  # side by side in a folder, `__init__` among them
MAX_DICTS = 40  # lines with `dict[str, Any]` outside tests


def sources() -> dict[str, str]:
    """The Python files outside tests, by their path."""
    paths = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in (".venv", "tests")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def long_functions(source: str) -> dict[str, tuple[int, bool]]:
    """The functions with more than `MAX_LINES` lines of code, each with that number and whether it has a reason.

    The lines are those of arguments and body, without docstring, comments and blank lines.
    """
    lines, found = source.splitlines(), {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        docstring = range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1) if ast.get_docstring(node) else ()
        numbers = [number for number in range(node.lineno, (node.end_lineno or 0) + 1) if number not in docstring]
        texts = [lines[number - 1].strip() for number in numbers]
        count = sum(bool(text) and not text.startswith("#") for text in texts)
        if count > MAX_LINES:
            above = first - 2
            while above >= 0 and lines[above].strip().startswith("#") and REASON not in lines[above]:
                above -= 1
            found[node.name] = count, above >= 0 and lines[above].strip().startswith(REASON)
    return found


def test_long_functions_have_a_reason():
    found = {f"{path}: {name}": each for path, text in sources().items() for name, each in long_functions(text).items()}
    assert found  # the rule sees some
    assert [f"{name} ({count} lines)" for name, (count, reason) in found.items() if not reason] == []


@pytest.mark.parametrize(
    ("above", "lines", "expected"),
    [
        ("", 59, {}),
        ("", 60, {"work": (61, False)}),
        ("# Long: a table.\n", 60, {"work": (61, True)}),
        ("# Long: a table,\n# which goes on.\n@cache\n", 60, {"work": (61, True)}),
        ("# A comment.\n", 60, {"work": (61, False)}),
        ("# Long: of another.\nx = 1\n", 60, {"work": (61, False)}),
    ],
)
def test_what_counts_as_long(above, lines, expected):
    body = "    # not code\n\n" + "    x = 1\n" * lines
    assert long_functions(f'{above}def work():\n    """One line.\n\n    And more."""\n{body}') == expected


def test_dicts_of_anything_are_few():
    found = [
        f"{path}: {line}" for path, text in sources().items() for line in text.splitlines() if "dict[str, Any]" in line
    ]
    assert len(found) <= MAX_DICTS, "\n".join(found)


def test_no_type_error_is_ignored_without_its_name():
    bare = ("type: ignore\n", "pyright: ignore\n")
    found = [path for path, text in sources().items() if any(end in f"{text}\n" for end in bare)]
    assert found == []


def test_no_folder_has_too_many_modules():
    counts = Counter(path.rpartition("/")[0] for path in sources())
    assert [f"{folder} ({count})" for folder, count in counts.items() if count > MAX_MODULES] == []
