"""Train students of a tiny model with several losses for the same time, and compare their samples with the teacher's.

    OMP_NUM_THREADS=1 python -m benchmarks.distillation.compare --output docs/distillation.json
    python -m benchmarks.distillation.page docs/distillation.json --page docs/distillation.md

Phantoms of 8 x 8 x 8 voxels, conditioned on their masks; the latents are the standardized voxels, so that no
autoencoder has a part in it. The teacher is guided (scale 2). Losses: `trajectory` (diffusion.distillation: steps of
the teacher's own trajectories), `shortcut` (a step is two of half its length) and `meanflow` (the identity of
MeanFlow), see benchmarks.distillation.losses. All students begin as the teacher, have the same optimizer and rows of a
batch, and the same seconds of the processor; the learning rate ends with them.

Measured on masks of phantoms that neither model saw. `distance` is the root mean square of student minus teacher (20
steps), both sampled from the same noise; the latents' standard deviation is 1. `power` is that of the samples relative
to the teacher's, in dB, in the finest half of frequencies. `kernel` is the kernel distance of a random network's
statistics from real phantoms, and `floor` that of training phantoms.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from cli.command import ArgumentParser, run_command
from cli.settings import NonNegativeInt, Number, PositiveFloat, PositiveInt

LOSSES = ("trajectory", "shortcut", "meanflow")


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="report to write, a JSON file")
    parser.add_argument("--teacher_steps", type=Number(PositiveInt), default=800, help="training steps (800)")
    parser.add_argument("--seconds", type=Number(PositiveFloat), nargs="*", default=[15.0, 60.0], help="(15 60)")
    parser.add_argument("--samples", type=Number(PositiveInt), default=48, help="volumes of each set (48)")
    parser.add_argument("--seeds", type=Number(NonNegativeInt), nargs="*", default=[0], help="of the students (0)")
    parser.add_argument("--losses", nargs="*", choices=LOSSES, default=list(LOSSES), help="losses to compare (all)")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion import (
    Conditions,
    LatentUNet3D,
    denoise,
    drop_conditions,
    fit_scheduler,
    fold_mask,
    make_scheduler,
    training_loss,
)
from diffusion.distillation import Teacher
from diffusion.objectives import FLOW_MAP, RECTIFIED_FLOW
from evaluation.metrics.features import RandomStatistics
from evaluation.report import Provenance, check_report, provenance, write_report
from training import OptimizerConfig
from training.encoder_distance import kernel_distance
from training.engine.learner import Learner
from volumes import make_phantom

from .losses import meanflow_loss, shortcut_loss

SIDE, TRAINING, BATCH, UNSEEN = 8, 64, 4, 1000
CALLS, STEPS, PAIRS, GUIDANCE = (1, 2, 4), 20, 4, 2.0
DROPOUT = {"mask": 0.1}
LABELS = 4


class Row(TypedDict):
    """Samples of a model with a number of calls of its U-Net. A teacher was not trained here."""

    model: str
    calls: int
    distance: float
    power: float
    kernel: float
    floor: float
    seconds: float | None
    seed: int | None
    steps: int | None


class Report(Provenance):
    """The JSON file."""

    rows: list[Row]
    guidance: float
    teacher_steps: int
    samples: int
    load: float


def new_network(objective: str = RECTIFIED_FLOW) -> LatentUNet3D:
    """Return a U-Net with random weights."""
    return LatentUNet3D(
        1, 1, channels=(16, 32), strides=(2,), blocks=(1, 2), attention=(False, True), head_dim=16,
        num_labels=LABELS, mask_stride=1, mask_width=8, condition_dropout=DROPOUT, objective=objective,
    )  # fmt: skip


def phantoms(first: int, count: int) -> tuple[Tensor, Conditions]:
    """Return standardized phantoms (count, 1, 8, 8, 8), and their masks."""
    pairs = [make_phantom(first + number, (SIDE, SIDE, SIDE))[:2] for number in range(count)]
    values, masks = (torch.from_numpy(np.stack([pair[i].array for pair in pairs])) for i in (0, 1))
    standardized = (values.float() - 132) / 223  # as phantoms of all sizes
    return standardized, Conditions(mask=fold_mask(masks[:, 0], (1, 1, 1), LABELS))


def sample(unet: LatentUNet3D, conditions: Conditions, name: str | None, steps: int, guidance: float) -> Tensor:
    """Generate volumes, from the same noise for all models."""
    assert conditions.mask is not None
    noise = torch.randn((len(conditions.mask), 1, SIDE, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    objective = unet.config["objective"]
    scheduler = fit_scheduler(make_scheduler(objective, name=name), objective)
    schema = unet.condition_schema
    return denoise(
        unet, noise, scheduler, conditions, guidance_scale=guidance, schema=schema, num_inference_steps=steps
    )


def fine_power(volumes: Tensor) -> float:
    """Return the mean power in the finest half of frequencies, in dB."""
    power = torch.fft.fftn(volumes.double(), dim=(2, 3, 4)).abs() ** 2
    axes = torch.meshgrid(*[torch.fft.fftfreq(SIDE)] * 3, indexing="ij")
    fine = sum(axis**2 for axis in axes) >= 0.25**2
    return 10 * math.log10(float(power[..., fine].mean()))


def features(volumes: Tensor) -> np.ndarray:
    """Return the statistics (N, F) of a random network."""
    return RandomStatistics()((volumes / 6 + 0.5).clamp(0, 1)).numpy()


class Bench:
    """The teacher, its samples, and what the samples of others are compared with."""

    def __init__(self, teacher_steps: int, samples: int):
        self.data, self.conditions = phantoms(0, TRAINING)
        self.real, self.unseen = phantoms(UNSEEN, samples)
        self.weight = torch.ones(1, 1, SIDE, SIDE, SIDE)
        torch.manual_seed(0)
        network, steps = new_network(), teacher_steps
        self.unet = self._fit(network, partial(training_loss, objective=RECTIFIED_FLOW), 0, steps=steps)[0].eval()
        scheduler = make_scheduler(RECTIFIED_FLOW, name="UniPCMultistepScheduler")
        self.teacher = Teacher(self.unet, scheduler, 8, GUIDANCE, calls=CALLS, pairs=PAIRS)
        self.reference = sample(self.unet, self.unseen, None, STEPS, GUIDANCE)
        sets = [features(self.data[:samples]), features(self.real)]
        self.mean, self.spread = sets[0].mean(0), math.sqrt(sets[0].var(0).mean())
        self.floor = kernel_distance(*(self._scaled(rows) for rows in sets))

    def _scaled(self, rows: np.ndarray) -> np.ndarray:
        return (rows - self.mean) / self.spread

    def row(self, model: str, calls: int, volumes: Tensor, **facts: Any) -> Row:
        """Measure samples."""
        found = kernel_distance(self._scaled(features(volumes)), self._scaled(features(self.real)))
        return {
            "model": model,
            "calls": calls,
            "distance": float(((volumes - self.reference) ** 2).mean().sqrt()),
            "power": fine_power(volumes) - fine_power(self.reference),
            "kernel": found,
            "floor": self.floor,
            **{"seconds": None, "seed": None, "steps": None, **facts},
        }  # pyright: ignore[reportReturnType]

    def _fit(
        self, network: LatentUNet3D, loss: Callable[..., Tensor], seed: int, *, steps: int | None = None,
        seconds: float = math.inf, rows: int = BATCH, needs_average: bool = False,
    ) -> tuple[LatentUNet3D, int]:  # fmt: skip
        """Train for so many steps, or seconds of the processor. Returns the average, and the steps."""
        learner = Learner("unet", network, OptimizerConfig(warmup_steps=20), ema_decay=0.99, max_steps=steps or 10**9)
        learner.prepare(Accelerator(cpu=True))
        order, begin, taken = torch.Generator().manual_seed(seed), time.process_time(), 0
        more = {"average": learner.average} if needs_average else {}
        while (spent := time.process_time() - begin) < seconds and taken != steps:
            if taken and steps is None:
                learner.max_steps = max(taken + 1, round(taken * seconds / spent))
            chosen = torch.randint(len(self.data), (rows,), generator=order)
            generators = [torch.Generator().manual_seed(seed * 10**9 + taken * rows + row) for row in range(rows)]
            given = self.conditions.map(lambda tensor, chosen=chosen: tensor[chosen])
            given = drop_conditions(given, network.condition_schema, DROPOUT, generators)
            weight = self.weight.expand(rows, -1, -1, -1, -1)
            learner.backward(
                loss(
                    learner.model,
                    latents=self.data[chosen],
                    conditions=given,
                    weight=weight,
                    generator=generators,
                    **more,
                )
            )
            learner.update(taken)
            taken += 1
        return learner.average, taken

    def student(self, name: str, seconds: float, seed: int) -> list[Row]:
        """Train a student with a loss, and measure it at each number of calls."""
        torch.manual_seed(seed)
        network = new_network(FLOW_MAP)
        network.load_state_dict(self.unet.state_dict(), strict=False)
        losses: Mapping[str, Callable[..., Tensor]] = {
            "trajectory": partial(training_loss, objective=FLOW_MAP, teacher=self.teacher),
            "shortcut": partial(shortcut_loss, teacher=self.teacher),
            "meanflow": partial(meanflow_loss, teacher=self.teacher),
        }
        own = name == "trajectory"  # whose rows are PAIRS of each sample
        average, steps = self._fit(
            network, losses[name], seed, seconds=seconds, rows=BATCH if own else BATCH * PAIRS, needs_average=not own
        )
        facts = {"seconds": seconds, "seed": seed, "steps": steps}
        return [self.row(name, calls, sample(average, self.unseen, None, calls, 1.0), **facts) for calls in CALLS]


def main(args: Sequence[str] | None = None) -> None:
    """Train, measure and write the report."""
    options = parse(args)
    check_report(options.output)
    bench, rows = Bench(options.teacher_steps, options.samples), []
    for name, steps in ((None, STEPS), (None, 2), (None, 4), ("UniPCMultistepScheduler", 8)):
        label = f"teacher, {'Euler' if name is None else 'UniPC'}"
        rows.append(bench.row(label, 2 * steps, sample(bench.unet, bench.unseen, name, steps, GUIDANCE)))
    for seconds in options.seconds:
        for name in options.losses:
            for seed in options.seeds:
                rows += bench.student(name, seconds, seed)
                print(*(f"{row['model']} {row['calls']}: {row['distance']:.3f}" for row in rows[-3:]), flush=True)
    report: Report = {
        "rows": rows,
        "guidance": GUIDANCE,
        "teacher_steps": options.teacher_steps,
        "samples": options.samples,
        "load": os.getloadavg()[0],
        **provenance(),
    }
    write_report(options.output, report)
