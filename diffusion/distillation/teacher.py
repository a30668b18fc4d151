"""The teacher of a flow map: its trajectories, and the steps of them that a student learns.

A flow map u(x_t, t, s) is the average velocity from time t to time s, so that x_s = x_t + (s - t) u (Boffi et al. 2024;
Geng et al. 2025, Eq. 3). The student regresses on the steps of its teacher's own sampling, guidance included: the
teacher goes all the way from noise (Luhman & Luhman 2021) or from a noised image, once for each sample of the batch,
and several steps of that trajectory are targets. The minimizer of this loss is the teacher's map itself, whatever the
student predicts meanwhile; a loss that asks a student to agree with itself has no such anchor in a short run.

Axes of latents: (B, C, h, w, d). Times are in the scheduler's units, 0 (clean) to 1000 (noise).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..conditioning import Conditions
from ..denoise import Autoguidance, StepChange, denoise
from ..denoiser import LatentDenoiser
from ..guidance import Guidance, Interval, check_guidance
from ..objectives import RECTIFIED_FLOW, TRAIN_STEPS, fit_scheduler
from ..scheduler_options import Scheduler

Generators = torch.Generator | list[torch.Generator]


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained flow, and how it samples.

    Args:
        unet: in evaluation mode, on the device of the training.
        scheduler: the teacher's. It must be deterministic, with one call of the U-Net a step.
        steps: of its sampling; a multiple of each of `calls`.
        guidance: its guidance, which the student learns.
        interval: noise levels (lo, hi] in which its guidance acts; None: all.
        weak: its weaker U-Net, for autoguidance.
        autoguidance: the scale of it, which the student learns as well; up to 1 means none.
        calls: the numbers of steps in which the student samples. It learns the steps of each.
        pairs: steps of each trajectory that a batch is asked for.
        from_images: share of trajectories that begin at a noised image, as editing does; the others begin at noise.
        autocast: context of the teacher's calls.
    Raises: ValueError naming what does not fit.
    """

    unet: LatentDenoiser
    scheduler: Scheduler
    steps: int = 20
    guidance: Guidance = 1.0
    interval: Interval | None = None
    weak: LatentDenoiser | None = None
    autoguidance: float = 1.0
    calls: Sequence[int] = (1, 2, 4)
    pairs: int = 8
    from_images: float = 0.0
    autocast: Callable[[], AbstractContextManager] = nullcontext

    def __post_init__(self) -> None:
        objective = self.unet.config["objective"]
        if objective != RECTIFIED_FLOW:
            raise ValueError(f"the teacher predicts {objective}; a flow map has a teacher of {RECTIFIED_FLOW}")
        fitted = fit_scheduler(self.scheduler, objective, self.unet.train_steps)
        name, options = type(fitted).__name__, fitted.config
        if fitted.order != 1:
            raise ValueError(f"{name} calls the teacher {fitted.order} times a step; use UniPCMultistepScheduler")
        if options.get("stochastic_sampling") or options.get("algorithm_type", "").startswith("sde"):
            raise ValueError(f"{name} adds noise, so noise does not decide the image; use UniPCMultistepScheduler")
        schema = self.unet.condition_schema
        names = [*(["mask"] if schema.mask else []), *schema.classes, *schema.numbers, *dict(schema.images)]
        check_guidance(self.guidance, schema.dropout, names)
        if not self.calls:
            raise ValueError("calls is empty: give the numbers of steps in which the student samples, such as 1, 2, 4")
        if odd := [count for count in self.calls if self.steps % count]:
            raise ValueError(f"{self.steps} steps of the teacher are no multiple of {odd} calls of the student")
        if self.from_images and not self._beginnings:
            raise ValueError(f"from_images {self.from_images}: with calls {list(self.calls)} all steps begin at noise")

    @property
    def _spans(self) -> list[tuple[int, int]]:
        """The steps that the student learns, from and to which of the teacher's levels, by the number of calls."""
        return [
            (step * self.steps // count, (step + 1) * self.steps // count)
            for count in sorted(self.calls)
            for step in range(count)
        ]

    @property
    def _beginnings(self) -> list[int]:
        """The levels below noise at which a step begins."""
        return sorted({begin for begin, _ in self._spans if begin})

    @torch.no_grad()
    def steps_of_map(
        self, latents: Tensor, conditions: Conditions, weight: Tensor, generator: Generators
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample one trajectory for each sample of the batch, and take `pairs` steps of each.

        Args:
            latents: clean latents (B, C, h, w, d), at which some trajectories begin.
            conditions: the batch's, with folded masks.
            weight: (B, 1, h, w, d), zero in the padding.
            generator: as in `training_loss`.
        Returns: noisy latents, average velocities (pairs * B, C, h, w, d), and the times (pairs * B,) at which the
            steps begin and end. Row i is of sample i % B.
        """
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        chances = _uniform(generator, len(latents), 2 + self.pairs)
        first = [self._begin(*row[:2]) for row in chances.tolist()]
        states, levels = self.trajectories(latents, noise, conditions, weight, first)
        spans = [
            self._span(begin, (number + chance) / self.pairs)
            for number in range(self.pairs)
            for begin, chance in zip(first, chances[:, 2 + number].tolist(), strict=True)
        ]
        rows = torch.arange(len(spans)) % len(latents)
        begins, ends = torch.tensor(spans).unbind(1)
        t, s = levels[begins, rows], levels[ends, rows]
        noisy, after = states[begins, rows], states[ends, rows]
        velocity = (noisy - after) / (t - s).view(-1, *[1] * (latents.ndim - 1))
        return noisy, velocity, TRAIN_STEPS * t, TRAIN_STEPS * s

    def _begin(self, chance: float, place: float) -> int:
        """Return the level at which a trajectory begins, from two numbers in [0, 1)."""
        beginnings = self._beginnings
        return beginnings[int(place * len(beginnings))] if chance < self.from_images else 0

    def _span(self, first: int, chance: float) -> tuple[int, int]:
        """Return a step of the student at or after level `first`: each number of calls is as frequent as the others,
        and so is each step of one number. `chance` in [0, 1) decides."""
        spans = [(begin, end) for begin, end in self._spans if begin >= first]
        shares = torch.tensor([float(end - begin) for begin, end in spans])  # a step of n calls has 1 / n of the levels
        return spans[min(int((shares.cumsum(0) / shares.sum() <= chance).sum()), len(spans) - 1)]

    def trajectories(
        self, latents: Tensor, noise: Tensor, conditions: Conditions, weight: Tensor, first: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Sample as the teacher's pipeline does, and keep all steps.

        Args:
            first: of each sample, the level at which it begins: 0 at noise, others at its noised image.
        Returns: the latents at each level (steps + 1, B, C, h, w, d), zero before a sample's first, and the levels
            (steps + 1, B), from 1 to 0.
        """
        conditions, given = _embedded(self.unet, conditions), conditions
        weak = None if self.weak is None else Autoguidance(self.weak, _embedded(self.weak, given), self.autoguidance)
        states = latents.new_zeros(self.steps + 1, *latents.shape)
        levels = latents.new_zeros(self.steps + 1, len(latents))
        cells = [int(count) for count in weight.flatten(1).sum(1)]
        shifts = [self.unet.timestep_shift((count, 1, 1)) for count in cells]
        groups: dict[tuple[int, float], list[int]] = {}
        for row, group in enumerate(zip(first, shifts, strict=True)):
            groups.setdefault(group, []).append(row)
        for (begin, shift), rows in groups.items():
            scheduler = fit_scheduler(self.scheduler, RECTIFIED_FLOW, self.unet.train_steps, shift=shift)
            inside = weight[rows]
            start, own = noise[rows] * inside, _rows(conditions, rows)
            own_weak = None if weak is None else replace(weak, conditions=_rows(weak.conditions, rows))

            def keep(step: int, timestep: Tensor, after: Tensor, *, begin=begin, rows=rows, inside=inside):
                states[begin + step + 1, rows] = after * inside
                return StepChange(after * inside)

            image = {"image": latents[rows] * inside, "strength": (self.steps - begin) / self.steps} if begin else {}
            with self.autocast():
                denoise(
                    self.unet, start, scheduler, own, guidance_scale=self.guidance, guidance_interval=self.interval,
                    autoguidance=own_weak, schema=self.unet.condition_schema, num_inference_steps=self.steps,
                    callback=keep, **image,
                )  # fmt: skip
            levels[:, rows] = scheduler.sigmas.to(levels)[:, None]
            at = levels[begin, rows].view(-1, *[1] * (latents.ndim - 1))
            states[begin, rows] = start if not begin else (1 - at) * latents[rows] * inside + at * start
        return states, levels


def _embedded(unet: LatentDenoiser, conditions: Conditions) -> Conditions:
    """Return the conditions with the mask embedded, once and not at each step."""
    if unet.mask_embedding is None or conditions.mask is None:
        return conditions
    return replace(conditions, mask=unet.embed_mask(conditions.mask))


def _rows(conditions: Conditions, rows: Sequence[int]) -> Conditions:
    return conditions.map(lambda tensor: tensor[rows])


def _uniform(generator: Generators, batch: int, count: int) -> Tensor:
    """Return numbers (B, count) in [0, 1) on the CPU; of several generators, each gives a row."""
    if isinstance(generator, torch.Generator):
        return torch.rand(batch, count, generator=generator, device=generator.device).cpu()
    return torch.cat([_uniform(one, 1, count) for one in generator])
