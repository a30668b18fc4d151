"""What the denoiser is trained to predict, and the schedulers that speak the same language. Latents: (B, C, h, w, d),
unit variance.

Timesteps are in the scheduler's units, 0 (clean) to 1000 (noise), for every objective.
"""

from typing import Any, TypeAlias

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

Scheduler: TypeAlias = Any  # any of diffusers' schedulers; their common base class declares none of what they share
TRAIN_STEPS = 1000
RECTIFIED_FLOW, V_PREDICTION, EPSILON = "rectified_flow", "v_prediction", "epsilon"
OBJECTIVES = (RECTIFIED_FLOW, V_PREDICTION, EPSILON)

FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
DIFFUSION_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
)
TRAINED_WITH = ("beta_schedule", "prediction_type", "rescale_betas_zero_snr", "timestep_spacing")


def check_objective(objective: str) -> None:
    """Raises: ValueError naming the known objectives."""
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; known: {', '.join(OBJECTIVES)}")


def make_scheduler(objective: str) -> Scheduler:
    """The default scheduler for sampling: Euler for rectified flow, DDIM on a cosine schedule (Nichol & Dhariwal
    2021) for v and eps.

    v starts at pure noise (Lin et al. 2024, section 3.3). eps must not: there the cosine schedule leaves 5e-5 of the
    image, by which x0 = (x - sqrt(1 - a) eps) / sqrt(a) divides the prediction's error, and nothing clamps latents. Its
    first step of 20 is at t = 950, where 0.08 of the image is left.
    """
    check_objective(objective)
    if objective == RECTIFIED_FLOW:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_STEPS)
    return DDIMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=objective,  # pyright: ignore[reportArgumentType]
        clip_sample=False,
        timestep_spacing="trailing" if objective == V_PREDICTION else "leading",
        rescale_betas_zero_snr=objective == V_PREDICTION,  # eps says nothing about the image at zero SNR
    )


def fit_scheduler(scheduler: Scheduler, objective: str) -> Scheduler:
    """The scheduler, made to speak the model's objective: unchanged if it does, converted if it can, refused if not.

    `DPMSolverMultistepScheduler.from_config(flow_match.config)` gives an eps scheduler without a word, and samples of
    noise; this is the guard. DPM-Solver++ and UniPC are converted to flows by `use_flow_sigmas`; schedulers of v and
    eps take on the noise schedule and the prediction type that the model was trained with. Only the classes in
    `FLOW_SCHEDULERS` and `DIFFUSION_SCHEDULERS` are let through: tests/test_denoise.py shows that each recovers x0
    from a perfect denoiser, and others do not (DEIS and SA stop short of a flow's end, PNDM by default diverges,
    inverse schedulers run the other way).

    Raises: ValueError naming scheduler, objective and the ones that fit.
    """
    check_objective(objective)
    name, config = type(scheduler).__name__, dict(scheduler.config)
    known = FLOW_SCHEDULERS if objective == RECTIFIED_FLOW else DIFFUSION_SCHEDULERS
    remedy = f"use one of {', '.join(known)}, or make_scheduler({objective!r})"
    if name not in known:
        raise ValueError(f"{name} cannot sample a model that predicts {objective}; {remedy}")
    if config["num_train_timesteps"] != TRAIN_STEPS:
        raise ValueError(
            f"{name} counts {config['num_train_timesteps']} training steps, the model was trained with {TRAIN_STEPS}; "
            f"{remedy}"
        )
    if name.startswith("FlowMatch"):
        if config.get("invert_sigmas"):
            raise ValueError(f"{name} with invert_sigmas runs from data to noise; {remedy}")
        return scheduler
    if objective == RECTIFIED_FLOW:
        wanted = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
    else:
        trained = dict(make_scheduler(objective).config)
        wanted = {key: trained[key] for key in TRAINED_WITH if key in config} | {"use_flow_sigmas": False}
    wanted |= {"trained_betas": None, "clip_sample": False, "thresholding": False}  # latents are not within [-1, 1]
    wanted = {key: value for key, value in wanted.items() if key in config}
    if all(config[key] == value for key, value in wanted.items()):
        return scheduler
    return type(scheduler).from_config(config, **wanted)


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(-1, *[1] * (like.ndim - 1))


def sample_timesteps(objective: str, batch: int, generator: torch.Generator) -> Tensor:
    """Random timesteps (B,) for training, drawn on the generator's device.

    Rectified flow: sigma = sigmoid(n), n ~ N(0, 1), the logit-normal of Esser et al. 2024 (Eq. 19 with m = 0, s = 1).
    Else uniform integers.
    """
    if objective == RECTIFIED_FLOW:
        return TRAIN_STEPS * torch.sigmoid(torch.randn(batch, generator=generator, device=generator.device))
    return torch.randint(0, TRAIN_STEPS, (batch,), generator=generator, device=generator.device)


def noisy_and_target(objective: str, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents at `timesteps` (B,) and what the model should predict from them.

    Rectified flow (Liu et al. 2023, Eq. 1): x_t = (1 - sigma) x + sigma n, target n - x, sigma = t / 1000.
    eps (Ho et al. 2020, Eq. 4 and 14): x_t = sqrt(a) x + sqrt(1 - a) n, target n.
    v (Salimans & Ho 2022, section 4): target sqrt(a) n - sqrt(1 - a) x.
    """
    if objective == RECTIFIED_FLOW:
        sigma = _broadcast(timesteps / TRAIN_STEPS, latents)
        return (1 - sigma) * latents + sigma * noise, noise - latents
    scheduler = _training_schedule(objective)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    if objective == EPSILON:
        return noisy, noise
    return noisy, scheduler.get_velocity(latents, noise, timesteps)


def _training_schedule(objective: str) -> Scheduler:
    return DDPMScheduler.from_config(make_scheduler(objective).config)
