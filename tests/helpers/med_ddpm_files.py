"""Checkpoints of Med-DDPM in its layout, with random weights, and what their network computes.

Names and shapes are those of the published files. `predict` is the network as functions of the tensors by those names:
a second implementation, after Dhariwal & Nichol 2021. Axes: (B, C, Z, Y, X), in the order of the files' arrays.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from interop.med_ddpm import Published

GROUPS = 32
NARROW = [32, 32, 32, 64, 32]
BUFFERS = (
    "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
    "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance "
    "posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 posterior_mean_coef3"
).split()
Shapes = dict[str, tuple[int, ...]]


def layer(name: str, *shape: int) -> Shapes:
    """Weight and bias of a layer."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def residual(name: str, first: int, width: int, time: int) -> Shapes:
    """The tensors of a residual block."""
    convs = layer(f"{name}.in_layers.2", width, first, 3, 3, 3) | layer(f"{name}.out_layers.3", width, width, 3, 3, 3)
    norms = layer(f"{name}.in_layers.0", first) | layer(f"{name}.out_layers.0", width)
    skip = {} if first == width else layer(f"{name}.skip_connection", width, first, 1, 1, 1)
    return convs | norms | layer(f"{name}.emb_layers.1", width, time) | skip


def attention(name: str, width: int) -> Shapes:
    """The tensors of a layer of attention."""
    mixing = layer(f"{name}.qkv", 3 * width, width, 1) | layer(f"{name}.proj_out", width, width, 1)
    return mixing | layer(f"{name}.norm", width)


def shapes_of(one: Published, widths: Sequence[int]) -> Shapes:
    """Name and shape of every tensor of the network in a checkpoint."""
    inputs, outputs = one.tells
    first, time = widths[0], 4 * widths[0]
    found = layer("time_embed.0", time, first) | layer("time_embed.2", time, time)
    found |= layer("input_blocks.0.0", first, inputs, 3, 3, 3)
    width, skips, number = first, [first], 1
    for level, wide in enumerate(widths):
        for _ in range(one.num_res_blocks):
            found |= residual(f"input_blocks.{number}.0", width, wide, time)
            found |= attention(f"input_blocks.{number}.1", wide) if one.attention_levels[level] else {}
            width, number = wide, number + 1
            skips.append(width)
        if level + 1 < len(widths):
            found |= layer(f"input_blocks.{number}.0.op", width, width, 3, 3, 3)
            skips.append(width)
            number += 1
    found |= residual("middle_block.0", width, width, time) | attention("middle_block.1", width)
    found |= residual("middle_block.2", width, width, time)
    number = 0
    for level, wide in reversed([*enumerate(widths)]):
        for block in range(one.num_res_blocks + 1):
            found |= residual(f"output_blocks.{number}.0", width + skips.pop(), wide, time)
            found |= attention(f"output_blocks.{number}.1", wide) if one.attention_levels[level] else {}
            width, place = wide, 1 + one.attention_levels[level]
            if level and block == one.num_res_blocks:
                found |= layer(f"output_blocks.{number}.{place}.conv", width, width, 3, 3, 3)
            number += 1
    found |= layer("out.0", width) | layer("out.2", outputs, width, 3, 3, 3)
    return {f"denoise_fn.{name}": shape for name, shape in found.items()}


def cosine_betas(steps: int) -> np.ndarray:
    """The cosine schedule (Nichol & Dhariwal 2021, Eq. 17), float64."""
    level = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - level[1:] / level[:-1], 0.999)


def random_state(one: Published, steps: int, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a checkpoint of a narrow network; all of them matter."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.tensor(cosine_betas(steps), dtype=torch.float32) for name in BUFFERS}
    for name, shape in shapes_of(one, NARROW).items():
        values = torch.randn(shape, generator=generator)
        scales = name.endswith("weight") and len(shape) == 1  # of a norm
        state[name] = values * (math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1) + (1.0 if scales else 0.0)
    return state


def write(path: Path, one: Published, steps: int) -> dict[str, Tensor]:
    """Write a checkpoint as its training does. Returns the averaged weights, which count."""
    average = random_state(one, steps)
    torch.save({"step": 7, "model": {key: value * 0 for key, value in average.items()}, "ema": average}, path)
    return average


def predict(state: Mapping[str, Tensor], x: Tensor, timestep: int) -> Tensor:
    """Return the noise that the network predicts from voxels and mask channels (1, C, Z, Y, X)."""

    def parts(name: str) -> list[Tensor]:
        return [state[f"denoise_fn.{name}.{kind}"] for kind in ("weight", "bias")]

    def has(name: str) -> bool:
        return f"denoise_fn.{name}.weight" in state

    def norm(name: str, value: Tensor) -> Tensor:
        return F.group_norm(value, GROUPS, *parts(name))

    def block(name: str, value: Tensor) -> Tensor:
        hidden = F.conv3d(F.silu(norm(f"{name}.in_layers.0", value)), *parts(f"{name}.in_layers.2"), padding=1)
        hidden = hidden + F.linear(F.silu(time), *parts(f"{name}.emb_layers.1"))[..., None, None, None]
        hidden = F.conv3d(F.silu(norm(f"{name}.out_layers.0", hidden)), *parts(f"{name}.out_layers.3"), padding=1)
        skip = f"{name}.skip_connection"
        return hidden + (F.conv3d(value, *parts(skip)) if has(skip) else value)

    def attend(name: str, value: Tensor) -> Tensor:
        flat = norm(f"{name}.norm", value).flatten(2)
        query, key, values = F.conv1d(flat, *parts(f"{name}.qkv")).chunk(3, dim=1)
        weights = torch.softmax(query.transpose(1, 2) @ key / query.shape[1] ** 0.5, dim=-1)
        return value + F.conv1d(values @ weights.transpose(1, 2), *parts(f"{name}.proj_out")).view_as(value)

    def run(name: str, value: Tensor) -> Tensor:
        for place in range(3):
            layer_name = f"{name}.{place}"
            if has(f"{layer_name}.in_layers.0"):
                value = block(layer_name, value)
            elif has(f"{layer_name}.qkv"):
                value = attend(layer_name, value)
            elif has(f"{layer_name}.op"):
                value = F.conv3d(value, *parts(f"{layer_name}.op"), stride=2, padding=1)
            elif has(f"{layer_name}.conv"):
                larger = F.interpolate(value, scale_factor=2, mode="trilinear", align_corners=False)
                value = F.conv3d(larger, *parts(f"{layer_name}.conv"), padding=1)
            elif has(layer_name):
                value = F.conv3d(value, *parts(layer_name), padding=1)
        return value

    half = NARROW[0] // 2
    angles = timestep * torch.tensor([1000 ** (-index / half) for index in range(half)])[None]
    time = F.linear(torch.cat([angles.cos(), angles.sin()], dim=1), *parts("time_embed.0"))
    time = F.linear(F.silu(time), *parts("time_embed.2"))

    def count(kind: str) -> int:
        return 1 + max(int(name.split(".")[2]) for name in state if f".{kind}." in name)

    skips = []
    for number in range(count("input_blocks")):
        x = run(f"input_blocks.{number}", x)
        skips.append(x)
    x = run("middle_block", x)
    for number in range(count("output_blocks")):
        x = run(f"output_blocks.{number}", torch.cat([x, skips.pop()], dim=1))
    return F.conv3d(F.silu(norm("out.0", x)), *parts("out.2"), padding=1)
