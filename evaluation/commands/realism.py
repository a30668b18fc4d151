"""`evaluate.py realism`: whether generated volumes look like real ones, and whether their slices are consistent."""

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jsonargparse import Namespace

from cli.live_bar import LiveBar
from evaluation.studies.realism import measure_realism, steps_of
from volumes import DataConfig

from .common import write_study
from .sets import describe_sets, load_extractors, load_sets

NAME = "realism"


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, object]:
    """Compare the sets. Always in float32, because distances between sets are small differences of large numbers."""
    start = time.perf_counter()
    windows = hounsfield_windows(options.hounsfield, options.data)
    sets, skipped = load_sets(options, NAME)
    extractors = load_extractors(options, device) if "features" in options.parts else {}
    channels = options.data.channels
    steps = steps_of(sets, len(extractors), len(channels), options.parts, options.pairs)
    with LiveBar(total=sum(steps.values()), unit="step", disable=None, desc="realism") as progress:

        def on_step(part: str) -> None:
            progress.set_postfix_str(part, refresh=False)
            progress.update()

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = measure_realism(
                sets,
                extractors,
                channels=channels,
                parts=options.parts,
                hounsfield=windows,
                pairs=options.pairs,
                seed=options.seed,
                device=device,
                on_step=on_step,
            )
    study = {
        "volumes": describe_sets(sets, options.unseen),
        "skipped": skipped,
        "precision": "float32",
        "seconds": round(time.perf_counter() - start, 2),
    }
    report = write_study(NAME, options, {**result, **study})
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"note: {message}")
    print_summary(result)
    return report


def hounsfield_windows(channels: Sequence[str], config: DataConfig) -> dict[str, tuple[float, float]]:
    """Return the window of each channel that is CT, in Hounsfield units.

    Raises: ValueError for an unknown channel, and for one that is scaled by percentiles, which has lost its unit.
    """
    windows = {}
    for channel in channels:
        if channel not in config.channels:
            raise ValueError(f"--hounsfield {channel}: the data has the channels {', '.join(config.channels)}")
        if config.image_labels:
            raise ValueError(f"--hounsfield {channel}: the data are label maps, which have no intensities")
        scaling = config.scaling(channel)
        if scaling.kind != "window":
            raise ValueError(
                f"--hounsfield {channel}: its intensity is of kind {scaling.kind}, which keeps no units; CT needs "
                "data.intensity {kind: window, low: HU, high: HU}"
            )
        windows[channel] = (scaling.low, scaling.high)
    return windows


def print_summary(result: Mapping[str, Any]) -> None:
    """Print the main distances, each beside that of real training volumes."""
    for name, distances in result.get("features", {}).items():
        for distance in ("kernel", "frechet"):
            print(f"{distance} distance, {name}: {_beside_real(distances[distance])}")
    if "diversity" in result:
        for real in ("test", "training"):
            gap = result["diversity"][f"generated_minus_{real}"]
            print(f"MS-SSIM of generated pairs minus that of {real} pairs: {_with_interval(gap)}")
    for channel, statistics in result.get("consistency", {}).items():
        name, worst = max(statistics.items(), key=lambda item: item[1]["wasserstein"]["excess"]["mean"])
        print(f"slices of {channel}, farthest from real is {name}: {_beside_real(worst['wasserstein'])}")
    for channel, intensity in result.get("intensity", {}).items():
        print(f"histogram of {channel}: {_beside_real(intensity['histogram'])}")
        for name, share in intensity.get("hounsfield", {}).items():
            means = [f"{share[source]['mean']:.1%}" for source in ("generated", "test", "training")]
            print(f"{channel}, {name}: {means[0]} generated, {means[1]} held-out real, {means[2]} training")


def _beside_real(distances: Mapping[str, Any]) -> str:
    generated, real = (_with_interval(distances[key]) for key in ("generated_to_test", "training_to_test"))
    return f"{generated}; real against real {real}"


def _with_interval(value: Mapping[str, Any]) -> str:
    low, high = value["interval"]
    return f"{value['mean']:.4g} ({low:.4g} to {high:.4g})"
