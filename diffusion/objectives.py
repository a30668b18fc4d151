"""Training objectives of the denoiser, the shift of their timesteps, and the schedulers that fit them.

Latents: (B, C, h, w, d), unit variance.

Timesteps are in the scheduler's units, 0 (clean) to 1000 (noise), for every objective; v and eps may be trained with
another number of steps.
"""

import copy
import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import diffusers
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from .scheduler_options import (
    COSINE,
    DPM,
    FOREIGN,
    SHIFTS,
    UNIPC,
    Betas,
    Scheduler,
    check_options,
    check_values,
    chosen,
    parameters,
    spacing,
    without_effect,
)

TRAIN_STEPS = 1000
RECTIFIED_FLOW, V_PREDICTION, EPSILON = "rectified_flow", "v_prediction", "epsilon"
FLOW_MAP = "flow_map"  # the average velocity of a rectified flow between two times, see `diffusion.distillation`
OBJECTIVES = (RECTIFIED_FLOW, V_PREDICTION, EPSILON, FLOW_MAP)
FLOWS = (RECTIFIED_FLOW, FLOW_MAP)

FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
FLOW_MAP_SCHEDULERS = FLOW_SCHEDULERS[:1]  # others take the prediction for the velocity at one time
DIFFUSION_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
)
STEPS, SOLVER_STEPS, MAP_STEPS = 20, 10, 2  # of sampling: by default, of flows by solvers of higher order, of flow maps
Values = TypeVar("Values", float, Tensor)
MAX_SHIFT_VOXELS = 10**9
TRAINED_WITH = ("beta_schedule", "prediction_type", "rescale_betas_zero_snr", "timestep_spacing")


def check_objective(objective: str) -> None:
    """Raise ValueError naming the known objectives."""
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; expected one of {', '.join(OBJECTIVES)}")


def check_train_steps(objective: str, train_steps: int | None) -> None:
    """Raise ValueError for a number of steps that the objective cannot have."""
    if train_steps is not None and objective in FLOWS:
        raise ValueError(f"train_steps {train_steps}: the time of {objective} is continuous; omit it")
    if train_steps is not None and train_steps < 2:
        raise ValueError(f"train_steps must be 2 or more, got {train_steps}")


def check_shift(objective: str, shift_voxels: int | None) -> None:
    """Raise ValueError for a shift of timesteps with an objective that has none."""
    if shift_voxels is not None and objective not in FLOWS:
        raise ValueError(
            f"shift_voxels {shift_voxels}: only {RECTIFIED_FLOW} shifts its timesteps by the number of latent voxels, "
            f"the noise schedule of {objective} is fixed; omit it, or set objective: {RECTIFIED_FLOW}"
        )


def default_sampler(objective: str, scheduler: str | None = None) -> tuple[str, int]:
    """Return the scheduler's class and the number of steps that a trained model samples with where its training does
    not say. On flows UniPC in 10 steps is as good as Euler in 20 (docs/quality_and_speed.md).

    Args:
        scheduler: the class, where that is given.
    """
    check_objective(objective)
    usual = {RECTIFIED_FLOW: UNIPC, FLOW_MAP: FLOW_MAP_SCHEDULERS[0]}.get(objective, "DDIMScheduler")
    name = scheduler or usual
    if objective == FLOW_MAP:
        return name, MAP_STEPS
    return name, SOLVER_STEPS if objective == RECTIFIED_FLOW and name in (DPM, UNIPC) else STEPS


def schedulers_of(objective: str) -> tuple[str, ...]:
    """Return the names of diffusers' schedulers that sample the objective."""
    flows = {RECTIFIED_FLOW: FLOW_SCHEDULERS, FLOW_MAP: FLOW_MAP_SCHEDULERS}
    return flows.get(objective, DIFFUSION_SCHEDULERS)


