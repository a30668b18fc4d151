"""The formats of `--export`: which there are, what is checked before anything is generated, and the export itself."""

from collections.abc import Sequence
from pathlib import Path

from files.remote import refuse_url
from pipelines.inputs.request import VolumeRequest
from pipelines.storage.finished import FinishedVolume
from volumes.description import DataDescription

from . import bids, nnunet
from .folder import check_folder, whole_mask

FORMATS = ("nnunet", "bids")


def check_exports(
    exports: Sequence[tuple[str, Path]],
    output: Path,
    data: DataDescription,
    requests: Sequence[VolumeRequest],
    count: int,
    *,
    partial: bool = False,
) -> None:
    """Check, before anything is generated, that volumes of these requests can be exported.

    Args:
        exports: (format, folder) of each.
        output: the folder of the volumes.
        partial: whether the model takes masks with voxels of an unknown label; all masks are then read.
    Raises: ValueError for unknown formats, folders that hold something else or lie in one another, volumes that the
    format cannot hold, and masks with voxels of an unknown label.
    """
    for number, (kind, folder) in enumerate(exports):
        if kind not in FORMATS:
            raise ValueError(f"--export {kind}: is not a format; give {' or '.join(FORMATS)}, and a folder")
        refuse_url(folder, f"--export {kind}")
        if output.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--export {kind} {folder}: the output {output} lies in it; give another folder")
        _check_place(kind, folder, [other for _, other in exports[:number]])
        if data.image_labels:
            raise ValueError(f"--export {kind}: this pipeline generates label maps; export the volumes of such masks")
        names = [f"{request.name}_{k:03d}" for request in requests for k in range(count)]
        if kind == "nnunet":
            nnunet.check(folder, data, requests)
        else:
            bids.subjects(names)
        check_folder(folder, names, kind)
    for request in requests if exports and partial else ():
        if request.mask is not None:
            whole_mask(request, data)


def _check_place(kind: str, folder: Path, others: Sequence[Path]) -> None:
    """Raises: ValueError for a folder that a file is in the way of, and for one that is, holds or lies in another."""
    place = folder.resolve()
    for parent in (place, *place.parents):
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"--export {kind} {folder}: {parent} is a file, not a folder; give another folder")
    for other in others:
        if place.is_relative_to(other.resolve()) or other.resolve().is_relative_to(place):
            raise ValueError(
                f"--export {kind} {folder}: is, holds or lies in {other}, the folder of another --export; give each a "
                "folder of its own, side by side"
            )


def export(kind: str, folder: Path, volumes: Sequence[FinishedVolume], data: DataDescription) -> None:
    """Write finished volumes as a data set, which appears as a whole: see `nnunet.write` and `bids.write`.

    Raises: ValueError as `check_exports`, and for masks that changed since.
    """
    if not volumes:
        print(f"no volume is finished, so there is nothing to export to {folder}", flush=True)
        return
    check_folder(folder, [volume.name for volume in volumes], kind)
    (nnunet if kind == "nnunet" else bids).write(volumes, data, folder)
    print(f"{len(volumes)} volumes exported to {folder} ({kind})", flush=True)
