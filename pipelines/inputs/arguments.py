"""Convert and check arguments of calls (numbers of numpy and torch, any sequence, paths with ~) before any work. Every
function names the argument in its ValueError.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch

from volumes.formats.raw import SPACINGS

SHOWN = 120  # characters of a value in a message


def whole_number(name: str, value: Any, least: int | None = 1) -> int:
    """Convert any whole number (3, 3.0, numpy's, an array or tensor of no dimension) to an int. Raises: ValueError."""
    number: Any = _scalar(value)
    whole = isinstance(number, Integral) or (_is_finite(number) and float(number).is_integer())
    if isinstance(number, bool) or not whole or (least is not None and number < least):
        bound = "" if least is None else f", {least} or more"
        raise ValueError(f"{name} is a whole number{bound}; got {_shown(value)}")
    return int(number)


def real_number(name: str, value: Any) -> float:
    """Convert any finite number to a float. Raises: ValueError."""
    number = _scalar(value)
    if isinstance(number, bool) or not _is_finite(number):
        raise ValueError(f"{name} is a finite number; got {_shown(value)}")
    return float(number)


def flag(name: str, value: Any) -> bool:
    """Convert a bool of Python or numpy to a bool. Raises: ValueError for all else: "no" would count as yes."""
    truth = _scalar(value)
    if not isinstance(truth, bool):
        raise ValueError(f"{name} is True or False; got {_shown(value)}")
    return truth


def grid_shape(shape: Any) -> tuple[int, int, int]:
    """Convert `shape` to (X, Y, Z) ints. Raises: ValueError."""
    try:
        x, y, z = (whole_number("shape", side) for side in listed("shape", shape))
    except ValueError as error:
        raise ValueError(f"shape is three positive numbers of voxels (X, Y, Z), got {_shown(shape)}") from error
    return x, y, z


def grid_spacing(spacing: Any) -> tuple[float, float, float]:
    """Convert `spacing` to (x, y, z) floats. Raises: ValueError."""
    low, high = SPACINGS
    try:
        x, y, z = (real_number("spacing", side) for side in listed("spacing", spacing))
        if not all(low <= side <= high for side in (x, y, z)):
            raise ValueError("out of range")
    except ValueError as error:
        raise ValueError(
            f"spacing is three lengths of a voxel (x, y, z), {low:g} to {high:g} mm each, got {_shown(spacing)}"
        ) from error
    return x, y, z


def noise_levels(sigmas: Any) -> list[float]:
    """Convert `sigmas` to floats; `diffusion.denoise.set_timesteps` checks that they fall. Raises: ValueError."""
    try:
        levels = [real_number("sigmas", sigma) for sigma in listed("sigmas", sigmas)]
        if not levels:
            raise ValueError("sigmas is empty")
        return levels
    except ValueError as error:
        raise ValueError(
            f"sigmas are noise levels in (0, 1] that fall, such as 1, 0.75, 0.5, 0.25; got {_shown(sigmas)}"
        ) from error


def names(name: str, values: Any) -> list[str]:
    """Convert a sequence of texts to a list. Raises: ValueError, also for a single text."""
    found = listed(name, values)
    if not all(isinstance(one, str) for one in found):
        raise ValueError(f"{name} is a list of names; got {_shown(values)}")
    return [str(one) for one in found]


def translation(label_map: Any) -> dict[int | str, int | str] | None:
    """Convert `label_map` to ints of Python: {value of the mask, or name of its segment: value or name of the model}.

    Raises: ValueError, also for a value that occurs twice, such as 3 and "3".
    """
    if label_map is None:
        return None
    if not isinstance(label_map, Mapping):
        raise ValueError(
            f'label_map is a dict {{value: known value or name}}, such as {{3: 1}} or {{3: "tumor"}}; got '
            f"{_shown(label_map)}"
        )
    targets = {
        key: str(target)
        if isinstance(target, str)
        else whole_number(f"label_map, which leads from {key!r}, ", target, None)
        for key, target in label_map.items()
    }
    if "" in targets:
        raise ValueError(f"label_map translates an empty name; got {_shown(label_map)}")
    numbers = [_number(key) for key in targets]
    values = [
        one if isinstance(one, str) else whole_number("each value that label_map translates", one, None)
        for one in numbers
    ]
    if len(set(values)) < len(values):
        raise ValueError(f"label_map translates {max(values, key=values.count)} twice; got {_shown(label_map)}")
    return dict(zip(values, targets.values(), strict=True))


def local_path(name: str, value: Any) -> Path:
    """Convert to a path, with ~ as the home folder. Raises: ValueError for what is not a path."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(f"{name} is a path, as text or a Path; got {_shown(value)}")
    return Path(os.path.expanduser(text))


def listed(name: str, values: Any) -> list[Any]:
    """List the values of any sequence: list, tuple, range, array, tensor, generator. Raises: ValueError for what has no
    order, for text, and for a single value.
    """
    if (
        isinstance(values, str | bytes | Mapping | Set)
        or not isinstance(values, Iterable)
        or getattr(values, "ndim", 1) < 1
    ):
        raise ValueError(f"{name} is a list; got {_shown(values)}")
    return list(values)


def plain(value: Any, where: str) -> Any:
    """Convert to what JSON can hold: numbers, texts, lists and dicts of Python. `where` names it in messages.

    Raises: ValueError naming the entry for what JSON cannot hold, NaN and infinity included.
    """
    value = _scalar(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral):
        return int(value)
    if _is_finite(value):
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(_scalar(key)): plain(one, f"{where}, {_scalar(key)}") for key, one in value.items()}
    if isinstance(value, np.ndarray | torch.Tensor):
        return plain(value.tolist(), where)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain(one, where) for one in value]
    raise ValueError(
        f"{where}: {_shown(value)} cannot be written to a sidecar; give finite numbers, texts, lists or dicts"
    )


def _scalar(value: Any) -> Any:
    """Convert a number of numpy or torch, or an array or tensor of no dimension, to Python's; keep all else."""
    if isinstance(value, torch.Tensor) and value.is_meta:  # which holds no number
        return value
    if isinstance(value, np.generic | np.ndarray | torch.Tensor) and value.ndim == 0:
        return value.item()
    return value


def _is_finite(number: Any) -> TypeGuard[float]:
    """Return whether it is a real number that a float can hold."""
    try:
        return isinstance(number, Real) and math.isfinite(number)
    except OverflowError:  # of an int with more than 308 digits
        return False


def _number(text: Any) -> Any:
    """Return the number that a text stands for in tables and JSON."""
    return int(text) if isinstance(text, str) and re.fullmatch(r"\s*-?[0-9]+\s*", text) else text


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**SHOWN else "a number of very many digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
