"""The table of a folder's generated volumes, manifest.csv."""

import csv
from collections.abc import Collection
from pathlib import Path

from files.atomic import atomic_file
from files.paths import open_regular
from pipelines.rejection import rejection_columns

from .finished import finished_volumes
from .provenance import channel_files

MANIFEST = "manifest.csv"
BEGINS = b"file,mask,"  # of a manifest of ours


def check_manifest(output: Path) -> None:
    """Raises: ValueError if a manifest is in the way that generate.py did not write."""
    path = output / MANIFEST
    if path.exists():
        with open_regular(path) as file:
            begins = file.read(len(BEGINS))
        if begins and begins != BEGINS:
            raise ValueError(f"{path}: is not a manifest of generate.py; move it away, or choose another --output")


def write_manifest(output: Path, known: Collection[Path] = ()) -> int:
    """manifest.csv: a row for every finished volume in the folder, from its sidecar, with a column for each class,
    number and condition channel, and `rejection_columns` of checked ones. Files of several channels share one cell,
    with semicolons between. Returns the number of rows.

    Args:
        known: files whose digests need not be computed again.
    """
    columns = ("file", "mask", "mask_sha256", "seed", "num_inference_steps", "scheduler", "dtype", "model", "software")
    rows: list[dict[str, object]] = []
    names: dict[str, None] = {}  # in order
    for path, record in finished_volumes(output, known=known):
        row: dict[str, object] = {
            "file": ";".join(file.name for file in channel_files(path, record.channels)),
            "mask": record.mask and record.mask.get("file"),
            "mask_sha256": record.mask and record.mask.get("sha256"),
            "scheduler": record.scheduler.get("class"),
        }
        row |= {name: getattr(record, name) for name in columns if name not in row}
        images = {channel: image.get("file") for channel, image in (record.images or {}).items()}
        conditions = {**(record.classes or {}), **(record.numbers or {}), **images, **rejection_columns(record)}
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
