"""Read the tensors of a file that `torch.save` wrote, without running anything that the file names.

A pickle is a program: it names functions, and says what to call them with. Here no name is ever looked up. Each name
that a file of plain weights contains has a stand-in in `NAMES`, all others are refused; so nothing of the file can
run, whatever it holds. A tensor is only described (`StoredTensor`) until its shape has been checked, and is read
afterwards.
"""

import io
import math
import pickle
import pickletools
import reprlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Never

import torch

from files.documents import FileError
from files.paths import open_regular, printable

MOST_PICKLE = 1 << 26  # bytes of the part that is not tensors
MOST_ENTRIES = 1 << 16  # of the archive; one per tensor
MOST_SIDES = 16  # of a tensor
MOST_VALUES = 1 << 20  # of the part that is not tensors, each counted as often as it is referred to
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What torch.save's protocol 2 writes, and the newer forms of the same in protocols 3 to 5.
OPCODES = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT UNICODE "
    "BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 "
    "TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID PUT BINPUT LONG_BINPUT "
    "MEMOIZE GET BINGET LONG_BINGET POP POP_MARK DUP STRING BINSTRING SHORT_BINSTRING".split()
)


class Refused(ValueError):
    """What a file holds beside tensors and plain values."""


class _Mapping(dict):
    """Stand-in for OrderedDict. Attributes that a pickle sets on it (a state dict's `_metadata`) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class Dropped:
    """What describes an image, beside a tensor of MONAI: nothing of it is kept."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _Fixed:
    """What a pickle cannot change once it is built."""

    def __setstate__(self, state: object) -> Never:
        raise Refused(f"changes a {type(self).__name__.strip('_')}")


class _StandIn(_Fixed):
    """What a name in a pickle stands for: a function of this module. A pickle cannot change it."""

    __slots__ = ("_call", "name")

    def __init__(self, name: str, call: Callable[..., object]):
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> object:
        return self._call(*args)

    def __setattr__(self, name: str, value: object) -> Never:
        raise Refused(f"changes {self.name}")


@dataclass(frozen=True)
class _Storage(_Fixed):
    """Memory of one or several tensors: the archive's entry `data/<key>`."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor(_Fixed):
    """A tensor in a file, not read yet.

    Attributes:
        shape, dtype: of the tensor.
        offset, strides: where it lies in its storage, in elements.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    strides: tuple[int, ...]
    storage: _Storage = field(repr=False)


def _tensor(storage: object, offset: object, shape: object, strides: object, *_: object) -> StoredTensor:
    """Describe a tensor, as `torch._utils._rebuild_tensor_v2` would build it. Raises: Refused outside its storage."""
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise Refused("builds a tensor of something else than a storage")
    numbers = (offset, *shape, *strides)
    if not all(type(n) is int and 0 <= n < 2**48 for n in numbers) or len(shape) != len(strides):
        raise Refused(f"builds a tensor with the impossible place {reprlib.repr(numbers):.80}")
    assert isinstance(offset, int)
    if len(shape) > MOST_SIDES:
        raise Refused(f"builds a tensor of {len(shape)} sides")
    last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= storage.numel:
        raise Refused(f"builds a tensor {shape} that lies outside of its storage of {storage.numel} elements")
    return StoredTensor(shape, storage.dtype, offset, strides, storage)


def _parameter(data: object, *_: object) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise Refused("builds a parameter of something else than a tensor")
    return data


def _subclass(function: object, _: object, args: object, *__: object) -> StoredTensor:
    """Describe a tensor of a subclass (MONAI's MetaTensor) as a plain one; what else it knows is dropped."""
    if function is not NAMES["torch._utils", "_rebuild_tensor_v2"] or not isinstance(args, tuple):
        raise Refused("builds a tensor by another function")
    return _tensor(*args)


def _mapping(*args: object) -> _Mapping:
    """Make a mapping of pairs, as old pickles of an OrderedDict hold them."""
    pairs = args[0] if args else []
    if (
        len(args) > 1
        or not isinstance(pairs, list)
        or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs)
    ):
        raise Refused("builds an OrderedDict of something else than pairs")
    _check_keys([key for key, _ in pairs])
    return _Mapping(pairs)


