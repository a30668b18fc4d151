"""Check the values of settings against their annotations.

    @dataclass
    @checked
    class LoopConfig:
        batch_size: PositiveInt = 4
        workers: NonNegativeInt | None = None

`--help`, config files and constructors all use the same annotation. No range contains NaN or infinity. This module
imports the standard library only, by itself and by `files.shipped`.
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

from files.shipped import expand_path, is_shipped

Hint = Any  # a type annotation
Class = TypeVar("Class")
MAX_VALUE = 2**63 - 1  # of whole numbers: int64


@dataclass(frozen=True)
class Range:
    """The valid numbers of a setting: `Annotated[float, Range(0, above=True)]`. Never NaN or infinite.

    Attributes:
        low: the lower end; None for no end.
        high: the upper end; None for no end.
        above: whether `low` itself is excluded.
        below: whether `high` itself is excluded.
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


@dataclass(frozen=True)
class PathMark:
    """Mark a local path or URL, in which a leading `~` is the home folder.

    Attributes:
        moves: whether the path is relative to the place where it is written, see `config_files`. If not, it is relative
            to another setting.
        words: values that are not paths.
    """

    moves: bool = True
    words: tuple[str, ...] = ()

    def __repr__(self) -> str:  # what `--help` prints
        return "path"


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # range of numpy's global generator
FiniteFloat = Annotated[float, Range()]
PositiveFloat = Annotated[float, Range(0, above=True)]
NonNegativeFloat = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, below=True)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
InnerShare = Annotated[float, Range(0, 1, above=True, below=True)]
TwoOrMore = Annotated[int, Range(2)]
Axis = Annotated[int, Range(0, 2)]
UserPath = Annotated[str, PathMark()]
PathBelowRoot = Annotated[str, PathMark(moves=False)]
Checkpoint = Annotated[str, PathMark(words=("latest",))]


def checked(owner: type[Class]) -> type[Class]:
    """Check the values of a dataclass when it is constructed; use it below `@dataclass`.

    It also converts numpy's numbers to Python's, which YAML can store, and expands `~` and names of shipped weights in
    paths. The class's own `__post_init__` runs afterwards. (A base class would do, but jsonargparse reads one as a
    choice of subclasses.)
    """
    post_init = owner.__dict__.get("__post_init__")

    def __post_init__(self: Any) -> None:  # noqa: N807
        values = {name: getattr(self, name) for name in hints_of(type(self))}
        refuse(faults(type(self), values))
        for name, hint in hints_of(type(self)).items():
            value = expand_paths(hint, plain_numbers(values[name]))
            if value is not values[name]:
                object.__setattr__(self, name, value)  # works for frozen classes too
        if post_init is not None:
            post_init(self)

    owner.__post_init__ = __post_init__  # pyright: ignore[reportAttributeAccessIssue]
    return owner


def refuse(messages: Iterator[str], where: str = "") -> None:
    """Raise a ValueError that lists the messages, if there are any."""
    if lines := list(messages):
        raise ValueError(where + (lines[0] if len(lines) == 1 else "\n  ".join(["these settings are wrong:", *lines])))


@cache
def hints_of(owner: Callable[..., Any]) -> dict[str, Hint]:
    """Return the annotations of a dataclass's fields, or of a class's or function's arguments, by name."""
    if dataclasses.is_dataclass(owner):
        hints = get_type_hints(owner, include_extras=True)
        return {field.name: hints[field.name] for field in dataclasses.fields(owner)}
    function = owner.__init__ if isinstance(owner, type) else owner
    hints = get_type_hints(inspect.unwrap(function), include_extras=True)
    return {name: hints.get(name, Any) for name in inspect.signature(owner).parameters}


def faults(owner: Callable[..., Any], values: Mapping[str, Any], prefix: str = "", raw: bool = False) -> Iterator[str]:
    """Yield one message per invalid value of a dataclass, or of the arguments of a class.

    Args:
        owner: the dataclass or class.
        values: its values by name.
        prefix: text before every name, such as "loop.".
        raw: whether the values come from a YAML file: settings may be missing there, and PyYAML leaves numbers such as
            `1e-4` as text.
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
    """Return the message for an unknown setting, with the nearest name of its section or of another.

    Args:
        name: the unknown setting.
        owner: the class of the settings.
        section: text before the names of all settings of `owner`, such as "data.".
    """
    known = [f"{section}{setting}" for setting in names_below(owner)]
    parent, _, last = name.rpartition(".")
    siblings = {setting.rpartition(".")[2]: setting for setting in known if setting.rpartition(".")[0] == parent}
    near = [siblings[match] for match in difflib.get_close_matches(last, siblings, n=1, cutoff=0.7)]
    near = near or [setting for setting in known if setting.rpartition(".")[2] == last]
    hint = f"did you mean {near[0]}?" if near else f"valid here: {', '.join(sorted(siblings or known))}"
    return f"{name}: is not a setting; {hint}"


def names_below(owner: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of all settings of a dataclass, or of a class's arguments."""
    names = []
    for name, hint in hints_of(owner).items():
        names.append(f"{prefix}{name}")
        inner = next((arm for arm in arms(hint) if dataclasses.is_dataclass(arm)), None)
        names += names_below(inner, f"{prefix}{name}.") if inner else []
    return names


