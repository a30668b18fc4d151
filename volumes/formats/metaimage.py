"""MetaImage files (.mha, and .mhd with its voxels beside it), as ITK writes them: patient coordinates in LPS, in mm.

The format: https://itk.org/Wiki/ITK/MetaIO/Documentation. Three dimensions, binary voxels, raw or compressed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import BinaryIO

import numpy as np

from files.paths import open_regular
from volumes.volume import VolumeError

from .raw import (
    LPS_TO_RAS,
    UNITS,
    RawVolume,
    check_room,
    file_beside,
    make_grid,
    numbers,
    read_packed,
    whole_numbers,
)

LINE_BYTES, LINES = 4096, 1000  # more is not a header
TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
PLAIN = {"headersize": 0.0, "elementtointensityfunctionslope": 1.0, "elementtointensityfunctionoffset": 0.0}
SYNONYMS = {  # MetaIO knows several names of one thing
    "orientation": "transformmatrix",
    "rotation": "transformmatrix",
    "position": "offset",
    "origin": "offset",
    "elementbyteordermsb": "binarydatabyteordermsb",
}


def read_metaimage(path: Path, units: str | None = None) -> RawVolume:
    """Read voxels and grid of a MetaImage file. `units` replaces the unit of its lengths if the header is wrong.

    Raises: VolumeError for files that are broken, or of a kind that this module does not read.
    """
    name = str(path)
    with open_regular(path) as file:
        fields = _fields(name, file)
        if fields.get("objecttype", "Image").lower() != "image" or _required(name, fields, "ndims") != "3":
            raise VolumeError(f"{name}: is not an image of three dimensions (ObjectType and NDims)")
        if not _flag(name, fields, "binarydata", "True"):
            raise VolumeError(f"{name}: holds its voxels as text; save it as binary")
        for field, plain in PLAIN.items():
            if numbers(name, field, fields.get(field, str(plain)), 1) != [plain]:
                raise VolumeError(f"{name}: has {field} = {fields[field]}, which is not supported; save it without")
        unit = fields.get("distanceunits", "mm").lower().replace("?", "mm")
        if unit not in UNITS and not units:
            raise VolumeError(
                f"{name}: its DistanceUnits are {unit[:80]!r}; save it in mm, or set data.units in the training's "
                "config"
            )
        kind = _required(name, fields, "elementtype")
        if kind not in TYPES:
            raise VolumeError(f"{name}: its voxels are of type {kind!r}; expected one of {', '.join(TYPES)}")
        dtype = np.dtype(TYPES[kind]).newbyteorder(">" if _flag(name, fields, "binarydatabyteordermsb") else "<")
        compressed = _flag(name, fields, "compresseddata")
        shape = whole_numbers(name, "DimSize", _required(name, fields, "dimsize"), 3)
        (channels,) = whole_numbers(
            name, "ElementNumberOfChannels", fields.get("elementnumberofchannels", "1"), 1
        )  # they lie together, voxel by voxel
        affine = _affine(name, fields)
        nbytes = check_room(name, (channels, *shape), dtype.itemsize)
        local = fields["elementdatafile"].upper() == "LOCAL"
        if local:
            data = read_packed(name, file, nbytes, compressed=compressed)
        else:
            with open(file_beside(path, fields["elementdatafile"]), "rb") as beside:
                data = read_packed(f"{name} ({fields['elementdatafile']})", beside, nbytes, compressed=compressed)
    values = np.moveaxis(np.frombuffer(data, dtype).reshape((channels, *shape), order="F"), 0, -1)
    return RawVolume(name, values, make_grid(name, shape, affine, "mm" if units else unit, units))


def stored_size(path: Path) -> tuple[int, float]:
    """Return how many voxels a file says that it holds, and the size of one in the cube of its unit of length. Raises:
    VolumeError for a broken header.
    """
    name = str(path)
    with open_regular(path) as file:
        fields = _fields(name, file)
    shape = whole_numbers(name, "DimSize", _required(name, fields, "dimsize"))
    (channels,) = whole_numbers(name, "ElementNumberOfChannels", fields.get("elementnumberofchannels", "1"), 1)
    spacing = numbers(name, "ElementSpacing", _required(name, fields, "elementspacing"))
    return channels * math.prod(shape), math.prod(spacing)


def detached_file(path: Path) -> Path | None:
    """Return the file beside the header that holds the voxels; None if the header's file holds them."""
    with open_regular(path) as file:
        named = _fields(str(path), file)["elementdatafile"]
    return None if named.upper() == "LOCAL" else file_beside(path, named)


def _fields(name: str, file: BinaryIO) -> dict[str, str]:
    """Read the header's fields, names in lower case, up to ElementDataFile. The file's position is then after that
    line.
    """
    fields: dict[str, str] = {}
    for _ in range(LINES):
        line = file.readline(LINE_BYTES).decode("latin-1")
        field, equals, value = line.partition("=")
        field = field.strip().lower()
        field, value = SYNONYMS.get(field, field), value.strip()
        if not equals or not line.endswith("\n") or field in fields:
            break
        fields[field] = value
        if field == "elementdatafile":
            return fields
    raise VolumeError(f"{name}: is not a MetaImage file, or its header is damaged (ElementDataFile ends it)")


def _affine(name: str, fields: dict[str, str]) -> np.ndarray:
    """Return the affine to RAS+ in mm. Without a TransformMatrix the axes are those of LPS, as in ITK."""
    spacing = numbers(name, "ElementSpacing", _required(name, fields, "elementspacing"), 3)
    if min(spacing) <= 0:
        raise VolumeError(f"{name}: its geometry is broken: its ElementSpacing is {fields['elementspacing'][:80]!r}")
    axes = numbers(name, "TransformMatrix", fields.get("transformmatrix", "1 0 0 0 1 0 0 0 1"), 9)
    directions = np.array(axes).reshape(3, 3).T  # axis by axis in the file
    if np.abs(np.linalg.norm(directions, axis=0) - 1).max() > 1e-2:
        raise VolumeError(f"{name}: its geometry is broken: the axes of its TransformMatrix are not of length 1")
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = numbers(name, "Offset", _required(name, fields, "offset"), 3)
    return LPS_TO_RAS @ affine


def _flag(name: str, fields: dict[str, str], field: str, default: str = "False") -> bool:
    value = fields.get(field, default).lower()
    if value not in ("true", "false"):
        raise VolumeError(f"{name}: its {field} is {value[:80]!r}; expected True or False")
    return value == "true"


def _required(name: str, fields: dict[str, str], field: str) -> str:
    if field not in fields:
        raise VolumeError(f"{name}: its header has no {field}, without which it cannot be read")
    return fields[field]
