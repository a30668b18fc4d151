"""Count the functions that a reader follows from a mask file to the NIfTI that generate.py writes.

The rule, so that the figure can be repeated. A function of ours counts if it has at least `LINES` lines of code
(without docstring, comments and blank lines), and if while one mask becomes one volume

- it returns or yields the volume in one of its forms, or gets one, returns nothing and is not a check (`CHECKS`);
- or it is on the call stack of such a function.

Forms are the classes `FORMS`, and arrays whose axes have the sizes of the mask or of its latents. What a network does
inside its `forward` does not count, nor properties, nor what follows when the volume is written (manifest, preview).
"""

import ast
import sys
from collections.abc import Callable
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
FORMS = (VolumeRequest, PlannedVolume, PreparedVolume, PreparedGrid, Volume, Sample, Conditions, nib.Nifti1Image)


class Walk:
    """Records while it traces.

    Args:
        planes: sizes of two neighboring axes of the mask and of its latents.
    """

    def __init__(self, planes: set[tuple[int, ...]]):
        self.planes = planes
        self.returned: set[CodeType] = set()
        self.kept: dict[CodeType, bool] = {}  # got a form: whether it returned nothing
        self.callers: dict[CodeType, set[CodeType]] = {}
        self.networks = 0

    def trace(self, work: Callable[[], object]) -> None:
        """Do some work, up to a call of `stop`."""
        sys.setprofile(self._event)
        try:
            work()
        finally:
            sys.setprofile(None)

    def stop(self, *_: object) -> None:
        """End the walk."""
        sys.setprofile(None)

    def is_form(self, value: Any, depth: int = 0) -> bool:
        """Whether a value, or one in a list, tuple or dict of it, is a form of the volume."""
        if isinstance(value, np.ndarray | torch.Tensor):
            return tuple(value.shape[-3:-1]) in self.planes
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list | tuple) and depth < 2:
            return any(self.is_form(one, depth + 1) for one in value[:4])
        return isinstance(value, FORMS)

    def _event(self, frame: FrameType, event: str, value: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not is_ours(code):
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
                if any(self.is_form(frame.f_locals.get(name)) for name in arguments):
                    self.kept.setdefault(code, True)
            elif self.is_form(value):
                self.returned.add(code)
            elif code in self.kept and value is not None:
                self.kept[code] = False
        self.networks += network and event == "call"

    def functions(self) -> list[str]:
        """Return `file: function` of those that count."""
        storing = {one for one, nothing in self.kept.items() if nothing and not is_check(one)}
        reached = self.returned | storing
        reached |= {caller for one in reached for caller in self.callers[one] if is_ours(caller)}
        return sorted({f"{place(one)}: {one.co_qualname}" for one in reached if lines_of(one) >= LINES})


def is_ours(code: CodeType) -> bool:
    """Whether a function is in one of our rooms or scripts."""
    path = Path(code.co_filename)
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in (".venv", "tests")


def is_check(code: CodeType) -> bool:
    """Whether a function says by its name that it only checks."""
    return code.co_name.lstrip("_").startswith(CHECKS)


def place(code: CodeType) -> str:
    """Return the file of a function."""
    return Path(code.co_filename).relative_to(ROOT).as_posix()


def lines_of(code: CodeType) -> int:
    """Return the lines of code of a function; 0 for properties and nested expressions."""
    source = Path(code.co_filename).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and code.co_firstlineno in (
            node.lineno,
            *(decorator.lineno for decorator in node.decorator_list),
        ):
            if any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
                return 0
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if not body or node.name != code.co_name:
                return 0
            text = source.splitlines()[body[0].lineno - 1 : node.end_lineno]
            return sum(bool(line.strip()) and not line.strip().startswith("#") for line in text)
    return 0
