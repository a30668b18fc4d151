"""The denoising loop that the pipeline, the training previews and the tests share."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from .conditioning import UNCONDITIONED, Conditions, ConditionSchema
from .guidance import Guidance, Guide, Interval, Prediction, interval_in_effect
from .scheduler_options import DPM, UNIPC, Scheduler, check_levels, is_flow, noise_shares, spacing

MAX_STEPS = 100_000
MIN_SPAN = 0.9  # of the schedule, that the steps must cover


@dataclass(frozen=True)
class StepChange:
    """What a callback changes for the following steps; None changes nothing. `stop` ends the loop."""

    latents: Tensor | None = None
    guidance_scale: float | Mapping[str, float] | None = None
    stop: bool = False


StepCallback = Callable[[int, Tensor, Tensor], StepChange | None]


@dataclass(frozen=True, eq=False)
class Autoguidance:
    """A weaker version of the U-Net, by which its predictions are guided (`guidance.autoguided`).

    Attributes:
        unet: predicts the same from the same latents and timesteps.
        conditions: the batch's, as this U-Net takes them.
        scale: up to 1 means none.
    """

    unet: nn.Module
    conditions: Conditions
    scale: float


class Schedule(TypedDict, total=False):
    """How a scheduler is asked for its steps: one of the two."""

    sigmas: Sequence[float] | np.ndarray
    num_inference_steps: int


def set_timesteps(
    scheduler: Scheduler, num_inference_steps: int, sigmas: Sequence[float] | None, device: torch.device
) -> Tensor:
    """Prepare the scheduler and return its timesteps.

    Without `sigmas`, a FlowMatch scheduler that takes them gets 1, 1 - 1/N, ..., 1/N: its own default ends at 0.001 and
    so wastes a step.
    Raises: ValueError if the scheduler takes no sigmas, they do not fall, options would move them, the number of steps
    is not positive, or these steps do not span the schedule (`_check_span`, `check_levels`).
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    if num_inference_steps > MAX_STEPS:
        raise ValueError(f"num_inference_steps is above {MAX_STEPS}; 20 are usual")
    if sigmas is not None and not (len(sigmas) and all(1 >= a > b for a, b in pairwise([*sigmas, 0]))):
        raise ValueError(f"sigmas are noise levels in (0, 1] that fall, such as 1, 0.75, 0.5, 0.25; got {sigmas}")
    name = type(scheduler).__name__
    takes_sigmas = is_flow(scheduler) and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    if sigmas is not None and not takes_sigmas:
        raise ValueError(f"{name} does not take sigmas: omit them, or use FlowMatchEulerDiscreteScheduler")
    if sigmas is not None:
        moved = spacing(scheduler.config) + [one for one in ("shift_terminal",) if scheduler.config[one] is not None]
        moved += ["shift"] if getattr(scheduler, "shift", 1) != 1 else []
        moved += ["flow_shift"] if scheduler.config.get("flow_shift", 1) != 1 else []
        if moved:
            raise ValueError(
                f"sigmas are used unchanged, but {name}'s {', '.join(moved)} would change them; omit either"
            )
    if sigmas is not None:
        schedule: Schedule = {"sigmas": np.array(sigmas, np.float64) if name == UNIPC else list(sigmas)}
    elif takes_sigmas and name != UNIPC:
        schedule = {"sigmas": np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps).tolist()}
    else:
        _check_span(scheduler, num_inference_steps)
        schedule = {"num_inference_steps": num_inference_steps}
    scheduler.set_timesteps(**schedule, device="cpu")  # to be looked at: the device may be one without data
    check_levels(scheduler, num_inference_steps if sigmas is None else len(sigmas), begins_anywhere=sigmas is not None)
    scheduler.set_timesteps(**schedule, device=device)
    if is_flow(scheduler) and name in (DPM, UNIPC):
        # diffusers rounds them down to whole numbers. The network would be told less noise than its input has, and
        # leave the difference in the result.
        exact = scheduler.sigmas[:-1] * scheduler.config["num_train_timesteps"]
        scheduler.timesteps = exact.to(device)
    return scheduler.timesteps