def _check_keys(keys: Sequence[object]) -> None:
    """Refuse keys whose hash may take forever: a tuple of a tuple, of a tuple, ..., each twice in the next."""
    for key in keys:
        if not isinstance(key, str | int | float | Dropped):
            raise Refused(f"has a {type(key).__name__} as the key of a dict")


def _count(value: object, known: dict[int, int]) -> int:
    """Count the values of a document as if it had no references, which could take forever to walk along."""
    if not isinstance(value, tuple | list | dict):
        return 1
    if id(value) not in known:
        known[id(value)] = 1 + sum(_count(one, known) for one in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]


def _never(*_: object) -> Never:
    raise Refused("calls a type of storage")


def _names() -> dict[tuple[str, str], _StandIn]:
    calls: dict[tuple[str, str], Callable[..., object]] = {
        ("collections", "OrderedDict"): _mapping,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch._tensor", "_rebuild_from_type_v2"): _subclass,
    }
    calls |= dict.fromkeys([("torch", name) for name in STORAGES], _never)
    # A scale factor that was computed from a MetaTensor is one, with all that it knows of the image: dropped.
    dropped = [("monai.data.meta_tensor", "MetaTensor"), ("monai.utils.enums", "MetaKeys")]
    dropped += [("monai.utils.enums", "SpaceKeys"), ("_codecs", "encode"), ("numpy", "ndarray"), ("numpy", "dtype")]
    dropped += [(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]
    dropped += [(f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")]
    calls |= dict.fromkeys(dropped, lambda *_: Dropped())
    return {name: _StandIn(".".join(name), call) for name, call in calls.items()}


NAMES = _names()


class _Unpickler(pickle._Unpickler):  # Python's own, not C's: keys are checked before they are hashed
    """An unpickler that knows the names in `NAMES`, and looks up none."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name. Raises: Refused for any other."""
        try:
            return NAMES[module, name]
        except KeyError:
            raise Refused(f"names {printable(f'{module}.{name}')[:120]}") from None

    def persistent_load(self, pid: object) -> _Storage:
        """Return the storage that a pickle refers to."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _StandIn)):
            raise Refused(f"refers to {printable(reprlib.repr(pid)[:80])}")
        _, kind, key, _, numel = pid
        dtype = STORAGES.get(kind.name.removeprefix("torch."))
        if dtype is None or not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 2**48:
            raise Refused(f"refers to {printable(reprlib.repr(pid)[:80])}")
        found = self.storages.setdefault(key, _Storage(key, dtype, numel))
        if found != _Storage(key, dtype, numel):
            raise Refused(f"refers to the storage {printable(key)[:40]} as two types or sizes")
        return found

    def load_setitem(self) -> None:
        """Set an entry of a dict. Raises: Refused for a key that is not text or a number; so do the next two."""
        _check_keys(self.stack[-2:-1])  # pyright: ignore[reportAttributeAccessIssue]
        super().load_setitem()  # pyright: ignore[reportAttributeAccessIssue]

    def load_setitems(self) -> None:
        """Set entries of a dict."""
        _check_keys(self.stack[::2])  # pyright: ignore[reportAttributeAccessIssue]
        super().load_setitems()  # pyright: ignore[reportAttributeAccessIssue]

    def load_dict(self) -> None:
        """Make a dict."""
        _check_keys(self.stack[::2])  # pyright: ignore[reportAttributeAccessIssue]
        super().load_dict()  # pyright: ignore[reportAttributeAccessIssue]

    dispatch |= {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
    }


@dataclass(frozen=True)
class TorchFile:
    """A file that `torch.save` wrote.

    Attributes:
        content: its plain values, with a `StoredTensor` where it has a tensor, and `Dropped` where it describes images.
    """

    path: Path
    content: object
    _prefix: str

    @classmethod
    def open(cls, path: Path) -> "TorchFile":
        """Read everything but the tensors' values.

        Raises: FileError (a ValueError) naming the file for what is not an archive of torch.save, is damaged, or holds
            anything beside tensors and plain values: the function or class is named.
        """
        with _archive(path) as archive:
            prefix = _check_entries(path, archive)
            data = _read_entry(path, archive, f"{prefix}data.pkl")
            byteorder = f"{prefix}byteorder"
            if byteorder in archive.namelist() and _read_entry(path, archive, byteorder) != b"little":
                raise FileError(f"{path}: was written on a machine of another byte order; save it again on this one")
            try:
                _check_opcodes(data)
                reader = _Unpickler(data)
                content = reader.load()
                if _count(content, {}) > MOST_VALUES:
                    raise Refused(f"refers to its values more than {MOST_VALUES} times")
                sizes = {info.filename: info.file_size for info in archive.infolist()}
                for key, storage in reader.storages.items():
                    if sizes.get(f"{prefix}data/{key}") != storage.numel * storage.dtype.itemsize:
                        raise Refused(f"lacks the storage {printable(key)[:40]}, or has it in another size")
            except Refused as error:
                raise FileError(
                    f"{path}: {error}; files of weights hold tensors and plain values only, anything else can run code "
                    "and is refused. Nothing of the file was run"
                ) from error
            except Exception as error:  # of many kinds: the pickle is not one
                raise FileError(f"{path}: its pickle is damaged ({type(error).__name__}: {error!s:.200})") from error
        return cls(path, content, prefix)

    def read(self, tensors: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
        """Read the values of tensors, each into memory of its own. Raises: FileError for a damaged file."""
        found: dict[str, torch.Tensor] = {}
        with _archive(self.path) as archive:
            for name, stored in tensors.items():
                if not math.prod(stored.shape):
                    found[name] = torch.empty(stored.shape, dtype=stored.dtype)
                    continue
                raw = bytearray(_read_entry(self.path, archive, f"{self._prefix}data/{stored.storage.key}", None))
                values = torch.frombuffer(raw, dtype=stored.dtype)
                found[name] = values.as_strided(stored.shape, stored.strides, stored.offset).clone(
                    memory_format=torch.contiguous_format
                )
        return found


def _archive(path: Path) -> zipfile.ZipFile:
    """Open an archive. Raises: FileError for another format, such as torch.save's before 1.6."""
    try:
        open_regular(path).close()
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise FileError(
            f"{path}: is not an archive of torch.save (or of a version before 1.6, or its download is incomplete); "
            "load and save it again with a new torch, where you trust it"
        ) from error
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: cannot be read: {error}") from error


def _check_entries(path: Path, archive: zipfile.ZipFile) -> str:
    """Return the folder in the archive, with a slash. Raises: FileError for entries that torch.save does not write."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1 or len(set(names)) != len(names) or len(names) > MOST_ENTRIES:
        raise FileError(f"{path}: is not an archive of torch.save: it needs one data.pkl, and no name twice")
    prefix = pickles[0].removesuffix("data.pkl")
    if any(name == f"{prefix}constants.pkl" or name.startswith(f"{prefix}code/") for name in names):
        raise FileError(f"{path}: is a TorchScript archive, which holds code; only plain weights are read")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise FileError(
                f"{path}: its entry {printable(entry.filename)[:80]} is compressed; torch.save compresses none"
            )
    return prefix


def _read_entry(path: Path, archive: zipfile.ZipFile, name: str, limit: int | None = MOST_PICKLE) -> bytes:
    """Read an entry. Raises: FileError if it is damaged, or larger than `limit` bytes."""
    try:
        if limit is not None and archive.getinfo(name).file_size > limit:
            raise FileError(f"{path}: its {printable(name)[:80]} is larger than {limit >> 20} MiB")
        return archive.read(name)
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError, RuntimeError, OverflowError) as error:
        raise FileError(f"{path}: its {printable(name)[:80]} is damaged; was the download complete?") from error


def _check_opcodes(data: bytes) -> None:
    """Raise Refused for operations that files of weights have no use for, and for those that only take memory."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in OPCODES:
            raise Refused(f"has the operation {opcode.name}")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > len(data):
            raise Refused(f"has the operation {opcode.name} {argument}")
