"""Many edits to disk, with the guarantees of `batch_generation`: resumable, recorded, and the same in any batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from accelerate import PartialState

from files.atomic import refuse_link
from files.writable import check_output_folder
from pipelines.base import VolumePipeline
from pipelines.batch_generation import RunConfig, check_count, generate_to_disk, load_pipeline, only_job
from pipelines.edit_pipeline import MedVolumeEditPipeline
from pipelines.inputs.edit_files import (
    EditRow,
    Lesion,
    edited_rows,
    keep_or_write,
    named_images,
    named_rows,
    read_edits,
    row_request,
)
from pipelines.inputs.inpainting import BLEND_MARGIN_MM
from pipelines.inputs.request import VolumeRequest
from pipelines.inputs.request_files import refuse_inputs_in
from pipelines.storage.trained_on import MASKS

REGIONS = "regions"  # folder in the output, of where a lesion is inserted or removed


@dataclass(frozen=True)
class EditConfig(RunConfig):
    """One command of edits, see `edit.py --help`.

    Attributes:
        images: the words of --image, see `edit_files.named_images`.
        edits: a table, instead of images, mask, region and name.
        strength: None: 1, for edits with a region.
        lesion: changes the mask, and sets the region.
        rows: the edits themselves, instead of all these.
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
    rows: Sequence[EditRow] = ()
    pipeline_class: ClassVar[type[VolumePipeline]] = MedVolumeEditPipeline

    def read_rows(self, pipe: VolumePipeline, say: Callable[[str], object] = print) -> Sequence[EditRow]:
        """Return the edits, each with its name. Raises: ValueError as `read_edits` and `named_images`."""
        if self.rows:
            return self.rows
        if self.edits is not None:
            return named_rows(read_edits(self.edits, pipe, say))
        images = named_images(self.images, list(pipe.data.channels))
        return named_rows([EditRow(images, self.mask, self.region, name=self.name)])

    def requests(
        self, load: Callable[[], VolumePipeline], say: Callable[[str], object] = print
    ) -> Sequence[VolumeRequest]:
        """Return the requests of the edits."""
        pipe = load()
        requests = [
            row_request(
                row,
                pipe.data,
                steps=self.sampling.filled(pipe.sampling_settings).steps,
                strength=self.strength,
                blend_margin=self.blend_margin,
                keep_channels=self.keep_channels,
                label_map=self.label_map,
            )
            for row in self.read_rows(pipe, say)
        ]
        refuse_inputs_in(self.output, requests)
        return requests


def edit_to_disk(config: EditConfig, state: PartialState) -> list[str]:
    """Generate this process's share of the edited volumes of a command that are not finished. Where there is a lesion,
    the masks with it or without it are written to OUTPUT/masks first, and the regions that change to OUTPUT/regions.

    Returns: one line per volume that was not written, for voxels that no file can hold.
    Raises: ValueError for what cannot be used, before the first step.
    """
    if config.lesion is None:
        return generate_to_disk(config, state)
    pipe = load_pipeline(config, state.device)
    rows = config.read_rows(pipe, state.print)
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
        # The new masks hold the model's labels.
        return generate_to_disk(replace(config, rows=rows, label_map={}), state, loaded=pipe, held=True)
