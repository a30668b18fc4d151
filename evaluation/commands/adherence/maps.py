"""`evaluate.py adherence`: whether generated volumes, and reconstructions, show the tissues of their label maps."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from cli.live_bar import LiveBar
from evaluation.commands.common import precision_name, write_study
from evaluation.data.maps import generated_with_maps, real_with_maps
from evaluation.studies.limits import check_command
from evaluation.studies.map_adherence import measure_map_adherence
from pipelines.storage.loading import load_autoencoder
from volumes import load_cases

NAME = "adherence"


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, object]:
    """Cluster the intensities of all volumes, and compare the clusters with the maps.

    Raises: ValueError without generated volumes and without an autoencoder.
    """
    if not (options.synthetic or options.vae):
        raise ValueError("nothing to measure: give --synthetic, --vae or both")
    start = time.perf_counter()
    cases = load_cases(options.data)
    check_command(NAME, cases, options.data, vars(options))
    real = real_with_maps(cases, options.data, options.split)
    generated, map_of = None, None
    if options.synthetic:
        folders = [Path(folder) for folder in options.synthetic]
        generated, map_of = generated_with_maps(folders, cases, options.data, options.split)
    vae = load_autoencoder(options.vae).to(device) if options.vae else None  # pyright: ignore[reportArgumentType]
    with LiveBar(unit="volume", disable=None, desc="clustering tissues") as progress:

        def on_volume(name: str) -> None:
            progress.set_postfix_str(name, refresh=False)
            progress.update()

        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            result = measure_map_adherence(real, generated, map_of, vae, on_volume)
    study = {
        "split": options.split,
        "precision": precision_name(dtype),
        "skipped": dict([*real.skipped, *(generated.skipped if generated else ())]),
        "seconds": round(time.perf_counter() - start, 2),
    }
    report = write_study(NAME, options, {**result, **study})
    print_summary(result)
    return report


def print_summary(result: Mapping[str, Any]) -> None:
    """Print the Dice of each source, their ratios, and what is outside of the maps."""
    for source, dice in result["dice"].items():
        per_label = ", ".join(f"{name} {figure['mean']:.4f}" for name, figure in dice["per_label"].items())
        print(f"{source}, Dice against {result['maps']} maps: {_with_interval(dice['mean'])}; {per_label}")
    if to_real := result.get("reconstruction_to_real"):
        print(f"tissues of reconstructions against those of their originals: {_with_interval(to_real['mean'])}")
    for name, ratio in result["ratios"].items():
        low, high = ratio["interval"]
        print(f"{name}: {ratio['of_means']:.4f} ({low:.4f} to {high:.4f})")
    for source, share in result.get("outside", {}).items():
        low, high = share["interval"]
        print(f"{source}, not empty outside of the map: {share['mean']:.3%} ({low:.3%} to {high:.3%})")


def _with_interval(value: Mapping[str, Any]) -> str:
    low, high = value["interval"]
    return f"{value['mean']:.4f} ({low:.4f} to {high:.4f})"
