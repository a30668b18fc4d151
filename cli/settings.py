"""Values of settings: each is declared once, where the setting is, and checked everywhere by what stands here.

    @dataclass
    @checked
    class LoopConfig:
        batch_size: PositiveInt = 4
        workers: NonNegativeInt | None = None

The annotation is what `--help` shows, what a config file is checked against, and what a constructor refuses. NaN and
infinity lie in no range. Nothing here imports more than the standard library.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import math
import numbers
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Hint = Any  # a type annotation
Class = TypeVar("Class")
MAX_VALUE = 2**63 - 1  # of whole numbers: what computers count to


@dataclass(frozen=True)
class Range:
    """Which numbers a setting may be: `Annotated[float, Range(0, above=True)]`. Never NaN or infinite.

    Args:
        low, high: the ends; None is no end.
        above, below: whether `low` and `high` themselves are outside.
    """

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        if abs(value) > MAX_VALUE if isinstance(value, numbers.Integral) else not math.isfinite(value):
            return False
        high_enough = self.low is None or (value > self.low if self.above else value >= self.low)
        return high_enough and (self.high is None or (value < self.high if self.below else value <= self.high))

    def __repr__(self) -> str:  # what `--help` prints
        if self.low is None and self.high is None:
            return "finite"
        low = "" if self.low is None else f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        high = "" if self.high is None else f"below {self.high:.10g}" if self.below else f"{self.high:.10g} or less"
        if self.low is not None and self.high is not None and not self.above and not self.below:
            return f"from {self.low:g} to {self.high:.10g}"
        return " and ".join(end for end in (low, high) if end)


class HomePath:
    """Marks a path of this machine, or its URL: `~` at its beginning is the home folder."""

    def __repr__(self) -> str:
        return "path"


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # what numpy's global generator takes
FiniteFloat = Annotated[float, Range()]
PositiveFloat = Annotated[float, Range(0, above=True)]
NonNegativeFloat = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, below=True)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
InnerShare = Annotated[float, Range(0, 1, above=True, below=True)]
TwoOrMore = Annotated[int, Range(2)]
Axis = Annotated[int, Range(0, 2)]
UserPath = Annotated[str, HomePath()]


def checked(owner: type[Class]) -> type[Class]:
    """Below `@dataclass`: constructing one checks its values against their annotations, makes numpy's numbers Python's, which YAML
    can hold, and expands `~` in paths.

    What `__post_init__` does comes after. (A base class would do, but jsonargparse reads one as a choice of subclasses.)
    """
    own = owner.__dict__.get("__post_init__")

    def __post_init__(self: Any) -> None:
        values = {name: getattr(self, name) for name in hints_of(type(self))}
        refuse(faults(type(self), values))
        for name, hint in hints_of(type(self)).items():
            value = expand_home(hint, plain_numbers(values[name]))
            if value is not values[name]:
                object.__setattr__(self, name, value)  # also of a frozen one
        if own is not None:
            own(self)

    owner.__post_init__ = __post_init__  # pyright: ignore[reportAttributeAccessIssue]
    return owner


def refuse(found: Iterator[str], where: str = "") -> None:
    """Raises: ValueError that lists the faults, if there are any."""
    if lines := list(found):
        raise ValueError(where + (lines[0] if len(lines) == 1 else "\n  ".join(["these settings are wrong:", *lines])))


@cache
def hints_of(owner: Callable[..., Any]) -> dict[str, Hint]:
    """Annotations of a dataclass's fields, or of a class's or function's arguments, by name."""
    if dataclasses.is_dataclass(owner):
        hints = get_type_hints(owner, include_extras=True)
        return {field.name: hints[field.name] for field in dataclasses.fields(owner)}
    function = owner.__init__ if isinstance(owner, type) else owner
    hints = get_type_hints(inspect.unwrap(function), include_extras=True)
    return {name: hints.get(name, Any) for name in inspect.signature(owner).parameters}