def make_scheduler(
    objective: str,
    train_steps: int = TRAIN_STEPS,
    *,
    name: str | None = None,
    bound: float | None = None,
    betas: Betas | None = None,
) -> Scheduler:
    """Build a scheduler for sampling: by default Euler for flows, DDIM on a cosine schedule (Nichol & Dhariwal
    2021) for v and eps. `default_sampler` names what trained models are sampled with.

    v starts at pure noise (Lin et al. 2024, section 3.3). eps must not: there the cosine schedule leaves 5e-5 of the
    image, by which x0 = (x - sqrt(1 - a) eps) / sqrt(a) divides the prediction's error. DDIM's first step of 20 is at
    t = 950, where 0.08 of the image is left. A sampler that visits all steps (DDPM) needs a `bound`.

    Args:
        train_steps: length of the schedule of v and eps.
        name: another scheduler class of diffusers, such as DDPMScheduler (Ho et al. 2020, Algorithm 2).
        bound: largest absolute value of a sample (`VolumeAutoencoder.latent_bound`), to which samplers clip x0 if they
            can.
        betas: noise schedule of v and eps, for models that others trained. Default: the cosine schedule.
    Raises: ValueError for a class that does not fit the objective.
    """
    check_objective(objective)
    if objective in FLOWS:
        default = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_STEPS)
    else:
        default = DDIMScheduler(
            num_train_timesteps=train_steps,
            **({"beta_schedule": COSINE} if betas is None else betas),  # pyright: ignore[reportArgumentType]
            prediction_type=objective,  # pyright: ignore[reportArgumentType]
            clip_sample=False,
            timestep_spacing="trailing" if objective == V_PREDICTION else "leading",
            rescale_betas_zero_snr=objective == V_PREDICTION,  # eps says nothing about the image at zero SNR
        )
    known = schedulers_of(objective)
    if name is not None and name not in known:
        raise ValueError(f"scheduler {name!r} does not fit {objective}; expected one of {', '.join(known)}")
    kind = type(default) if name is None else getattr(diffusers, name)
    clipping = {} if bound is None else {"clip_sample": True, "clip_sample_range": float(bound)}
    if not clipping.keys() <= inspect.signature(kind).parameters.keys():
        clipping = {}
    if kind is type(default) and not clipping:
        return default
    return fit_scheduler(kind.from_config(default.config, **clipping), objective, train_steps, betas=betas, bound=bound)


