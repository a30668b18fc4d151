"""Train a tiny diffusion model at two latent sizes, with and without the timestep shift, and compare the results.

    OMP_NUM_THREADS=1 python -m benchmarks.learning.timestep_shift --output docs/timestep_shift.json
    python -m benchmarks.learning.shift_page docs/timestep_shift.json --page docs/large_latents.md

Phantoms of both sizes show the same structures. The latents are the standardized voxels, so that no autoencoder has a
part in it. Networks, steps, batches and seeds are equal. At the smaller size the shift is 1 (it is `shift_voxels`), so
there is one model. At the larger size there is one with and one without the shift, and each samples both ways, so that
the effects in training and in sampling can be told apart.

`unknown` needs no training: how unsure noisy latents leave it which of 64 phantoms they show, as a fraction of log 64,
by Bayes' rule; this decides the structures that an ideal denoiser has to choose. `--seeds` alone measures only that.

Losses are on phantoms that were not trained on, at fixed timesteps. Samples are compared with such phantoms by the
kernel distance of their means over 4 x 4 x 4 blocks (`coarse`: where the structures are) and of a random network's
statistics (`local`: textures and edges), each beside the distance of training phantoms (`floor`).
"""

import argparse
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from cli.command import ArgumentParser, run_command
from cli.settings import NonNegativeInt, Number, PositiveInt

SIDES = (8, 16)


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="report to write, a JSON file")
    parser.add_argument("--steps", type=Number(PositiveInt), default=400, help="training steps of each model (400)")
    parser.add_argument("--samples", type=Number(PositiveInt), default=48, help="volumes of each set (48)")
    parser.add_argument("--seeds", type=Number(NonNegativeInt), nargs="*", default=[0, 1], help="of trainings (0 1)")
    parser.add_argument("--sides", type=Number(PositiveInt), nargs=2, default=list(SIDES), help="8 or more (8 16)")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from diffusion import Conditions, LatentUNet3D, denoise, fit_scheduler, make_scheduler, training_loss
from diffusion.objectives import RECTIFIED_FLOW, TRAIN_STEPS, noisy_and_target, shift_of, shifted
from evaluation.metrics.features import RandomStatistics
from evaluation.report import Provenance, check_report, provenance, write_report
from training import OptimizerConfig
from training.encoder_distance import kernel_distance
from training.engine.learner import Learner
from volumes import make_phantom

TRAINING, BATCH, INFERENCE_STEPS = 64, 4, 20
TIMES = (50, 200, 400, 600, 800, 900, 950, 980)  # of 1000
BLOCKS = 4  # of the coarse means, along each axis


class Distance(TypedDict):
    """Kernel distances from unseen phantoms, of samples and of training phantoms."""

    generated: float
    floor: float


class Row(TypedDict):
    """One trained model at one size. `samples` is by whether the sampling was shifted, then by the features."""

    side: int
    seed: int
    trained_with_shift: bool
    shift: float
    seconds_of_training: float
    loss_by_timestep: dict[str, float]
    samples: dict[str, dict[str, Distance]]


class Report(Provenance):
    """The JSON file. `unknown` is by side, by how timesteps are shifted, and by timestep."""

    steps: int
    samples: int
    shift_voxels: int
    batch: int
    unknown: dict[str, dict[str, dict[str, float]]]
    models: list[Row]
    load: float


def latents(first: int, count: int, side: int) -> Tensor:
    """Return phantoms (count, 1, side, side, side) with a mean of 0 and a variance of 1 over all of them."""
    images = [make_phantom(first + number, (side, side, side))[0].array for number in range(count)]
    values = torch.from_numpy(np.stack(images)).float()
    return (values - 132) / 223  # the mean and the std of phantoms of all sizes


@torch.no_grad()
def unknown(side: int, shift: float) -> dict[str, float]:
    """Return the entropy of which phantom noisy latents show, over log `TRAINING`, by the timestep before the shift."""
    data, found = latents(0, TRAINING, side).flatten(1).double(), {}
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0)).double()
    for timestep in TIMES:
        t = shifted(timestep / TRAIN_STEPS, shift, 1)
        distance = torch.cdist((1 - t) * data + t * noise, (1 - t) * data)
        chance = torch.softmax(-(distance**2) / (2 * t**2), 1)
        found[str(timestep)] = float(torch.special.entr(chance).sum(1).mean() / math.log(TRAINING))
    return found


