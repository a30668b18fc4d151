"""Train a tiny U-Net on hippocampus latents with changes of the loss, and compare what equally many steps learn.

    OMP_NUM_THREADS=1 nice -n 19 python -m benchmarks.learning.per_step --output docs/learning_per_step.json

Each change has a plain training beside it with the same seed: the same initial weights, batches, timesteps (but for
`uniform`) and noise. Both have the trainer's own step, optimizer and moving average, and are judged by the trainer's
own validation loss, which no change weighs.

- `uniform` (rectified flow): timesteps are uniform instead of logit-normal (Esser et al. 2024). As the validation loss
  draws its timesteps logit-normal too, `by_timestep` says more.
- `align` (rectified flow): the coarsest features are mapped by a small network to the clean latents under them, and 1
  minus the cosine of both is added to the loss with a weight of 0.5 (as REPA, Yu et al. 2025, but with the
  autoencoder's own latents as the target, as in SRA 2, so that there is no second encoder). It acts on latent voxels
  inside the field of view alone.
- `min_snr` (v and eps): each volume's error counts by min(SNR, 5) / SNR for eps, and by min(SNR, 5) / (SNR + 1) for v
  (Hang et al. 2023, section 3.4).

Trainings that --output already has are not repeated, so an interrupted comparison continues, or takes more seeds.
`by_timestep` is the loss at fixed timesteps after the last step, from the same noise for all trainings. `arithmetic`
is the factor by which `align` multiplies the floating-point operations of a training step.
"""

import argparse
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from cli.command import ArgumentParser, run_command
from cli.settings import NonNegativeInt, Number, PositiveInt


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="report to write, a JSON file")
    parser.add_argument("--work", type=Path, default=Path("output/learning_per_step"), help="where latents are cached")
    parser.add_argument("--data.root", dest="root", default="data/hippocampus", help="folder of the volumes")
    parser.add_argument("--steps", type=Number(PositiveInt), default=150, help="of each training (150)")
    parser.add_argument("--every", type=Number(PositiveInt), default=30, help="steps between validations (30)")
    parser.add_argument("--seeds", type=Number(NonNegativeInt), nargs="+", default=[0, 1, 2], help="(0 1 2)")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import train_ldm
from diffusion import LatentUNet3D, make_scheduler
from diffusion.objectives import (
    EPSILON,
    RECTIFIED_FLOW,
    TRAIN_STEPS,
    V_PREDICTION,
    noisy_and_target,
    sample_timesteps,
)
from evaluation.report import Provenance, check_report, provenance, read_report, write_report
from evaluation.stats.intervals import over_seeds
from pipelines.storage.loading import load_autoencoder
from training.build import build_model
from training.engine.learner import Learner
from training.engine.step import Training
from training.ldm import build
from training.ldm_config import TrainLdmConfig
from training.ldm_step import LdmTrainingStep, build_step

ALIGN, GAMMA = 0.5, 5.0
PLAIN = "plain"
ARMS = {
    RECTIFIED_FLOW: (PLAIN, "align", "uniform"),
    V_PREDICTION: (PLAIN, "min_snr"),
    EPSILON: (PLAIN, "min_snr"),
}
TIMES = [50 + 100 * number for number in range(10)]  # of 1000
HELD_OUT = 9  # volumes that are validated
UNET = (
    "{class: diffusion.LatentUNet3D, channels: [16, 32], strides: [2], blocks: [1, 1], attention: [false, true], "
    "head_dim: 16, mask_width: 16, condition_dropout: {mask: 0.1}}"
)
CACHE = "{versions: 8, flip_axes: [0], shift: true, rotate: 8, scale: 0.08, deform: 1.2}"


class Run(TypedDict):
    """One training. `loss` is by step."""

    objective: str
    arm: str
    seed: int
    loss: dict[str, float]
    by_timestep: dict[str, float]
    seconds_of_training: float


class Figure(TypedDict):
    """The mean over the seeds, its 95 % interval, and the seeds."""

    mean: float
    interval: list[float] | None
    by_seed: list[float]


