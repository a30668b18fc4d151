"""Requests from files: one per mask, or one per row of a table with masks, classes, numbers and images."""

import difflib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from diffusion import ConditionSchema
from files.names import (
    Disk,
    cell_path,
    glob_names,
    nfc,
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

BOX_IMAGE = "box_image"  # the column of the images that set the boxes, for a model with `data.crop`
NEAR = 0.8  # of 1: likeness of two column names, above which one is probably mistyped (difflib's ratio)
FOLDER_SUFFIXES = tuple(suffix for suffix in SUFFIXES if not suffix.startswith(".img"))  # of a pair, the .hdr


def mask_requests(patterns: Sequence[str], output: Path) -> list[VolumeRequest]:
    """Build one request per mask of `find_masks`, called as `mask_names` says.

    Raises: ValueError as `find_masks`, and for two masks whose volumes would have one name.
    """
    masks = find_masks(patterns, output)
    names = mask_names(masks)
    check_mask_names(masks, names)
    return [VolumeRequest(mask, name=name) for mask, name in zip(masks, names, strict=True)]


def check_mask_names(masks: Sequence[Path], names: Sequence[str]) -> None:
    """Raises: ValueError for a name that is unfit for a file, and for two masks whose volumes would have one name."""
    for mask, name in zip(masks, names, strict=True):
        check_name(name, f"the mask {str(mask)!r}, for its volumes")
    places: dict[str, Path] = {}  # of each name
    for mask, name in zip(masks, names, strict=True):
        if (other := places.setdefault(same_name(name), mask)) is not mask:
            both, stems = with_urls(f"{other} and {mask}"), (volume_stem(other), volume_stem(mask))
            if other.parent != mask.parent:
                raise ValueError(f"{both}: their volumes would both be called {name}; rename one")
            alike = "" if stems[0] == stems[1] else ", apart from upper and lower case"
            raise ValueError(f"{both} have the same stem{alike}, so their volumes would too; rename one")


def mask_names(masks: Sequence[Path]) -> list[str]:
    """Return names for the volumes of masks: their stems, or where stems are equal, the parts of all paths that differ:
    p01/tumour.nii.gz and p02/tumour.nii.gz are p01 and p02."""
    stems = [volume_stem(mask) for mask in masks]
    if len({same_name(stem) for stem in stems}) == len(stems):
        return stems
    paths = [[*map(nfc, mask.absolute().parent.parts), stem] for mask, stem in zip(masks, stems, strict=True)]
    shortest = min(map(len, paths))
    common = next((i for i in range(shortest) if len({path[i] for path in paths}) > 1), shortest)
    paths = [path[common:] for path in paths]
    if len({len(path) for path in paths}) == 1:  # the parts at each depth are of one kind: patients, sessions, stems
        kept = [i for i in range(len(paths[0])) if len({path[i] for path in paths}) > 1]
        paths = [[path[i] for i in kept] for path in paths]
    elif len(set(stems)) == 1:
        paths = [path[:-1] for path in paths]
    return ["_".join(path) or stem for path, stem in zip(paths, stems, strict=True)]


def find_masks(patterns: Sequence[str], output: Path) -> list[Path]:
    """Find mask files in folders, or matching patterns, sorted by stem; for URLs, local copies.

    Raises: ValueError if there are none, or if masks lie in the output folder (volumes would become masks in the next
    run).
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
    refuse_masks_in(output, masks)
    return masks


def refuse_masks_in(output: Path, masks: Sequence[Path]) -> None:
    """Raise ValueError for a mask or an image in the output folder."""
    for mask in masks:
        if mask.parent.resolve() == output.resolve():
            raise ValueError(f"{mask}: lies in --output {output}; write volumes to another folder")


def refuse_inputs_in(output: Path, requests: Sequence[VolumeRequest]) -> None:
    """Raises: ValueError for a file of the requests in the output folder."""
    files = [file for request in requests for file in request.files]
    refuse_masks_in(output, [Path(file) for file in files if isinstance(file, str | os.PathLike)])


def read_requests(
    source: str | Path, pipe: VolumePipeline, output: Path, say: Callable[[str], object] = print
) -> list[VolumeRequest]:
    """Read the rows of a table of conditions, in order. For a table at a URL, the files below its folder are copied
    first.

    Args:
        say: is told in one line which columns the model does not know, and which are not read.
    Raises: ValueError for a table without a column that is read, for columns whose names are nearly those of such, for
    names used twice or unfit for a file, for masks and images in the output folder, and if some rows have a mask (or,
    without any, an image) and others do not.
    """
    disk = Disk()
    table = copy_table(source, read_table) if is_url(source) else disk.find(plain_path(str(source)))
    schema = pipe.unet.condition_schema
    boxes = [BOX_IMAGE] if pipe.data.crop is not None and pipe.data.crop.channel is not None else []
    known = ["mask", *boxes, "name", *schema.classes, *schema.numbers, *(name for name, _ in schema.images)]
    rows = read_table(table, known)
    check_columns(rows, known, source, say)
    requests: list[VolumeRequest] = []
    places: dict[str, str] = {}  # of each name
    for number, row in enumerate(rows, start=1):
        request = _row_request(row, f"row_{number:04d}", schema, boxes, table.parent, disk, str(source))
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
    refuse_inputs_in(output, requests)
    return requests


def check_columns(rows: Sequence[Row], known: Sequence[str], source: str | Path, say: Callable[[str], object]) -> None:
    """Compare the columns of a table with those that are read. Says which are not.

    Raises: ValueError if none is, and for columns whose names are nearly those of such.
    """
    unread = sorted({column for row in rows for column in row} - set(known))
    if rows and not {column for row in rows for column in row} & set(known):
        raise ValueError(f"{source}: unknown columns {unread}; for this model a table has {', '.join(known)}")
    if meant := {column: near for column in unread if (near := _mistyped(column, known))}:
        listing = ", ".join(f"{column!r} (did you mean {near}?)" for column, near in meant.items())
        raise ValueError(f"{source}: unknown columns {listing}; for this model a table has {', '.join(known)}")
    if unread:
        say(f"{source}: columns that this model does not know are not read: {', '.join(unread)}")


def _mistyped(column: str, known: Sequence[str]) -> str | None:
    """The known column that an unknown one is probably meant to be: of nearly the same letters, or of other case."""
    by_key = {same_name(name): name for name in reversed(known)}
    near = difflib.get_close_matches(same_name(column).strip(), by_key, n=1, cutoff=NEAR)
    return by_key[near[0]] if near else None


def row_files(row: Row, columns: Sequence[str], folder: Path, disk: Disk, source: str) -> dict[str, Path]:
    """Return the files that a row of a table in `folder` names in these columns, without empty cells.

    Raises: ValueError for missing files.
    """
    paths = {}
    for column in columns:
        if row.get(column, "") == "":
            continue
        cell = str(row[column])
        paths[column] = cell_path(folder, cell, disk)
        if not paths[column].exists():
            raise ValueError(
                f"{source}: {row.place}: {with_urls(str(paths[column]))}: no such file{windows_hint(cell)}"
            )
    return paths


def _row_request(
    row: Row, unnamed: str, schema: ConditionSchema, boxes: Sequence[str], folder: Path, disk: Disk, source: str
) -> VolumeRequest:
    """Build the request of one row of a table in `folder`, without empty cells. Raises: ValueError for missing files,
    and for a name that is unfit for a file.
    """
    cells = {column: value for column, value in row.items() if value != ""}
    paths = row_files(row, ["mask", *boxes, *(name for name, _ in schema.images)], folder, disk, source)
    mask, box_image = paths.pop("mask", None), paths.pop(BOX_IMAGE, None) if boxes else None
    if box_image is not None and mask is None:
        raise ValueError(
            f"{source}: {row.place}: has a {BOX_IMAGE} without a mask, on whose grid it lies; give the mask"
        )
    name = str(cells.get("name", volume_stem(mask) if mask else unnamed))
    check_name(name, f"{source}: {row.place}, for its volumes")
    classes, numbers = (
        {column: cells[column] for column in kind if column in cells} for kind in (schema.classes, schema.numbers)
    )
    return VolumeRequest(mask, classes=classes, numbers=numbers, images=paths, box_image=box_image, name=name)