def fit_scheduler(
    scheduler: Scheduler,
    objective: str,
    train_steps: int = TRAIN_STEPS,
    *,
    shift: float = 1.0,
    betas: Betas | None = None,
    bound: float | None = None,
) -> Scheduler:
    """Return a new scheduler, never the same object, that fits the model's objective: a copy if the given one fits, a
    converted copy if it can be converted; otherwise it is refused. So a call's steps and history stay out of the
    pipeline, and calls may run side by side.

    `DPMSolverMultistepScheduler.from_config(flow_match.config)` silently gives an eps scheduler, and its samples are
    noise; this function prevents that. DPM-Solver++ and UniPC are converted to flows by `use_flow_sigmas`; schedulers
    of v and eps take on the noise schedule and the prediction type that the model was trained with. Only the classes in
    `FLOW_SCHEDULERS` and `DIFFUSION_SCHEDULERS` are accepted: tests/diffusion/test_denoise.py shows that each recovers
    x0 from a perfect denoiser, and others do not (DEIS and SA stop short of a flow's end, PNDM by default diverges,
    inverse schedulers run the other way). Clipping to [-1, 1] is switched off, as latents exceed it; clipping to a
    wider range, or to `bound`, stays.

    Every other option takes effect, is refused (`scheduler_options.check_options`), or is named in a warning. The shift
    of a flow has two names and is carried over: UniPC built from the config of a shifted Euler has Euler's shift.
    `timestep_spacing` is the model's unless it was set explicitly; eps models keep theirs, see `make_scheduler`.

    Args:
        shift: of the timesteps on one grid, `LatentDenoiser.timestep_shift`. It becomes the scheduler's own shift,
            which is Eq. 23 of Esser et al. 2024 in all four classes for flows. A scheduler that has a shift other than
            1, or spaces the levels otherwise (Karras, ...), keeps its levels, and a warning says so.
        betas: the noise schedule that a model of v or eps was trained with, where it is not the cosine schedule.
        bound: largest absolute value of a clean latent, where that is known.
    Raises: ValueError naming scheduler, objective and the ones that fit, or the option and its remedy.
    Warns: of options that were set explicitly and have no effect, and of a `shift` that has none.
    """
    check_objective(objective)
    name = type(scheduler).__name__
    flow = objective in FLOWS
    known = schedulers_of(objective)
    remedy = f"use one of {', '.join(known)}, or make_scheduler({objective!r})"
    if isinstance(scheduler, type):
        raise ValueError(
            f"the scheduler is the class {scheduler.__name__}; give {scheduler.__name__}.from_config(config)"
        )
    if name not in known:
        raise ValueError(f"{name} cannot sample a model that predicts {objective}; {remedy}")
    config = dict(scheduler.config)
    if config["num_train_timesteps"] != train_steps:
        raise ValueError(
            f"{name} counts {config['num_train_timesteps']} training steps, the model was trained with {train_steps} "
            f"(num_train_timesteps); {remedy}"
        )
    defaults, by_hand = parameters(type(scheduler)), chosen(scheduler)
    check_values(type(scheduler), {key: config[key] for key in defaults})
    wanted = _wanted(scheduler, objective, train_steps, by_hand, betas, bound)
    shifting = {} if shift == 1 else _shift(name, config | wanted, shift)
    wanted |= shifting
    options = {key: config[key] for key in defaults} | wanted
    check_options(type(scheduler), options, flow)
    changed = {key for key, value in wanted.items() if type(config[key]) is not type(value) or config[key] != value}
    usual = defaults | {
        "timestep_spacing": None if flow else make_scheduler(objective, train_steps).config.timestep_spacing
    }
    idle = {key for key in without_effect(name, options, flow) if options[key] not in (defaults[key], usual[key])}
    for key in sorted(by_hand & changed - set(SHIFTS)):
        warnings.warn(f"{name}: {key}={config[key]!r} does not fit this model; {wanted[key]!r} is taken", stacklevel=2)
    for key in sorted(by_hand & idle - changed):
        warnings.warn(
            f"{name}: {key}={config[key]!r} has no effect with this model and the other options", stacklevel=2
        )
    for key in FOREIGN:
        if config.get(key) and key not in defaults:
            warnings.warn(f"{name} has no option {key}; {key}={config[key]!r} has no effect", stacklevel=2)
    if not changed:
        return copy.deepcopy(scheduler)
    carried = set() if changed.isdisjoint(SHIFTS) else set(SHIFTS) - defaults.keys()  # under its other name
    fitted = type(scheduler).from_config({key: one for key, one in config.items() if key not in carried}, **wanted)
    if "shift" in shifting:  # Euler and Heun shift their last level in __init__, and again in set_timesteps
        fitted.sigma_min = 1 / train_steps
    return fitted


def _wanted(
    scheduler: Scheduler,
    objective: str,
    train_steps: int,
    by_hand: set[str],
    betas: Betas | None,
    bound: float | None,
) -> dict[str, object]:
    """Return the options that the model decides, as far as the scheduler's class has them."""
    name, config = type(scheduler).__name__, scheduler.config
    mine, other = SHIFTS if name.startswith("FlowMatch") else SHIFTS[::-1]
    if objective in FLOWS:
        wanted = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        if mine not in by_hand and other in by_hand:
            wanted[mine] = config[other]
        if hasattr(scheduler, "set_shift"):
            wanted["shift"] = wanted.get(mine, scheduler.shift)  # which the config does not know of
    else:
        trained = dict(make_scheduler(objective, train_steps, betas=betas).config)
        wanted = {key: trained[key] for key in (*TRAINED_WITH, *(betas or ()))} | {"use_flow_sigmas": False}
        if objective == V_PREDICTION and "timestep_spacing" in by_hand:
            del wanted["timestep_spacing"]
    widest = config["clip_sample_range"] if config.get("clip_sample") else 0.0
    clips = widest > 1 or widest == bound  # latents of unit variance exceed 1; voxels do not
    if objective == FLOW_MAP:
        wanted |= {"stochastic_sampling": False}  # it takes the prediction for the velocity at one time
    wanted |= {"trained_betas": None, "clip_sample": clips, "thresholding": False}
    return {key: value for key, value in wanted.items() if key in parameters(type(scheduler))}


