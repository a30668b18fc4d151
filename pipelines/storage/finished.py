"""Which generated volumes are finished: their sidecar is valid, and every file has the bytes that it records.

The record of a sidecar also decides whether it is the volume that is asked for: see `left_to_generate`.
"""

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Protocol, TypeVar

from files.paths import printable
from pipelines.rejection import as_planned
from volumes import VolumeError
from volumes.formats.nifti import SYNTHETIC, open_nifti

from .provenance import FILES, describe_file, sidecar_content, sidecar_path, sidecars, volume_files

logger = logging.getLogger(__name__)
CHECKS = ("copy_check", "map_check", "rejected")  # what a record has of them, if there were any
TYPES: dict[str, Any] = {  # of a record's entries, those that a manifest has
    "software": str,
    "model": str,
    "seed": (int, NoneType),
    "num_inference_steps": int,
    "dtype": str,
    "scheduler": dict,
    **dict.fromkeys(("mask", "classes", "numbers", "images"), (dict, NoneType)),
    "channels": (list, NoneType),
}


class Planned(Protocol):
    """A volume that is asked for: its file, and the record that its sidecar would have."""

    @property
    def path(self) -> Path: ...

    @property
    def record(self) -> dict[str, Any]: ...


Task = TypeVar("Task", bound=Planned)


def record_fault(record: Mapping[str, Any]) -> str | None:
    """Why a record is not one that generate.py writes; None if it is."""
    for name, kinds in TYPES.items():
        if not isinstance(record.get(name), kinds):
            return f"its {name} is {str(record.get(name))[:40]!r}"
    parts = {"scheduler": [record["scheduler"]], "mask": [record["mask"] or {"file": None}]}
    parts["images"] = list((record["images"] or {}).values())
    for name, key in (("scheduler", "class"), ("mask", "file"), ("images", "file")):
        if not all(isinstance(one, dict) and isinstance(one.get(key, 0), str | NoneType) for one in parts[name]):
            return f"its {name} does not say its {key}"
    rejected = record.get("rejected", [])
    if not isinstance(rejected, list) or not all(
        isinstance(one, dict) and {"seed", "check"} <= one.keys() for one in rejected
    ):
        return f"its rejected is {str(rejected)[:40]!r}"
    if not all(isinstance(record.get(name, {}), dict) for name in CHECKS[:2]):
        return "its checks are damaged"
    return None


def file_fault(path: Path, content: Mapping[str, Any], *, known: Collection[Path] = ()) -> str | None:
    """Why the files of the volume at `path` are not those that its sidecar records; None if they are.

    Args:
        content: see `provenance.sidecar_content`.
        known: files whose digests need not be computed again.
    """
    files, recorded = volume_files(path, content), content.get(FILES)
    if not isinstance(recorded, list) or len(recorded) != len(files):
        return f"{path}: its sidecar does not record the digests of its files"
    for file, entry in zip(files, recorded, strict=True):
        entry = entry if isinstance(entry, dict) else {}
        if not os.path.lexists(file):
            return f"{file}: is missing"
        try:
            size = file.stat().st_size
            if size != entry.get("bytes"):
                return f"{file}: has {size} bytes, its sidecar says {str(entry.get('bytes'))[:20]}"
            if file not in known and describe_file(file)["sha256"] != entry.get("sha256"):
                return f"{file}: is damaged, its bytes are not those that its sidecar records"
        except (OSError, ValueError) as error:
            return f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})"
    return None


def left_to_generate(tasks: Sequence[Task]) -> list[Task]:
    """The tasks whose volumes are not finished. Says of each that was there in part, or damaged, which it is and why.

    Raises: ValueError naming the volumes that other settings or another model made, those without a sidecar that are not of this
    package, and sidecars that are damaged or somebody else's: what is not known to be worthless is not replaced.
    """
    todo, refused = [], []
    for task in tasks:
        try:
            fault = _fault(task)
        except ValueError as error:
            refused.append(str(error))
            continue
        if fault is not None:
            todo.append(task)
            if fault:
                print(printable(f"{fault}; the volume is generated again"), flush=True)
    if refused:
        raise ValueError("choose another --output, or remove these first:\n" + "\n".join(refused))
    return todo


def _fault(task: Planned) -> str | None:
    """None if the task's volume is finished, "" if nothing is there of it. Raises: ValueError for what must not be replaced."""
    content = sidecar_content(task.path)
    files = dict.fromkeys([*volume_files(task.path, task.record), *volume_files(task.path, content or {})])
    there = [file for file in files if os.path.lexists(file)]
    for file in there:
        if file.exists() and not file.is_file():
            raise ValueError(f"{file}: is not a regular file")
    if content is None:
        if foreign := [file for file in there if not _is_ours(file)]:
            raise ValueError(f"{foreign[0]}: has no sidecar, so it was not generated by this script")
        return f"{there[0]}: has no sidecar" if there else ""
    record = {key: value for key, value in content.items() if key != FILES}
    if there:
        try:
            made = as_planned(record, task.record)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{sidecar_path(task.path)}: is damaged ({error!r})") from error
        keys = {*task.record, *CHECKS, "callback"} - {"software"}
        if different := sorted(key for key in keys if made.get(key) != task.record.get(key)):
            raise ValueError(f"{task.path}: was made with another {', another '.join(different)}")
    return file_fault(task.path, content)


def _is_ours(file: Path) -> bool:
    """Whether a file holds nothing, or its header says that this package generated it."""
    if not file.exists() or not file.stat().st_size:
        return True
    try:
        _, image = open_nifti(file, check=False)
    except VolumeError:
        return False
    return bytes(image.header["descrip"].item()).startswith(SYNTHETIC)


def finished_volumes(folder: Path, *, known: Collection[Path] = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(path, record) of each finished volume (.nii.gz) in a folder, by name. Logs a warning of those that are not finished.

    A sidecar without digests counts if its volume's files are there: it is from before there were any.

    Args:
        known: files whose digests need not be computed again.
    """
    for sidecar in sidecars(folder):
        path = sidecar.with_suffix(".nii.gz")
        try:
            content = sidecar_content(path)
            fault = None if content is None else record_fault(content)
        except ValueError as error:
            content, fault = {}, str(error)
        files = [path] if content is None else volume_files(path, content)
        if content is None or not any(map(os.path.lexists, files)):
            continue  # somebody else's JSON, or of a volume that is gone
        if fault is None and FILES in content:
            fault = file_fault(path, content, known=known)
        elif fault is None and (gone := [file for file in files if not file.is_file()]):
            fault = f"{gone[0]}: is missing"
        if fault is not None:
            logger.warning("%s: left out: %s", printable(str(path)), printable(fault))
            continue
        yield path, {key: value for key, value in content.items() if key != FILES}
