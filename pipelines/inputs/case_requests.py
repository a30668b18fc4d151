"""Requests from a data set: one per case of a split, of its mask, classes, numbers and condition channels."""

from collections.abc import Sequence
from pathlib import Path

from files.names import same_name
from pipelines.base import VolumePipeline
from volumes import Case, DataConfig, load_cases

from .request import VolumeRequest
from .request_files import refuse_masks_in


def case_requests(data: DataConfig, splits: Sequence[str], pipe: VolumePipeline, output: Path) -> list[VolumeRequest]:
    """Build one request per case of these splits, in the order of their names, which are those of the cases. Masks are
    read with the data's `label_map`.

    Raises: ValueError as `load_cases`; for splits without a case, a pipeline that was trained on other conditions than
    the data has, cases without a mask that the model needs, and files in the output folder.
    """
    cases = load_cases(data)
    chosen = [case for case in cases if case.split in splits]
    if not chosen:
        found = ", ".join(sorted({case.split for case in cases})) or "nothing"
        raise ValueError(f"--split {' '.join(splits)}: the data has no such case; it has {found}")
    _check_conditions(data, pipe)
    requests = [_case_request(case, data, pipe) for case in chosen]
    names: dict[str, str] = {}
    for case in chosen:
        if (other := names.setdefault(same_name(case.name), case.name)) != case.name:
            raise ValueError(f"the cases {other} and {case.name} are one name on some disks; rename one")
    refuse_masks_in(output, [file for request in requests for file in request.files if isinstance(file, Path)])
    return requests


def _case_request(case: Case, data: DataConfig, pipe: VolumePipeline) -> VolumeRequest:
    schema, unet = pipe.unet.condition_schema, pipe.unet.config
    if case.phantom is not None:
        raise ValueError(f"{case.name}: is a phantom, which has no files to generate from; use --masks or --conditions")
    if unet["num_labels"] and case.mask is None and not (unet["condition_dropout"] or {}).get("mask"):
        raise ValueError(f"{case.name}: has no mask in a file to generate from; set data.masks in the config")
    cells = {name: case.metadata[name] for name in case.metadata if case.metadata[name] not in ("", None)}
    return VolumeRequest(
        case.mask if unet["num_labels"] else None,
        classes={name: cells[name] for name in schema.classes if name in cells},
        numbers={name: cells[name] for name in schema.numbers if name in cells},
        images={name: case.images[name] for name, _ in schema.images},
        label_map=data.label_map,
        name=case.name,
    )


def _check_conditions(data: DataConfig, pipe: VolumePipeline) -> None:
    """Raises: ValueError if the data has conditions that the model does not know, or lacks a channel that it is
    given."""
    schema = pipe.unet.condition_schema
    unknown = sorted({*data.classes, *data.numbers} - {*schema.classes, *schema.numbers})
    missing = [name for name, _ in schema.images if name not in data.channels]
    remedy = "take the pipeline that was trained with this config"
    if unknown:
        raise ValueError(f"the pipeline was not trained on {', '.join(unknown)}, which the config names; {remedy}")
    if missing:
        raise ValueError(f"the pipeline is given {', '.join(missing)}, a channel that the config lacks; {remedy}")
