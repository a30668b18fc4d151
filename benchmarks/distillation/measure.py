"""Compare a student with its teacher on the validation volumes of its training, which it did not learn from.

    OMP_NUM_THREADS=1 python -m benchmarks.distillation.measure --run output/hippocampus/student --output REPORT.json

`distance` is the root mean square of student minus teacher, both sampled from the same noise, in latents, whose
standard deviation is about 1; the teacher takes its own steps. `power` is that of the volumes relative to the real ones
in dB, by band of 0.05 cycles a voxel. `kernel` is the kernel distance from the real volumes in the features of the
autoencoder's encoder, and `floor` that of training volumes. Residual noise is not added.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveInt


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the student's run")
    parser.add_argument("--student", type=Path, help="its pipeline (RUN/pipeline)")
    parser.add_argument("--output", type=Path, required=True, help="report to write, a JSON file")
    parser.add_argument("--calls", type=Number(PositiveInt), nargs="*", default=[1, 2, 4], help="(1 2 4)")
    parser.add_argument("--volumes", type=Number(PositiveInt), default=18, help="validation volumes, at most (18)")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion import LatentDenoiser, denoise, fit_scheduler, make_scheduler
from diffusion.denoise import Autoguidance
from diffusion.distillation import Teacher
from diffusion.objectives import FLOW_MAP, RECTIFIED_FLOW
from diffusion.scheduler_options import Scheduler
from evaluation.metrics.spectrum import BAND_EDGES, mean_band_power, ratio_db
from evaluation.report import Provenance, check_report, provenance, write_report
from pipelines import MedVolumePipeline
from pipelines.storage.loading import load_autoencoder
from training.distill import load_teacher
from training.encoder_distance import EncoderDistance, box
from training.engine.config import parse_config
from training.held_out import EncodedVolume, encode_held_out
from training.ldm import image_latents
from training.ldm_config import TrainLdmConfig
from training.splits import PaddedVolumes, load_split


class Row(TypedDict):
    """Samples of a model with a number of calls of its U-Net; `power` is by band."""

    model: str
    calls: int
    distance: float
    kernel: float
    floor: float
    power: list[float]


class Report(Provenance):
    """The JSON file. `bands` are the edges of the bands of `power`, in cycles a voxel."""

    rows: list[Row]
    volumes: int
    bands: list[float]
    load: float


class Bench:
    """The validation volumes, and the teacher's samples of them."""

    def __init__(self, config: TrainLdmConfig, count: int):
        self.vae, rank = load_autoencoder(config.vae), Accelerator(cpu=True)
        self.teacher = load_teacher(config, self.vae, rank)[0]
        train, held_out = load_split(config.data)
        if held_out is None:
            raise ValueError("the run has no validation volumes: set data.validation_fraction")
        images, labels = image_latents(config.data, self.vae), self.teacher.unet.config["num_labels"]
        items = encode_held_out(held_out, self.vae, config, rank, labels, images)
        self.items: list[EncodedVolume] = [items[i] for i in range(min(count, len(items)))]
        self.realism = EncoderDistance(self.vae, PaddedVolumes(train, self.vae.stride))
        self.real_power = mean_band_power([self._inside(item["image"], item) for item in self.items])
        self.reference, self.calls = self.taught(self.teacher.scheduler, self.teacher.steps)

    def _inside(self, image: Tensor, item: EncodedVolume) -> np.ndarray:
        return image[:, *box(item["fov"])][0].float().clamp(-1, 1).numpy()

    def taught(self, scheduler: Scheduler, steps: int) -> tuple[list[Tensor], int]:
        """Return the teacher's samples with its guidance, and its calls of a U-Net for each."""
        return self.samples(self.teacher.unet, scheduler, steps, self.teacher)

    def samples(
        self, unet: LatentDenoiser, own: Scheduler, steps: int, guide: Teacher | None = None
    ) -> tuple[list[Tensor], int]:
        """Return the latents of all validation volumes, from the same noise for all models, and the calls for each."""
        latents, calls = [], []
        for number, item in enumerate(self.items):
            noise = torch.randn(item["latents"].shape, generator=torch.Generator().manual_seed(number))
            shift = unet.timestep_shift(noise.shape[2:])
            scheduler = fit_scheduler(own, unet.config["objective"], unet.train_steps, shift=shift)
            weaker = None
            if guide is not None and guide.weak is not None:
                weaker = Autoguidance(guide.weak, item["conditions"], guide.autoguidance)
            sampled = denoise(
                unet,
                noise,
                scheduler,
                item["conditions"],
                schema=unet.condition_schema,
                num_inference_steps=steps,
                count_calls=calls.append,
                guidance_scale=1.0 if guide is None else guide.guidance,
                guidance_interval=None if guide is None else guide.interval,
                autoguidance=weaker,
            )
            latents.append(sampled)
        return latents, calls[0]

    @torch.no_grad()
    def row(self, model: str, calls: int, latents: list[Tensor]) -> Row:
        """Measure samples."""
        volumes = [self.vae.decode(one, return_dict=False)[0][0].float().clamp(-1, 1) for one in latents]
        pairs, count = list(zip(volumes, self.items, strict=True)), len(self.items)
        found = self.realism.compare([self.realism.row(*pair, number, count) for number, pair in enumerate(pairs)])
        power = ratio_db(mean_band_power([self._inside(*pair) for pair in pairs]), self.real_power)
        squares = [float(((a - b) ** 2).mean()) for a, b in zip(latents, self.reference, strict=True)]
        return {
            "model": model,
            "calls": calls,
            "distance": float(np.sqrt(np.mean(squares))),
            "kernel": found["kernel_distance"],
            "floor": found["kernel_distance/floor"],
            "power": power.tolist(),
        }


def main(args: Sequence[str] | None = None) -> None:
    """Measure and write the report."""
    options = parse(args)
    check_report(options.output)
    config = parse_config(TrainLdmConfig, [f"--config={options.run / 'config.yaml'}"])
    bench = Bench(config, options.volumes)
    student = MedVolumePipeline.from_pretrained(options.student or options.run / "pipeline")
    if student.unet.config["objective"] != FLOW_MAP:
        raise ValueError(f"{options.student or options.run}: is not a student, its objective is not {FLOW_MAP}")
    rows = [bench.row("real latents", 0, [item["latents"] for item in bench.items])]
    rows.append(bench.row("teacher", bench.calls, bench.reference))
    for steps in (max(options.calls), 20):
        latents, calls = bench.taught(make_scheduler(RECTIFIED_FLOW), steps)
        rows.append(bench.row(f"teacher, {steps} Euler steps", calls, latents))
    for steps in options.calls:
        latents, calls = bench.samples(student.unet, student.scheduler, steps)
        rows.append(bench.row("student", calls, latents))
    for row in rows:
        print(f"{row['model']}, {row['calls']} calls: distance {row['distance']:.3f}, kernel {row['kernel']:.3f}")
    report: Report = {
        "rows": rows,
        "volumes": len(bench.items),
        "bands": list(BAND_EDGES),
        "load": os.getloadavg()[0],
        **provenance(),
    }
    write_report(options.output, report)
