"""`evaluate.py reconstruction`: what an autoencoder loses."""

import dataclasses
import time
from typing import Any

import torch
from jsonargparse import Namespace

from cli.live_bar import LiveBar
from evaluation import evaluate_reconstruction, provenance, write_report
from evaluation.studies.limits import check_command
from pipelines.storage.loading import load_autoencoder
from volumes import VolumeDataset, load_cases

from .common import precision_name

NAME = "reconstruction"


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Reconstruct the volumes of a split, and say how close they come."""
    every = load_cases(options.data)
    check_command(NAME, every, options.data, vars(options))
    cases = [case for case in every if case.split == options.split]
    vae = load_autoencoder(options.vae).to(device)  # pyright: ignore[reportArgumentType]
    dataset = VolumeDataset(cases, options.data)
    start = time.perf_counter()
    with LiveBar(
        total=len(dataset), unit="volume", disable=None, desc=f"reconstructing split {options.split}"
    ) as progress:

        def on_volume(name: str, decibels: float) -> None:
            progress.set_postfix_str(f"{name} {decibels:.1f} dB")
            progress.update()

        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            result = evaluate_reconstruction(vae, dataset, crop=tuple(options.crop), on_volume=on_volume)
    report = {
        "evaluation": "reconstruction",
        **result,
        "split": options.split,
        "vae": options.vae,
        "precision": precision_name(dtype),
        "skipped": dict(dataset.skipped),
        "seconds": round(time.perf_counter() - start, 2),
        "data": dataclasses.asdict(options.data),
        **provenance(),
    }
    write_report(options.output, report)
    print(
        f"PSNR inside the field of view: {result['psnr_db']['mean']:.2f} dB, mean of {result['volumes']} volumes ({options.split})"
    )
    for label, dice in result["dice"].items():
        print(
            f"Dice of {label}: {dice['mean']:.4f}, lowest {dice['lowest']:.4f}, of {dice['volumes']} volumes that have it"
        )
    print(f"sharpness (mean gradient of reconstructions over real): {result['sharpness']:.3f}")
    if codes := result.get("codebook"):
        print(
            f"codebook: {codes['usage']:.1%} of {codes['codes']} codes used, perplexity {codes['perplexity']:.0f}, "
            f"{codes['bits_per_cell']:.2f} bits a cell (entropy {codes['entropy_bits_per_cell']:.2f}), "
            f"{codes['bits_per_voxel']:.3f} bits a voxel"
        )
    print("power of reconstructions over real, dB by cycles/voxel:")
    print("  ".join(f"{band}: {value:+.1f}" for band, value in result["spectrum"]["ratio_db"].items()))
    print(f"report: {options.output}")
    return report