def faults(owner: Callable[..., Any], values: Mapping[str, Any], prefix: str = "", raw: bool = False) -> Iterator[str]:
    """What is wrong with values for a dataclass, or for arguments of a class, one sentence a setting.

    Args:
        prefix: before every name, such as "loop.".
        raw: whether they are as a YAML file has them: settings may be missing, which a command line adds, and PyYAML
            leaves numbers such as `1e-4` as text.
    """
    hints = hints_of(owner)
    for name in values:
        if name not in hints:
            yield unknown(f"{prefix}{name}", owner, prefix)
    for name, hint in hints.items():
        if name in values:
            yield from faults_of(hint, values[name], f"{prefix}{name}", raw)
        elif not raw and dataclasses.is_dataclass(owner) and _is_required(owner, name):
            yield f"{prefix}{name}: is missing; expected {describe(hint)}"


def unknown(name: str, owner: Any, section: str = "") -> str:
    """That a setting is unknown, and which was likely meant: one of its section, or one of its name in another section.

    Args:
        owner: of the settings; `section` is before the names of all of them, such as "data.".
    """
    known, (parent, _, last) = [f"{section}{one}" for one in names_below(owner)], name.rpartition(".")
    beside = {one.rpartition(".")[2]: one for one in known if one.rpartition(".")[0] == parent}
    near = [beside[one] for one in difflib.get_close_matches(last, beside, n=1, cutoff=0.7)]
    near = near or [one for one in known if one.rpartition(".")[2] == last]
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(beside or known))}"
    return f"{name}: is not a setting; {hint}"


def names_below(owner: Any, prefix: str = "") -> list[str]:
    """Dotted names of all settings of a dataclass, or of a class's arguments."""
    names = []
    for name, hint in hints_of(owner).items():
        names.append(f"{prefix}{name}")
        inner = next((one for one in arms(hint) if dataclasses.is_dataclass(one)), None)
        names += names_below(inner, f"{prefix}{name}.") if inner else []
    return names


def arms(hint: Hint) -> list[Hint]:
    """The parts of a union, or the annotation itself, without marks."""
    base = base_of(hint)
    if get_origin(base) in (Union, types.UnionType):
        return [arm for part in get_args(base) for arm in arms(part)]
    return [base]


def describe(hint: Hint) -> str:
    """What a value of this annotation is, in words: "a whole number, 1 or more"."""
    base, limits = split_hint(hint)
    origin, args = get_origin(base), get_args(base)
    suffix = f", {limits!r}" if limits is not None else ""
    if origin in (Union, types.UnionType):
        return " or ".join(describe(one) for one in args if one is not type(None)) + (
            ", or null" if type(None) in args else ""
        )
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if dataclasses.is_dataclass(base):
        return f"settings {{{', '.join(hints_of(base))}}}"  # pyright: ignore[reportArgumentType]
    if origin is tuple and args[-1:] != (...,):
        each = describe(args[0]) if len(set(map(repr, args))) == 1 else "; ".join(map(describe, args))
        return f"a list of {len(args)}, each {each}" if len(set(map(repr, args))) == 1 else f"a list [{each}]"
    if origin in (list, tuple, Sequence):
        return f"a list, each {describe(args[0])}"
    if origin in (dict, Mapping):
        return f"a mapping of {describe(args[0])} to {describe(args[1])}"
    plain = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        Any: "anything",
        dict: "a mapping",
    }
    what = "a path" if any(isinstance(mark, HomePath) for mark in _marks(hint)) else plain.get(base)
    return (what or getattr(base, "__name__", str(base))) + suffix


def expand_home(hint: Hint, value: Any) -> Any:
    """The value with `~` expanded in what is annotated as a `UserPath`; the same object if nothing changes."""
    if isinstance(value, str):
        is_path = any(isinstance(mark, HomePath) for mark in _marks(hint))
        return os.path.expanduser(value) if is_path and value.startswith("~") else value
    if isinstance(value, list) and any(isinstance(one, str) for one in value):
        expanded = [expand_home(hint, one) for one in value]
        return expanded if expanded != value else value
    if isinstance(value, dict) and any(isinstance(one, str) for one in value.values()):
        expanded = {key: expand_home(hint, one) for key, one in value.items()}
        return expanded if expanded != value else value
    return value


