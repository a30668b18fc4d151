"""Requests from a data set: one per case of a split, of its mask, classes, numbers and condition channels."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from files.atomic import refuse_link
from files.names import same_name
from pipelines.base import VolumePipeline
from pipelines.storage.trained_on import MASKS
from volumes import Case, DataConfig, Volume, load_cases, read_mask, read_volume, same_grid, write_volume
from volumes.data.case_files import known_labels, one_grid, read_case
from volumes.formats.read import segmentation_file

from .masks import DrawnMask, LabelMap, TimePoint
from .request import VolumeRequest
from .request_files import refuse_inputs_in


def case_requests(
    data: DataConfig, splits: Sequence[str], pipe: VolumePipeline, output: Path, label_map: LabelMap | None = None
) -> list[VolumeRequest]:
    """Build one request per case of these splits, in the order of their names, which are those of the cases. Masks are
    read with the data's `label_map`; those of DICOM-SEG and RTSTRUCT on the grid of the case's image. Where training
    resampled a case (`data.resample_to`), its mask is written to OUTPUT/masks as training reads it, and that file is
    the request's. Where training cut its cases to the foreground of an image (`data.crop`), that image of the case sets
    the box.

    Args:
        label_map: of the command, which comes after the data's, see `check_label_names`.
    Raises: ValueError as `load_cases` and `check_label_names`; for splits without a case, a pipeline that was trained
    on other conditions than the data has, cases without a mask that the model needs, masks that training both resampled
    and cut, condition channels in 4-D files, and files in the output folder. VolumeError: as `one_grid`.
    """
    cases = load_cases(data)
    chosen = [case for case in cases if case.split in splits]
    if not chosen:
        found = ", ".join(sorted({case.split for case in cases})) or "nothing"
        raise ValueError(f"--split {' '.join(splits)}: the data has no such case; it has {found}")
    _check_conditions(data, pipe)
    check_label_names(data, pipe, label_map or {})
    requests = [_case_request(case, data, pipe, output / MASKS) for case in chosen]
    names: dict[str, str] = {}
    for case in chosen:
        if (other := names.setdefault(same_name(case.name), case.name)) != case.name:
            raise ValueError(f"the cases {other} and {case.name} are one name on some disks; rename one")
    refuse_inputs_in(output, requests)
    return requests


def check_label_names(data: DataConfig, pipe: VolumePipeline, label_map: LabelMap) -> None:
    """Raises: ValueError if a label of the data has another name in the pipeline, unless `label_map` translates each
    value of the files that is read as this label."""
    wrong, remedies = [], []
    values = {name: value for value, name in pipe.data.labels.items()}
    for value, name in sorted(data.label_names.items()):
        own = [] if value in data.label_map else [value]
        stored = [key for key, target in data.label_map.items() if target == value] + own
        left = [key for key in stored if key not in label_map]
        if left and pipe.data.labels.get(value, name) != name:
            wrong.append(f"{value} is {name} in the config and {pipe.data.labels[value]} in the pipeline")
            remedies += [f"{key}={values[name]}" for key in left if name in values]
            remedies += [f"{key}={value}" for key in left if name not in values]
    if wrong:
        words = " ".join(map(shlex.quote, remedies))
        raise ValueError(
            f"the labels differ: {'; '.join(wrong)}; take the pipeline that was trained with this config, or, if "
            f"these translations are right, add --label_map {words}"
        )


def _case_request(case: Case, data: DataConfig, pipe: VolumePipeline, masks: Path) -> VolumeRequest:
    schema = pipe.denoiser.condition_schema
    if case.phantom is not None:
        raise ValueError(f"{case.name}: is a phantom, which has no files to generate from; use --masks or --conditions")
    if schema.mask and case.mask is None and not schema.dropout.get("mask"):
        raise ValueError(f"{case.name}: has no mask in a file to generate from; set data.masks in the config")
    own = case.mask if schema.mask else None
    resampled = None if own is None else _write_resampled(case, data, masks)
    cells = {name: case.metadata[name] for name in case.metadata if case.metadata[name] not in ("", None)}
    return VolumeRequest(
        resampled or (None if own is None else _mask(case, own, data)),
        classes={name: cells[name] for name in schema.classes if name in cells},
        numbers={name: cells[name] for name in schema.numbers if name in cells},
        images={name: _image(case, name, data) for name, _ in schema.images},
        label_map=data.label_map if resampled is None else None,
        box_image=_box_image(case, data, pipe),
        name=case.name,
    )


def _mask(case: Case, path: Path, data: DataConfig) -> Path | DrawnMask:
    """The mask of a case, with the image that training reads it with, if it is drawn on one."""
    channel = data.resample_to or next(iter(data.patterns))
    image, time_point = case.images[channel], data.volume_number(channel)
    return path if segmentation_file(path) is None else DrawnMask(path, image, time_point)


def _write_resampled(case: Case, data: DataConfig, folder: Path) -> Path | None:
    """Write the mask of a case as training reads it, in the box that all its volumes show, unless it is written.

    Returns: the file; None where training resampled nothing.
    Raises: ValueError if training cut the case, too.
    """
    if data.resample_to is None:
        return None
    aligned = one_grid(case, read_case(case, data), data)
    if not aligned.resampled:
        return None
    if data.crop is not None:
        raise ValueError(
            f"{case.mask}: the training resampled its case onto the grid of {data.resample_to} (data.resample_to) and "
            "cut it (data.crop), which --split cannot do; resample the masks onto that grid, and give them with "
            "--masks (or, with classes, numbers or images, with --conditions)"
        )
    assert aligned.mask is not None
    values, indices = np.array(sorted(known_labels(data)), np.int16), aligned.mask.array
    labels = np.where(indices < 0, indices, values[np.maximum(indices, 0)]).astype(np.int16)
    mask = Volume(labels, aligned.mask.affine)  # without its source, whose grid is another
    file = folder / f"{case.name}.nii.gz"
    if not (file.is_file() and _is_equal(read_mask(file), mask)):
        refuse_link(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_volume(mask, file, description="a mask as the training read it")
    return file


def _is_equal(written: Volume, mask: Volume) -> bool:
    return same_grid(written, mask) and np.array_equal(written.array, mask.array)


def _image(case: Case, channel: str, data: DataConfig) -> Path:
    """The file of a condition channel. Raises: ValueError if it holds several volumes, of which `time_point` takes
    one."""
    path, number = case.images[channel], data.volume_number(channel)
    if number is not None and (count := len(read_volume(path, **data.reading).array)) > 1:
        raise ValueError(
            f"{path}: holds {count} volumes, of which data.time_point takes number {number} for channel {channel!r}; "
            "--split reads 3-D files: save that volume as a file of its own, name it in data.images, and remove the "
            "channel from data.time_point"
        )
    return path


def _box_image(case: Case, data: DataConfig, pipe: VolumePipeline) -> Path | TimePoint | None:
    """The file whose foreground sets the box; None where the pipeline's training cut nothing, or by the mask.

    Raises: ValueError if the data has no such channel.
    """
    crop = pipe.data.crop
    if crop is None or crop.channel is None:
        return None
    channel = next(iter(case.images)) if len(case.images) == len(pipe.data.channels) == 1 else crop.channel
    if channel not in case.images:
        raise ValueError(
            f"{case.name}: the pipeline finds its box in the image {channel!r} (data.crop), which the config lacks; "
            "take the pipeline that was trained with this config"
        )
    number = data.volume_number(channel)
    return case.images[channel] if number is None else TimePoint(case.images[channel], number)


def _check_conditions(data: DataConfig, pipe: VolumePipeline) -> None:
    """Raises: ValueError if the data has conditions that the model does not know, or lacks a channel that it is
    given."""
    schema = pipe.denoiser.condition_schema
    unknown = sorted({*data.classes, *data.numbers} - {*schema.classes, *schema.numbers})
    missing = [name for name, _ in schema.images if name not in data.channels]
    remedy = "take the pipeline that was trained with this config"
    if unknown:
        raise ValueError(f"the pipeline was not trained on {', '.join(unknown)}, which the config names; {remedy}")
    if missing:
        raise ValueError(f"the pipeline is given {', '.join(missing)}, a channel that the config lacks; {remedy}")
