"""What the page asks for: requests and sampling from its JSON."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.inputs.edit_files import EditRow, row_request
from pipelines.inputs.inpainting import BLEND_MARGIN_MM
from pipelines.inputs.request import VolumeRequest
from pipelines.sampling import SamplingConfig
from volumes import PADDING, write_volume
from volumes.lesions import REGION_MARGIN_MM, grown

from .models import StudioModel
from .session import Session, StudioMask, StudioResult, model_mask

MOST_SEED = 2**53 - 1  # what JavaScript counts to


def request_of(
    model: StudioModel, body: Mapping[str, object], mask: StudioMask | None, images: Mapping[str, Path]
) -> VolumeRequest:
    """Return the request that the page asks for, to any model that fits to `model`.

    Raises: ValueError for what is none.
    """
    shape = body.get("shape")
    name = "map" if model.map_codes is not None else "volume"
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
    model: StudioModel,
    session: Session,
    wanted: VolumeRequest,
    mask: StudioMask,
    change: Change,
    sampling: SamplingConfig,
) -> VolumeRequest:
    """Return the request that changes a result to fit another mask, and keeps the rest of it.

    The region is where the masks differ, and `REGION_MARGIN_MM` around it, as for `medvolume edit --insert`.

    Raises: ValueError for a result without a mask, on another grid, or whose mask is the same.
    """
    result = change.result
    before = None if result.mask is None else session.masks.get(result.mask)
    if before is None:
        raise ValueError(f"#{result.number} has no mask, so nothing says what is to change; generate from a mask first")
    old, new = (model_mask(one.file, model) for one in (before, mask))
    if old.shape != new.shape or not np.allclose(old.affine, new.affine, atol=1e-3):
        raise ValueError(f"#{result.number} lies on another grid than the mask; start from its mask, {before.name}")
    changed = old.array[0] != new.array[0]
    if not changed.any():
        raise ValueError(f"the mask is that of #{result.number}; paint what is to change")
    region = grown(changed, REGION_MARGIN_MM, new.spacing) & (new.array[0] != PADDING)
    file = session.new_folder("regions") / f"{mask.name}_region.nii.gz"
    write_volume(new.replace(region[None].astype(np.uint8)), file)
    channels = model.data.channels
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
        model.data,
        steps=sampling.filled(model.settings).steps,
        strength=None,
        blend_margin=BLEND_MARGIN_MM,
        keep_channels=(),
        label_map={},
    )


def sampling_of(body: Mapping[str, object]) -> tuple[SamplingConfig, int]:
    """Return the settings and the seed that the page asks for. Raises: ValueError for what cannot be used."""
    steps, guidance, seed = body.get("steps"), body.get("guidance"), body.get("seed", 0)
    if type(seed) is not int or not 0 <= seed <= MOST_SEED:
        raise ValueError(f"the seed is a whole number from 0 to {MOST_SEED}; got {str(seed)[:40]}")
    if steps is not None and type(steps) is not int:
        raise ValueError(f"steps are a whole number; got {str(steps)[:40]}")
    scale = None if guidance is None else number(guidance, "guidance")
    return SamplingConfig(num_inference_steps=steps, guidance_scale=scale), seed


def left_to(model: StudioModel, sampling: SamplingConfig) -> SamplingConfig:
    """Return the settings without those that are the model's own: they are left to it, and so are not in commands."""
    usual, steps, scale = model.usual_settings, sampling.num_inference_steps, sampling.guidance_scale
    return SamplingConfig(
        num_inference_steps=None if steps == usual["num_inference_steps"] else steps,
        guidance_scale=None if scale == usual["guidance_scale"] else scale,
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
