"""What users take home: a pair of mask and volume with its record, the collection, and the collection for nnU-Net."""

import json
import shutil
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from pipelines.export import nnunet
from pipelines.storage.finished import FinishedVolume
from pipelines.storage.provenance import FILES, channel_files, sidecar_content, sidecar_path
from volumes import volume_parts
from volumes.description import DataDescription

from .again import TABLE, as_command, as_python, sources, table_of
from .session import StudioResult

DATASET = "Dataset501_Studio"


def write_pairs(results: Sequence[StudioResult], archive: Path) -> None:
    """Write a zip with each result's volume and record, what it was generated from, and how to make it again.

    One result lies at the root; each of several has a folder of its own, named by its number.
    """
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for result in results:
            stem = sidecar_path(result.path).stem
            place = "" if len(results) == 1 else f"{result.number:03d}_{stem}/"
            for file in [*result.files, sidecar_path(result.path)]:
                packed.write(file, f"{place}{file.name}", _kind(file))
            for source in sources(result.request):
                for file in volume_parts(source):
                    inner = f"{source.name}/{file.name}" if source.is_dir() else file.name
                    packed.write(file, f"{place}{inner}", _kind(file))
            packed.writestr(f"{place}again.py", as_python(result.model, result.request, result.record, stem))
            command = as_command(result.model, result.request, result.record, result.seed)
            packed.writestr(f"{place}again.sh", f"{command}\n")
            if table := table_of(result.request):
                packed.writestr(f"{place}{TABLE}", table)


def write_nnunet(results: Sequence[StudioResult], data: DataDescription, work: Path, archive: Path) -> None:
    """Write a zip with a data set for nnU-Net of the results.

    Args:
        work: an empty folder for files on the way.
    Raises: ValueError for results without a mask, and for masks of which not every voxel is known.
    """
    volumes = [renamed(result, number, work / "volumes") for number, result in enumerate(results, start=1)]
    folder = work / DATASET
    nnunet.check(folder, data, [volume.request for volume in volumes])
    nnunet.write(volumes, data, folder)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            packed.write(file, file.relative_to(work).as_posix(), _kind(file))


def renamed(result: StudioResult, number: int, folder: Path) -> FinishedVolume:
    """Copy a result under a name of its own.

    Two volumes of one mask have one name, as each is the first of its command.
    """
    folder.mkdir(exist_ok=True)
    name = f"{result.request.name}_{number:03d}"
    path = folder / f"{name}.nii.gz"
    files = channel_files(path, result.record.channels)
    for source, target in zip(result.files, files, strict=True):
        shutil.copyfile(source, target)
    content = dict(sidecar_content(result.path) or {})
    content[FILES] = [{**entry, "file": file.name} for entry, file in zip(content[FILES], files, strict=True)]
    sidecar_path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return FinishedVolume(path, result.record, replace(result.request, name=name))


def _kind(file: Path) -> int:
    """How a file is packed: what is compressed already is stored."""
    return zipfile.ZIP_STORED if file.suffix == ".gz" else zipfile.ZIP_DEFLATED


def accepted(results: Iterable[StudioResult]) -> list[StudioResult]:
    """Return the results in the collection. Raises: ValueError if it is empty."""
    found = [result for result in results if result.accepted]
    if not found:
        raise ValueError("the collection is empty; accept a volume first")
    return found
