"""The table of a folder's generated volumes, manifest.csv."""

import csv
from collections.abc import Collection
from pathlib import Path
from typing import Any

from files.atomic import atomic_file
from files.paths import open_regular
from pipelines.rejection import rejection_columns

from .finished import finished_volumes
from .provenance import volume_files

MANIFEST = "manifest.csv"
BEGINS = b"file,mask,"  # by which one of ours is told from others


def check_manifest(output: Path) -> None:
    """Raises: ValueError if a manifest is in the way that generate.py did not write."""
    path = output / MANIFEST
    if path.exists():
        with open_regular(path) as file:
            begins = file.read(len(BEGINS))
        if begins and begins != BEGINS:
            raise ValueError(f"{path}: is not a manifest of generate.py; move it away, or choose another --output")


def write_manifest(output: Path, known: Collection[Path] = ()) -> int:
    """manifest.csv: a row for every finished volume in the folder, from its sidecar, with a column for each class, number
    and given image, and of checked ones `rejection_columns`. Files of several channels stand in one cell, with semicolons
    between. Returns the number of rows.

    Args:
        known: files whose digests need not be computed again.
    """
    columns = ("file", "mask", "mask_sha256", "seed", "num_inference_steps", "scheduler", "dtype", "model", "software")
    rows: list[dict[str, Any]] = []
    names: dict[str, None] = {}  # in order
    for path, record in finished_volumes(output, known=known):
        mask, scheduler = record["mask"] or {}, record["scheduler"].get("class")
        flat = {"mask": mask.get("file"), "mask_sha256": mask.get("sha256"), "scheduler": scheduler}
        flat["file"] = ";".join(file.name for file in volume_files(path, record))
        images = {name: image.get("file") for name, image in (record["images"] or {}).items()}
        given = {**(record["classes"] or {}), **(record["numbers"] or {}), **images, **rejection_columns(record)}
        names |= dict.fromkeys(given)
        rows.append(given | {column: flat.get(column, record.get(column)) for column in columns})
    settings: dict[str, Any] = {
        "newline": "",
        "encoding": "utf-8",
        "errors": "backslashreplace",
    }  # sidecars may be anybody's
    with atomic_file(output / MANIFEST) as unfinished, open(unfinished, "w", **settings) as file:
        writer = csv.DictWriter(file, [*columns, *(name for name in names if name not in columns)])
        writer.writeheader()
        writer.writerows(rows)
    return len(rows)
