"""Files that would run code, that are damaged, or that hold something else are refused by name."""

import io
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from files.documents import FileError
from interop.convert import read_source
from interop.pickles import StoredTensor, TorchFile

WEIGHTS = {"encoder.weight": torch.arange(6.0).reshape(2, 3), "encoder.bias": torch.tensor([1.5, -2.0])}


class Runs:
    """What a pickle makes by calling a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Has(dict):
    """What a pickle sets the state of."""


def archive(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    """An archive as torch.save writes it, with any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        for name, content in {
            "version": b"3\n",
            "byteorder": b"little",
            "data/0": struct.pack("6f", *range(6)),
            **entries,
        }.items():
            file.writestr(f"archive/{name}", content)
    return path


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def whole(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def storage(kind: str = "FloatStorage", key: str = "0", numel: int = 6) -> bytes:
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + whole(numel) + b"tQ"


def tensor(shape=(6,), strides=(1,), offset=0, of: bytes | None = None) -> bytes:
    numbers = [b"(" + b"".join(map(whole, values)) + b"t" for values in (shape, strides)]
    hooks = name("collections", "OrderedDict") + b")R"
    arguments = (of or storage()) + whole(offset) + numbers[0] + numbers[1] + b"\x89" + hooks
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def state(*values: bytes) -> bytes:
    """A pickle of {"0": value, "1": value, ...}."""
    pairs = b"".join(text(str(number)) + value for number, value in enumerate(values))
    return b"\x80\x02}(" + pairs + b"u."


# A function that is called, and what its name is.
CODE = [
    (os.system, "true", "posix.system"),
    (eval, "1", "builtins.eval"),
    (exec, "1", "builtins.exec"),
    (print, "1", "builtins.print"),
    (getattr, "a", "upper", "builtins.getattr"),
    (open, "/etc/hosts", "io.open"),
    (__import__, "os", "builtins.__import__"),
    (compile, "1", "a", "eval", "builtins.compile"),
    (bytearray, 1 << 40, "builtins.bytearray"),
    (set, [1], "builtins.set"),
    (torch.load, "x", "torch.serialization.load"),
    (torch.hub.load, "a/b", "c", "torch.hub.load"),
    (torch.device, "cpu", "torch.device"),
    (torch.set_default_dtype, torch.float64, "torch.set_default_dtype"),
    (torch.nn.Linear, 1, 1, "torch.nn.modules.linear.Linear"),
    (Path, "x", "pathlib.Path"),
    (os.unlink, "x", "posix.unlink"),
    (os.popen, "true", "os.popen"),
    (pickle.loads, b"N.", "_pickle.loads"),
    (OrderedDict.fromkeys, "a", "builtins.getattr"),
]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("call", CODE, ids=lambda call: call[-1])
def test_a_pickle_that_calls_a_function_is_refused_by_its_name(call, protocol, tmp_path):
    function, *args, named = call
    torch.save({**WEIGHTS, "x": Runs(function, *args)}, tmp_path / "x.pt", pickle_protocol=protocol)
    with pytest.raises(FileError) as caught:
        read_source(tmp_path / "x.pt")
    said = re.search("names (.+);", str(caught.value))
    assert (
        said is not None and said[1].replace("__builtin__", "builtins").rpartition(".")[2] == named.rpartition(".")[2]
    )
    assert str(tmp_path / "x.pt") in str(caught.value) and "Nothing of the file was run" in str(caught.value)


FLOATS = name("torch", "FloatStorage")
FROM_TYPE = name("torch._tensor", "_rebuild_from_type_v2")
PARAMETER = name("torch._utils", "_rebuild_parameter")
REBUILD = name("torch._utils", "_rebuild_tensor_v2")
HOSTILE = {
    "a class": (name("interop.pickles", "TorchFile"), "names interop.pickles.TorchFile"),
    "a dotted name": (name("collections", "OrderedDict.fromkeys"), "names collections.OrderedDict.fromkeys"),
    "an old instance": (b"(ios\nsystem\n", "the operation INST"),
    "an object": (b"(" + FLOATS + b"o", "the operation OBJ"),
    "a new object": (FLOATS + b")\x81", "the operation NEWOBJ"),
    "an extension": (b"\x82\x01", "the operation EXT1"),
    "a text for a storage": (b"Pabc\n", "the operation PERSID"),
    "a huge memo": (b"Nr\xff\xff\xff\x7f", "LONG_BINPUT 2147483647"),
    "a stand-in that is changed": (REBUILD + b"}" + text("name") + text("os") + b"sb", "changes a StandIn"),
    "a stand-in that is changed by slots": (REBUILD + b"N}" + text("_call") + FLOATS + b"s\x86b", "changes a StandIn"),
    "a tensor that is changed": (tensor() + b"}" + text("offset") + whole(9) + b"sb", "changes a StoredTensor"),
    "a storage that is changed": (storage() + b"}" + text("numel") + whole(99) + b"sb", "changes a Storage"),
    "a storage that is called": (FLOATS + b")R", "calls a type of storage"),
    "a tensor of a text": (tensor(of=text("x")), "something else than a storage"),
    "a tensor beyond its storage": (tensor((7,)), "outside of its storage"),
    "an offset beyond its storage": (tensor((6,), offset=1), "outside of its storage"),
    "strides beyond its storage": (tensor((2, 3), (4, 1)), "outside of its storage"),
    "a negative stride": (tensor((2, 3), (-3, 1)), "impossible place"),
    "a negative side": (tensor((-1,)), "impossible place"),
    "a huge side": (tensor((2**60,), (0,)), "impossible place"),
    "too few strides": (tensor((2, 3), (1,)), "impossible place"),
    "twenty sides": (tensor((1,) * 20, (1,) * 20), "20 sides"),
    "a storage that is missing": (tensor(of=storage(key="7")), "lacks the storage 7"),
    "a storage outside": (tensor(of=storage(key="../../x")), "lacks the storage"),
    "a storage of another size": (tensor(of=storage(numel=9)), "lacks the storage 0, or has it in another size"),
    "a storage of two types": (tensor() + b"0" + tensor(of=storage("HalfStorage")), "as two types or sizes"),
    "a storage of unknown type": (tensor(of=storage("ComplexFloatStorage")), "names torch.ComplexFloatStorage"),
    "a reference to something": (b"(" + text("module") + text("x") + b"tQ", "refers to"),
    "an image's function": (FROM_TYPE + b"(" + FLOATS + b"N)}tR", "another function"),
    "a parameter of a text": (PARAMETER + b"(" + text("x") + b"tR", "else than a tensor"),
    "a mapping of numbers": (name("collections", "OrderedDict") + b"(" + whole(3) + b"tR", "else than pairs"),
    "too little": (b"R", "damaged"),
    "a nested tuple as a key": (b"}K\x00" + b"2\x86" * 60 + b"K\x01s", "has a tuple as the key of a dict"),
    "a nested tuple as one of several keys": (b"}(K\x00" + b"2\x86" * 60 + b"K\x01u", "has a tuple as the key"),
    "a nested tuple as a key of marked values": (b"(K\x00" + b"2\x86" * 60 + b"K\x01d", "has a tuple as the key"),
    "a nested tuple as a key of pairs": (
        name("collections", "OrderedDict") + b"](K\x00" + b"2\x86" * 60 + b"K\x01\x86e\x85R",
        "has a tuple as the key",
    ),
    "a nested tuple for a storage": (b"K\x00" + b"2\x86" * 60 + b"Q", "refers to"),
    "a nested tuple for a shape": (
        REBUILD + b"(" + storage() + whole(0) + b"(K\x00" + b"2\x86" * 60 + b"t(K\x01t\x89)tR",
        "impossible place",
    ),
    "a nested tuple as a value": (b"K\x00" + b"2\x86" * 60, "refers to its values more than"),
    "a nested list as a value": (b"]" + b"q\x010](h\x01h\x01e" * 60, "refers to its values more than"),
    "a text for a tensor": (text("x"), "0 among its weights is not a tensor"),
    "metadata for a tensor": (name("numpy", "dtype") + b")R", "is not a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_pickle_that_torch_does_not_write_is_refused(case, tmp_path):
    pickled, message = HOSTILE[case]
    path = archive(tmp_path / "x.pt", b"\x80\x02}" + text("state_dict") + state(pickled)[2:-1] + b"s.")
    with pytest.raises(FileError, match=message) as caught:
        read_source(path)
    assert str(path) in str(caught.value)


def test_the_helpers_write_what_torch_writes(tmp_path):
    """So the pickles above are refused for what they change."""
    path = archive(tmp_path / "x.pt", state(tensor((2, 3), (3, 1)), tensor((3, 2), (1, 3)), tensor((2,), (0,), 4)))
    expected = torch.arange(6.0).reshape(2, 3)
    loaded = torch.load(path, weights_only=True)
    ours = read_source(path).read({"0": "0", "1": "1", "2": "2"})
    for key, value in {"0": expected, "1": expected.T, "2": torch.tensor([4.0, 4.0])}.items():
        assert torch.equal(ours[key], value) and torch.equal(loaded[key], value) and ours[key].is_contiguous()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_of_torch_are_read_as_torch_reads_them(protocol, tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(torch.bfloat16)
    state_dict = network.state_dict()  # with its _metadata
    state_dict |= {
        "view": torch.arange(24.0).reshape(4, 6)[1:3, ::2].T,
        "empty": torch.empty(0, 3),
        "half": torch.ones(2).half(),
    }
    state_dict["parameter"] = torch.nn.Parameter(torch.randn(3))
    state_dict["number"] = torch.tensor(7, dtype=torch.int16)
    torch.save(
        {"state_dict": state_dict, "epoch": 3, "note": "é", "flags": (True, None, [1.5])},
        tmp_path / "x.pt",
        pickle_protocol=protocol,
    )
    source = read_source(tmp_path / "x.pt")
    found = source.read({key: key for key in source.state})
    assert found.keys() == state_dict.keys() and source.beside == ("epoch", "note", "flags")
    for key, value in state_dict.items():
        assert torch.equal(found[key], value) and found[key].dtype == value.dtype
        assert source.state[key] == (tuple(value.shape), value.is_floating_point())


def test_nothing_but_tensors_comes_out_of_a_file(tmp_path):
    torch.save(OrderedDict(WEIGHTS), tmp_path / "x.pt")
    content = TorchFile.open(tmp_path / "x.pt").content
    assert isinstance(content, dict) and all(type(value) is StoredTensor for value in content.values())


def test_archives_that_torch_does_not_write_are_refused(tmp_path):
    good = state(tensor())
    torch.save(WEIGHTS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(WEIGHTS, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-100])
    torch.save(WEIGHTS, tmp_path / "flip.pt")
    raw = bytearray((tmp_path / "flip.pt").read_bytes())
    place = raw.index(struct.pack("6f", *range(6)))
    raw[place + 5] ^= 1
    (tmp_path / "flip.pt").write_bytes(raw)
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1")
    with open(tmp_path / "pickle.pt", "wb") as file:
        pickle.dump({"a": 1}, file)
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "none.pt", "w") as file:
        file.writestr("archive/x", b"")
    with zipfile.ZipFile(archive(tmp_path / "two.pt", good), "a") as file:
        file.writestr("other/data.pkl", good)
    os.mkfifo(tmp_path / "pipe.pt")
    archive(tmp_path / "zipped.pt", good, zipfile.ZIP_DEFLATED)
    archive(tmp_path / "big.pt", good, byteorder=b"big")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weights": WEIGHTS}, tmp_path / "elsewhere.pt")
    torch.save({"model": WEIGHTS, "state_dict": WEIGHTS}, tmp_path / "both.pt")
    torch.save({"unet_state_dict": WEIGHTS, "scale_factor": torch.tensor([1.0, 2.0])}, tmp_path / "scales.pt")
    torch.save({"unet_state_dict": WEIGHTS, "scale_factor": float("nan")}, tmp_path / "nan.pt")
    messages = {
        "old": "not an archive of torch.save",
        "cut": "not an archive of torch.save",
        "text": "not an archive of torch.save",
        "pickle": "not an archive of torch.save",
        "script": "TorchScript",
        "none": "needs one data.pkl",
        "two": "needs one data.pkl",
        "pipe": "pipe",
        "zipped": "compressed",
        "big": "byte order",
        "list": "state dict is expected",
        "elsewhere": "expected under one of unet_state_dict",
        "both": "expected under one of unet_state_dict",
        "scales": "scale_factor",
        "nan": "scale_factor is nan",
    }
    for stem, message in messages.items():
        with pytest.raises(FileError, match=message) as caught:
            read_source(tmp_path / f"{stem}.pt")
        assert f"{stem}.pt" in str(caught.value)
    source = read_source(tmp_path / "flip.pt")
    with pytest.raises(FileError, match="damaged"):
        source.read({key: key for key in source.state})


def test_changed_pickles_are_refused_or_harmless(tmp_path):
    """Whatever bytes a pickle has: it is read as tensors and plain values, or refused by FileError."""
    buffer = io.BytesIO()
    torch.save({"state_dict": WEIGHTS, "scale_factor": 1.5}, buffer)
    with zipfile.ZipFile(buffer) as file:
        data = next(file.read(entry) for entry in file.namelist() if entry.endswith("data.pkl"))
    assert pickletools.dis(data, io.StringIO()) is None
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(300):
        place, value, cut = (int(torch.randint(0, most, (1,), generator=generator)) for most in (len(data), 256, 8))
        changed = data[:place] if cut == 0 else data[:place] + bytes([value]) + data[place + 1 :]
        path = archive(tmp_path / "x.pt", changed, **{"data/1": struct.pack("2f", 1.5, -2.0)})
        try:
            source = read_source(path)
            source.read({key: key for key in source.state})
        except FileError:
            refused += 1
    assert 150 < refused < 300
