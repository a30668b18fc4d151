"""Count the functions that a reader follows from a mask file to the NIfTI that generate.py writes.

The rule, so that the figure can be repeated. A function of ours counts if it has at least `LINES` lines of code
(without docstring, comments and blank lines), and if while one mask becomes one volume

- it returns or yields the volume in one of its forms, and not only what it got: a function that selects or passes on
  (which volumes are not finished yet, a mask that needs no resampling) brings the volume to no other form;
- or it gets a form, is declared to return nothing (`-> None`), and is not a check (`CHECKS`): such a function stores
  what it gets. One whose answer may be None, and is, found that there is nothing to do;
- or it is on the call stack of such a function.

Forms are the classes `FORMS`, and arrays whose axes have the sizes of the mask or of its latents. What a network does
inside its `forward` does not count, nor properties, nor comprehensions (in Python 3.12 they are no functions any more),
nor what follows when the volume is written (manifest, preview).

Only the thread that walks is traced, and no garbage is collected meanwhile: what earlier tests left, such as suspended
generators, is closed by calls of its own, in the middle of whatever runs.
"""

import ast
import gc
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import nibabel as nib
import numpy as np
import torch

from diffusion import Conditions
from pipelines.inputs.prepared import PreparedGrid, PreparedVolume
from pipelines.inputs.request import VolumeRequest
from pipelines.planning import PlannedVolume
from pipelines.sampling import Sample
from volumes import Volume

ROOT = Path(__file__).resolve().parents[2]
LINES = 10
CHECKS = ("check", "refuse", "warn")
COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
FORMS = (VolumeRequest, PlannedVolume, PreparedVolume, PreparedGrid, Volume, Sample, Conditions, nib.Nifti1Image)


class Walk:
    """Records while it traces.

    Args:
        planes: sizes of two neighboring axes of the mask and of its latents.
    """

    def __init__(self, planes: set[tuple[int, ...]]):
        self.planes = planes
        self.returned: set[CodeType] = set()
        self.got: set[CodeType] = set()
        self.callers: dict[CodeType, set[CodeType]] = {}
        self.running: dict[FrameType, dict[int, object]] = {}  # the forms that it got, by their identity
        self.networks = 0

    def trace(self, work: Callable[[], object]) -> None:
        """Do some work, up to a call of `stop`."""
        gc.collect()
        gc.disable()
        sys.setprofile(self._event)
        try:
            work()
        finally:
            sys.setprofile(None)
            gc.enable()
            self.running.clear()

    def stop(self, *_: object) -> None:
        """End the walk."""
        sys.setprofile(None)

    def forms(self, value: Any, depth: int = 0) -> Iterator[object]:
        """The forms of the volume that a value is, or that a list, tuple or dict holds."""
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list | tuple) and depth < 2:
            for one in value[:4]:
                yield from self.forms(one, depth + 1)
        elif isinstance(value, np.ndarray | torch.Tensor):
            if tuple(value.shape[-3:-1]) in self.planes:
                yield value
        elif isinstance(value, FORMS):
            yield value

    def _event(self, frame: FrameType, event: str, value: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not is_ours(code) or code.co_name in COMPREHENSIONS:
            return
        network = code.co_name == "forward" and isinstance(frame.f_locals.get("self"), torch.nn.Module)
        self.networks -= network and event == "return"
        if not self.networks:
            if code not in self.callers:
                self.callers[code] = set()
                above = frame.f_back
                while above is not None:
                    self.callers[code].add(above.f_code)
                    above = above.f_back
            if event == "call":
                arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
                values = [frame.f_locals.get(name) for name in arguments]
                self.running[frame] = {id(form): form for value in values for form in self.forms(value)}
                if self.running[frame]:
                    self.got.add(code)
            elif any(id(form) not in self.running.get(frame, ()) for form in self.forms(value)):
                self.returned.add(code)
        if event == "return":
            self.running.pop(frame, None)
        self.networks += network and event == "call"

    def functions(self) -> list[str]:
        """Return `file: function` of those that count."""
        storing = {code for code in self.got if stores(code)}
        reached = self.returned | storing
        reached |= {caller for one in reached for caller in self.callers[one] if is_ours(caller)}
        return sorted({f"{place(one)}: {one.co_qualname}" for one in reached if lines_of(one) >= LINES})


@cache
def is_ours(code: CodeType) -> bool:
    """Whether a function is in one of our rooms or scripts."""
    path = Path(code.co_filename)
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in (".venv", "tests")


def stores(code: CodeType) -> bool:
    """Whether a function is declared to return nothing, and does not say by its name that it only checks."""
    node = definition(code)
    returns_nothing = node is not None and isinstance(node.returns, ast.Constant) and node.returns.value is None
    return returns_nothing and not code.co_name.lstrip("_").startswith(CHECKS)


def place(code: CodeType) -> str:
    """Return the file of a function."""
    return Path(code.co_filename).relative_to(ROOT).as_posix()


@cache
def parsed(path: str) -> tuple[list[str], dict[int, ast.FunctionDef]]:
    """Return the lines of a file, and its functions by their first line, decorators included."""
    source = Path(path).read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return source.splitlines(), {min([n.lineno, *(d.lineno for d in n.decorator_list)]): n for n in functions}


def definition(code: CodeType) -> ast.FunctionDef | None:
    """Return the statement that defines a function; None for lambdas and comprehensions."""
    node = parsed(code.co_filename)[1].get(code.co_firstlineno)
    return node if node is not None and node.name == code.co_name else None


def lines_of(code: CodeType) -> int:
    """Return the lines of code of a function; 0 for properties and nested expressions."""
    node = definition(code)
    if node is None or any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
        return 0
    body = node.body[1:] if ast.get_docstring(node) else node.body
    if not body:
        return 0
    text = parsed(code.co_filename)[0][body[0].lineno - 1 : node.end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in text)
