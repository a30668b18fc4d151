"""What the page knows of a model, and what it asks for: requests and sampling from its JSON."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pipelines.base import VolumePipeline
from pipelines.edit_pipeline import MedVolumeEditPipeline
from pipelines.inputs.edit_files import EditRow, row_request
from pipelines.inputs.inpainting import BLEND_MARGIN_MM
from pipelines.inputs.request import VolumeRequest
from pipelines.inputs.request_files import read_requests
from pipelines.sampling import DEFAULTS, SamplingConfig
from volumes import PADDING, Volume, write_volume
from volumes.lesions import REGION_MARGIN_MM, grown

from .labels import OUTSIDE_CODE, UNKNOWN_CODE, LabelCodes
from .session import Session, StudioMask, StudioResult, model_mask

EXAMPLES = "examples.csv"  # in the folder of a pipeline
MOST_SEED = 2**53 - 1  # what JavaScript counts to


class Page:
    """What the page shows of a pipeline.

    Args:
        name: its folder, or its repository.
    Raises: ValueError for more labels than the studio can paint.
    """

    def __init__(self, name: str, pipe: VolumePipeline) -> None:
        self.name, self.pipe = name, pipe
        self.codes = LabelCodes.of(pipe.data.labels, pipe.unet.takes_partial_masks)
        self.map_codes = LabelCodes.of(pipe.data.image_labels) if pipe.data.image_labels else None

    @cached_property
    def examples(self) -> list[VolumeRequest]:
        """The rows with a mask of the examples in the pipeline's folder."""
        table = Path(self.name) / EXAMPLES
        if not table.is_file():
            return []
        rows = read_requests(table, self.pipe, Path("none"), say=lambda _: None)
        return [row for row in rows if row.mask is not None]

    def example(self, number: object) -> Path:
        """Return the mask of an example. Raises: ValueError for one that is not there."""
        if type(number) is not int or not 0 <= number < len(self.examples):
            raise ValueError(f"there is no example {str(number)[:20]}; the pipeline has {len(self.examples)}")
        return Path(str(self.examples[number].mask))

    @cached_property
    def editor(self) -> MedVolumeEditPipeline:
        """The pipeline that edits images, with the same components."""
        editor = MedVolumeEditPipeline.from_pipe(self.pipe)
        editor.set_progress_bar_config(disable=True)
        return editor

    @property
    def usual_shape(self) -> tuple[int, int, int]:
        """The middle of the training set's shapes."""
        low, high = self.pipe.data.shape_range
        x, y, z = ((a + b) // 2 for a, b in zip(low, high, strict=True))
        return x, y, z

    def empty_grid(self, shape: object) -> Volume:
        """Return a grid of this shape on the model's template. Raises: ValueError for anything but a shape."""
        x, y, z = self.usual_shape if shape is None else whole_shape(shape)
        return Volume(np.broadcast_to(np.int16(0), (1, x, y, z)), np.array(self.pipe.data.affine, dtype=np.float64))

    def to_json(self) -> dict[str, object]:
        """Return what the page needs to know of the model."""
        data, config = self.pipe.data, self.pipe.unet.config
        rates = config["condition_dropout"] or {}
        own = self.pipe.sampling_settings.to_json()
        labels = self.map_codes or self.codes
        return {
            "name": self.name,
            "description": data.description,
            "labels": [
                {"code": code, "value": value, "name": name}
                for code, (value, name) in enumerate(zip(labels.values, labels.names, strict=True))
            ],
            "partial": self.codes.partial,
            "outside": OUTSIDE_CODE,
            "unknown": UNKNOWN_CODE,
            "mask": "none" if config["num_labels"] == 0 else "optional" if rates.get("mask") else "required",
            "classes": {name: list(values) for name, values in (config["classes"] or {}).items()},
            "numbers": {
                name: {"low": stats.low, "high": stats.high, "mean": stats.mean}
                for name, stats in (data.numbers if config["numbers"] else {}).items()
                if name not in data.grid_numbers
            },
            "images": sorted(config["images"] or {}),
            "optional": sorted(name for name, rate in rates.items() if rate),
            "channels": list(data.channels),
            "windows": [[scale.low, scale.high] for scale in data.intensity],
            "steps": own.get("num_inference_steps", DEFAULTS["num_inference_steps"]),
            "guidance": own.get("guidance_scale", DEFAULTS["guidance_scale"]),
            "guides": bool(rates),
            "maps": self.map_codes is not None,
            "edits": config["num_labels"] > 0 and not config["images"] and data.crop is None,
            "shape": list(self.usual_shape),
            "draws_shape": data.maps is not None,
            "examples": [
                {"name": row.name, "classes": dict(row.classes), "numbers": dict(row.numbers)} for row in self.examples
            ],
        }


def request_of(
    page: Page, body: Mapping[str, object], mask: StudioMask | None, images: Mapping[str, Path]
) -> VolumeRequest:
    """Return the request that the page asks for. Raises: ValueError for what is none."""
    shape = body.get("shape")
    name = "map" if page.map_codes is not None else "volume"
    return VolumeRequest(
        mask=None if mask is None else mask.file,
        shape=None if shape is None or mask is not None or images else whole_shape(shape),
        classes={str(key): str(value) for key, value in entries(body, "classes").items()},
        numbers={key: number(value, key) for key, value in entries(body, "numbers").items()},
        images=images,
        name=name if mask is None else mask.name,
    )


@dataclass(frozen=True)
class Change:
    """What of a result is generated again: the surroundings of what was painted differently since.

    Attributes:
        strength: in (0, 1], how much is changed there; None for all.
    """

    result: StudioResult
    strength: float | None


def edit_of(
    page: Page, session: Session, wanted: VolumeRequest, mask: StudioMask, change: Change, sampling: SamplingConfig
) -> VolumeRequest:
    """Return the request that changes a result to fit another mask, and keeps the rest of it.

    The region is where the masks differ, and `REGION_MARGIN_MM` around it, as for `medvolume edit --insert`.

    Raises: ValueError for a result without a mask, on another grid, or whose mask is the same.
    """
    result = change.result
    before = None if result.mask is None else session.masks.get(result.mask)
    if before is None:
        raise ValueError(f"#{result.number} has no mask, so nothing says what is to change; generate from a mask first")
    old, new = (model_mask(one.file, page.pipe) for one in (before, mask))
    if old.shape != new.shape or not np.allclose(old.affine, new.affine, atol=1e-3):
        raise ValueError(f"#{result.number} lies on another grid than the mask; start from its mask, {before.name}")
    changed = old.array[0] != new.array[0]
    if not changed.any():
        raise ValueError(f"the mask is that of #{result.number}; paint what is to change")
    region = grown(changed, REGION_MARGIN_MM, new.spacing) & (new.array[0] != PADDING)
    file = session.new_folder("regions") / f"{mask.name}_region.nii.gz"
    write_volume(new.replace(region[None].astype(np.uint8)), file)
    channels = page.pipe.data.channels
    row = EditRow(
        dict(zip(channels, result.files, strict=True)),
        mask.file,
        file,
        change.strength,
        wanted.classes,  # pyright: ignore[reportArgumentType]
        wanted.numbers,
        mask.name,
    )
    return row_request(
        row,
        page.pipe.data,
        steps=sampling.filled(page.pipe.sampling_settings).steps,
        strength=None,
        blend_margin=BLEND_MARGIN_MM,
        keep_channels=(),
        label_map={},
    )


def sampling_of(page: Page, body: Mapping[str, object]) -> tuple[SamplingConfig, int]:
    """Return the settings and the seed that the page asks for; settings that are the pipeline's own are left to it.

    Raises: ValueError for what cannot be used.
    """
    own = page.pipe.sampling_settings.to_json()
    usual = {**DEFAULTS, **own}
    steps, guidance, seed = body.get("steps"), body.get("guidance"), body.get("seed", 0)
    if type(seed) is not int or not 0 <= seed <= MOST_SEED:
        raise ValueError(f"the seed is a whole number from 0 to {MOST_SEED}; got {str(seed)[:40]}")
    if steps is not None and type(steps) is not int:
        raise ValueError(f"steps are a whole number; got {str(steps)[:40]}")
    scale = None if guidance is None else number(guidance, "guidance")
    return (
        SamplingConfig(
            num_inference_steps=None if steps == usual["num_inference_steps"] else steps,
            guidance_scale=None if scale == usual["guidance_scale"] else scale,
        ),
        seed,
    )


def entries(body: Mapping[str, object], name: str) -> dict[str, object]:
    """Return an object of the page's JSON, without what was left empty. Raises: ValueError if it is none."""
    given = body.get(name) or {}
    if not isinstance(given, dict):
        raise ValueError(f"{name} are an object of names and values")
    return {str(key): value for key, value in given.items() if value not in (None, "")}


def number(value: object, name: str) -> float:
    """Return a number of the page's JSON. Raises: ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is a number; got {str(value)[:40]!r}")
    return float(value)


def whole_shape(value: object) -> tuple[int, int, int]:
    """Return three numbers of voxels. Raises: ValueError for anything else."""
    sides = value if isinstance(value, list) else []
    if len(sides) != 3 or not all(type(side) is int and 1 <= side <= 1024 for side in sides):
        raise ValueError(f"a shape is three whole numbers from 1 to 1024; got {str(value)[:60]}")
    x, y, z = sides
    return x, y, z
