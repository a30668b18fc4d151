"""`evaluate.py realism`: whether generated volumes look like real ones, and their slices fit together."""

import dataclasses
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from jsonargparse import Namespace

from cli.live_bar import LiveBar
from evaluation.report import provenance, write_report
from evaluation.studies.realism import measure_realism, steps_of

from .sets import describe_sets, load_extractors, load_sets

NAME = "realism"


def run(options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Compare the sets; always in float32, for distances of sets are small differences of large numbers."""
    start = time.perf_counter()
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
            found = measure_realism(
                sets,
                extractors,  # pyright: ignore[reportArgumentType]
                channels=channels,
                parts=options.parts,
                pairs=options.pairs,
                seed=options.seed,
                device=device,
                on_step=on_step,
            )
    report = {
        "evaluation": NAME,
        **found,
        "volumes": describe_sets(sets, options.unseen),
        "skipped": skipped,
        "synthetic": options.synthetic,
        "vae": options.vae,
        "precision": "float32",
        "seconds": round(time.perf_counter() - start, 2),
        "data": dataclasses.asdict(options.data),
        **provenance(),
    }
    write_report(options.output, report)
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"note: {message}")
    _print(report)
    print(f"report: {options.output}")
    return report


def _print(report: Mapping[str, Any]) -> None:
    for name, found in report.get("features", {}).items():
        for distance in ("kernel", "frechet"):
            made, floor = found[distance]["generated_to_test"], found[distance]["training_to_test"]
            print(f"{distance} distance, {name}: {_text(made)}; real against real {_text(floor)}")
    if "diversity" in report:
        for real in ("test", "training"):
            print(
                f"MS-SSIM of generated less that of {real} pairs: {_text(report['diversity'][f'generated_minus_{real}'])}"
            )
    for channel, statistics in report.get("consistency", {}).items():
        name, worst = max(statistics.items(), key=lambda item: item[1]["wasserstein"]["excess"]["mean"])
        made, floor = worst["wasserstein"]["generated_to_test"], worst["wasserstein"]["training_to_test"]
        print(f"slices of {channel}, farthest from real is {name}: {_text(made)}; real against real {_text(floor)}")
    for channel, found in report.get("intensity", {}).items():
        made, floor = (found["histogram"][key] for key in ("generated_to_test", "training_to_test"))
        print(f"histogram of {channel}: {_text(made)}; real against real {_text(floor)}")


def _text(figure: Mapping[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{figure['mean']:.4g} ({low:.4g} to {high:.4g})"
