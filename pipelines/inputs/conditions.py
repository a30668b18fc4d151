"""Conditions: classes and numbers as people name them, checked against what a model knows; these, masks and images as
the U-Net's tensors."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from autoencoder import VolumeAutoencoder
from autoencoder.losses.reconstruction import cells_inside
from diffusion import Conditions, LatentDenoiser, fold_images
from pipelines.storage.record import WithoutRecord
from pipelines.volume_processor import VolumeProcessor
from volumes import PADDING, Volume, grid_numbers
from volumes.data.tables import read_number
from volumes.description import DataDescription, NumberStats

from .inpainting import encoded
from .masks import replaced_labels
from .prepared import PreparedGrid, PreparedVolume
from .request import Classes, Numbers, VolumeRequest

LATENT_PLANES = 16  # of the latent grid, whose mask is folded and embedded at once
FAR = 0.1  # of the training range, beyond which a number is worth a warning


def check_described(vae: VolumeAutoencoder, unet: LatentDenoiser, data: DataDescription) -> None:
    """Raise ValueError if `data` describes other classes, numbers or channels than the U-Net knows, or if the
    autoencoder cannot encode the images that condition the U-Net.
    """
    schema = unet.condition_schema
    classes = {name: list(values) for name, values in schema.values.items()}
    if classes != data.classes:
        raise ValueError(f"the U-Net knows the classes {classes or 'none'}, data describes {data.classes or 'none'}")
    if set(schema.numbers) != set(data.numbers):
        numbers = list(schema.numbers)
        raise ValueError(f"the U-Net knows the numbers {numbers or 'none'}, data describes {data.numbers or 'none'}")
    for name, channels in schema.images:
        if name not in data.channels:
            raise ValueError(
                f"the U-Net has the image condition {name!r}, data describes the channels {list(data.channels)}"
            )
        own = vae.latents_of(data.channels.index(name))
        if own.stop - own.start != channels:
            raise ValueError(
                f"the U-Net takes {channels} latent channels of {name}, the autoencoder gives {own.stop - own.start}"
            )


def check_conditions(
    unet: LatentDenoiser, data: DataDescription, classes: Classes, numbers: Numbers, grid: Volume
) -> tuple[dict[str, str], dict[str, float]]:
    """Check classes and numbers of one volume, and return them as its sidecar records them. Numbers that describe the
    grid, if the model learned any (spacing_x, size_z, ...), default to those of `grid`.

    Raises: ValueError for names and values that the model does not know, for numbers that are not finite, and for a
    condition that is missing though training never dropped it. Warns: of numbers far outside the training range.
    """
    schema = unet.condition_schema
    known_classes: Mapping[str, Sequence[str]] = schema.values
    ranges: dict[str, NumberStats] = data.numbers if schema.numbers else {}
    numbers = {name: grid_numbers(grid)[name] for name in data.grid_numbers} | dict(numbers)
    knows = f"this model knows {_listing(known_classes, ranges)}"
    for kind, requested, known in (("classes", classes, known_classes), ("numbers", numbers, ranges)):
        if unknown := [name for name in requested if name not in known]:
            raise ValueError(f"{kind} names {', '.join(map(str, unknown))}; {knows}")
    chosen = {name: str(value) for name, value in classes.items()}
    for name, value in chosen.items():
        if value not in known_classes[name]:
            raise ValueError(f"classes: {name} is {value!r}; {knows}")
    values = {name: _finite(name, value) for name, value in numbers.items()}
    for name, value in values.items():
        low, high = ranges[name].low, ranges[name].high
        if not low - FAR * (high - low) <= value <= high + FAR * (high - low):
            warnings.warn(f"numbers: {name} is {value:g}, the model was trained on {low:g} to {high:g}", stacklevel=2)
    rates = schema.dropout
    needed = [name for name in [*known_classes, *ranges] if name not in {**chosen, **values} and not rates.get(name)]
    if needed:
        raise ValueError(f"{', '.join(needed)} must be given, as training never dropped it; {knows}")
    return chosen, values


def check_grid_source(unet: LatentDenoiser, request: VolumeRequest) -> None:
    """Raise ValueError unless exactly one of mask, shape and images sets the grid, and it is one that the model
    takes."""
    has_mask, has_shape = request.mask is not None, request.shape is not None
    has_images = bool(request.images) or request.edit is not None
    sources = has_mask + has_shape + (has_images and not has_mask)
    schema = unet.condition_schema
    if not schema.mask:
        if has_mask or sources != 1:
            raise ValueError(
                "this model was trained without a mask condition: give shape=(X, Y, Z), or an image in its place, "
                "and no mask"
            )
    elif not schema.dropout.get("mask"):
        if not has_mask or has_shape:
            raise ValueError("this model is conditioned on a mask: give mask=..., which also sets the shape")
    elif sources != 1:
        raise ValueError("give a mask, which also sets the shape, or shape=(X, Y, Z) or an image to do without")


def condition_tensors(
    unet: LatentDenoiser,
    volumes: Sequence[PreparedVolume],
    device: torch.device,
    images: Sequence[torch.Tensor | None] = (),
) -> Conditions:
    """Build the conditions of one batch of equal grids: those that the model knows and the volumes have. Masks are
    embedded.

    Args:
        images: of each volume its `image_condition`; None for a model without images.
    """
    schema, tensors = unet.condition_schema, {}
    if known := [image for image in images if image is not None]:
        tensors["image"] = torch.cat(known)
    if schema.classes:
        indices = [
            [schema.values[n].index(volume.classes[n]) if n in volume.classes else -1 for n in schema.classes]
            for volume in volumes
        ]
        tensors["classes"] = torch.tensor(indices, device=device)
    if schema.numbers:
        values = [[volume.numbers.get(name, math.nan) for name in schema.numbers] for volume in volumes]
        tensors["numbers"] = torch.tensor(values, dtype=torch.float32, device=device)
    masks = [volume.grid.labels for volume in volumes if volume.grid.labels is not None]
    if masks:
        tensors["mask"] = _embedded(unet, masks, device)  # once, not at every step
    return Conditions(**tensors)


def has_labels(mask: np.ndarray | None, labels: Iterable[int]) -> bool:
    """Return whether a mask of label indices (None for no mask) has one of these."""
    return mask is not None and bool(np.isin(mask, list(labels)).any())


def replaced_by(unet: LatentDenoiser, labels: Mapping[int, str], without: WithoutRecord | None) -> dict[int, int]:
    """Return the label indices that `guidance_without` replaces, and by what; none for None.

    Raises: ValueError for what the model does not know.
    """
    return {} if without is None else replaced_labels(unet, labels, without["labels"])


def contrasts(
    unet: LatentDenoiser,
    labels: Mapping[int, str],
    without: WithoutRecord | None,
    volumes: Sequence[PreparedVolume],
    conditions: Conditions,
    device: torch.device,
) -> list[tuple[float, Conditions]]:
    """Return the conditions from which a batch is guided away, with their scale: the same with other labels in the
    masks. Empty if none of the masks has the labels that are replaced."""
    replaced = replaced_by(unet, labels, without)
    masks = [volume.grid.labels for volume in volumes if volume.grid.labels is not None]
    if without is None or conditions.mask is None or not any(has_labels(mask, replaced) for mask in masks):
        return []
    others = []
    for mask in masks:
        other = mask.copy()
        for label, target in replaced.items():
            other[mask == label] = target
        others.append(other)
    return [(without["scale"], replace(conditions, mask=_embedded(unet, others, device)))]


def _embedded(unet: LatentDenoiser, masks: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """Return label indices (X, Y, Z) as the masks of a batch, (B, mask_width, h, w, d)."""
    stride, halo, embedded = unet.mask_stride[2], unet.mask_halo, []
    depth = masks[0].shape[2] // stride
    for start in range(0, depth, LATENT_PLANES):  # folded ids, or bits, are far larger than labels and embedding
        first, last = max(start - halo, 0), min(start + LATENT_PLANES + halo, depth)
        part = torch.from_numpy(np.stack([mask[..., first * stride : last * stride] for mask in masks]))
        slab = unet.embed_labels(part.to(device))
        embedded.append(slab[..., start - first : min(start + LATENT_PLANES, depth) - first])
    return torch.cat(embedded, dim=4)


def image_condition(
    vae: VolumeAutoencoder,
    unet: LatentDenoiser,
    processor: VolumeProcessor,
    prepared: PreparedGrid,
    device: torch.device,
) -> torch.Tensor:
    """Build the U-Net's "image" (1, sum of C + 1, h, w, d) of one grid: its condition channels, encoded (the
    posterior's mode).
    """
    latents: dict[str, torch.Tensor] = {}
    if prepared.images:
        latents_of_all = encoded(vae, processor.standardized_images(prepared, prepared.images), device)
        latents = {name: latents_of_all[:, vae.latents_of(processor.channels.index(name))] for name in prepared.images}
    sides = tuple(n // s for n, s in zip(prepared.shape, vae.stride, strict=True))
    inside = None
    if prepared.resampled:  # as in training: an image is given where there is a field of view
        seen = torch.from_numpy(prepared.placement.apply(prepared.grid.array[0] != PADDING, False))
        inside = cells_inside(seen[None, None].to(device), sides)
    return fold_images(latents, dict(unet.condition_schema.images), sides, inside).to(device, unet.dtype)


def _finite(name: str, value: Any) -> float:
    try:
        number = read_number(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"numbers: {name} is {value!r}; give a finite number, or omit {name}")
    return number


def _listing(classes: Mapping[str, Sequence[str]], ranges: Mapping[str, NumberStats]) -> str:
    """Describe in words what a model knows."""
    labels = [f"{name} ({', '.join(values)})" for name, values in sorted(classes.items())]
    numbers = [f"{name} ({stats.low:g} to {stats.high:g})" for name, stats in sorted(ranges.items())]
    return f"the classes {', '.join(labels) or 'none'} and the numbers {', '.join(numbers) or 'none'}"
