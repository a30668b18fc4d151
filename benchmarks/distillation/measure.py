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

from diffusion import denoise, fit_scheduler, make_scheduler
from diffusion.guidance import Guidance
from diffusion.objectives import FLOW_MAP, RECTIFIED_FLOW
from evaluation.metrics.spectrum import BAND_EDGES, mean_band_power, ratio_db
from evaluation.report import check_report, provenance, write_report
from pipelines import MedVolumePipeline
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


class Bench:
    """The validation volumes, and the teacher's samples of them."""

    def __init__(self, config: TrainLdmConfig, count: int):
        assert config.distill is not None
        self.teacher = MedVolumePipeline.from_pretrained(config.distill.teacher)
        train, held_out = load_split(config.data)
        assert held_out is not None, "the run has no validation volumes"
        self.vae, unet = self.teacher.vae, self.teacher.unet
        images, labels = image_latents(config.data, self.vae), unet.config["num_labels"]
        items = encode_held_out(held_out, self.vae, config, Accelerator(cpu=True), labels, images)
        self.items: list[EncodedVolume] = [items[i] for i in range(min(count, len(items)))]
        self.realism = EncoderDistance(self.vae, PaddedVolumes(train, self.vae.stride))
        self.real_power = mean_band_power([self._inside(item["image"], item) for item in self.items])
        settings = self.teacher.sampling_settings
        self.steps, self.guidance = settings.num_inference_steps or 20, settings.guidance_scale or 1.0
        self.reference = self.samples(self.teacher, self.steps, self.guidance)

    def _inside(self, image: Tensor, item: EncodedVolume) -> np.ndarray:
        return image[:, *box(item["fov"])][0].float().clamp(-1, 1).numpy()

    def samples(self, pipe: MedVolumePipeline, steps: int, guidance: Guidance, name: str | None = None) -> list[Tensor]:
        """Return the latents of all validation volumes, always from the same noise."""
        unet, latents = pipe.unet, []
        objective = unet.config["objective"]
        own = pipe.scheduler if name is None else make_scheduler(objective, unet.train_steps, name=name)
        for number, item in enumerate(self.items):
            noise = torch.randn(item["latents"].shape, generator=torch.Generator().manual_seed(number))
            scheduler = fit_scheduler(own, objective, unet.train_steps, shift=unet.timestep_shift(noise.shape[2:]))
            given = {"guidance_scale": guidance, "schema": unet.condition_schema, "num_inference_steps": steps}
            latents.append(denoise(unet, noise, scheduler, item["conditions"], **given))
        return latents

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
    bench, few = Bench(config, options.volumes), max(options.calls)
    factor = 1 if bench.guidance == 1 else 2  # calls a step
    student = MedVolumePipeline.from_pretrained(options.student or options.run / "pipeline")
    rows = [bench.row("real volumes, reconstructed", 0, [item["latents"] for item in bench.items])]
    rows.append(bench.row("teacher", factor * bench.steps, bench.reference))
    rows.append(bench.row(f"teacher, {few} steps", factor * few, bench.samples(bench.teacher, few, bench.guidance)))
    if bench.teacher.unet.config["objective"] == RECTIFIED_FLOW:
        name, steps = "UniPCMultistepScheduler", config.distill.steps if config.distill else None
        latents = bench.samples(bench.teacher, steps or bench.steps, bench.guidance, name)
        rows.append(bench.row("teacher, UniPC", factor * (steps or bench.steps), latents))
    assert student.unet.config["objective"] == FLOW_MAP
    for calls in options.calls:
        rows.append(bench.row("student", calls, bench.samples(student, calls, 1.0)))
    for row in rows:
        print(f"{row['model']}, {row['calls']} calls: distance {row['distance']:.3f}, kernel {row['kernel']:.3f}")
    facts = {"volumes": len(bench.items), "bands": list(BAND_EDGES), "load": os.getloadavg()[0]}
    write_report(options.output, {"rows": rows, **facts, **provenance()})


if __name__ == "__main__":
    run_command(main)
