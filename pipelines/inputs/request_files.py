"""Requests from files: one per mask, or one per row of a table with masks, classes, numbers and images."""

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path

from diffusion import ConditionSchema
from files.names import (
    Disk,
    cell_path,
    glob_names,
    resource_forks,
    same_name,
    windows_hint,
)
from files.paths import check_name
from files.remote import (
    copy_pattern,
    copy_table,
    is_url,
    plain_path,
    with_urls,
)
from pipelines.base import VolumePipeline
from volumes import volume_stem
from volumes.data.tables import Row, read_table
from volumes.formats.dicom import is_series
from volumes.formats.read import SUFFIXES, is_volume

from .request import VolumeRequest

FOLDER_SUFFIXES = tuple(suffix for suffix in SUFFIXES if not suffix.startswith(".img"))  # of a pair, the .hdr


def mask_requests(patterns: Sequence[str], output: Path) -> list[VolumeRequest]:
    """Build one request per mask of `find_masks`."""
    return [VolumeRequest(mask, name=volume_stem(mask)) for mask in find_masks(patterns, output)]


def find_masks(patterns: Sequence[str], output: Path) -> list[Path]:
    """Find mask files in folders, or matching patterns, sorted by stem; for URLs, local copies.

    Raises: ValueError if there are none, if two have the same stem (their volumes would have one name), or if masks lie
    in the output folder (volumes would become masks in the next run).
    """
    found: set[Path] = set()
    disk = Disk()
    for source in patterns:
        pattern = copy_pattern(source) if is_url(source) else plain_path(source)
        spelled = str(disk.find(pattern))
        pattern = spelled if Path(spelled).exists() else pattern
        matches = [pattern] if Path(pattern).is_file() else glob_names(pattern)  # a[1].nii is a file's name
        paths = [path for path in map(Path, matches) if is_volume(path)]
        if Path(pattern).is_dir() and not paths:  # a folder of masks, not of one's slices
            paths = [
                path
                for path in Path(pattern).iterdir()
                if path.name.lower().endswith(FOLDER_SUFFIXES) or is_series(path)
            ]
        found |= {path for path in paths if not path.name.startswith(".")}
    if not found:
        raise ValueError(
            f"no masks found in {' '.join(patterns)}; give a folder with .nii.gz files (or other volumes), or a "
            "quoted glob"
        )
    masks = sorted(found, key=lambda path: (volume_stem(path), str(path)))
    if forks := resource_forks(masks):
        warnings.warn(f"{len(forks)} files of macOS beside the masks are ignored, such as {forks[0]}", stacklevel=2)
    for mask in masks:
        check_name(volume_stem(mask), f"the mask {str(mask)!r}, for its volumes")
    for first, second in itertools.pairwise(sorted(masks, key=lambda path: same_name(volume_stem(path)))):
        if same_name(volume_stem(first)) == same_name(volume_stem(second)):
            both = with_urls(f"{first} and {second}")
            alike = "" if volume_stem(first) == volume_stem(second) else ", apart from upper and lower case"
            raise ValueError(f"{both} have the same stem{alike}, so their volumes would too; rename one")
    refuse_masks_in(output, masks)
    return masks


def refuse_masks_in(output: Path, masks: Sequence[Path]) -> None:
    """Raise ValueError for a mask or an image in the output folder."""
    for mask in masks:
        if mask.parent.resolve() == output.resolve():
            raise ValueError(f"{mask}: lies in --output {output}; write volumes to another folder")


def read_requests(source: str | Path, pipe: VolumePipeline, output: Path) -> list[VolumeRequest]:
    """Read the rows of a table of conditions, in order. For a table at a URL, the files below its folder are copied
    first.

    Raises: ValueError for columns that the model does not know, for names used twice or unfit for a file, for masks and
    images in the output folder, and if some rows have a mask (or, without any, an image) and others do not.
    """
    disk = Disk()
    table = copy_table(source, read_table) if is_url(source) else disk.find(plain_path(str(source)))
    schema, rows = pipe.unet.condition_schema, read_table(table)
    known = ["mask", "name", *schema.classes, *schema.numbers, *(name for name, _ in schema.images)]
    if unknown := sorted({column for row in rows for column in row} - set(known)):
        raise ValueError(f"{source}: unknown columns {unknown}; for this model a table has {', '.join(known)}")
    requests: list[VolumeRequest] = []
    places: dict[str, str] = {}  # of each name
    for number, row in enumerate(rows, start=1):
        request = _row_request(row, f"row_{number:04d}", schema, table.parent, disk, str(source))
        name = same_name(request.name)
        if name in places:
            raise ValueError(
                f"{source}: several rows are called {request.name}: {places[name]} and {row.place}"
                " (upper and lower case count as equal on some disks); tell them apart in a column `name`"
            )
        places[name] = row.place
        requests.append(request)
    masks, files = sum(request.mask is not None for request in requests), sum(bool(one.files) for one in requests)
    if (masks or files) not in (0, len(requests)):
        source_name = "a mask" if masks else "an image"
        raise ValueError(
            f"{source}: {masks or files} of {len(requests)} rows have {source_name}; split it into two tables"
        )
    refuse_masks_in(output, [file for request in requests for file in request.files if isinstance(file, Path)])
    return requests


def _row_request(
    row: Row, unnamed: str, schema: ConditionSchema, folder: Path, disk: Disk, source: str
) -> VolumeRequest:
    """Build the request of one row of a table in `folder`, without empty cells. Raises: ValueError for missing files,
    and for a name that is unfit for a file.
    """
    cells = {column: value for column, value in row.items() if value != ""}
    paths = {}
    for column in ["mask", *(name for name, _ in schema.images)]:
        if column not in cells:
            continue
        cell = str(cells[column])
        paths[column] = cell_path(folder, cell, disk)
        if not paths[column].exists():
            raise ValueError(
                f"{source}: {row.place}: {with_urls(str(paths[column]))}: no such file{windows_hint(cell)}"
            )
    mask = paths.pop("mask", None)
    name = str(cells.get("name", volume_stem(mask) if mask else unnamed))
    check_name(name, f"{source}: {row.place}, for its volumes")
    classes, numbers = (
        {column: cells[column] for column in kind if column in cells} for kind in (schema.classes, schema.numbers)
    )
    return VolumeRequest(mask, classes=classes, numbers=numbers, images=paths, name=name)
