"""Small dataclasses as JSON, and back. Floats come back bit for bit, NaN and infinities included."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache, partial
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
    return cast(Kind, _reader(kind)(value))


@cache
def _reader(kind: object) -> Callable[[object], object]:
    """Return what reads values of a type: thousands of volumes are read at each start."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        [other] = [_reader(part) for part in parts if part is not type(None)]
        return lambda value: None if value is None else other(value)
    if origin is tuple:
        if parts[-1] is Ellipsis:
            return partial(_read_rows, _reader(parts[0]))
        return partial(_read_tuple, tuple(map(_reader, parts)))
    if kind is np.ndarray:
        return _read_array
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        return partial(_read_object, kind, {field.name: _reader(hints[field.name]) for field in fields(kind)})
    # An integer stays one: a window of 0 to 1 computes as its config says.
    return partial(_read_scalar, (int, float) if kind is float else (kind,))


def _read_rows(read: Callable[[object], object], value: object) -> object:
    if type(value) is not list:
        raise _unexpected(value)
    return tuple([read(row) for row in value])


def _read_tuple(readers: Sequence[Callable[[object], object]], value: object) -> object:
    if type(value) is not list or len(value) != len(readers):
        raise _unexpected(value)
    return tuple([read(row) for read, row in zip(readers, value, strict=True)])


def _read_array(value: object) -> object:
    if type(value) is not list:
        raise _unexpected(value)
    try:
        return np.array(value, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"no array of numbers: {str(value)[:80]}") from error


def _read_object(
    kind: Callable[..., object], readers: Mapping[str, Callable[[object], object]], value: object
) -> object:
    if type(value) is not dict or value.keys() != readers.keys():
        raise _unexpected(value)
    return kind(**{name: readers[name](one) for name, one in value.items()})


def _read_scalar(kinds: tuple[object, ...], value: object) -> object:
    if type(value) not in kinds:
        raise _unexpected(value)
    return value


def _unexpected(value: object) -> ValueError:
    return ValueError(f"unexpected {str(value)[:80]!r}")
