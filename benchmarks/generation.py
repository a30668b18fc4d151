"""Measure seconds per generated volume.

    python -m benchmarks.generation --output out/bench/generation.json

Times the pipeline from a mask file to a NIfTI image in memory, one mask at a time and all masks in one call; then the
denoising loop and the decoder alone. One untimed run over all masks comes first, which prepares kernels for their
grids.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cli.command import ArgumentParser, run_command
from cli.settings import NonNegativeFloat, Number, PositiveInt

PIPELINE = Path(__file__).resolve().parents[1] / "weights" / "hippocampus"


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=PIPELINE, help="pipeline folder (weights/hippocampus)")
    parser.add_argument("--masks", type=Path, help="folder of mask files; default: masks/ in the pipeline folder")
    parser.add_argument("--steps", type=Number(PositiveInt), help="denoising steps (the pipeline's own)")
    parser.add_argument(
        "--guidance_scale",
        type=Number(NonNegativeFloat),
        help="guidance scale of all conditions; 1 means no guidance (the pipeline's own)",
    )
    parser.add_argument("--repeats", type=Number(PositiveInt), default=3, help="timed runs over all masks (3)")
    parser.add_argument(
        "--precision", choices=["auto", "bf16", "no"], default="auto", help="auto: bf16 if the hardware supports it"
    )
    parser.add_argument("--device", help="such as cpu or cuda; default: the GPU, if any")
    parser.add_argument("--output", type=Path, required=True, help="report to write, a JSON file")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import torch
from tqdm import tqdm

from evaluation.report import check_report, provenance, write_report
from pipelines import MedVolumePipeline
from training import resolve_precision
from volumes import read_mask
from volumes.devices import find_device


def main(args: Sequence[str] | None = None) -> dict[str, object]:
    """Time the pipeline, write the report and return it."""
    options = parse(args)
    check_report(options.output)
    masks = find_masks(options.pipeline, options.masks)
    dtype = torch.bfloat16 if resolve_precision(options.precision) == "bf16" else torch.float32
    pipe = MedVolumePipeline.from_pretrained(options.pipeline, dtype=dtype)
    pipe.to(find_device(options.device))
    pipe.set_progress_bar_config(disable=True)
    seconds_per_volume = time_generation(
        pipe, masks, steps=options.steps, repeats=options.repeats, guidance_scale=options.guidance_scale
    )
    settings = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
    record = pipe(masks[0], **settings, output_type="latent").provenance[0]
    report = {
        "benchmark": "generation",
        "pipeline": options.pipeline.name,
        "device": str(pipe.device),
        "dtype": str(dtype).removeprefix("torch."),
        "scheduler": record["scheduler"]["class"],
        "steps": record["num_inference_steps"],
        **{name: record.get(name) for name in ("guidance_scale", "guidance_interval", "network_calls")},
        "repeats": options.repeats,
        "parameters": {name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("unet", "vae")},
        "masks": {path.name: list(read_mask(path).shape) for path in masks},
        "seconds_per_volume": seconds_per_volume,
        **provenance(),
    }
    write_report(options.output, report)
    for name, seconds in seconds_per_volume.items():
        spread = f"mean {seconds['mean']:.3f}, {seconds['min']:.3f} to {seconds['max']:.3f}"
        print(f"{name:12} {seconds['median']:.3f} s per volume ({spread})")
    print(f"report: {options.output}")
    return report


def find_masks(pipeline: Path, masks: Path | None) -> list[Path]:
    """Return the mask files of `masks`, or of masks/ in the pipeline folder. Raises: ValueError if there are none."""
    folder = masks or pipeline / "masks"
    paths = sorted(path for path in folder.glob("*") if path.name.endswith((".nii", ".nii.gz")))
    if not paths:
        raise ValueError(f"{folder}: no masks (.nii, .nii.gz) there; give a folder with --masks")
    return paths


def time_generation(
    pipe: MedVolumePipeline, masks: list[Path], *, steps: int | None, repeats: int, guidance_scale: float | None = None
) -> dict[str, dict[str, float]]:
    """Return statistics of seconds per volume.

    They are "whole" (mask file to NIfTI image, one at a time), "batched" (the same, all masks in one call), "denoising"
    (to latents, one at a time) and "decoding" (latents to voxels).
    """

    def generate(mask: Path | list[Path], output_type: str) -> list[Any]:
        generator = torch.Generator().manual_seed(0)
        return pipe(
            mask=mask,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generator,
            output_type=output_type,
        ).volumes

    def decode(latents: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return pipe.vae.decode(latents[None].to(pipe.vae.dtype)).sample  # pyright: ignore[reportAttributeAccessIssue]

    for mask in masks:  # untimed
        generate(mask, "nifti")
    generate(masks, "nifti")
    times: dict[str, list[float]] = {"whole": [], "batched": [], "denoising": [], "decoding": []}
    for _ in range(repeats):
        for mask in tqdm(masks, unit="volume", desc="generate", disable=None):
            times["whole"].append(seconds_of(pipe.device, lambda mask=mask: generate(mask, "nifti"))[0])
            seconds, latents = seconds_of(pipe.device, lambda mask=mask: generate(mask, "latent"))
            times["denoising"].append(seconds)
            times["decoding"].append(seconds_of(pipe.device, lambda latents=latents: decode(latents[0]))[0])
        times["batched"].append(seconds_of(pipe.device, lambda: generate(masks, "nifti"))[0] / len(masks))
    return {name: summary(values) for name, values in times.items()}


def seconds_of(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds until the device has finished `work`, and its result."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - start, result


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, mean, minimum and maximum, to tenths of milliseconds."""
    figures = {
        "median": statistics.median(seconds),
        "mean": statistics.fmean(seconds),
        "min": min(seconds),
        "max": max(seconds),
    }
    return {name: round(value, 4) for name, value in figures.items()}
