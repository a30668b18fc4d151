"""The diffusion loss: one function from latents to a scalar."""

from typing import TYPE_CHECKING

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from .conditioning import Conditions
from .objectives import TRAIN_STEPS, noisy_and_target, sample_timesteps, shifted
from .scheduler_options import Betas

if TYPE_CHECKING:
    from .distillation import Teacher


def training_loss(
    unet: nn.Module,
    objective: str,
    latents: Tensor,
    conditions: Conditions,
    weight: Tensor,
    generator: torch.Generator | list[torch.Generator],
    *,
    train_steps: int = TRAIN_STEPS,
    shift_voxels: int | None = None,
    shift_power: float = 0.5,
    betas: Betas | None = None,
    teacher: "Teacher | None" = None,
    absolute: bool = False,
    each: bool = False,
    emphasis: Tensor | None = None,
) -> Tensor:
    """Compute the mean squared error of the prediction over the latent voxels inside the field of view (Ho et al. 2020,
    Eq. 14), or its mean absolute error (as WaveGrad's, Chen et al. 2021). Each volume counts the same, as in
    autoencoder/losses/reconstruction.py.

    Args:
        unet: the model, wrapped by Accelerate or not.
        objective: the U-Net's `config.objective`.
        latents: clean, standardized latents (B, C, h, w, d).
        conditions: the batch's, with folded masks.
        weight: (B, 1, h, w, d), zero in the padding. Padding is not data: its latents and its noise are zero,
        as outside the grid.
        generator: source of timesteps and noise, on the CPU or on the latents' device; or one for each sample of the
            batch.
        train_steps, betas: length and noise levels of the schedule, the U-Net's own (`LatentDenoiser.loss_settings`).
        shift_voxels: the U-Net's `shift_voxels`. Each sample's timestep is shifted by the number of its own latent
            voxels inside the field of view: what the U-Net sees of it, whatever the batch pads or crops it to.
        shift_power: of that number, in the shift: 1/2 of ours, 1/3 of MAISI's.
        teacher: of a flow map. It samples from the batch's conditions, and the prediction is of several steps of each
            sample's trajectory, which count the same.
        absolute: use the absolute error.
        each: return the loss of each latent channel, (C,); their mean is the loss.
        emphasis: (B, 1, h, w, d), how much each latent voxel counts beside the others of its volume
            (`folding.emphasis_of`). The loss is then their weighted mean, so its scale stays. Volumes whose weights are
            all zero count as 0.
    """
    weight = weight.expand(len(latents), *weight.shape[1:])
    inside = weight.flatten(1).sum(1)
    if teacher is None:
        timesteps = sample_timesteps(objective, len(latents), generator, train_steps).to(latents.device)
        if shift_voxels is not None:
            timesteps = shifted(timesteps, (inside.clamp_min(1.0) / shift_voxels) ** shift_power, train_steps)
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        noisy, target = noisy_and_target(objective, latents, noise, timesteps, train_steps, betas)
        end = {}
    else:
        noisy, target, timesteps, after = teacher.steps_of_map(latents, conditions, weight, generator)
        end = {"next_timestep": after}
        rows = torch.arange(len(noisy), device=latents.device) % len(latents)
        weight, inside, conditions = weight[rows], inside[rows], conditions.map(lambda tensor: tensor[rows])
        emphasis = None if emphasis is None else emphasis.expand(len(latents), *emphasis.shape[1:])[rows]
    prediction = unet(noisy * weight, timesteps, **conditions.as_kwargs(), **end, return_dict=False)[0]
    error = prediction.float() - target.float()
    error = (error.abs() if absolute else error**2) * weight
    if emphasis is not None:  # of the error alone: the U-Net and the shift see the field of view as it is
        error = error * emphasis
        inside = (weight * emphasis).flatten(1).sum(1)
    least = 1.0 if emphasis is None else torch.finfo(inside.dtype).tiny  # weights may sum to less than 1
    if each:
        return (error.flatten(2).sum(2) / inside[:, None].clamp_min(least)).mean(0)
    cells = inside * latents.shape[1]
    return (error.flatten(1).sum(1) / cells.clamp_min(least)).mean()
