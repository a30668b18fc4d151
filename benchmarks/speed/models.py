"""Build our networks and their peers in MONAI by name, and call them alike. Axes: (B, C, X, Y, Z).

The width of a peer of "equal parameters" is searched so that it has as many as ours (within 5 %, see `closest`). All
autoencoders have 4 latent channels and a stride of 4 per axis.
"""

from bisect import bisect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.networks.nets.autoencoderkl import AutoencoderKL
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from torch import Tensor, nn

from autoencoder import AutoencoderKL3D
from autoencoder.posterior import DiagonalGaussian3D
from diffusion import LatentUNet3D

STRIDE = 4
LATENT_CHANNELS = 4


def parameters(model: nn.Module) -> int:
    """Count the parameters."""
    return sum(p.numel() for p in model.parameters())


def closest(build: Callable[[int], nn.Module], widths: Sequence[int], target: int) -> nn.Module:
    """Build the model whose parameter count is nearest `target`, over growing `widths`.

    Raises:
        ValueError: if it is more than 5 % off.
    """

    def count(width: int) -> int:
        with torch.device("meta"):
            return parameters(build(width))

    place = bisect(widths, target, key=count)
    best = min(widths[max(place - 1, 0) : place + 1], key=lambda width: abs(count(width) - target))
    if abs(count(best) - target) > 0.05 * target:
        raise ValueError(
            f"no peer within 5 % of {target} parameters, width {best} has {count(best)}: change its widths"
        )
    return build(best)


def _ours() -> nn.Module:
    return AutoencoderKL3D()


def _monai() -> nn.Module:
    """Build MONAI's AutoencoderKL with MAISI's levels and blocks, without attention (too large here)."""

    def build(last: int) -> nn.Module:
        return AutoencoderKL(
            spatial_dims=3,
            in_channels=1,
            out_channels=1,
            channels=(24, 48, last),
            num_res_blocks=(2, 2, 2),
            attention_levels=(False, False, False),
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=8,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        )

    return closest(build, range(48, 257, 8), _count(_ours))


def _maisi(num_splits: int) -> nn.Module:
    """Build MAISI's autoencoder as published (Guo et al. 2024; MONAI's maisi_ct_generative), but in float32."""
    return AutoencoderKlMaisi(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        num_channels=(64, 128, 256),
        num_res_blocks=(2, 2, 2),
        attention_levels=(False, False, False),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=32,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
        num_splits=num_splits,
        dim_split=1,
        norm_float16=False,
    )


AUTOENCODERS: dict[str, Callable[[], nn.Module]] = {
    "ours": _ours,
    "monai": _monai,
    "maisi": lambda: _maisi(1),
    "maisi 4 splits": lambda: _maisi(4),
}


def _our_unet() -> nn.Module:
    return LatentUNet3D(in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS)


def _diffusion_model_unet(
    image_channels: int, channels: tuple[int, ...], blocks: tuple[int, ...], groups: int, head_channels: int
) -> nn.Module:
    """Build MONAI's U-Net with attention on the coarsest level only, as ours."""
    return DiffusionModelUNet(
        spatial_dims=3,
        in_channels=image_channels,
        out_channels=image_channels,
        channels=channels,
        num_res_blocks=blocks,
        attention_levels=(*(False for _ in channels[1:]), True),
        norm_num_groups=groups,
        num_head_channels=head_channels,
    )


def _monai_unet() -> nn.Module:
    """Build MONAI's DiffusionModelUNet over the same latents, with levels and blocks as ours."""

    def build(last: int) -> nn.Module:
        return _diffusion_model_unet(LATENT_CHANNELS, (48, last), (1, 2), groups=8, head_channels=16)

    return closest(build, range(48, 257, 16), _count(_our_unet))


def _monai_voxel_unet() -> nn.Module:
    """Build MONAI's DiffusionModelUNet over voxels: narrow and four levels deep, so full resolution costs little."""

    def build(last: int) -> nn.Module:
        return _diffusion_model_unet(1, (16, 32, 64, last), (1, 1, 1, 1), groups=4, head_channels=last)

    return closest(build, range(48, 257, 4), _count(_our_unet))


UNETS: dict[str, Callable[[], nn.Module]] = {
    "ours": _our_unet,
    "monai": _monai_unet,
    "monai voxels": _monai_voxel_unet,
}


def _count(build: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return parameters(build())


def encode(model: nn.Module, volume: Tensor) -> Tensor:
    """Return the posterior mean (B, 4, X/4, Y/4, Z/4) of a volume (B, 1, X, Y, Z)."""
    return posterior(model, volume).mode()


def decode(model: Any, latents: Tensor) -> Tensor:
    """Return the decoded volume (B, 1, X, Y, Z)."""
    return model.decode(latents, return_dict=False)[0] if isinstance(model, AutoencoderKL3D) else model.decode(latents)


def posterior(model: Any, volume: Tensor) -> DiagonalGaussian3D:
    """Return the encoder's Gaussian, in our class for every model, so that all share one loss."""
    if isinstance(model, AutoencoderKL3D):
        return model.encode(volume, return_dict=False)[0]
    mean, std = model.encode(volume)
    zero, one = mean.new_zeros(mean.shape[1]), mean.new_ones(mean.shape[1])
    return DiagonalGaussian3D(torch.cat([mean, 2 * std.log()], dim=1), zero, one)


def predict(model: Any, noisy: Tensor, timestep: Tensor) -> Tensor:
    """Return a U-Net's output for noisy latents or volumes (B, C, ...) and timesteps (B,)."""
    return model(noisy, timestep, return_dict=False)[0] if isinstance(model, LatentUNet3D) else model(noisy, timestep)


def latent_shape(voxels: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Return (4, X/4, Y/4, Z/4). Raises: ValueError if a side is not a multiple of 4."""
    if any(n % STRIDE for n in voxels):
        raise ValueError(f"{voxels} voxels: sides must be multiples of {STRIDE}")
    return (LATENT_CHANNELS, *(n // STRIDE for n in voxels))  # pyright: ignore[reportReturnType]