def arms(hint: Hint) -> list[Hint]:
    """Return the members of a union, or the annotation itself, without `Annotated`."""
    base = base_of(hint)
    if get_origin(base) in (Union, types.UnionType):
        return [arm for part in get_args(base) for arm in arms(part)]
    return [base]


def describe(hint: Hint) -> str:
    """Describe the valid values of an annotation in words: "a whole number, 1 or more"."""
    base, limits = split_hint(hint)
    origin, args = get_origin(base), get_args(base)
    suffix = f", {limits!r}" if limits is not None else ""
    if base is float and limits == Range():
        return "a finite number"
    if origin in (Union, types.UnionType):
        words = any(get_origin(arm) is Literal for arm in args)
        return (", or " if words else " or ").join(describe(arm) for arm in args if arm is not type(None)) + (
            ", or null" if type(None) in args else ""
        )
    if origin is Literal and len(args) == 1:
        return f'"{args[0]}"'
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if dataclasses.is_dataclass(base):
        return f"settings {{{', '.join(hints_of(base))}}}"
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
    name = "a path" if any(isinstance(mark, PathMark) for mark in marks(hint)) else plain.get(base)
    return (name or getattr(base, "__name__", str(base))) + suffix


def expand_paths(hint: Hint, value: Any) -> Any:
    """Expand `~` and names of shipped weights in values annotated as `UserPath`.

    Returns: the same object if nothing changes.
    Raises: ValueError for shipped weights that are not there.
    """
    if isinstance(value, str):
        is_path = any(isinstance(mark, PathMark) for mark in marks(hint))
        return expand_path(value) if is_path and (value.startswith("~") or is_shipped(value)) else value
    if isinstance(value, list) and any(isinstance(item, str) for item in value):
        expanded = [expand_paths(hint, item) for item in value]
        return expanded if expanded != value else value
    if isinstance(value, dict) and any(isinstance(item, str) for item in value.values()):
        expanded = {key: expand_paths(hint, item) for key, item in value.items()}
        return expanded if expanded != value else value
    return value


def plain_numbers(value: Any) -> Any:
    """Convert numpy's numbers to Python's; return the same object if there are none."""
    if isinstance(value, numbers.Number) and hasattr(value, "item"):  # np.float64 is a float, too
        return value.item()  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, list | tuple):
        plain = [plain_numbers(item) for item in value]
        return value if all(new is old for new, old in zip(plain, value, strict=True)) else type(value)(plain)
    if isinstance(value, dict):
        plain = {plain_numbers(key): plain_numbers(item) for key, item in value.items()}
        kept = all(new is old and plain[new] is value[old] for new, old in zip(plain, value, strict=True))
        return value if kept else plain
    return value


