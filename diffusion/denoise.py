"""The denoising loop. There is one; the pipeline, the training previews and the tests call it."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .guidance import UNNAMED, ConditionNames, Conditions, guidance_terms, guided
from .objectives import Scheduler

StepCallback = Callable[[int, Tensor, Tensor], Tensor | None]


def set_timesteps(
    scheduler: Scheduler, num_inference_steps: int, sigmas: Sequence[float] | None, device: torch.device
) -> Tensor:
    """Prepare the scheduler and return its timesteps.

    A FlowMatch scheduler that takes sigmas and is given none gets 1, 1 - 1/N, ..., 1/N: its own default ends at 0.001
    and so spends a step on nothing.
    Raises: ValueError if the scheduler takes no sigmas, they do not fall, or the number of steps is not positive.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    if sigmas is not None and not (len(sigmas) and all(1 >= a > b for a, b in pairwise([*sigmas, 0]))):
        raise ValueError(f"sigmas are noise levels in (0, 1] that fall, such as 1, 0.75, 0.5, 0.25; got {sigmas}")
    name = type(scheduler).__name__
    takes_sigmas = name.startswith("FlowMatch") and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    if sigmas is None and takes_sigmas:
        sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps).tolist()
    if sigmas is None:
        scheduler.set_timesteps(num_inference_steps, device=device)
    elif takes_sigmas:
        scheduler.set_timesteps(sigmas=list(sigmas), device=device)
    else:
        raise ValueError(f"{name} takes no sigmas: leave them out, or use FlowMatchEulerDiscreteScheduler")
    return scheduler.timesteps


@torch.no_grad()
def denoise(
    unet: nn.Module,
    latents: Tensor,
    scheduler: Scheduler,
    conditions: Mapping[str, Tensor],
    *,
    guidance_scale: float | Mapping[str, float] = 1.0,
    names: ConditionNames = UNNAMED,
    num_inference_steps: int = 20,
    sigmas: Sequence[float] | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    callback: StepCallback | None = None,
    progress: bool = False,
) -> Tensor:
    """From noise to latents, deterministic but for schedulers that draw noise (they draw it from `generator`).

    Args:
        latents: standard normal noise (B, C, h, w, d); scaled here to what the scheduler starts from.
        scheduler: one that fits the U-Net's objective (`fit_scheduler`).
        conditions: keyword arguments of the U-Net, e.g. {"mask": ids (B, h, w, d, r)}.
        guidance_scale: classifier-free guidance, one scale or one per condition (`guidance_terms`); 1 is none. `names`
        are those of the conditions.
        sigmas: noise levels to visit, descending from 1, instead of `num_inference_steps` even ones (FlowMatch
        schedulers only).
        callback: called after each step with (step, timestep, latents); what it returns, if anything, replaces the
        latents.
    Returns: latents (B, C, h, w, d).
    """
    timesteps = set_timesteps(scheduler, num_inference_steps, sigmas, latents.device)
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    draws_noise = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if draws_noise else {}

    def predict(noisy: Tensor, timestep: Tensor, given: Conditions) -> Tensor:
        return unet(noisy, timestep, **given, return_dict=False)[0]

    prediction_of = guided(predict, guidance_terms(conditions, names, guidance_scale))
    for step, timestep in enumerate(tqdm(timesteps, desc="denoise", disable=not progress, leave=False)):
        scaled = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        latents = scheduler.step(prediction_of(scaled, timestep), timestep, latents, return_dict=False, **extra)[0]
        if callback is not None:
            replaced = callback(step, timestep, latents)
            latents = latents if replaced is None else replaced
    return latents
