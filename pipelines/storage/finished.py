"""Which generated volumes are finished (their sidecar is valid, and every file has the bytes that it records), and
manifest.csv, the table of those in a folder.

The record of a sidecar also decides whether a finished volume is the planned one: see `left_to_generate`.
"""

import csv
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cli.live_bar import LiveBar
from files.atomic import atomic_file
from files.paths import open_regular, printable
from pipelines.inputs.request import VolumeRequest
from pipelines.rejection import rejection_columns
from volumes import VolumeError
from volumes.formats.nifti import SYNTHETIC, open_nifti

from .provenance import FILES, channel_files, describe_file, sidecar_content, sidecar_path, sidecars, volume_files
from .record import GenerationRecord

logger = logging.getLogger(__name__)

MANIFEST = "manifest.csv"
BEGINS = b"file,mask,"  # of a manifest of ours
READERS = 4  # threads
AT_ONCE = 1024  # volumes that wait for a thread


class Planned(Protocol):
    """A volume to generate: its file, and the record that its sidecar will have."""

    @property
    def path(self) -> Path: ...

    @property
    def record(self) -> GenerationRecord: ...


Task = TypeVar("Task", bound=Planned)
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class FinishedVolume:
    """A finished volume of a command: its file, its record, and what it was generated from."""

    path: Path
    record: GenerationRecord
    request: VolumeRequest

    @property
    def name(self) -> str:
        """The name that its files have in common: case_000."""
        return sidecar_path(self.path).stem

    @property
    def files(self) -> list[Path]:
        """The files that hold the volume."""
        return channel_files(self.path, self.record.channels)


def file_fault(path: Path, content: Mapping[str, Any], *, known: Collection[Path] = ()) -> str | None:
    """Explain why the files of the volume at `path` are not those that its sidecar records; None if they are.

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
    """Return the tasks whose volumes are not finished. Prints which volumes were incomplete or damaged, and why.

    Raises: ValueError naming the volumes of other settings or another model, volumes without a sidecar that this
    package did not write, and sidecars that are damaged or from other software. Only files that are known to be
    worthless are replaced.
    """
    todo, refused = [], []
    for task, (fault, refusal) in zip(tasks, in_threads(_checked, tasks, "checking finished volumes"), strict=True):
        if refusal is not None:
            refused.append(refusal)
        elif fault is not None:
            todo.append(task)
            if fault:
                print(printable(f"{fault}; the volume is generated again"), flush=True)
    if refused:
        raise ValueError("choose another --output, or remove these first:\n" + "\n".join(refused))
    return todo


def in_threads(work: Callable[[Item], Result], items: Sequence[Item], title: str) -> Iterator[Result]:
    """Do the work on each item in threads, and give the results in order, with a progress bar after two seconds.

    Reading and hashing run outside the interpreter's lock, and network drives answer several requests at a time.
    """
    with (
        ThreadPoolExecutor(READERS) as readers,
        LiveBar(total=len(items), unit="volume", desc=title, delay=2, leave=False, disable=None) as bar,
    ):
        for start in range(0, len(items), AT_ONCE):
            for result in readers.map(work, items[start : start + AT_ONCE]):
                yield result
                bar.update()


def _checked(task: Planned) -> tuple[str | None, str | None]:
    """Return the task's `_fault`, and None or why its files must not be replaced."""
    try:
        return _fault(task), None
    except ValueError as error:
        return None, str(error)


def _fault(task: Planned) -> str | None:
    """Return None if the task's volume is finished, "" if nothing of it exists, else the fault. Raises: ValueError for
    files that must not be replaced.
    """
    content = sidecar_content(task.path)
    files = dict.fromkeys([*channel_files(task.path, task.record.channels), *volume_files(task.path, content or {})])
    there = [file for file in files if os.path.lexists(file)]
    for file in there:
        if file.exists() and not file.is_file():
            raise ValueError(f"{file}: is not a regular file")
    if content is None:
        if foreign := [file for file in there if not _is_ours(file)]:
            raise ValueError(f"{foreign[0]}: has no sidecar, so it was not generated by this script")
        return f"{there[0]}: has no sidecar" if there else ""
    if there:
        try:
            record = GenerationRecord.from_json(content)
        except ValueError as error:
            raise ValueError(f"{sidecar_path(task.path)}: is damaged ({error})") from error
        if different := record.differences(task.record):
            raise ValueError(f"{task.path}: was generated with another {', another '.join(different)}")
    return file_fault(task.path, content)


def _is_ours(file: Path) -> bool:
    """Return whether a file is empty, or its header says that this package generated it."""
    if not file.exists() or not file.stat().st_size:
        return True
    try:
        _, image = open_nifti(file, check=False)
    except VolumeError:
        return False
    return bytes(image.header["descrip"].item()).startswith(SYNTHETIC)


