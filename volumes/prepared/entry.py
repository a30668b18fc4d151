"""One prepared volume on disk: its voxels as a safetensors file, and what is known of it as JSON beside it.

The image is stored in the units of its files, one tensor (X, Y, Z) per channel, in the smallest type that holds it
exactly, and is scaled when it is read: by the same operations on the same values, so the result has the same bits as
if it had been kept in memory. Scans of integers take two bytes a voxel or one, resampled ones four.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from volumes.data.alignment import MASK
from volumes.data.cases import Case
from volumes.data.config import DataConfig
from volumes.labels import merge_channels
from volumes.map_checks import measure_map
from volumes.volume import Volume

from .case import CaseFacts, MaskFacts, PreparedCase, UnscaledCase, scale_image
from .codec import from_plain, to_plain

Arrays = Mapping[str, np.ndarray]
Box = tuple[slice, slice, slice]
INTEGERS = (np.uint8, np.int8, np.uint16, np.int16)
KEY, CHECKSUM = "key", "crc32"  # in the header
DIGEST, FACTS = "sha256", "facts"  # in the JSON file, beside the key
OF_CASE = ("classes", "numbers")  # facts of the table, which are not stored
MAX_FACTS = 1 << 24  # bytes of a JSON file


class DamagedEntry(ValueError):
    """A file that does not hold what was written under its name."""


@dataclass(frozen=True, eq=False)
class Part:
    """A box of a prepared case: image (C, X, Y, Z) in [-1, 1], mask int16 (X, Y, Z), seen bool (X, Y, Z)."""

    image: np.ndarray
    mask: np.ndarray | None
    seen: np.ndarray | None


def smallest(values: np.ndarray) -> np.ndarray:
    """Convert values in the smallest type that holds each exactly: an integer of 8 or 16 bits, float16, or theirs."""
    low, high = values.min(), values.max()
    for kind in INTEGERS:
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            small = values.astype(kind)
            if np.array_equal(small, values):
                return small
            break  # they are not integers
    if values.dtype == np.float32 and np.abs([low, high]).max() <= np.finfo(np.float16).max:
        small = values.astype(np.float16)
        if np.array_equal(small.astype(np.float32), values):
            return small
    return values


def pack(case: UnscaledCase) -> dict[str, np.ndarray]:
    """Return the arrays of a case as they are stored."""
    arrays = {f"image.{index}": smallest(channel) for index, channel in enumerate(case.image.array)}
    if case.mask is not None:
        arrays["mask"] = smallest(case.mask.array[0])
    if case.seen is not None:
        arrays["seen"] = case.seen
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def facts_of(case: UnscaledCase, arrays: Arrays, config: DataConfig, num_labels: int) -> CaseFacts:
    """Measure what is known of a case without its voxels."""
    image = scale_image(case.image.array, case.scales, case.seen)
    digest, mask, measured = zlib.crc32(np.ascontiguousarray(image).data), None, None
    if case.mask is not None:
        digest = zlib.crc32(np.ascontiguousarray(case.mask.array).data, digest)
        inside = case.mask.array[case.mask.array >= 0]  # neither PADDING nor UNKNOWN
        counts = np.bincount(inside, minlength=num_labels)
        mask = MaskFacts(affine=case.mask.affine, source=case.mask.source, counts=tuple(counts.tolist()))
    if names := config.image_labels:
        labels = merge_channels(image, sorted(names))[0]
        measured = measure_map(labels, float(np.prod(case.image.spacing)), names)
    return CaseFacts(
        **case.details(),  # pyright: ignore[reportArgumentType]
        shape=case.image.shape,
        affine=case.image.affine,
        source=case.image.source,
        mask=mask,
        seen=case.seen is not None,
        map=measured,
        digest=digest,
        checksum=checksum(arrays),
        nbytes=sum(array.nbytes for array in arrays.values()),
    )


def checksum(arrays: Arrays) -> int:
    """Compute the CRC-32 over names, types, shapes and bytes of arrays."""
    result = 0
    for name, array in sorted(arrays.items()):
        result = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), result)
        result = zlib.crc32(array.data, result)
    return result


def unpack(facts: CaseFacts, read: Callable[[str], np.ndarray]) -> Part:
    """Make a part of a case from what `read` returns of each stored array."""
    seen = read("seen") if facts.seen else None
    stored = [read(f"image.{index}").astype(np.float32) for index in range(len(facts.scales))]
    mask = read("mask").astype(np.int16) if facts.mask is not None else None
    return Part(scale_image(np.stack(stored), facts.scales, seen), mask, seen)


def whole_case(facts: CaseFacts, part: Part) -> PreparedCase:
    """Join facts and voxels to the case that `prepare` made."""
    mask = None
    if facts.mask is not None and part.mask is not None:
        mask = Volume(part.mask[None], facts.mask.affine, facts.mask.source)
    image = Volume(part.image, facts.affine, facts.source)
    return PreparedCase(**facts.details(), image=image, mask=mask, seen=part.seen)  # pyright: ignore[reportArgumentType]


def write_arrays(path: Path, key: str, facts: CaseFacts, arrays: Arrays) -> None:
    """Write the voxels; only this user may read them. Raises: OSError, of a full disk too."""
    path.touch(0o600)
    try:
        save_file(dict(arrays), path, metadata={KEY: key, CHECKSUM: str(facts.checksum)})
    except SafetensorError as error:  # its own exception for a full disk
        raise OSError(str(error)) from error
    path.chmod(0o600)


def read_part(path: Path, key: str, facts: CaseFacts, box: Box | None = None, *, check: bool = False) -> Part:
    """Read a box of a case, or all of it. Only the pages of the box are read.

    Args:
        check: whether to compare the checksum of the voxels, for which all of them are read.
    Raises: FileNotFoundError if there is no file; DamagedEntry if it is not the one that was written.
    """
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            if header.get(KEY) != key or header.get(CHECKSUM) != str(facts.checksum):
                raise DamagedEntry("it is another volume")
            if check and checksum({name: file.get_tensor(name) for name in file.keys()}) != facts.checksum:  # noqa: SIM118
                raise DamagedEntry("its voxels have changed")

            def read(name: str) -> np.ndarray:
                stored = file.get_slice(name)
                if tuple(stored.get_shape()) != facts.shape:
                    raise DamagedEntry(f"{name} is {stored.get_shape()}")
                return np.asarray(stored[:] if box is None else stored[box])

            return unpack(facts, read)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        if isinstance(error, DamagedEntry):
            raise
        raise DamagedEntry(f"it cannot be read: {error}") from error


def facts_text(facts: CaseFacts, key: str, case: Case) -> str:
    """Return the facts as JSON, with channels in the place of paths, and without the cells of the table."""
    names = {file: name for name, file in _files(case).items()}
    kept = replace(facts, oddities=tuple((names.get(file, file), oddity) for file, oddity in facts.oddities))
    plain = to_plain(kept)
    assert isinstance(plain, dict)
    stored = {name: value for name, value in plain.items() if name not in OF_CASE}
    return json.dumps({KEY: key, DIGEST: _digest(stored), FACTS: stored})


def facts_from(text: str, key: str, case: Case) -> CaseFacts:
    """Read what `facts_text` wrote, for a case whose files have the same content. Raises: ValueError."""
    plain = json.loads(text)
    if not isinstance(plain, dict) or plain.get(KEY) != key or not isinstance(plain.get(FACTS), dict):
        raise ValueError("it is of another volume")
    if plain.get(DIGEST) != _digest(plain[FACTS]):
        raise ValueError("its content has changed")
    facts = from_plain(CaseFacts, {**plain[FACTS], **{name: [] for name in OF_CASE}})
    files = _files(case)
    return replace(facts, oddities=tuple((files.get(name, name), oddity) for name, oddity in facts.oddities))


def _digest(stored: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(stored).encode()).hexdigest()


def _files(case: Case) -> dict[str, str]:
    """Return the names of a case's files in messages, by channel; that of the mask under `MASK`."""
    files = {name: str(path) for name, path in case.images.items()}
    return {**files, MASK: str(case.mask)} if case.images else {"": case.name}


assert set(OF_CASE) <= {field.name for field in fields(CaseFacts)}
