"""Runs the blocks of a page of the documentation as a reader would: in order, in one folder, by copy and paste."""

import importlib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

import medvolume

FENCE = re.compile(r"```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)```\n", re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?:    .*\n)+")
INSTALLING = "pip install"  # the tests run where everything is installed


def run_page(
    text: str,
    *,
    added: Mapping[str, Sequence[str]] | None = None,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, object]:
    """Run all blocks of a page in the working directory, in this process. Returns the variables of its Python code.

    Python runs in one namespace; indented and bash blocks are commands of medvolume; a block with a title is written to
    the file of this name; `text` is what people see. Any other block fails the test.

    Args:
        added: {the beginning of a command: words that are added to it}, such as fewer steps. Each must be used.
        before: {the beginning of a command: what happens before it}, such as the readers' answers. Each must be used.
    """
    namespace: dict[str, object] = {"__name__": "page"}
    left = {*(added or {}), *(before or {})}
    for kind, title, code in blocks(text):
        if title:
            Path(title).parent.mkdir(parents=True, exist_ok=True)
            Path(title).write_text(code)
        elif kind == "python":
            exec(compile(code, "a page's block", "exec"), namespace)
        elif kind in ("", "bash"):
            for line in commands(code):
                for start in [start for start in before or {} if line.startswith(start)]:
                    (before or {})[start]()
                    left.discard(start)
                starts = [start for start in added or {} if line.startswith(start)]
                left -= set(starts)
                run_command(
                    shlex.split(line, comments=True) + [word for start in starts for word in (added or {})[start]]
                )
        elif kind != "text":
            pytest.fail(f"a block that nothing runs:\n```{kind}\n{code}")
    assert not left, f"no command of the page begins with {sorted(left)}"
    return namespace


def blocks(text: str) -> list[tuple[str, str, str]]:
    """(language, title, code) of the blocks of a page; the language of an indented one is ""."""
    found = [(match.start(), *match.groups()) for match in FENCE.finditer(text)]
    plain = FENCE.sub(lambda match: "\0" * len(match[0]), text)  # at the same places
    for match in INDENTED.finditer(plain):
        found.append((match.start(), "", None, re.sub("^    ", "", match[0], flags=re.MULTILINE)))
    return [(kind, title or "", code) for _, kind, title, code in sorted(found)]


def commands(code: str) -> list[str]:
    """The lines of a block of the shell, with continued ones as one."""
    lines = [line.strip() for line in code.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#") and INSTALLING not in line]


def run_command(words: Sequence[str]) -> None:
    """Run a command of medvolume in this process, and require that it succeeds."""
    if words[0] == "medvolume":
        module, args = medvolume.COMMANDS[words[1]].module, words[2:]
    elif words[:2] == ["python", "-m"]:
        module, args = words[2], words[3:]
    elif words[0] == "python":
        module, args = words[1].removesuffix(".py"), words[2:]
    else:
        pytest.fail(f"this line is not a command of medvolume: {shlex.join(words)}")
    found = importlib.import_module(module)
    main = importlib.import_module(f"{module}.__main__").main if hasattr(found, "__path__") else found.main
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        status = main(list(args))
    except SystemExit as end:
        status = end.code
    assert type(status) is not int or status == 0, f"{shlex.join(words)}: ended with {status}"
