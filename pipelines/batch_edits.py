"""Many edits to disk, with the guarantees of `batch_generation`: resumable, recorded, and the same in any batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import PartialState

from files.atomic import refuse_link
from files.writable import check_output_folder
from pipelines.batch_generation import RunConfig, check_count, load_pipeline, only_job, write_volumes
from pipelines.edit_pipeline import MedVolumeEditPipeline
from pipelines.inputs.edit_files import (
    EditRow,
    Lesion,
    edited_rows,
    keep_or_write,
    named_images,
    named_rows,
    read_edits,
    refuse_inputs_in,
    row_request,
)
from pipelines.inputs.inpainting import BLEND_MARGIN_MM
from pipelines.inputs.request import VolumeRequest

MASKS, REGIONS = "masks", "regions"  # folders in the output, of masks with a lesion inserted or removed


@dataclass(frozen=True)
class EditConfig(RunConfig):
    """One command of edits, see `edit.py --help`.

    Attributes:
        images: the words of --image, see `edit_files.named_images`.
        edits: a table in the place of images, mask, region and name.
        strength: None: 1, for edits with a region.
        lesion: changes the mask, and sets the region.
    """

    images: Sequence[str] = ()
    mask: Path | None = None
    region: Path | None = None
    name: str | None = None
    edits: str | Path | None = None
    strength: float | None = None
    blend_margin: float = BLEND_MARGIN_MM
    keep_channels: Sequence[str] = ()
    lesion: Lesion | None = None


def edit_to_disk(config: EditConfig, state: PartialState) -> list[str]:
    """Generate this process's share of the edited volumes of a command that are not finished, and list all that are in
    the manifest.

    Returns: one line per volume that was not written, for voxels that no file can hold.
    Raises: ValueError for what cannot be used, before the first step.
    """
    pipe = load_pipeline(MedVolumeEditPipeline, config, state.device)
    if config.edits is not None:
        rows = read_edits(config.edits, pipe, state.print)
    else:
        images = named_images(config.images, list(pipe.data.channels))
        rows = [EditRow(images, config.mask, config.region, name=config.name)]
    rows = named_rows(rows)
    if config.lesion is None:
        requests = _requests(rows, pipe, config)
        refuse_inputs_in(config.output, requests)
        check_count(requests, config.count)
        return write_volumes(pipe, requests, config, state)
    check_count(rows, config.count)
    changed = edited_rows(rows, config.lesion, pipe.data, config.label_map)
    check_output_folder(config.output)
    with only_job(config, state):
        rows = []
        for row, mask, region in changed:
            files = [config.output / folder / f"{row.name}.nii.gz" for folder in (MASKS, REGIONS)]
            if state.is_main_process:
                for file, volume in zip(files, (mask, region), strict=True):
                    refuse_link(file.parent)
                    keep_or_write(volume, file)
            rows.append(replace(row, mask=files[0], region=files[1]))
        state.wait_for_everyone()
        config = replace(config, label_map={})  # the new masks hold the model's labels
        return write_volumes(pipe, _requests(rows, pipe, config), config, state, held=True)


def _requests(rows: Sequence[EditRow], pipe: MedVolumeEditPipeline, config: EditConfig) -> list[VolumeRequest]:
    steps = config.sampling.filled(pipe.sampling_settings).steps
    return [
        row_request(
            row,
            pipe.data,
            steps=steps,
            strength=config.strength,
            blend_margin=config.blend_margin,
            keep_channels=config.keep_channels,
            label_map=config.label_map,
        )
        for row in rows
    ]
