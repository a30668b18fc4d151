"""Small dataclasses as JSON, and back. Floats come back bit for bit, NaN and infinities included."""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass
from functools import cache
from typing import TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

Kind = TypeVar("Kind")


def to_plain(value: object) -> object:
    """Convert dataclasses, tuples and arrays to what JSON holds."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [to_plain(one) for one in value]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value


def from_plain(kind: type[Kind], value: object) -> Kind:
    """Read what `to_plain` wrote of a value of type `kind`; arrays are of float64.

    Raises: ValueError for anything else.
    """
    return cast(Kind, _read(kind, value))


@cache
def _hints(kind: type) -> dict[str, object]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


@cache
def _form(kind: object) -> tuple[object, tuple[object, ...]]:
    return get_origin(kind), get_args(kind)


def _read(kind: object, value: object) -> object:
    origin, parts = _form(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        return _read(next(part for part in parts if part is not type(None)), value)
    if origin is tuple:
        _expect(isinstance(value, list), value)
        rows = cast(list[object], value)
        kinds = [parts[0]] * len(rows) if parts[-1] is Ellipsis else list(parts)
        _expect(len(kinds) == len(rows), value)
        return tuple(_read(part, row) for part, row in zip(kinds, rows, strict=True))
    if kind is np.ndarray:
        _expect(isinstance(value, list), value)
        try:
            return np.array(value, np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"no array of numbers: {str(value)[:80]}") from error
    if isinstance(kind, type) and is_dataclass(kind):
        _expect(isinstance(value, dict), value)
        named, hints = cast(dict[str, object], value), _hints(kind)
        _expect(named.keys() == hints.keys(), value)
        return kind(**{name: _read(hints[name], one) for name, one in named.items()})
    if kind is float:
        _expect(type(value) in (int, float), value)
        return value  # an integer stays one: a window of 0 to 1 computes as its config says
    _expect(type(value) is kind, value)
    return value


def _expect(fits: bool, value: object) -> None:
    if not fits:
        raise ValueError(f"unexpected {str(value)[:80]!r}")
