"""Losses of a flow map that need no whole trajectory of the teacher, over which `diffusion.distillation` was chosen.

Both ask the student about noised training latents, and about itself. Times are fractions of noise, in [0, 1].
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from diffusion import Conditions
from diffusion.distillation import Teacher
from diffusion.guidance import guidance_terms, guided
from diffusion.objectives import TRAIN_STEPS

Generators = Sequence[torch.Generator]
EPS = 0.01  # of the finite difference
FINEST = 8  # steps of the finest level of `shortcut_loss`


def column(values: Tensor) -> Tensor:
    """Return (B,) as (B, 1, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1, 1)


class Question:
    """A batch of noised latents, and what teacher and student say of it."""

    def __init__(self, unet: Any, latents: Tensor, conditions: Conditions, weight: Tensor, teacher: Teacher):
        self.unet, self.latents, self.conditions, self.weight = unet, latents, conditions, weight
        schema = teacher.unet.condition_schema

        def predict(noisy: Tensor, timestep: Tensor, given: Conditions) -> Tensor:
            times = timestep.repeat(len(noisy) // len(timestep))
            return teacher.unet(noisy, times, **given.as_kwargs(), return_dict=False)[0]

        self._guided = guided(predict, guidance_terms(conditions, schema, teacher.guidance))

    def noised(self, noise: Tensor, t: Tensor) -> Tensor:
        """Return the noised latents at times (B,)."""
        return ((1 - column(t)) * self.latents + column(t) * noise) * self.weight

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the teacher's guided velocity."""
        return self._guided(x, t * TRAIN_STEPS) * self.weight

    def student(self, x: Tensor, t: Tensor, s: Tensor, unet: nn.Module | None = None) -> Tensor:
        """Return the student's average velocity from t to s."""
        model = self.unet if unet is None else unet
        times = {"next_timestep": s * TRAIN_STEPS}
        return model(x, t * TRAIN_STEPS, **self.conditions.as_kwargs(), **times, return_dict=False)[0] * self.weight

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared error inside the field of view, as `training_loss` does."""
        cells = self.weight.flatten(1).sum(1) * prediction.shape[1]
        return (((prediction - target) ** 2).flatten(1).sum(1) / cells).mean()


def _noise(latents: Tensor, generators: Generators, count: int) -> tuple[Tensor, Tensor]:
    noise = randn_tensor(latents.shape, generator=list(generators))
    return noise, torch.cat([torch.rand(1, count, generator=one) for one in generators])


def shortcut_loss(
    unet: Any, *, latents: Tensor, conditions: Conditions, weight: Tensor, generator: Generators,
    teacher: Teacher, average: nn.Module,
) -> Tensor:  # fmt: skip
    """Ask for one step where the average of the student's weights takes two (Frans et al. 2024, Eq. 4).

    The finest steps are the teacher's, by the midpoint rule.
    """
    ask = Question(unet, latents, conditions, weight, teacher)
    noise, chances = _noise(latents, generator, 2)
    levels = [1, 2, 4, FINEST]
    counts = torch.tensor([levels[int(chance * len(levels))] for chance in chances[:, 0].tolist()])
    t = 1 - (chances[:, 1] * counts).floor() / counts
    s = t - 1 / counts
    x, middle = ask.noised(noise, t), (t + s) / 2
    with torch.no_grad():
        finest = counts == FINEST
        first = torch.where(column(finest), ask.velocity(x, t), ask.student(x, t, middle, average))
        between = x - column(t - middle) * first
        second = torch.where(column(finest), ask.velocity(between, middle), ask.student(between, middle, s, average))
        target = torch.where(column(finest), second, (first + second) / 2)
    return ask.error(ask.student(x, t, s), target)


def meanflow_loss(
    unet: Any, *, latents: Tensor, conditions: Conditions, weight: Tensor, generator: Generators,
    teacher: Teacher, average: nn.Module,
) -> Tensor:  # fmt: skip
    """Ask for v - (t - s) du/dt, the identity of MeanFlow (Geng et al. 2025, Eq. 6).

    v is the teacher's velocity; du/dt is a finite difference along it. In a quarter of the samples s is t.
    """
    ask = Question(unet, latents, conditions, weight, teacher)
    noise, chances = _noise(latents, generator, 3)
    t = torch.maximum(chances[:, 0], chances[:, 1]).clamp_min(EPS)
    t = torch.where(chances[:, 0] < 0.25, torch.ones_like(t), t)  # noise, where all sampling begins
    s = torch.where(chances[:, 2] < 0.25, t, torch.where(chances[:, 2] < 0.5, 0 * t, chances[:, 1] * t))
    x = ask.noised(noise, t)
    with torch.no_grad():
        velocity = ask.velocity(x, t)
        before = ask.student(x - EPS * velocity, t - EPS, torch.minimum(s, t - EPS))
    prediction = ask.student(x, t, s)
    change = (prediction.detach() - before) / EPS
    return ask.error(prediction, velocity - column(t - s) * change)