class Compared(TypedDict):
    """One change beside the plain trainings, see `compare`."""

    loss: Figure
    even: Figure
    share_of_steps: list[float | None]


class Report(Provenance):
    """The JSON file. `compared` is by objective and change."""

    steps: int
    batch: int
    align_weight: float
    gamma: float
    arithmetic: dict[str, float]
    compared: dict[str, Compared]
    runs: list[Run]
    load: float


def alignment(features: Tensor, latents: Tensor, weight: Tensor, head: nn.Module, stride: Sequence[int]) -> Tensor:
    """Return 1 minus the cosine of what `head` makes of the features and the latents under them.

    Args:
        features: (B, F, h', w', d').
        latents: clean (B, C, h, w, d).
        weight: (B, 1, h, w, d), zero in padding. Only cells that are inside the field of view as a whole count.
        stride: latent voxels per feature along each axis.
    """
    sides = [n * s for n, s in zip(features.shape[2:], stride, strict=True)]
    missing = [n - have for n, have in zip(sides, latents.shape[2:], strict=True)]
    ends = (0, missing[2], 0, missing[1], 0, missing[0])
    cells = folded(F.pad(latents * weight, ends), stride)
    inside = folded(F.pad(weight, ends), stride).amin(1)
    cosine = F.cosine_similarity(head(features).float(), cells, dim=1)
    return ((1 - cosine) * inside).sum() / inside.sum().clamp_min(1.0)