def _shift(name: str, options: Mapping[str, Any], shift: float) -> dict[str, object]:
    """Return the option that shifts the levels of this class. Warns: where others space the levels already."""
    option = SHIFTS[0] if name.startswith("FlowMatch") else SHIFTS[1]
    own = [*spacing(options), *([option] if options[option] != 1 else [])]
    if not own:
        return {option: shift}
    given = ", ".join(f"{one}={options[one]!r}" for one in own)
    warnings.warn(
        f"{name}: {given} is taken for grids of all sizes, in place of the model's shift by the number of latent "
        f"voxels (shift_voxels), which is {shift:.3g} here",
        stacklevel=3,
    )
    return {}


# The shift of timesteps by the number of latent voxels.
#
# A fraction t of noise hides less of a large grid than of a small one, because neighbors that show the same structure
# average the noise out. Of a constant image of n values, seen at noise t, the value is known up to
# t / (1 - t) / sqrt(n). Equal uncertainty on grids of n and m values needs t_m = s t_n / (1 + (s - 1) t_n) with
# s = sqrt(m / n) (Esser et al. 2024, "Scaling Rectified Flow Transformers", section 5.3.2, Eq. 23).
#
# That argument counts values, not sides. So in 3-D all latent voxels count, and s is the square root of their ratio.
# MAISI takes the cube root instead (MONAI's `timestep_transform`, n = 32^3): the ratio of sides, which in 2-D is
# Eq. 23, and shifts less in 3-D. Channels do not count: they are not observations of one value.
#
# In training the shift moves the density of t: sigmoid(N(0, 1)) becomes sigmoid(N(log s, 1)). The loss at each t keeps
# its weight of 1, so this density is all of the weighting by t; a weight beside it would apply the shift twice.


def shift_of(sides: Sequence[int], base: int | None) -> float:
    """Return s = sqrt(m / n) of a grid of m = h w d latent voxels; 1 without a shift.

    Args:
        sides: (h, w, d).
        base: n, the number of latent voxels at which timesteps are not shifted (the U-Net's `shift_voxels`); None: they
            never are.
    """
    return 1.0 if base is None else math.sqrt(math.prod(sides) / base)


def shifted(timesteps: Values, shift: float | Tensor, end: float) -> Values:
    """Shift timesteps from 0 (clean) to `end` (noise), both of which stay (Esser et al. 2024, Eq. 23). A shift of 1
    changes no bit."""
    return shift * timesteps / (1 + (shift - 1) * (timesteps / end))  # pyright: ignore[reportReturnType]


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(-1, *[1] * (like.ndim - 1))


def sample_timesteps(
    objective: str, batch: int, generator: torch.Generator | Sequence[torch.Generator], train_steps: int = TRAIN_STEPS
) -> Tensor:
    """Sample random timesteps (B,) for training, on the generator's device; of several generators, each gives one.

    Rectified flow: sigma = sigmoid(n), n ~ N(0, 1), the logit-normal of Esser et al. 2024 (Eq. 19 with m = 0, s = 1).
    Else uniform integers.
    """
    if not isinstance(generator, torch.Generator):
        return torch.cat([sample_timesteps(objective, 1, one, train_steps) for one in generator])
    if objective in FLOWS:
        return TRAIN_STEPS * torch.sigmoid(torch.randn(batch, generator=generator, device=generator.device))
    return torch.randint(0, train_steps, (batch,), generator=generator, device=generator.device)


def noisy_and_target(
    objective: str,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    train_steps: int = TRAIN_STEPS,
    betas: Betas | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the noisy latents at `timesteps` (B,) and what the model should predict from them.

    Rectified flow (Liu et al. 2023, Eq. 1): x_t = (1 - sigma) x + sigma n, target n - x, sigma = t / 1000.
    eps (Ho et al. 2020, Eq. 4 and 14): x_t = sqrt(a) x + sqrt(1 - a) n, target n.
    v (Salimans & Ho 2022, section 4): target sqrt(a) n - sqrt(1 - a) x.

    Flow map: as rectified flow, for its step from t to 0; students learn from `diffusion.distillation.Teacher`.
    """
    if objective in FLOWS:
        sigma = _broadcast(timesteps / TRAIN_STEPS, latents)
        return (1 - sigma) * latents + sigma * noise, noise - latents
    scheduler: Any = DDPMScheduler.from_config(make_scheduler(objective, train_steps, betas=betas).config)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    if objective == EPSILON:
        return noisy, noise
    return noisy, scheduler.get_velocity(latents, noise, timesteps)
