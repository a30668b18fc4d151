"""`evaluate.py reconstruction`: what an autoencoder loses."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from jsonargparse import Namespace

from cli.live_bar import LiveBar
from evaluation.studies.limits import check_command
from evaluation.studies.reconstruction import evaluate_reconstruction
from pipelines.storage.loading import load_autoencoder
from volumes import VolumeDataset, load_cases

from .common import precision_name, write_study

NAME = "reconstruction"


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, object]:
    """Reconstruct the volumes of a split, and measure how close the reconstructions are."""
    cases = load_cases(options.data)
    check_command(NAME, cases, options.data, vars(options))
    vae = load_autoencoder(options.vae).to(device)  # pyright: ignore[reportArgumentType]
    dataset = VolumeDataset([case for case in cases if case.split == options.split], options.data)
    start = time.perf_counter()
    title = f"reconstructing split {options.split}"
    with LiveBar(total=len(dataset), unit="volume", disable=None, desc=title) as progress:

        def on_volume(name: str, decibels: float) -> None:
            progress.set_postfix_str(f"{name} {decibels:.1f} dB")
            progress.update()

        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            result = evaluate_reconstruction(vae, dataset, crop=tuple(options.crop), on_volume=on_volume)
    study = {
        "split": options.split,
        "precision": precision_name(dtype),
        "skipped": dict(dataset.skipped),
        "seconds": round(time.perf_counter() - start, 2),
    }
    report = write_study(NAME, options, {**result, **study})
    print_summary(result, options.split)
    return report


def print_summary(result: Mapping[str, Any], split: str) -> None:
    """Print PSNR, Dice of label maps, sharpness, codebook use and the power spectrum."""
    psnr = result["psnr_db"]["mean"]
    print(f"PSNR inside the field of view: {psnr:.2f} dB, mean of {result['volumes']} volumes ({split})")
    if foreground := result.get("psnr_foreground_db"):
        print(f"PSNR where masks are not background: {foreground['mean']:.2f} dB")
    for label, dice in result["dice"].items():
        print(f"Dice of {label}: {dice['mean']:.4f}, lowest {dice['lowest']:.4f}, of {dice['volumes']} volumes with it")
    print(f"sharpness (mean gradient of reconstructions over real): {result['sharpness']:.3f}")
    if codes := result.get("codebook"):
        print(
            f"codebook: {codes['usage']:.1%} of {codes['codes']} codes used, perplexity {codes['perplexity']:.0f}, "
            f"{codes['bits_per_cell']:.2f} bits per latent voxel (entropy {codes['entropy_bits_per_cell']:.2f}), "
            f"{codes['bits_per_voxel']:.3f} bits per voxel"
        )
    print("power of reconstructions over real, dB by cycles/voxel:")
    print("  ".join(f"{band}: {value:+.1f}" for band, value in result["spectrum"]["ratio_db"].items()))