def folded(values: Tensor, stride: Sequence[int]) -> Tensor:
    """Move each block of (B, C, h, w, d) into channels: (B, C * block, h / stride, ...)."""
    a, b, c = stride
    batch, channels, h, w, d = values.shape
    blocks = values.reshape(batch, channels, h // a, a, w // b, b, d // c, c)
    return blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def min_snr(timesteps: Tensor, objective: str) -> Tensor:
    """Return how much the error of v or eps counts at each timestep: as that of the image would, times min(SNR, 5)."""
    share: Tensor = make_scheduler(objective).alphas_cumprod[timesteps]
    snr = share / (1 - share)
    return snr.clamp(max=GAMMA) / (snr + (objective == V_PREDICTION))


def changed_loss(
    network: Any,
    objective: str,
    latents: Tensor,
    conditions: Any,
    weight: Tensor,
    generators: Sequence[torch.Generator],
    *,
    arm: str,
    head: nn.Module,
) -> Tensor:
    """Compute the loss of an arm, as `diffusion.training_loss` but for the change."""
    timesteps = sample_timesteps(objective, len(latents), generators)
    if arm == "uniform":
        timesteps = torch.cat([TRAIN_STEPS * torch.rand(1, generator=one) for one in generators])
    noise = torch.cat([torch.randn(latents[:1].shape, generator=one) for one in generators])
    noisy, target = noisy_and_target(objective, latents, noise, timesteps)
    unet: LatentUNet3D = getattr(network, "module", network)
    seen: list[Tensor] = []
    hook = unet.down_blocks[-1][-1].register_forward_hook(lambda *called: seen.append(called[-1]))  # pyright: ignore[reportIndexIssue]
    prediction = network(noisy * weight, timesteps, **conditions.as_kwargs(), return_dict=False)[0]
    hook.remove()
    error = ((prediction - target) ** 2 * weight).flatten(1).sum(1)
    loss = error / (weight.flatten(1).sum(1) * latents.shape[1]).clamp_min(1.0)
    if arm == "min_snr":
        loss = loss * min_snr(timesteps, objective)
    mean = loss.mean()
    if arm == "align":
        mean = mean + ALIGN * alignment(seen[0], latents, weight, head, unet.downsamplers[-1].stride)  # pyright: ignore[reportArgumentType]
    return mean


def head_of(unet: LatentUNet3D) -> nn.Module:
    """Build the small network that maps the coarsest features to the latents under them."""
    stride: Sequence[int] = unet.downsamplers[-1].stride  # pyright: ignore[reportAssignmentType]
    width, cell = unet.config["channels"][-1], int(np.prod(stride))
    return nn.Sequential(
        nn.Conv3d(width, 2 * width, 1), nn.SiLU(), nn.Conv3d(2 * width, cell * unet.config["in_channels"], 1)
    )


def batch_of(training: Training, seed: int, step: int, size: int) -> Any:
    """Return the batch of a step, the same for all arms."""
    order = np.random.default_rng((seed, step))
    assert training.collate is not None
    return training.collate([training.data[int(index)] for index in order.integers(len(training.data), size=size)])


def generators_of(seed: int, step: int, size: int) -> list[torch.Generator]:
    """Return a generator for each sample of a batch."""
    return [torch.Generator().manual_seed(1_000_003 * seed + 101 * step + number) for number in range(size)]


class Comparison:
    """What all trainings share: data, autoencoder and settings."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.options, self.config = options, settings(options)
        self.training = build(self.config, self.accelerator)  # which also completes the model's settings
        self.vae = load_autoencoder(self.config.vae)
        count = len(self.training.validation)
        self.items = [self.training.validation[index * count // HELD_OUT] for index in range(HELD_OUT)]

    def step_of(self, objective: str, seed: int) -> tuple[LdmTrainingStep, Learner[nn.Module]]:
        """Return the training step of a fresh U-Net, and the learner of its head."""
        torch.manual_seed(seed)
        unet: LatentUNet3D = build_model(self.config.model | {"objective": objective})
        step = build_step(self.config, unet, self.vae)
        torch.manual_seed(seed)
        head = Learner("head", head_of(unet), self.config.optimizer, ema_decay=0.0, max_steps=self.options.steps)
        for learner in (step.unet, head):
            learner.prepare(self.accelerator)
        return step, head

    def train(self, objective: str, arm: str, seed: int) -> Run:
        """Train one arm, and measure it."""
        step, head = self.step_of(objective, seed)
        plain, changed = step.loss, partial(changed_loss, arm=arm, head=head.model)
        size, losses, seconds = self.config.loop.batch_size, dict[str, float](), 0.0
        for number in range(self.options.steps):
            begin = time.process_time()
            step.loss = changed
            step(batch_of(self.training, seed, number, size), generators_of(seed, number, size))
            step.unet.update(number)
            if arm == "align":
                head.update(number)
            step.loss = plain
            seconds += time.process_time() - begin
            if (number + 1) % self.options.every == 0 or number + 1 == self.options.steps:
                losses[str(number + 1)] = self.loss(step)
        return Run(
            objective=objective,
            arm=arm,
            seed=seed,
            loss=losses,
            by_timestep=self.by_timestep(step),
            seconds_of_training=round(seconds, 1),
        )

    def loss(self, step: LdmTrainingStep) -> float:
        """Return the trainer's validation loss, from the same noise for all."""
        found = [step.validate(item, torch.Generator().manual_seed(n))["loss"] for n, item in enumerate(self.items)]
        return float(np.mean(found))

    @torch.no_grad()
    def by_timestep(self, step: LdmTrainingStep) -> dict[str, float]:
        """Return the loss at `TIMES`."""
        found = []
        for number, item in enumerate(self.items):
            latents = item["latents"].expand(len(TIMES), *item["latents"].shape[1:])
            weight = item["inside"].to(latents)
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(number))
            times = torch.tensor(TIMES, dtype=torch.float32 if step.objective == RECTIFIED_FLOW else torch.int64)
            noisy, target = noisy_and_target(step.objective, latents, noise, times)
            given = item["conditions"].map(lambda values: values.expand(len(TIMES), *values.shape[1:]))
            error = step.unet.average(noisy * weight, times, **given.as_kwargs()).sample - target
            found.append((error**2 * weight).flatten(1).sum(1) / (weight.sum() * latents.shape[1]))
        return {str(time): value for time, value in zip(TIMES, torch.stack(found).mean(0).tolist(), strict=True)}

    def arithmetic(self) -> float:
        """Return by which factor `align` multiplies the floating-point operations of a training step."""
        counts = []
        for arm in (PLAIN, "align"):
            step, head = self.step_of(RECTIFIED_FLOW, 0)
            step.loss = partial(changed_loss, arm=arm, head=head.model)
            with FlopCounterMode(display=False) as counter:
                step(batch_of(self.training, 0, 0, 2), generators_of(0, 0, 2))
            counts.append(counter.get_total_flops())
        return counts[1] / counts[0]