def train(side: int, seed: int, base: int | None, steps: int) -> LatentUNet3D:
    """Train a model without conditions, and return its average."""
    torch.manual_seed(seed)
    network = LatentUNet3D(
        1, 1, channels=(8, 16, 24), strides=(2, 2), blocks=(1, 1, 2), attention=(False, False, True), head_dim=12,
        shift_voxels=base,
    )  # fmt: skip
    learner = Learner("unet", network, OptimizerConfig(warmup_steps=20), ema_decay=0.99, max_steps=steps)
    learner.prepare(Accelerator(cpu=True))
    data, weight = latents(0, TRAINING, side), torch.ones(BATCH, 1, side, side, side)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        batch = data[torch.randint(len(data), (BATCH,), generator=generator)]
        loss = training_loss(learner.model, RECTIFIED_FLOW, batch, Conditions(), weight, generator, shift_voxels=base)
        learner.backward(loss)
        learner.update(step)
    return learner.average


@torch.no_grad()
def losses(unet: LatentUNet3D, data: Tensor) -> dict[str, float]:
    """Return the loss of unseen latents at each of `TIMES`, from the same noise for all models."""
    found = {}
    for time_ in TIMES:
        generator, errors = torch.Generator().manual_seed(0), []
        for batch in data.split(BATCH):
            noise = torch.randn(batch.shape, generator=generator)
            timesteps = torch.full((len(batch),), float(time_))
            noisy, target = noisy_and_target(RECTIFIED_FLOW, batch, noise, timesteps, TRAIN_STEPS)
            errors.append(F.mse_loss(unet(noisy, timesteps).sample, target).item())
        found[str(time_)] = float(np.mean(errors))
    return found


def sample(unet: LatentUNet3D, side: int, count: int, shift: float) -> Tensor:
    """Generate volumes, from the same noise for all models."""
    scheduler = fit_scheduler(make_scheduler(RECTIFIED_FLOW), RECTIFIED_FLOW, shift=shift)
    noise = torch.randn((count, 1, side, side, side), generator=torch.Generator().manual_seed(1))
    parts = noise.split(8)
    return torch.cat([denoise(unet, p, scheduler, Conditions(), num_inference_steps=INFERENCE_STEPS) for p in parts])


def features(volumes: Tensor) -> dict[str, np.ndarray]:
    """Return (N, F) arrays of the coarse and the local features."""
    coarse = F.adaptive_avg_pool3d(volumes, BLOCKS).flatten(1)
    local = RandomStatistics()((volumes / 6 + 0.5).clamp(0, 1))
    return {"coarse": coarse.numpy(), "local": local.numpy()}


def distances(generated: Tensor, training: Tensor, unseen: Tensor) -> dict[str, Distance]:
    """Compare samples with unseen phantoms."""
    sets = {"generated": features(generated), "training": features(training), "unseen": features(unseen)}
    found: dict[str, Distance] = {}
    for name in ("coarse", "local"):
        mean, spread = sets["training"][name].mean(0), math.sqrt(sets["training"][name].var(0).mean())
        rows = {key: (of_set[name] - mean) / spread for key, of_set in sets.items()}  # corners alone have no spread
        found[name] = {
            "generated": kernel_distance(rows["generated"], rows["unseen"]),
            "floor": kernel_distance(rows["training"], rows["unseen"]),
        }
    return found


def measure(side: int, seed: int, base: int, shifting: bool, steps: int, count: int) -> Row:
    """Train one model, and measure it."""
    begin = time.perf_counter()
    unet = train(side, seed, base if shifting else None, steps)
    seconds = time.perf_counter() - begin
    shift, unseen = shift_of([side] * 3, base), latents(1000, count, side)
    training = latents(0, min(count, TRAINING), side)
    return {
        "side": side,
        "seed": seed,
        "trained_with_shift": shifting,
        "shift": shift,
        "seconds_of_training": round(seconds, 1),
        "loss_by_timestep": losses(unet, unseen),
        "samples": {
            name: distances(sample(unet, side, count, value), training, unseen)
            for name, value in {"even": 1.0, **({} if math.isclose(shift, 1) else {"shifted": shift})}.items()
        },
    }


def main(args: Sequence[str] | None = None) -> None:
    """Measure, and write the report after each model."""
    options = parse(args)
    check_report(options.output)
    small, large = options.sides
    rows: list[Row] = []
    runs = [(large, False), (large, True), (small, False)]
    shifts = {side: shift_of([side] * 3, small**3) for side in options.sides}
    powers = {"even": 0, "shifted": 1, "cube_root": 2 / 3}  # MAISI's is the cube root of the ratio of latent voxels
    exact = {
        str(side): {name: unknown(side, shift**power) for name, power in powers.items()}
        for side, shift in shifts.items()
    }
    for seed, (side, shifting) in [(None, (small, False)), *((seed, run) for seed in options.seeds for run in runs)]:
        if seed is not None:
            rows.append(measure(side, seed, small**3, shifting, options.steps, options.samples))
            print(rows[-1], flush=True)
        report: Report = {
            "steps": options.steps,
            "samples": options.samples,
            "shift_voxels": small**3,
            "batch": BATCH,
            "unknown": exact,
            "models": rows,
            "load": os.getloadavg()[0],
            **provenance(),
        }
        write_report(options.output, report)
