"""NRRD files (.nrrd, and .nhdr with its voxels beside it): three spatial axes, and one of channels or none.

The format: https://teem.sourceforge.net/nrrd/format.html. Raw and gzip encodings; a patient space (RAS, LAS or LPS)
with space directions is required, as nothing else says where the voxels lie.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from files.paths import open_regular
from volumes.volume import VolumeError

from .raw import (
    UNITS,
    RawVolume,
    check_room,
    file_beside,
    make_grid,
    numbers,
    read_packed,
    whole_numbers,
)

HEADER_BYTES = 1 << 20  # more is not a header
SPACES = {  # signs that lead to RAS
    "right-anterior-superior": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
}
SPACES |= {"".join(word[0] for word in name.split("-")): signs for name, signs in SPACES.items()}
NAMES = {  # of types, in C and in <stdint.h>
    "i1": "signed char, int8, int8_t",
    "u1": "uchar, unsigned char, uint8, uint8_t",
    "i2": "short, short int, signed short, signed short int, int16, int16_t",
    "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
    "i4": "int, signed int, int32, int32_t",
    "u4": "uint, unsigned int, uint32, uint32_t",
    "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
    "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
    "f4": "float",
    "f8": "double",
}
TYPES = {name: np.dtype(code) for code, names in NAMES.items() for name in names.split(", ")}
NAMED_UNITS = {
    **dict.fromkeys(("millimeter", "millimeters", "millimeter", "millimeters"), "mm"),
    **dict.fromkeys(("meter", "meters", "meter", "meters"), "m"),
    **dict.fromkeys(("\u00b5m", "\u00e2\u00b5m", "micron", "microns", "micrometer", "micrometers"), "um"),
    **dict.fromkeys(("centimeter", "centimeters"), "cm"),
}
ENCODINGS = {"raw": False, "gzip": True, "gz": True}  # compressed or not
VECTOR = re.compile(r"\(([^()]*)\)|none", re.IGNORECASE)


def read_nrrd(path: Path, units: str | None = None) -> RawVolume:
    """Read voxels and grid of a NRRD file. `units` replaces the unit of its lengths if the header is wrong.

    Raises: VolumeError for files that are broken, or of a kind that this module does not read.
    """
    name = str(path)
    with open_regular(path) as file:
        fields = _fields(name, file)
        kind = _required(name, fields, "type")
        dtype, encoding = TYPES.get(kind), _required(name, fields, "encoding")
        if dtype is None:
            raise VolumeError(f"{name}: its voxels are of type {kind!r}; only numbers are supported")
        if encoding not in ENCODINGS:
            raise VolumeError(f"{name}: is encoded as {encoding!r}; save it as raw or gzip")
        if dtype.itemsize > 1:
            if fields.get("endian") not in ("little", "big"):
                raise VolumeError(f"{name}: its header does not say whether its endian is little or big")
            dtype = dtype.newbyteorder("<" if fields["endian"] == "little" else ">")
        for skip in ("line skip", "lineskip", "byte skip", "byteskip"):
            if fields.get(skip, "0") != "0":
                raise VolumeError(f"{name}: has a {skip} of {fields[skip]}; save it without")
        shape, channel_axis, affine = _geometry(name, fields)
        unit = _unit(name, fields, units)
        nbytes = check_room(name, shape, dtype.itemsize)
        detached = fields.get("data file", fields.get("datafile"))
        if detached is None:
            data = read_packed(name, file, nbytes, compressed=ENCODINGS[encoding])
        else:
            with open(file_beside(path, detached), "rb") as beside:
                data = read_packed(f"{name} ({detached})", beside, nbytes, compressed=ENCODINGS[encoding])
    values = np.frombuffer(data, dtype).reshape(shape, order="F")
    values = values[..., None] if channel_axis is None else np.moveaxis(values, channel_axis, -1)
    return RawVolume(name, values, make_grid(name, values.shape[:3], affine, unit, units))


def stored_size(path: Path) -> tuple[int, float]:
    """Return how many voxels a file says that it holds, and the size of one in the cube of its unit of length. Raises:
    VolumeError for a broken header.
    """
    with open_regular(path) as file:
        shape, _, affine = _geometry(str(path), _fields(str(path), file))
    return math.prod(shape), float(abs(np.linalg.det(affine[:3, :3])))


def detached_file(path: Path) -> Path | None:
    """Return the file beside the header that holds the voxels; None if the header's file holds them."""
    with open_regular(path) as file:
        fields = _fields(str(path), file)
    named = fields.get("data file", fields.get("datafile"))
    return None if named is None else file_beside(path, named)


