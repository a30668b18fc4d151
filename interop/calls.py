"""A pipeline's sampling as a table: which calls of the U-Net there are, and how their results are added up.

A deterministic sampler without clipping is linear: what the U-Net is called with is a sum of the noise and of its
earlier predictions, each times a number that depends on the schedule alone. So Euler, UniPC, DPM-Solver++ and DDIM,
with guidance and its interval, are all a table of numbers, and one short loop runs them anywhere.
"""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn

from diffusion import Conditions, denoise
from diffusion.conditioning import ABSENT, ConditionSchema
from diffusion.guidance import Guidance, Interval
from diffusion.scheduler_options import Scheduler

LINEAR = 1e-4  # a table reproduces the scheduler's result to this fraction of its largest value
DIGITS = 9  # of a number in the table, which are those of float32


class NetworkCall(TypedDict):
    """One call of the U-Net: its input is the sum of `coefficients` times the noise and the predictions so far.

    `mask` is whether it is given the mask; guidance calls it without. `next_timestep` is that of a flow map, else None.
    """

    coefficients: list[float]
    timestep: float
    next_timestep: float | None
    mask: bool


class SamplingTable(TypedDict):
    """All calls, in order, and the coefficients of the final latents."""

    calls: list[NetworkCall]
    final: list[float]


class _Recorder(nn.Module):
    """A U-Net whose predictions are unit vectors, so that what it is called with shows the coefficients."""

    def __init__(self, takes_next_timestep: bool):
        super().__init__()
        self.takes_next_timestep = takes_next_timestep
        self.calls: list[NetworkCall] = []

    def forward(
        self, sample: Tensor, timestep: Tensor, mask: Tensor, next_timestep: Tensor | None = None, **_: object
    ) -> tuple[Tensor]:
        """Note a call for each sample of the batch, which guidance makes. Returns the unit vectors of their numbers."""
        predictions = torch.zeros_like(sample)
        for row, given, prediction in zip(sample, mask, predictions, strict=True):
            self.calls.append(
                {
                    "coefficients": _numbers(row, len(self.calls) + 1),
                    "timestep": float(timestep),
                    "next_timestep": None if next_timestep is None else float(next_timestep),
                    "mask": bool(given != ABSENT["mask"]),
                }
            )
            prediction[len(self.calls)] = 1
        return (predictions,)


class _Replay(nn.Module):
    """A U-Net with given predictions, whatever it is called with."""

    def __init__(self, predictions: Sequence[Tensor], takes_next_timestep: bool):
        super().__init__()
        self.predictions, self.takes_next_timestep = iter(predictions), takes_next_timestep

    def forward(self, sample: Tensor, *_: object, **__: object) -> tuple[Tensor]:
        """Return the next ones, one for each sample of the batch."""
        return (torch.cat([next(self.predictions) for _ in sample]),)


def sampling_table(
    scheduler: Scheduler,
    steps: int,
    *,
    guidance_scale: Guidance,
    guidance_interval: Interval | None,
    schema: ConditionSchema,
    takes_next_timestep: bool = False,
) -> SamplingTable:
    """Write down what `denoise` does with a scheduler, for a U-Net whose one condition is a mask.

    Args:
        scheduler: fitted to the U-Net; it is changed.
        steps: denoising steps.
        schema: the U-Net's.
    Raises: ValueError for a sampler that adds noise, or clips: no table can say what it does.
    """

    def run(unet: nn.Module, noise: Tensor) -> tuple[Tensor, int]:
        calls: list[int] = []
        latents = denoise(
            unet,
            noise,
            scheduler,
            Conditions(mask=torch.ones(1)),
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            schema=schema,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            count_calls=calls.append,
        )
        return latents, calls[0]

    zeros = torch.zeros(1, 1, 1, 1, 1)
    _, count = run(_Replay([zeros] * (4 * steps), takes_next_timestep), zeros)  # at most two stages, each guided
    recorder, noise = _Recorder(takes_next_timestep), torch.zeros(1, count + 1, 1, 1, 1)
    noise[:, 0] = 1
    final = _numbers(run(recorder, noise)[0], count + 1)

    known = 3 * torch.randn(count + 1, 1, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    expected, _ = run(_Replay(list(known[1:]), takes_next_timestep), known[0])
    found = torch.tensordot(torch.tensor(final), known, dims=1)
    if not (found - expected).abs().max() <= LINEAR * expected.abs().max():
        raise ValueError(
            f"{type(scheduler).__name__}: adds noise between steps, or clips, and a table of numbers cannot say that; "
            "give the pipeline one without either: UniPC, DDIM with clip_sample=False, or for a flow "
            "FlowMatchEulerDiscreteScheduler"
        )
    return {"calls": recorder.calls, "final": final}


def _numbers(latents: Tensor, count: int) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in latents.flatten()[:count].tolist()]