def _check_span(scheduler: Scheduler, num_inference_steps: int) -> None:
    """Check that the steps cover the schedule. Steps of v and eps are whole numbers of training steps, rounded down. So
    200 steps of a schedule of 300 are one training step long and begin at 199, where the sampler takes pure noise for
    half an image (DDIM: or step where they do not say).

    Raises: ValueError for more steps than were trained, and where rounding skips more than a tenth of the schedule,
    naming numbers of steps that fit.
    """
    config, name = scheduler.config, type(scheduler).__name__
    total, more = config["num_train_timesteps"], name in (DPM, UNIPC)
    if is_flow(scheduler):  # whose timesteps are fractions
        return
    evenly = config["timestep_spacing"] != "leading" and name != "DDIMScheduler"
    if evenly or (more and spacing(config)):
        if num_inference_steps > total:
            raise ValueError(
                f"num_inference_steps {num_inference_steps}: the model was trained with {total}; use {total}"
            )
        return

    def spans(steps: int) -> bool:  # those solvers divide by one more
        return total // (steps + more) * (steps + more) >= MIN_SPAN * total

    if not spans(num_inference_steps):
        fitting = [steps for steps in range(1, total + 1) if spans(steps)]
        near = [max((n for n in fitting if n < num_inference_steps), default=None)]
        near.append(min((n for n in fitting if n > num_inference_steps), default=None))
        raise ValueError(
            f"num_inference_steps {num_inference_steps} does not span the {total} steps of {name}'s schedule evenly; "
            f"use {' or '.join(str(n) for n in near if n)}"
        )


def steps_of(strength: float, num_inference_steps: int) -> int:
    """Return how many of the last steps an image of this strength goes through: strength * num_inference_steps, rounded
    down.

    Raises: ValueError for a strength outside (0, 1], and for one that gives no whole step.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength is above 0 and at most 1 (1 leaves nothing of the image), got {strength}")
    steps = math.floor(num_inference_steps * strength + 1e-6)  # 100 * 0.29 is 28.999999999999996
    if steps < 1:
        raise ValueError(
            f"strength {strength} of {num_inference_steps} steps is less than one step; raise either until their "
            "product is at least 1"
        )
    return steps


def noised(scheduler: Scheduler, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Add noise to clean latents (B, C, h, w, d), to the level at which the scheduler's next step begins, by the
    scheduler's formula.
    """
    add = scheduler.scale_noise if hasattr(scheduler, "scale_noise") else scheduler.add_noise
    return add(
        latents, noise=noise, **{"timestep" if hasattr(scheduler, "scale_noise") else "timesteps": timestep[None]}
    )