def plain_numbers(value: Any) -> Any:
    """The value with Python's numbers in the place of numpy's; the same object if it holds none."""
    if isinstance(value, numbers.Number) and hasattr(value, "item"):  # np.float64 is a float, too
        return value.item()  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, list | tuple):
        plain = [plain_numbers(one) for one in value]
        return value if all(one is other for one, other in zip(plain, value, strict=True)) else type(value)(plain)
    if isinstance(value, dict):
        plain = {plain_numbers(key): plain_numbers(one) for key, one in value.items()}
        kept = all(key is other and plain[key] is value[other] for key, other in zip(plain, value, strict=True))
        return value if kept else plain
    return value


def construct(hint: Hint, value: Any, name: str = "") -> Any:
    """Values that have no faults as the annotation says: mappings as dataclasses, lists as tuples where a tuple is meant.

    Raises: ValueError, with the section's name before it, for combinations that a dataclass refuses.
    """
    base, _ = split_hint(hint)
    origin, args = get_origin(base), get_args(base)
    if origin in (Union, types.UnionType):
        return construct(_arm(args, value), value, name)
    if dataclasses.is_dataclass(base) and not isinstance(value, base):  # pyright: ignore[reportArgumentType]
        hints = hints_of(base)  # pyright: ignore[reportArgumentType]
        inner = {key: construct(hints[key], one, f"{name}.{key}" if name else key) for key, one in value.items()}
        try:
            return base(**inner)  # pyright: ignore[reportCallIssue]
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name and not str(error).startswith(name) else str(error)) from error
    if origin is tuple and isinstance(value, list | tuple):
        each = [args[0]] * len(value) if args[-1:] == (...,) else args
        return tuple(construct(one, part, name) for one, part in zip(each, value, strict=True))
    if origin is list and isinstance(value, list | tuple):
        return [construct(args[0], one, name) for one in value]
    if origin is dict and isinstance(value, Mapping):
        return {construct(args[0], key): construct(args[1], one, f"{name}.{key}") for key, one in value.items()}
    if isinstance(value, str) and base in (int, float, bool):  # as a YAML file has it
        return read_plain(base, value)
    if base is float and isinstance(value, int):
        return float(value)
    return value


class Number:
    """A number on a command line, for `add_argument(type=Number(PositiveInt))` of argparse and of jsonargparse."""

    def __init__(self, hint: Hint):
        self.hint = hint
        self.__name__ = describe(hint)  # what argparse says of text that is none

    def __call__(self, text: Any) -> Any:
        base, _ = split_hint(self.hint)
        try:
            value = base(text)
        except (TypeError, ValueError):
            value = text
        if found := next(faults_of(self.hint, value, ""), None):
            raise argparse.ArgumentTypeError(found.removeprefix(": "))
        return value

    def __repr__(self) -> str:
        return self.__name__


def show_ranges(parser: argparse.ArgumentParser) -> None:
    """Add to the help of each `Number` of a parser which values it may have."""
    for action in parser._actions:
        if isinstance(action.type, Number):
            action.help = f"{action.help or ''} [{action.type}]".strip().replace("%", "%%")


def _is_required(owner: Any, name: str) -> bool:
    field = next(field for field in dataclasses.fields(owner) if field.name == name)
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def split_hint(hint: Hint) -> tuple[Hint, Range | None]:
    """The annotation without its marks, and its range."""
    if get_origin(hint) is not Annotated:
        return hint, None
    base, *marks = get_args(hint)
    return base, next((mark for mark in marks if isinstance(mark, Range)), None)


def base_of(hint: Hint) -> Hint:
    """The annotation without its marks."""
    return split_hint(hint)[0]


def _marks(hint: Hint) -> Iterator[Any]:
    """Marks of an annotation and of all within it."""
    if get_origin(hint) is Annotated:
        yield from get_args(hint)[1:]
    for inner in get_args(hint):
        yield from _marks(inner)


