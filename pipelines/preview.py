"""preview.png: the first volumes of a run, side by side."""

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cli.command import users_message
from files.atomic import atomic_file
from files.paths import printable
from pipelines.inputs.inpainting import load_region
from pipelines.inputs.masks import model_values
from pipelines.storage.finished import FinishedVolume
from volumes import FigureCase, read_volume
from volumes.description import DataDescription

PREVIEW = "preview.png"
COLUMNS = 6
DPI = 130


def write_preview(volumes: Sequence[FinishedVolume], data: DataDescription, output: Path) -> None:
    """Draw the first volumes of a run as `output`/preview.png, see `volumes.contact_sheet`; nothing without volumes.

    What a user can cause (a full disk, a mask that is gone) ends in a message, not in an error: the volumes are there.
    """
    if not volumes:
        return
    try:
        from volumes.contact_sheet import contact_sheet  # here, for matplotlib takes a second

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each was said when the mask was first read
            figure = contact_sheet(_cases(volumes[:COLUMNS], data), data.image_labels or data.labels)
        with atomic_file(output / PREVIEW) as unfinished:
            figure.savefig(unfinished, dpi=DPI)
    except Exception as error:
        message = users_message(error)
        if message is None:
            raise
        print(printable(f"{output / PREVIEW}: was not drawn: {message}"), flush=True)
        return
    print(f"preview: {output / PREVIEW}", flush=True)


def _cases(volumes: Sequence[FinishedVolume], data: DataDescription) -> Iterator[FigureCase]:
    for volume in volumes:
        yield _case(volume, data)


def _case(volume: FinishedVolume, data: DataDescription) -> FigureCase:
    """The volume with its mask; with the given channels, or the image before an edit."""
    record, request, reading = volume.record, volume.request, data.reading or {}
    generated = [read_volume(path) for path in volume.files]
    first = generated[0]
    conditions = {**(record.classes or {}), **(record.numbers or {})}
    title = "\n".join([volume.name, ", ".join(f"{name} {value}" for name, value in conditions.items())]).strip()
    if data.image_labels:
        return {"title": title, "images": {"labels": first.array[:1]}, "spacing": first.spacing, "labels": True}
    channels = list(record.channels or data.channels)
    case: FigureCase = {"title": title, "images": {}, "channels": channels, "spacing": first.spacing}
    arrays = [one.array[0] for one in generated]
    if request.edit is not None:
        before = [read_volume(_path(request.edit.images[channel]), **reading).array[0] for channel in channels]
        case["images"] = {"before": np.stack(before), "edited": np.stack(arrays)}
        if request.edit.region is not None:
            case["region"] = load_region(request.edit.region, first, reading)
    else:
        given = {channel: read_volume(_path(image), **reading).array[0] for channel, image in request.images.items()}
        case["channels"] = [*channels, *(f"{channel} (given)" for channel in given)]
        case["images"] = {"generated": np.stack([*arrays, *given.values()])}
        scales = dict(zip(data.channels, data.intensity, strict=True))
        case["windows"] = {channel: (scales[channel].low, scales[channel].high) for channel in channels}
    if request.mask is not None:
        affine = np.array(data.affine, dtype=np.float64)
        case["mask"] = model_values(request.mask, data.labels, request.label_map, affine, reading).array
    return case


def _path(image: object) -> str | os.PathLike:
    """The file of an image of a command, whose images are all files."""
    assert isinstance(image, str | os.PathLike), image
    return image