def _fields(name: str, file: BinaryIO) -> dict[str, str]:
    """Read the header's fields, in lower case except for file names. The file's position is then where the voxels
    begin.
    """
    start = file.read(HEADER_BYTES)
    if not re.match(rb"NRRD000[1-5]\r?\n", start):
        raise VolumeError(f"{name}: is not an NRRD file (it does not begin with NRRD0001 to NRRD0005)")
    end = re.search(rb"\r?\n\r?\n", start)
    if end is None and len(start) == HEADER_BYTES:
        raise VolumeError(f"{name}: its header has no end")
    file.seek(end.end() if end else len(start))
    fields: dict[str, str] = {}
    for line in start[: end.start() if end else len(start)].decode("latin-1").splitlines()[1:]:
        field, colon, value = line.partition(": ")
        if line.startswith("#") or ":=" in line:  # a comment, a key and value of the user's
            continue
        field, value = field.strip().lower(), value.strip()
        if not colon or field in fields:
            raise VolumeError(f"{name}: its header has an empty or repeated line: {line[:80]!r}")
        fields[field] = value if field in ("data file", "datafile") else value.lower()
    return fields


def _geometry(name: str, fields: dict[str, str]) -> tuple[tuple[int, ...], int | None, np.ndarray]:
    """Return the shape as stored, which of its axes are the channels, and the affine to RAS+ in mm."""
    (dimension,) = whole_numbers(name, "dimension", _required(name, fields, "dimension"), 1)
    if dimension not in (3, 4):
        raise VolumeError(f"{name}: has {dimension} dimensions; a volume has three, and one more of channels at most")
    shape = tuple(whole_numbers(name, "sizes", _required(name, fields, "sizes"), dimension))
    space = _required(name, fields, "space")
    if space not in SPACES:
        raise VolumeError(f"{name}: lies in the space {space!r}; RAS, LAS and LPS are those of a patient")
    text = _required(name, fields, "space directions")
    found = [match[1] for match in VECTOR.finditer(text)]
    along = [axis for axis, vector in enumerate(found) if vector is not None]
    if len(found) != dimension or len(along) != 3 or VECTOR.sub("", text).strip():
        raise VolumeError(f"{name}: its 'space directions' are {text[:80]!r}; expected three vectors")
    origin = VECTOR.fullmatch(_required(name, fields, "space origin"))
    if origin is None or origin[1] is None:
        raise VolumeError(f"{name}: its 'space origin' is {fields['space origin'][:80]!r}; expected (x,y,z)")
    affine = np.eye(4)
    for column, axis in enumerate(along):
        affine[:3, column] = _vector(name, "space directions", found[axis])
    affine[:3, 3] = _vector(name, "space origin", origin[1])
    if found := re.findall(r"\S*(?:color|complex)\b", fields.get("kinds", "")):
        raise VolumeError(
            f"{name}: holds colors or complex numbers (kinds: {found[0]}); only scalar images are supported"
        )
    channels = next((axis for axis in range(dimension) if axis not in along), None)
    return shape, channels, np.diag([*SPACES[space], 1.0]) @ affine


def _unit(name: str, fields: dict[str, str], units: str | None) -> str:
    """Return the unit of length that the header names, mm if it names none. Raises: VolumeError for several units, and
    for an unknown one, unless `units` is set.
    """
    named = {NAMED_UNITS.get(one, one) for one in re.findall(r'"([^"]*)"', fields.get("space units", ""))} - {""}
    if units or not named:
        return "mm"
    found = sorted(map(str, named))
    if len(found) > 1 or found[0] not in UNITS:
        raise VolumeError(
            f"{name}: its space units are {found}; save it in mm, or set data.units in the training's config"
        )
    return found[0]


def _vector(name: str, field: str, text: str) -> list[float]:
    return numbers(name, field, text.replace(",", " "), 3)


def _required(name: str, fields: dict[str, str], field: str) -> str:
    if field not in fields:
        raise VolumeError(f"{name}: its header has no {field!r}, without which it cannot be read")
    return fields[field]