def _arm(args: Sequence[Hint], value: Any) -> Hint:
    """Of a union, the one that the value is of, or comes nearest."""
    fitting = [one for one in args if not list(faults_of(one, value, "", True))]
    if fitting:
        return fitting[0]
    mappings = [
        one for one in args if dataclasses.is_dataclass(split_hint(one)[0]) or get_origin(split_hint(one)[0]) is dict
    ]
    if isinstance(value, Mapping) and mappings:
        deep = any(isinstance(one, Mapping) for one in value.values())
        return next((one for one in mappings if (get_origin(split_hint(one)[0]) is dict) == deep), mappings[0])
    if isinstance(value, list | tuple):
        return next((one for one in args if get_origin(split_hint(one)[0]) in (list, tuple, Sequence)), None)
    plain = {int: int, float: float, str: str}
    kind = plain.get(type(value))
    return next(
        (one for one in args if split_hint(one)[0] is kind or (kind is int and split_hint(one)[0] is float)), None
    )


def faults_of(hint: Hint, value: Any, name: str, raw: bool = False) -> Iterator[str]:
    """What is wrong with one value."""
    base, limits = split_hint(hint)
    origin, args = get_origin(base), get_args(base)
    if base is Any or isinstance(base, str) or base is inspect.Parameter.empty:
        return
    if origin in (Union, types.UnionType):
        arm = _arm(args, value)
        if arm is None:
            yield _wrong(name, value, hint)
        elif split_hint(arm)[0] in (int, float):  # null may be meant as well
            yield from (_wrong(name, value, hint) for _ in faults_of(arm, value, name, raw))
        else:
            yield from faults_of(arm, value, name, raw)
    elif dataclasses.is_dataclass(base):
        if isinstance(value, Mapping):
            yield from faults(base, value, f"{name}.", raw)  # pyright: ignore[reportArgumentType]
        elif not isinstance(value, base):  # pyright: ignore[reportArgumentType]
            yield _wrong(name, value, hint)
    elif origin in (tuple, list, Sequence):
        fixed = origin is tuple and args[-1:] != (...,)
        if isinstance(value, str | Mapping) or not isinstance(value, Sequence) or (fixed and len(value) != len(args)):
            yield _wrong(name, value, hint)
            return
        for number, (one, part) in enumerate(zip(args if fixed else [args[0]] * len(value), value, strict=True)):
            yield from faults_of(one, part, f"{name}[{number}]", raw)
    elif origin in (dict, Mapping) or base is dict:
        if not isinstance(value, Mapping):
            yield _wrong(name, value, hint)
            return
        for key, one in value.items() if args else ():
            yield from faults_of(args[0], key, f"{name}: the key {key!r}", raw)
            yield from faults_of(args[1], one, f"{name}.{key}", raw)
    elif value == "" and any(isinstance(mark, HomePath) for mark in _marks(hint)):
        yield f"{name}: is empty; expected {describe(hint)}"
    elif not _is_a(base, value, raw) or (limits is not None and _plain(base, value) not in limits):
        yield _wrong(name, value, hint)


def _is_a(base: Hint, value: Any, raw: bool) -> bool:
    """Whether a plain value is of a plain type; numbers of numpy count."""
    if base is type(None):
        return value is None
    if get_origin(base) is Literal:
        return value in get_args(base)
    if base is str:
        return isinstance(value, str | os.PathLike)
    if raw and isinstance(value, str) and base in (int, float, bool):
        return read_plain(base, value) is not None
    if base is bool:
        return isinstance(value, bool)
    if base in (int, float):
        kind = numbers.Integral if base is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    return not isinstance(base, type) or isinstance(value, base)


def read_plain(base: type, text: str) -> Any:
    """A number or a truth value in text, as jsonargparse reads it too; None if there is none."""
    if base is bool:
        return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(text.lower())
    try:
        return base(text)
    except ValueError:
        return None


def _plain(base: type, value: Any) -> Any:
    """A number, of text that is one."""
    return read_plain(base, value) if isinstance(value, str) else value


def _wrong(name: str, value: Any, hint: Hint) -> str:
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    kind = " (text)" if isinstance(value, str) else ""
    home = value is None and any(isinstance(mark, HomePath) for mark in _marks(hint))
    quotes = "; put it in quotes" if isinstance(value, int | float) and str in arms(hint) else ""
    quotes = '; for the home folder write "~", in quotes' if home else quotes
    return f"{name}: got {shown[:80]}{kind}, expected {describe(hint)}{quotes}"
