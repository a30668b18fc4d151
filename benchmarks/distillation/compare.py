"""Train students of a pipeline with several losses for the same time, and compare their samples with the teacher's.

    OMP_NUM_THREADS=1 python -m benchmarks.distillation.compare --config configs/hippocampus/distill.yaml \
        --output docs/distillation.json
    python -m benchmarks.distillation.page docs/distillation.json --page docs/distillation.md

Losses: `trajectory` (diffusion.distillation: steps of the teacher's own trajectories), `shortcut` (a step is two of
half its length) and `meanflow` (the identity of MeanFlow), see benchmarks.distillation.losses. All students begin as
the teacher, and have the optimizer, batch size and average of the config; the learning rate ends with the time.

Measured on the validation volumes of the config, which are training subjects that no student learns from. `distance` is
the root mean square of student minus teacher, both sampled from the same noise, in latents, whose standard deviation is
about 1. `power` is that of the volumes relative to the real ones, in dB. `kernel` is the kernel distance from the real
volumes in the features of the autoencoder's encoder, beside that of training volumes. Residual noise is not added.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveFloat, PositiveInt

LOSSES = ("trajectory", "shortcut", "meanflow")
CALLS = (1, 2, 4)


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="config of train_ldm.py with a `distill` section")
    parser.add_argument("--output", type=Path, required=True, help="report to write, a JSON file")
    parser.add_argument("--work", type=Path, required=True, help="folder of the latents and of the students")
    parser.add_argument("--losses", nargs="*", choices=LOSSES, default=list(LOSSES), help="losses to compare (all)")
    parser.add_argument("--students", type=Path, nargs="*", default=[], help="trained pipelines to measure as well")
    parser.add_argument("--minutes", type=Number(PositiveFloat), default=5.0, help="of each training (5)")
    parser.add_argument("--volumes", type=Number(PositiveInt), default=18, help="validation volumes, at most (18)")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion import LatentUNet3D, denoise, fit_scheduler, make_scheduler
from diffusion.objectives import FLOW_MAP, RECTIFIED_FLOW
from evaluation.metrics.spectrum import BAND_EDGES, mean_band_power, ratio_db
from evaluation.report import check_report, provenance, write_report
from pipelines import MedVolumePipeline
from training.encoder_distance import EncoderDistance, box
from training.engine.config import parse_config
from training.engine.sampling_order import derive_seed
from training.held_out import EncodedVolume
from training.ldm import LdmTrainingStep, build
from training.ldm_config import TrainLdmConfig

from .losses import meanflow_loss, shortcut_loss


class Row(TypedDict, total=False):
    """Samples of one model in one way. `power` is by band, from the first edge on."""

    model: str
    calls: int
    distance: float | None
    kernel: float
    floor: float
    power: list[float]
    steps: int
    samples: int
    minutes: float


class Bench:
    """What all students share: the built run of the config, the validation volumes and the teacher's samples."""

    def __init__(self, options: argparse.Namespace):
        self.config = parse_config(TrainLdmConfig, [f"--config={options.config}", f"--output={options.work / 'run'}"])
        self.config.loop.sample_every = 1  # for EncoderDistance
        self.training = build(self.config, Accelerator(cpu=True))
        step = self.training.step
        assert isinstance(step, LdmTrainingStep) and isinstance(step.realism, EncoderDistance)
        self.step, self.realism, self.vae = step, step.realism, step.vae
        self.teacher = step.loss.keywords["teacher"]
        self.items: list[EncodedVolume] = [self.training.validation[i] for i in range(len(self.training.validation))]
        self.items = self.items[: options.volumes]
        self.real = [self._inside(item["image"], item) for item in self.items]
        self.real_power = mean_band_power(self.real)

    def _inside(self, image: Tensor, item: EncodedVolume) -> np.ndarray:
        return image[:, *box(item["fov"])][0].float().clamp(-1, 1).numpy()

    @torch.no_grad()
    def samples(self, unet: LatentUNet3D, scheduler: Any, steps: int, guidance: Any) -> list[Tensor]:
        """Return the latents of all validation volumes, always from the same noise."""
        latents = []
        for number, item in enumerate(self.items):
            noise = torch.randn(item["latents"].shape, generator=torch.Generator().manual_seed(number))
            shift = unet.timestep_shift(noise.shape[2:])
            fitted = fit_scheduler(scheduler, unet.config["objective"], unet.train_steps, shift=shift)
            schema = unet.condition_schema
            given = {"guidance_scale": guidance, "schema": schema, "num_inference_steps": steps}
            latents.append(denoise(unet, noise, fitted, item["conditions"], **given))
        return latents

    @torch.no_grad()
    def row(self, model: str, calls: int, latents: list[Tensor], reference: list[Tensor] | None) -> Row:
        """Measure samples."""
        volumes = [self.vae.decode(one, return_dict=False)[0][0].float().clamp(-1, 1) for one in latents]
        count = min(len(self.items), len(self.realism.training))
        pairs = list(zip(volumes, self.items, strict=True))
        found = self.realism.compare([self.realism.row(*pair, i, count) for i, pair in enumerate(pairs)])
        power = mean_band_power([self._inside(*pair) for pair in pairs])
        distance = None
        if reference is not None:
            squares = [float(((a - b) ** 2).mean()) for a, b in zip(latents, reference, strict=True)]
            distance = float(np.sqrt(np.mean(squares)))
        return Row(
            model=model, calls=calls, distance=distance, kernel=found["kernel_distance"],
            floor=found["kernel_distance/floor"], power=[float(p) for p in ratio_db(power, self.real_power)],
        )  # fmt: skip

    def student_rows(self, name: str, unet: LatentUNet3D, reference: list[Tensor], **more: Any) -> list[Row]:
        """Measure a student at each number of calls."""
        rows = []
        for calls in CALLS:
            latents = self.samples(unet, make_scheduler(FLOW_MAP), calls, 1.0)
            rows.append(self.row(name, calls, latents, reference) | more)
            print(json.dumps(rows[-1]), flush=True)
        return rows

    def loss_of(self, name: str, average: LatentUNet3D) -> Callable[..., Tensor]:
        """Return the loss of a name."""
        if name == "trajectory":
            return lambda model, *batch: self.step.loss(model, FLOW_MAP, *batch)
        chosen = {"shortcut": shortcut_loss, "meanflow": meanflow_loss}[name]
        return partial(chosen, teacher=self.teacher, average=average)

    def train(self, name: str, minutes: float) -> tuple[LatentUNet3D, dict[str, float]]:
        """Train a student for so many minutes. Returns its average, and the steps and samples that it took."""
        training = build(self.config, Accelerator(cpu=True))
        step = training.step
        assert isinstance(step, LdmTrainingStep)
        learner = step.unet
        learner.prepare(Accelerator(cpu=True))
        loss = self.loss_of(name, learner.average)
        rows = self.config.loop.batch_size * (1 if name == "trajectory" else self.teacher.pairs // 2)
        step.loss = lambda model, _, *batch: loss(model, *batch)
        order = np.random.default_rng(0)
        spent, taken, learner.max_steps = 0.0, 0, 10**9
        while spent < 60 * minutes:
            training.data.set_epoch(taken)  # another version of each volume
            items = [training.data[int(i)] for i in order.integers(0, len(training.data), rows)]
            start = time.perf_counter()
            generators = [torch.Generator().manual_seed(derive_seed(0, taken, i)) for i in range(rows)]
            value = step(training.collate(items), generators)["loss"]
            learner.update(taken)
            taken, spent = taken + 1, spent + time.perf_counter() - start
            learner.max_steps = max(taken + 1, round(taken * 60 * minutes / spent))
            if taken % 20 == 0:
                print(f"{name} step {taken} of about {learner.max_steps}: loss {float(value):.4f}", flush=True)
        return learner.average, {"steps": taken, "samples": taken * rows, "minutes": minutes}


def main(args: Sequence[str] | None = None) -> None:
    """Train, measure and write the report."""
    options = parse(args)
    check_report(options.output)
    bench, rows = Bench(options), []
    teacher = bench.teacher
    reference = bench.samples(teacher.unet, make_scheduler(RECTIFIED_FLOW), 20, teacher.guidance)
    rows.append(bench.row("real latents", 0, [item["latents"] for item in bench.items], None))
    rows.append(bench.row("teacher, Euler", 40, reference, reference))
    for name, steps in (("FlowMatchEulerDiscreteScheduler", 2), ("FlowMatchEulerDiscreteScheduler", 4),
                        ("UniPCMultistepScheduler", 4), ("UniPCMultistepScheduler", 8),
                        ("DPMSolverMultistepScheduler", 8)):  # fmt: skip
        latents = bench.samples(teacher.unet, make_scheduler(RECTIFIED_FLOW, name=name), steps, teacher.guidance)
        short = name.removesuffix("Scheduler").removesuffix("Discrete").removesuffix("Multistep")
        rows.append(bench.row(f"teacher, {short}", 2 * steps, latents, reference))
    for row in rows:
        print(json.dumps(row), flush=True)
    for folder in options.students:
        rows += bench.student_rows(folder.name, MedVolumePipeline.from_pretrained(folder).unet.eval(), reference)
    for name in options.losses:
        average, facts = bench.train(name, options.minutes)
        rows += bench.student_rows(name, average, reference, **facts)
    write_report(options.output, {"rows": rows, "bands": list(BAND_EDGES), "load": os.getloadavg()[0], **provenance()})


if __name__ == "__main__":
    run_command(main)