def construct(hint: Hint, value: Any, name: str = "") -> Any:
    """Convert valid values to their annotation: mappings to dataclasses, lists to tuples.

    Raises:
        ValueError: starting with the section's name, for combinations that a dataclass refuses.
    """
    base, _ = split_hint(hint)
    origin, args = get_origin(base), get_args(base)
    if origin in (Union, types.UnionType):
        return construct(_arm(args, value), value, name)
    if dataclasses.is_dataclass(base) and not isinstance(value, base):  # pyright: ignore[reportArgumentType]
        hints = hints_of(base)
        inner = {key: construct(hints[key], item, f"{name}.{key}" if name else key) for key, item in value.items()}
        try:
            return base(**inner)  # pyright: ignore[reportCallIssue]
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name and not str(error).startswith(name) else str(error)) from error
    if origin is tuple and isinstance(value, list | tuple):
        each = [args[0]] * len(value) if args[-1:] == (...,) else args
        return tuple(construct(part, item, name) for part, item in zip(each, value, strict=True))
    if origin is list and isinstance(value, list | tuple):
        return [construct(args[0], item, name) for item in value]
    if origin is dict and isinstance(value, Mapping):
        return {construct(args[0], key): construct(args[1], item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, str) and base in (int, float, bool):  # text from a YAML file
        return read_plain(base, value)
    if base is float and isinstance(value, int):
        return float(value)
    return value


class Number:
    """Parse a number on a command line: `add_argument(type=Number(PositiveInt))`, for argparse and jsonargparse."""

    def __init__(self, hint: Hint):
        self.hint = hint
        self.__name__ = describe(hint)  # what argparse prints for other text

    def __call__(self, text: Any) -> Any:
        """Parse a value. Raises: ArgumentTypeError if it is not valid."""
        base, _ = split_hint(self.hint)
        try:
            value = base(text)
        except (TypeError, ValueError):
            value = text
        if message := next(faults_of(self.hint, value, ""), None):
            raise argparse.ArgumentTypeError(message.removeprefix(": "))
        return value

    def __repr__(self) -> str:
        return self.__name__


def show_ranges(parser: argparse.ArgumentParser) -> None:
    """Add the valid values to the help of each `Number` of a parser."""
    for action in parser._actions:
        if isinstance(action.type, Number):
            action.help = f"{action.help or ''} [{action.type}]".strip().replace("%", "%%")


def _is_required(owner: Any, name: str) -> bool:
    field = next(field for field in dataclasses.fields(owner) if field.name == name)
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def split_hint(hint: Hint) -> tuple[Hint, Range | None]:
    """Return the annotation without `Annotated`, and its range."""
    if get_origin(hint) is not Annotated:
        return hint, None
    base, *marks = get_args(hint)
    return base, next((mark for mark in marks if isinstance(mark, Range)), None)


def base_of(hint: Hint) -> Hint:
    """Return the annotation without `Annotated`."""
    return split_hint(hint)[0]


def marks(hint: Hint) -> Iterator[Any]:
    """Yield the `Annotated` marks of an annotation and of all inner ones."""
    if get_origin(hint) is Annotated:
        yield from get_args(hint)[1:]
    for inner in get_args(hint):
        yield from marks(inner)


def _arm(args: Sequence[Hint], value: Any) -> Hint:
    """Return the member of a union that fits the value, or the nearest one."""
    fitting = [arm for arm in args if not list(faults_of(arm, value, "", True))]
    if fitting:
        return fitting[0]
    mappings = [arm for arm in args if dataclasses.is_dataclass(base_of(arm)) or get_origin(base_of(arm)) is dict]
    if isinstance(value, Mapping) and mappings:
        deep = any(isinstance(item, Mapping) for item in value.values())
        return next((arm for arm in mappings if (get_origin(base_of(arm)) is dict) == deep), mappings[0])
    if isinstance(value, list | tuple):
        return next((arm for arm in args if get_origin(base_of(arm)) in (list, tuple, Sequence)), None)
    plain = {int: int, float: float, str: str}
    kind = plain.get(type(value))
    return next((arm for arm in args if base_of(arm) is kind or (kind is int and base_of(arm) is float)), None)


def faults_of(hint: Hint, value: Any, name: str, raw: bool = False) -> Iterator[str]:
    """Yield one message per fault of a value."""
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
        for number, (part, item) in enumerate(zip(args if fixed else [args[0]] * len(value), value, strict=True)):
            yield from faults_of(part, item, f"{name}[{number}]", raw)
    elif origin in (dict, Mapping) or base is dict:
        if not isinstance(value, Mapping):
            yield _wrong(name, value, hint)
            return
        for key, item in value.items() if args else ():
            yield from faults_of(args[0], key, f"{name}: the key {key!r}", raw)
            yield from faults_of(args[1], item, f"{name}.{key}", raw)
    elif value == "" and any(isinstance(mark, PathMark) for mark in marks(hint)):
        yield f"{name}: is empty; expected {describe(hint)}"
    elif not _is_a(base, value, raw) or (limits is not None and _plain(base, value) not in limits):
        yield _wrong(name, value, hint)


def _is_a(base: Hint, value: Any, raw: bool) -> bool:
    """Return whether a plain value has a plain type; numpy's numbers count."""
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
    """Parse a number or truth value as jsonargparse does; return None for other text."""
    if base is bool:
        return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(text.lower())
    try:
        return base(text)
    except ValueError:
        return None


def _plain(base: type, value: Any) -> Any:
    """Return the number in a text; return other values unchanged."""
    return read_plain(base, value) if isinstance(value, str) else value


def _wrong(name: str, value: Any, hint: Hint) -> str:
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    kind = " (text)" if isinstance(value, str) else ""
    home = value is None and any(isinstance(mark, PathMark) for mark in marks(hint))
    quotes = "; put it in quotes" if isinstance(value, int | float) and str in arms(hint) else ""
    quotes = '; for the home folder write "~", in quotes' if home else quotes
    return f"{name}: got {shown[:80]}{kind}, expected {describe(hint)}{quotes}"
