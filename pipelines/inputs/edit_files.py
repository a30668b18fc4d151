"""Edits from files: one of the command line, or one per row of a table; and lesions in their masks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from files.names import Disk, same_name
from files.paths import check_name
from files.remote import copy_table, is_url, plain_path
from pipelines.base import VolumePipeline
from volumes import Volume, VolumeError, read_mask, read_volume, same_grid, write_volume
from volumes.data.tables import Row, read_table
from volumes.description import DataDescription
from volumes.foreground import image_box, mask_box
from volumes.lesions import ellipsoid, insert_lesion, remove_lesion

from .inpainting import edit_requests
from .masks import LabelMap, index_labels, model_values
from .request import VolumeRequest
from .request_files import check_columns, mask_names, row_files

IMAGE = "image"  # the column, and the argument, of a model of one channel


@dataclass(frozen=True)
class EditRow:
    """One edit: what is edited, and how.

    Attributes:
        images: {channel: file} of every channel that the model generates.
        strength: None where the command's counts.
        region: label map of what is generated; None: everything, to the degree of the strength.
    """

    images: Mapping[str, Path]
    mask: Path | None = None
    region: Path | None = None
    strength: float | None = None
    classes: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    name: str | None = None


@dataclass(frozen=True)
class Lesion:
    """A lesion that is inserted into a mask, or removed from it. Labels are values or names of the model's.

    Attributes:
        label: the lesion's.
        position: voxel (x, y, z) in RAS+ order, counted from 0: the center of a new lesion, or a voxel of the one that
            is removed (None: all of that label).
        diameters: of a new lesion, in mm: one, or one per axis.
        within: labels that a new lesion may replace; none: all.
        replacement: the label that replaces a lesion that is removed; None: a lesion is inserted.
    """

    label: str
    position: tuple[int, int, int] | None = None
    diameters: tuple[float, ...] = ()
    within: Sequence[str] = ()
    replacement: str | None = None


def named_images(words: Sequence[str], channels: Sequence[str]) -> dict[str, Path]:
    """Read the words of `--image`: one file, or CHANNEL=FILE for each channel of the model.

    Raises: ValueError for channels that are unknown, missing or named twice.
    """
    images: dict[str, Path] = {}
    for word in words:
        name, _, file = word.partition("=")
        if name not in channels:
            name, file = (channels[0], word) if len(channels) == len(words) == 1 else (name, "")
        if not file or name in images:
            listing = " ".join(f"{channel}=FILE" for channel in channels)
            raise ValueError(f"--image {word}: give one file per channel of the model: --image {listing}")
        images[name] = Path(plain_path(file))
        if not images[name].exists():
            raise ValueError(f"--image {word}: no such file; check the path")
    if missing := [channel for channel in channels if channel not in images]:
        raise ValueError(f"--image: {', '.join(missing)} is missing; give it as {missing[0]}=FILE")
    return images


def read_edits(source: str | Path, pipe: VolumePipeline, say: Callable[[str], object] = print) -> list[EditRow]:
    """Read the rows of a table of edits, in order. Files are relative to the table's folder.

    Args:
        say: is told in one line which columns are not read.
    Raises: ValueError as `request_files.read_requests`, and for rows without an image or with a strength that is not a
    number.
    """
    disk = Disk()
    table = copy_table(source, read_table) if is_url(source) else disk.find(plain_path(str(source)))
    schema, channels = pipe.unet.condition_schema, list(pipe.data.channels)
    images = [IMAGE] if len(channels) == 1 else channels
    known = [*images, "mask", "region", "strength", "name", *schema.classes, *schema.numbers]
    rows = read_table(table, known)
    check_columns(rows, known, source, say)
    edits = []
    for row in rows:
        files = row_files(row, [*images, "mask", "region"], table.parent, disk, str(source))
        if missing := [column for column in images if column not in files]:
            raise ValueError(f"{source}: {row.place}: has no {missing[0]}; an edit needs the image that is edited")
        cells = {column: value for column, value in row.items() if value != ""}
        edits.append(
            EditRow(
                {channel: files[column] for channel, column in zip(channels, images, strict=True)},
                files.get("mask"),
                files.get("region"),
                _strength(row, str(source)),
                {name: cells[name] for name in schema.classes if name in cells},
                {name: cells[name] for name in schema.numbers if name in cells},
                str(cells["name"]) if "name" in cells else None,
            )
        )
    return edits


def _strength(row: Row, source: str) -> float | None:
    if (cell := row.get("strength", "")) == "":
        return None
    try:
        return float(cell)
    except ValueError as error:
        raise ValueError(f"{source}: {row.place}: strength is {cell!r}, expected a number above 0, up to 1") from error


def named_rows(rows: Sequence[EditRow]) -> list[EditRow]:
    """Give each edit a name for its volumes: its own, or else the stem of its first image; where stems are equal, what
    differs in the paths (`request_files.mask_names`).

    Raises: ValueError for names used twice, or unfit for a file.
    """
    first = [next(iter(row.images.values())) for row in rows]
    named = [replace(row, name=row.name or name) for row, name in zip(rows, mask_names(first), strict=True)]
    places: dict[str, Path] = {}
    for row, image in zip(named, first, strict=True):
        check_name(str(row.name), f"the edit of {str(image)!r}, for its volumes")
        if (other := places.setdefault(same_name(str(row.name)), image)) is not image:
            raise ValueError(
                f"the edits of {other} and {image} would both be called {row.name}; tell them apart in a column `name`"
            )
    return named


def edited_rows(
    rows: Sequence[EditRow], lesion: Lesion, data: DataDescription, label_map: LabelMap
) -> list[tuple[EditRow, Volume, Volume]]:
    """Insert or remove a lesion in the mask of each row. Returns the rows with their new masks and regions.

    Raises: ValueError for rows without a mask, unknown labels, lesions that change nothing, and lesions outside the box
    that the model sees (`data.crop`).
    """
    changed = []
    for row in rows:
        if row.mask is None:
            raise ValueError(f"{row.name}: a lesion is inserted into a mask, or removed from it; give --mask")
        affine = np.array(data.affine, dtype=np.float64)
        mask = model_values(row.mask, data.labels, label_map, affine, data.reading)
        after, region = changed_mask(mask, lesion, data.labels)
        _check_in_box(row, after, mask.array != after.array, data)
        changed.append((row, after, region))
    return changed


def _check_in_box(row: EditRow, mask: Volume, changed: np.ndarray, data: DataDescription) -> None:
    """Raises: ValueError if the model does not see any of the voxels that a lesion changes, bool (1, X, Y, Z), of an
    edit with this mask: the region around them may still reach into the box.
    """
    if data.crop is None:
        return
    if data.crop.channel is None:
        box = mask_box(mask.replace(index_labels(mask.array, data.labels)), sorted(data.labels), data.crop)
    else:
        box = image_box(read_volume(row.images[data.crop.channel], **data.reading), data.crop)
    if box is not None and box.shape == mask.shape and not box.apply(changed, False).any():
        raise ValueError(
            f"{row.name}: the lesion lies outside the box that this model sees of the image (data.crop), so nothing "
            "can be generated there; choose a position within what is not background"
        )


def changed_mask(mask: Volume, lesion: Lesion, labels: Mapping[int, str]) -> tuple[Volume, Volume]:
    """Return the mask with the lesion, or without it, and the region to generate, see `volumes.lesions`."""
    label = label_value(lesion.label, labels)
    if lesion.replacement is not None:
        return remove_lesion(mask, label, label_value(lesion.replacement, labels), position=lesion.position)
    assert lesion.position is not None
    diameters = lesion.diameters[0] if len(lesion.diameters) == 1 else lesion.diameters
    within = [label_value(one, labels) for one in lesion.within] or None
    return insert_lesion(mask, ellipsoid(diameters, mask.spacing), lesion.position, label, within=within)


def label_value(text: str, labels: Mapping[int, str]) -> int:
    """Return the value of a label that is given by value or name. Raises: ValueError if the model does not know it."""
    values = {name: value for value, name in labels.items()} | {str(value): value for value in labels}
    if text not in values:
        listing = ", ".join(f"{value} ({name})" for value, name in labels.items())
        raise ValueError(f"{text!r} is not a label of this model; it knows {listing}")
    return values[text]


def keep_or_write(volume: Volume, path: Path) -> None:
    """Write a mask or a region, unless it is there. Raises: ValueError if another one is."""
    if not path.exists():
        write_volume(volume, path)
        return
    try:
        there = read_mask(path)
        same = same_grid(there, volume) and np.array_equal(there.array, volume.array)
    except VolumeError:  # not a mask
        same = False
    if not same:
        raise ValueError(f"{path}: is another mask or region; choose another --output, or another --name")


def row_request(
    row: EditRow,
    data: DataDescription,
    *,
    steps: int,
    strength: float | None,
    blend_margin: float,
    keep_channels: Sequence[str],
    label_map: LabelMap,
) -> VolumeRequest:
    """Build the request of an edit.

    Args:
        steps: denoising steps, of which the strength is a share.
        strength: where the row has none; None: 1, with a region.
        blend_margin, keep_channels: as in the call of `MedVolumeEditPipeline`.
    Raises: ValueError naming the edit for what cannot be edited.
    """
    chosen = strength if row.strength is None else row.strength
    if chosen is None and row.region is None:
        raise ValueError(f"{row.name}: give --strength (image to image), --region (inpainting), or both")
    try:
        [edit] = edit_requests(
            data,
            [row.images],
            row.region,
            strength=1.0 if chosen is None else chosen,
            blend_margin=blend_margin,
            keep_channels=keep_channels,
            num_inference_steps=steps,
        )
    except ValueError as error:
        raise ValueError(f"{row.name}: {error}") from error
    return VolumeRequest(row.mask, None, row.classes, row.numbers, edit.conditions, label_map, edit, name=str(row.name))
