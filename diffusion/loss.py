"""The diffusion loss: one function from latents to a scalar."""

from collections.abc import Mapping

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from .objectives import noisy_and_target, sample_timesteps


def training_loss(
    unet: nn.Module,
    objective: str,
    latents: Tensor,
    conditions: Mapping[str, Tensor],
    weight: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the prediction over the latent cells inside the field of view.

    Args:
        unet: the model, wrapped by Accelerate or not.
        objective: the U-Net's `config.objective`.
        latents: clean, standardised latents (B, C, h, w, d).
        conditions: the U-Net's keyword arguments, e.g. {"mask": folded ids (B, h, w, d, r)}.
        weight: (B, 1, h, w, d), zero where a cell is padding. Padding is no data: its latents and its noise are zero,
        as outside the grid.
        generator: source of timesteps and noise, on the CPU or on the latents' device.
    """
    timesteps = sample_timesteps(objective, len(latents), generator).to(latents.device)
    noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    noisy, target = noisy_and_target(objective, latents, noise, timesteps)
    prediction = unet(noisy * weight, timesteps, **conditions, return_dict=False)[0]
    error = (prediction.float() - target.float()) ** 2 * weight
    return error.sum() / (weight.sum() * latents.shape[1]).clamp_min(1.0)
