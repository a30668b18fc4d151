"""Conditions: classes and numbers as people name them, checked against what a model knows; these, masks and images as the
U-Net's tensors."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from autoencoder import VolumeAutoencoder
from diffusion import Conditions, LatentUNet3D, fold_images, fold_mask
from pipelines.volume_processor import PreparedVolume, VolumeProcessor
from volumes import Volume, grid_numbers
from volumes.data.tables import read_number
from volumes.description import DataDescription, NumberStats

from .images import Images
from .inpainting import cells_of, encoded

Classes = Mapping[str, str | int]  # {class: value}
Numbers = Mapping[str, float]  # {number: value}
Row = tuple[dict[str, str], dict[str, float]]  # classes and numbers of one volume, as its sidecar records them

CELL_PLANES = 16  # of the latent grid, whose mask is folded and embedded at once
FAR = 0.1  # of the training range, beyond which a number is worth a warning


def check_described(vae: VolumeAutoencoder, unet: LatentUNet3D, data: DataDescription) -> None:
    """Raises: ValueError if `data` describes other classes, numbers or channels than the U-Net knows, and if the
    autoencoder cannot code the images that the U-Net can be given."""
    for kind in ("classes", "numbers"):
        known, described = unet.config[kind] or {}, getattr(data, kind)
        if set(known) != set(described) or (kind == "classes" and known != described):
            raise ValueError(f"the U-Net knows the {kind} {known or 'none'}, data describes {described or 'none'}")
    for name, channels in (unet.config["images"] or {}).items():
        if name not in data.channels:
            raise ValueError(f"the U-Net can be given {name!r}, data describes the channels {list(data.channels)}")
        own = vae.latents_of(data.channels.index(name))
        if own.stop - own.start != channels:
            raise ValueError(
                f"the U-Net takes {channels} latent channels of {name}, the autoencoder gives {own.stop - own.start}"
            )


def rows_of(
    classes: Classes | Sequence[Classes] | None,
    numbers: Numbers | Sequence[Numbers] | None,
    images: Images | Sequence[Images] | None,
    masks: int | None,
) -> list[tuple[Classes, Numbers, Images]]:
    """(classes, numbers, images) of each mask; without masks (None) as many as there are dicts in a list, or one.

    Raises: ValueError for lists of another length than there are masks, and for what is no dict.
    """
    asked = [{} if given is None else given for given in (classes, numbers, images)]
    lists = [given for given in asked if isinstance(given, Sequence)]
    for given in asked:
        if not all(isinstance(one, Mapping) for one in (given if isinstance(given, Sequence) else [given])):
            raise ValueError(
                'classes, numbers and image are dicts such as {"sex": "F"}, {"age": 63} and {"ct": "ct.nii.gz"}, or lists of '
                f"one dict a mask; got {given!r:.200}"
            )
    count = masks if masks is not None else len(lists[0]) if lists else 1
    if not count or any(len(one) != count for one in lists):
        wanted = f"{count} masks" if masks is not None else "as many volumes"
        raise ValueError(
            f"classes, numbers and image: lists of {[len(one) for one in lists]} dicts for {wanted}; give one a mask"
        )
    columns = [given if isinstance(given, Sequence) else [given] * count for given in asked]
    return list(zip(*columns, strict=True))  # pyright: ignore[reportReturnType]


def check_conditions(
    unet: LatentUNet3D, data: DataDescription, classes: Classes, numbers: Numbers, grid: Volume
) -> Row:
    """Classes and numbers of one volume, as its sidecar records them. Numbers that say what the grid is, if the model learned
    any (spacing_x, size_z, ...), are those of `grid`, unless they are given.

    Raises: ValueError for names and values that the model does not know, for numbers that are not finite, and for what
    is not given though training never left it out.
    Warns: of numbers far outside the training range.
    """
    values_of: dict[str, list[str]] = unet.config["classes"] or {}
    ranges: dict[str, NumberStats] = data.numbers if unet.config["numbers"] else {}
    numbers = {name: grid_numbers(grid)[name] for name in data.grid_numbers} | dict(numbers)
    knows = f"this model knows {_listing(values_of, ranges)}"
    for kind, given, known in (("classes", classes, values_of), ("numbers", numbers, ranges)):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"{kind} names {', '.join(map(str, unknown))}; {knows}")
    chosen = {name: str(value) for name, value in classes.items()}
    for name, value in chosen.items():
        if value not in values_of[name]:
            raise ValueError(f"classes: {name} is {value!r}; {knows}")
    values = {name: _finite(name, value) for name, value in numbers.items()}
    for name, value in values.items():
        low, high = ranges[name].low, ranges[name].high
        if not low - FAR * (high - low) <= value <= high + FAR * (high - low):
            warnings.warn(f"numbers: {name} is {value:g}, the model was trained on {low:g} to {high:g}", stacklevel=2)
    rates = unet.config["condition_dropout"] or {}
    needed = [name for name in [*values_of, *ranges] if name not in {**chosen, **values} and not rates.get(name)]
    if needed:
        raise ValueError(f"{', '.join(needed)} must be given, as training never left it out; {knows}")
    return chosen, values


def condition_tensors(
    unet: LatentUNet3D, prepared_volumes: Sequence[PreparedVolume], rows: Sequence[Row], device: torch.device
) -> Conditions:
    """The conditions of one batch of equal grids, those that the model knows and the canvases have; masks are embedded."""
    schema, values_of = unet.condition_schema, unet.config["classes"]
    tensors = {}
    if schema.classes:
        indices = [
            [values_of[n].index(classes[n]) if n in classes else -1 for n in schema.classes] for classes, _ in rows
        ]
        tensors["classes"] = torch.tensor(indices, device=device)
    if schema.numbers:
        values = [[numbers.get(name, math.nan) for name in schema.numbers] for _, numbers in rows]
        tensors["numbers"] = torch.tensor(values, dtype=torch.float32, device=device)
    masks = [prepared.labels for prepared in prepared_volumes if prepared.labels is not None]
    if masks:
        planes, embedded = CELL_PLANES * unet.mask_stride[2], []
        for start in range(0, masks[0].shape[2], planes):  # folded ids are far larger than labels and embedding
            part = torch.from_numpy(np.stack([one[..., start : start + planes] for one in masks]))
            embedded.append(unet.embed_mask(fold_mask(part.to(device), unet.mask_stride, unet.config["num_labels"])))
        tensors["mask"] = torch.cat(embedded, dim=4)  # once, not at every step
    return Conditions(**tensors)


def image_condition(
    vae: VolumeAutoencoder,
    unet: LatentUNet3D,
    processor: VolumeProcessor,
    prepared: PreparedVolume,
    device: torch.device,
) -> torch.Tensor:
    """The U-Net's "image" (1, sum of C + 1, h, w, d) of one canvas: what is given there, encoded (the posterior's mode)."""
    latents: dict[str, torch.Tensor] = {}
    if prepared.images:
        latents_of_all = encoded(vae, processor.standardized_images(prepared, prepared.images), device)
        latents = {name: latents_of_all[:, vae.latents_of(processor.channels.index(name))] for name in prepared.images}
    cells = [n // s for n, s in zip(prepared.shape, vae.stride, strict=True)]
    return fold_images(latents, unet.config["images"], cells).to(device, unet.dtype)


def edited_latents(
    vae: VolumeAutoencoder,
    unet: LatentUNet3D,
    processor: VolumeProcessor,
    prepared: PreparedVolume,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Latents (1, C, h, w, d) of the image that is changed, and bool (1, 1, h, w, d) the cells that its region reaches, even
    in part; None where everything is changed."""
    assert prepared.edit is not None
    latents = encoded(vae, processor.standardized_images(prepared, prepared.edit.images), device).to(unet.dtype)
    region = processor.padded_region(prepared)
    return latents, None if region is None else cells_of(region, vae.stride).to(device)


def _finite(name: str, value: Any) -> float:
    try:
        number = read_number(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"numbers: {name} is {value!r}; give a finite number, or leave {name} out")
    return number


def _listing(classes: Mapping[str, Sequence[str]], ranges: Mapping[str, NumberStats]) -> str:
    """What a model knows, in words."""
    known = [f"{name} ({', '.join(values)})" for name, values in sorted(classes.items())]
    numbers = [f"{name} ({stats.low:g} to {stats.high:g})" for name, stats in sorted(ranges.items())]
    return f"the classes {', '.join(known) or 'none'} and the numbers {', '.join(numbers) or 'none'}"
