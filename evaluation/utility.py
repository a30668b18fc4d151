"""Usefulness of volumes for a task: Dice on real subjects of segmenters trained on one source of volumes or another."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from .segmentation_data import LoadedPairs
from .segmenter import BATCH_SIZE, ITERATIONS, LEARNING_RATE, segmenter_dice, train_segmenter

SHAPE = (40, 56, 40)
REAL, SYNTHETIC, BOTH = SOURCES = ("real", "synthetic", "both")


def protocol(shape: tuple[int, int, int], iterations: int, dtype: torch.dtype | None) -> dict[str, Any]:
    """What must be equal for two scores to be comparable, ready for a report.

    Raises ValueError for a shape that the segmenter cannot halve three times.
    """
    if any(n % 8 or n < 16 for n in shape):
        raise ValueError(f"shape {shape}: every side must be a multiple of 8, and at least 16")
    return {
        "shape": list(shape),
        "iterations": iterations,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "precision": "float32" if dtype is None else str(dtype).removeprefix("torch."),
    }


def iterations_of(source: str, iterations: int = ITERATIONS) -> int:
    """Training steps: twice as many where real and synthetic volumes are learned from together."""
    return 2 * iterations if source == BOTH else iterations


def score_training(
    learn: LoadedPairs,
    judge: LoadedPairs,
    num_labels: int,
    *,
    seed: int,
    iterations: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train one segmenter on `learn` and score it on `judge`: {"seed", "dice", "per_label", "seconds"}.

    `dice` is the mean over the labels but the background of the mean over the judging volumes.
    """
    start = time.perf_counter()
    segmenter = train_segmenter(
        learn.images,
        learn.labels,
        num_labels,
        seed=seed,
        iterations=iterations,
        device=device,
        dtype=dtype,
        on_step=on_step,
    )
    per_label = segmenter_dice(segmenter, judge.images, judge.labels, num_labels, dtype=dtype)
    seconds = time.perf_counter() - start
    return {"seed": seed, "dice": float(np.mean(per_label)), "per_label": per_label, "seconds": round(seconds, 2)}


def ratios(scores: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Every source's Dice over real's: of the means, and seed by seed. `scores` holds the results of `score_training` by source."""
    if REAL not in scores:
        return {}
    real = {result["seed"]: result["dice"] for result in scores[REAL]}
    found: dict[str, Any] = {}
    for source, results in scores.items():
        if source == REAL:
            continue
        per_seed = {str(r["seed"]): r["dice"] / real[r["seed"]] for r in results if r["seed"] in real}
        of_means = float(np.mean([r["dice"] for r in results]) / np.mean(list(real.values())))
        found[f"{source}/real"] = {"of_means": of_means, "per_seed": per_seed}
    return found