def finished_volumes(folder: Path, *, known: Collection[Path] = ()) -> Iterator[tuple[Path, GenerationRecord]]:
    """Return (path, record) of each finished volume (.nii.gz) in a folder, by name. Logs a warning for those that are
    not finished.

    Args:
        known: files whose digests need not be computed again.
    """
    listed = sidecars(folder)
    read = partial(_finished, known=known)
    for sidecar, (record, fault) in zip(listed, in_threads(read, listed, "listing volumes"), strict=True):
        path = sidecar.with_suffix(".nii.gz")
        if fault is not None:
            logger.warning("%s: skipped: %s", printable(str(path)), printable(fault))
        elif record is not None:
            yield path, record


def _finished(sidecar: Path, known: Collection[Path]) -> tuple[GenerationRecord | None, str | None]:
    """Return the record of a finished volume, and None or why it is not finished; neither for JSON of somebody else,
    and of a volume that is gone.
    """
    path = sidecar.with_suffix(".nii.gz")
    content: Mapping[str, Any] | None = {}
    record = fault = None
    try:
        content = sidecar_content(path)
        record = None if content is None else GenerationRecord.from_json(content)
    except ValueError as error:
        fault = str(error)
    files = volume_files(path, content or {})
    if content is None or not any(map(os.path.lexists, files)):
        return None, None
    if record is not None:
        fault = file_fault(path, content, known=known)
    if record is None:
        return None, fault or "its sidecar is damaged"
    return record, fault


def check_manifest(output: Path) -> None:
    """Raises: ValueError if a manifest is in the way that generate.py did not write."""
    path = output / MANIFEST
    if path.exists():
        with open_regular(path) as file:
            begins = file.read(len(BEGINS))
        if begins and begins != BEGINS:
            raise ValueError(f"{path}: is not a manifest of generate.py; move it away, or choose another --output")


def edit_columns(record: GenerationRecord) -> dict[str, object]:
    """The manifest's columns of an edited volume: the files of its image, with semicolons between, and of its region,
    and the strength; none of others."""
    if record.edit is None:
        return {}
    image = ";".join(str(source["file"]) for source in record.edit["image"].values())
    region = record.edit["region"]["file"] if "region" in record.edit else None
    return {"edited_image": image, "region": region, "strength": record.edit["strength"]}


def guidance_columns(record: GenerationRecord) -> dict[str, object]:
    """The columns of guidance, where a volume has it: its interval ("0.2 0.8"), autoguidance with the hash of its
    weaker U-Net, and the labels that volumes are guided away from ("lesion=organ", with semicolons between) with their
    scale."""
    columns: dict[str, object] = {}
    if record.guidance_interval is not None:
        columns["guidance_interval"] = " ".join(f"{end:g}" for end in record.guidance_interval)
    if record.autoguidance_scale is not None:
        columns |= {"autoguidance_scale": record.autoguidance_scale, "unet_weak": record.unet_weak}
    if record.guidance_without is not None:
        labels = record.guidance_without["labels"].items()
        columns["guidance_without"] = ";".join(f"{label}={other}" for label, other in labels)
        columns["without_scale"] = record.guidance_without["scale"]
    return columns


def write_manifest(
    output: Path,
    known: Collection[Path] = (),
    finished: Sequence[tuple[Path, GenerationRecord]] | None = None,
) -> int:
    """manifest.csv: a row for every finished volume in the folder, from its sidecar, with a column for each class,
    number and condition channel, and `rejection_columns` of checked ones, `edit_columns` and
    `guidance_columns`. Files of several channels share one cell,
    with semicolons between. Returns the number of rows.

    Args:
        known: files whose digests need not be computed again.
        finished: the finished volumes; None: those that `finished_volumes` finds.
    """
    columns = ("file", "mask", "mask_sha256", "seed", "num_inference_steps", "scheduler", "dtype", "model", "software")
    rows: list[dict[str, object]] = []
    names: dict[str, None] = {}  # in order
    for path, record in finished_volumes(output, known=known) if finished is None else finished:
        row: dict[str, object] = {
            "file": ";".join(file.name for file in channel_files(path, record.channels)),
            "mask": record.mask and record.mask.get("file"),
            "mask_sha256": record.mask and record.mask.get("sha256"),
            "scheduler": record.scheduler.get("class"),
        }
        row |= {name: getattr(record, name) for name in columns if name not in row}
        images = {channel: image.get("file") for channel, image in (record.images or {}).items()}
        conditions = {**(record.classes or {}), **(record.numbers or {}), **images, **rejection_columns(record)}
        conditions |= edit_columns(record) | guidance_columns(record)
        names |= dict.fromkeys(conditions)
        rows.append(conditions | row)
    with (
        atomic_file(output / MANIFEST) as unfinished,
        # sidecars may be anybody's
        open(unfinished, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, [*columns, *(name for name in names if name not in columns)])
        writer.writeheader()
        writer.writerows(rows)
    return len(rows)
