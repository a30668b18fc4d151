"""How a result is made again without the studio: three lines of Python, or a command, beside its mask."""

import csv
import io
import shlex
from collections.abc import Sequence
from pathlib import Path

from pipelines.inputs.request import VolumeRequest
from pipelines.storage.record import GenerationRecord

TABLE = "conditions.csv"


def as_python(pipeline: str, request: VolumeRequest, record: GenerationRecord, name: str) -> str:
    """Return Python that makes the volume again, run in the folder of its mask and images.

    Args:
        pipeline: folder or repository.
        name: of the volume's file, without suffix.
    """
    arguments: dict[str, object] = {}
    if request.mask is not None:
        arguments["mask"] = file_name(request.mask)
    elif not request.images and request.shape is not None:
        arguments["shape"] = list(request.shape)
    edit = request.edit
    if edit is not None:
        images = {channel: file_name(image) for channel, image in edit.images.items()}
        arguments["image"] = images if len(images) > 1 else next(iter(images.values()))
        arguments["region"] = file_name(edit.region)
        if edit.strength != 1:
            arguments["strength"] = edit.strength
    if record.classes:
        arguments["classes"] = dict(record.classes)
    if request.numbers:
        arguments["numbers"] = dict(request.numbers)
    if request.images:
        arguments["image"] = {channel: file_name(image) for channel, image in request.images.items()}
    arguments |= given_settings(record, "num_inference_steps", "guidance_scale")
    kind = "MedVolumePipeline" if edit is None else "MedVolumeEditPipeline"
    lines = [f"    {key}={value!r}," for key, value in arguments.items()]
    lines += [f"    generator=[torch.Generator().manual_seed({record.seed})],", f'    paths="{name}_again.nii.gz",']
    return "\n".join(
        [
            "import torch",
            "",
            "import medvolume",
            "",
            f"pipe = medvolume.{kind}.from_pretrained({pipeline!r})",
            "pipe(",
            *lines,
            ")",
            "",
        ]
    )


def as_command(pipeline: str, request: VolumeRequest, record: GenerationRecord, seed: int) -> str:
    """Return the command that makes the volume again, run in the folder of its mask and images.

    Where it names a table, that is `table_of`.
    """
    words = ["medvolume", "generate" if request.edit is None else "edit", "--pipeline", pipeline]
    if request.edit is not None:
        words += ["--edits", TABLE]
    elif table_of(request):
        words += ["--conditions", TABLE]
    elif request.mask is not None:
        words += ["--masks", file_name(request.mask)]
    if request.mask is None and not request.files and request.shape is not None:
        words += ["--shape", *map(str, request.shape)]
    words += ["--output", "again", "--seed", str(seed)]
    for option, value in zip(
        ("--steps", "--guidance_scale"),
        map(
            given_settings(record, "num_inference_steps", "guidance_scale").get,
            ("num_inference_steps", "guidance_scale"),
        ),
        strict=True,
    ):
        words += [] if value is None else [option, f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


def table_of(request: VolumeRequest) -> str:
    """Return the table of a request, for `--conditions` or `--edits`; "" for one that has only a mask or a shape."""
    images = {channel: file_name(image) for channel, image in request.images.items()}
    conditions: dict[str, object] = {**request.classes, **request.numbers, **images}
    if (edit := request.edit) is not None:
        images = {channel: file_name(image) for channel, image in edit.images.items()}
        conditions |= images if len(images) > 1 else {"image": next(iter(images.values()))}
        conditions |= {"region": file_name(edit.region), "strength": edit.strength}
    if not conditions:
        return ""
    row = {} if request.mask is None else {"mask": file_name(request.mask)}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *row, *conditions])
    writer.writerow([request.name, *row.values(), *conditions.values()])
    return text.getvalue()


def given_settings(record: GenerationRecord, *names: str) -> dict[str, object]:
    """Return the settings among these that the user chose, which are not the pipeline's own."""
    values = {"num_inference_steps": record.num_inference_steps, "guidance_scale": record.guidance_scale}
    chosen = {name for name, place in (record.settings_from or {}).items() if place == "call"}
    return {name: 1.0 if values[name] is None else values[name] for name in names if name in chosen}


def file_name(source: object) -> str:
    """Return the name of a file or folder that a volume was generated from."""
    return Path(str(source)).name


def sources(request: VolumeRequest) -> Sequence[Path]:
    """Return the files and folders that a volume was generated from."""
    return [Path(str(source)) for source in request.files]