def settings(options: argparse.Namespace) -> TrainLdmConfig:
    """Return the settings of all trainings."""
    return train_ldm.parse(
        [
            "--config=configs/hippocampus/ldm.yaml",
            f"--output={options.work}",
            "--vae=weights/hippocampus/vae",
            f"--data.root={options.root}",
            f"--cache={CACHE[:-1]}, folder: {options.work / 'latents'}}}",
            f"--model={UNET}",
            "--residual_noise=false",
            "--optimizer={learning_rate: 1e-3, warmup_steps: 20}",
            f"--loop.max_steps={options.steps}",
            "--loop.batch_size=4",
            "--loop.ema_decay=0.98",
        ]
    )


def compare(runs: Sequence[Run], steps: int) -> dict[str, Compared]:
    """Compare each change with the plain training of the same seed, each figure with its interval over the seeds.

    Returns, for each change: `loss` at the last step and `even`, the mean of `by_timestep`, both relative to the plain
    training's (negative is better), and after which share of the steps its loss was that of the plain training's end
    (None if it never was).
    """
    found: dict[str, Compared] = {}
    for objective, arms in ARMS.items():
        for arm in arms[1:]:
            pairs = [(a, b) for a in runs for b in runs if a["objective"] == b["objective"] == objective
                     and (a["arm"], b["arm"]) == (arm, PLAIN) and a["seed"] == b["seed"]]  # fmt: skip
            if not pairs:
                continue
            last = str(steps)
            loss = [a["loss"][last] / b["loss"][last] - 1 for a, b in pairs]
            even = [sum(a["by_timestep"].values()) / sum(b["by_timestep"].values()) - 1 for a, b in pairs]
            ends = [reached(a["loss"], b["loss"][last]) for a, b in pairs]
            found[f"{objective}: {arm}"] = {
                "loss": figure(loss),
                "even": figure(even),
                "share_of_steps": [None if end is None else end / steps for end in ends],
            }
    return found


def figure(values: list[float]) -> Figure:
    """Return the mean of a value of each seed, with its interval."""
    return {"mean": float(np.mean(values)), "interval": over_seeds(values), "by_seed": values}


def reached(curve: dict[str, float], goal: float) -> float | None:
    """Return the step at which a curve is at `goal` for the first time, between validations by a straight line."""
    before: tuple[float, float] | None = None
    for name, loss in curve.items():
        step = float(name)
        if loss <= goal:
            if before is None:
                return step
            return before[0] + (step - before[0]) * (before[1] - goal) / max(before[1] - loss, 1e-12)
        before = (step, loss)
    return None


def earlier(options: argparse.Namespace) -> list[Run]:
    """Return the trainings of the report that is there. Raises: ValueError if they had other steps."""
    if not options.output.exists():
        return []
    report = read_report(options.output, Report, "benchmarks.learning.per_step")
    if report["steps"] != options.steps:
        raise ValueError(f"{options.output}: has trainings of {report['steps']} steps, not {options.steps}")
    return report["runs"]


def main(args: Sequence[str] | None = None) -> None:
    """Train and compare, and write the report after each training."""
    options = parse(args)
    check_report(options.output)
    runs = earlier(options)
    comparison = Comparison(options)
    arithmetic = comparison.arithmetic()
    for seed in options.seeds:
        for objective, arms in ARMS.items():
            for arm in arms:
                if any((run["objective"], run["arm"], run["seed"]) == (objective, arm, seed) for run in runs):
                    continue
                runs.append(comparison.train(objective, arm, seed))
                print(runs[-1], flush=True)
                report: Report = {
                    "steps": options.steps,
                    "batch": comparison.config.loop.batch_size,
                    "align_weight": ALIGN,
                    "gamma": GAMMA,
                    "arithmetic": {"align": arithmetic},
                    "compared": compare(runs, options.steps),
                    "runs": runs,
                    "load": os.getloadavg()[0],
                    **provenance(),
                }
                write_report(options.output, report)