# Long: a third are its arguments; it is the one loop of all samplers, edits and guidance, read from top to bottom.
@torch.no_grad()
def denoise(
    unet: nn.Module,
    latents: Tensor,
    scheduler: Scheduler,
    conditions: Conditions,
    *,
    guidance_scale: Guidance = 1.0,
    guidance_interval: Interval | None = None,
    autoguidance: Autoguidance | None = None,
    schema: ConditionSchema = UNCONDITIONED,
    num_inference_steps: int = 20,
    sigmas: Sequence[float] | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    callback: StepCallback | None = None,
    progress: Callable[[int], Any] | None = None,
    count_calls: Callable[[int], object] | None = None,
    image: Tensor | None = None,
    strength: float = 1.0,
    region: Tensor | None = None,
    contrasts: Sequence[tuple[float, Conditions]] = (),
) -> Tensor:
    """Turn noise into latents. Deterministic, except for schedulers that add noise (they draw it from `generator`).

    With `image`, start from that image, noised to `strength` of the way (SDEdit, Meng et al. 2022). With `region` too,
    everything outside the region is replaced after each step by the image, noised with the same noise to the current
    level (Lugmayr et al. 2022, Eq. 8a; Avrahami et al. 2023, section 4.1).

    Args:
        latents: standard normal noise (B, C, h, w, d); scaled here to what the scheduler starts from.
        scheduler: one that fits the U-Net's objective (`fit_scheduler`). A flow map (`takes_next_timestep`) is told
            where each step ends.
        conditions: the batch's.
        guidance_scale: classifier-free guidance, one scale or one per condition (`guidance_terms`); up to 1 means none.
        guidance_interval: noise levels (lo, hi] in which guidance acts (`interval_in_effect`); elsewhere a step is one
            network call. Default: all.
        autoguidance: guidance by a weaker U-Net, beside `guidance_scale` and in the same interval.
        schema: the U-Net's `condition_schema`, by which conditions are guided by name.
        sigmas: noise levels to visit, descending from 1, instead of `num_inference_steps` even ones (Euler and UniPC of
            flows only).
        progress: called once, before the first step, with the number of timesteps; returns a tqdm bar or anything with
            its `update`.
        count_calls: called at the end with the number of network calls for each sample.
        callback: called after each step with (step, timestep, latents); returns a `StepChange` for the following steps,
            or None.
        image: clean latents (B, C, h, w, d).
        strength: in (0, 1], the fraction of the steps that is run, counted from the end; 1 starts from pure noise.
        region: bool (B, 1, h, w, d), True where latents are generated; elsewhere they are those of `image`.
        contrasts: (scale, conditions) from which the prediction is guided away, see `guidance.contrasted`.
    Returns: latents (B, C, h, w, d).
    Raises: ValueError as `set_timesteps` and `steps_of`.
    """
    timesteps = set_timesteps(scheduler, num_inference_steps, sigmas, latents.device)
    noise, latents = latents, latents * getattr(scheduler, "init_noise_sigma", 1.0)
    first = 0
    if image is not None:
        stages = scheduler.order  # timesteps a step; the last step of a solver of order 2 has one
        steps = -(-len(timesteps) // stages)
        first = (steps - steps_of(strength, steps)) * stages
        timesteps = timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):
        # otherwise it searches the timestep, and starts at the second one that equals it
        scheduler.set_begin_index(first)
    if image is not None:
        known = noised(scheduler, image, noise, timesteps[0])
        latents = known if first else latents if region is None else torch.where(region, latents, known)
    draws_noise = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if draws_noise else {}

    is_map = getattr(unet, "takes_next_timestep", False)
    end: dict[str, Tensor] = {}

    def predict(noisy: Tensor, timestep: Tensor, given: Conditions) -> Tensor:
        return unet(noisy, timestep, **given.as_kwargs(), **end, return_dict=False)[0]

    levels = noise_shares(scheduler)[first:]
    guide = Guide(predict, conditions, schema, guidance_scale, interval_in_effect(guidance_interval))
    guide.contrasts = contrasts
    if autoguidance is not None:
        guide.weak, guide.autoguidance = _weak_prediction(autoguidance), autoguidance.scale
    with nullcontext() if progress is None else progress(len(timesteps)) as bar:
        for step, timestep in enumerate(timesteps):
            scales = hasattr(scheduler, "scale_model_input")
            scaled = scheduler.scale_model_input(latents, timestep) if scales else latents
            if is_map:
                end["next_timestep"] = torch.zeros_like(timestep) if step + 1 == len(timesteps) else timesteps[step + 1]
            prediction = guide.at(levels[step])(scaled, timestep)
            latents = scheduler.step(prediction, timestep, latents, return_dict=False, **extra)[0]
            if image is not None and region is not None:
                last = step + 1 == len(timesteps)
                known = image if last else noised(scheduler, image, noise, timesteps[step + 1])
                latents = torch.where(region, latents, known)
            if bar is not None:
                bar.update()
            change = None if callback is None else callback(step, timestep, latents)
            if change is None:
                continue
            latents = latents if change.latents is None else change.latents
            if change.guidance_scale is not None:
                guide.rescale(change.guidance_scale)
            if change.stop:
                break
    if count_calls is not None:
        count_calls(guide.calls)
    return latents


def _weak_prediction(autoguidance: Autoguidance) -> Prediction:
    """Return the predictions of the weaker U-Net under its conditions."""
    unet, given = autoguidance.unet, autoguidance.conditions.as_kwargs()
    return lambda latents, timestep: unet(latents, timestep, **given, return_dict=False)[0]
