"""Usefulness of volumes for a task: Dice on real subjects of segmenters trained on one source of volumes or another."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.data.pairs import LoadedPairs
from evaluation.networks.defaults import BOTH, REAL
from evaluation.networks.segmenter import (
    BATCH_SIZE,
    ITERATIONS,
    LEARNING_RATE,
    train_segmenter,
    volume_dice,
)
from evaluation.stats.intervals import compare_paired, over_seeds
from volumes import Case


def check_shape(shape: Sequence[int]) -> None:
    """Raises: ValueError for a shape that the segmenter cannot halve three times."""
    if any(n % 8 or n < 16 for n in shape):
        raise ValueError(f"shape {tuple(shape)}: every side must be a multiple of 8, and at least 16")


def protocol(shape: tuple[int, int, int], iterations: int, dtype: torch.dtype | None) -> dict[str, Any]:
    """What must be equal for two scores to be comparable, ready for a report.

    Raises ValueError for a shape that the segmenter cannot halve three times.
    """
    check_shape(shape)
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
    start: Mapping[str, Tensor] | None = None,
    synthetic: LoadedPairs | None = None,
) -> dict[str, Any]:
    """Train one segmenter on `learn` and score it on `judge`: {"seed", "dice", "per_label", "per_volume", "seconds"}.

    `dice` is the mean over the labels but the background of the mean over the judging volumes; `per_volume` are the means over
    the labels of each of those. `start` is `train_segmenter`'s. With `synthetic`, the same segmenter judges generated volumes
    against the masks that they were made from: "on_synthetic" has its scores (Med-LSDM's test; `mask_adherence`).
    """
    began = time.perf_counter()
    segmenter = train_segmenter(
        learn.images,
        learn.labels,
        num_labels,
        seed=seed,
        iterations=iterations,
        device=device,
        dtype=dtype,
        on_step=on_step,
        start=start,
    )
    result = {"seed": seed, **_score(segmenter, judge, num_labels, dtype)}
    if synthetic is not None:
        result["on_synthetic"] = _score(segmenter, synthetic, num_labels, dtype)
    return {**result, "seconds": round(time.perf_counter() - began, 2)}


def ratios(scores: Mapping[str, list[dict[str, Any]]], subjects: Sequence[str]) -> dict[str, Any]:
    """Every source's Dice over real's.

    Args:
        scores: the results of `score_training` by source.
        subjects: whose each judging volume is.
    Returns: {"source/real": {"of_means", "per_seed": {seed: ratio}, "interval_seeds": of the mean of those, "interval_subjects":
        of "of_means", over subjects drawn anew (`compare_paired`), if the results say how each volume fared}}, of the seeds that
        both have; {} without real.
    """
    real = {result["seed"]: result for result in scores.get(REAL, [])}
    found: dict[str, Any] = {}
    for source, results in scores.items():
        both = [(one, real[one["seed"]]) for one in results if one["seed"] in real]
        if source == REAL or not both:
            continue
        per_seed = {str(one["seed"]): one["dice"] / other["dice"] for one, other in both}
        of_means = float(np.mean([one["dice"] for one, _ in both]) / np.mean([other["dice"] for _, other in both]))
        found[f"{source}/real"] = {
            "of_means": of_means,
            "per_seed": per_seed,
            "interval_seeds": over_seeds(list(per_seed.values())),
        }
        if all("per_volume" in one for pair in both for one in pair):  # reports from before there was that have it not
            ours, theirs = (np.array([one["per_volume"] for one in side]) for side in zip(*both, strict=True))
            compared = compare_paired(ours, theirs, subjects, "ratio")
            found[f"{source}/real"]["interval_subjects"] = compared["interval_subjects"]
    return found


def mask_adherence(results: Sequence[Mapping[str, Any]], real: Sequence[Case], made: Sequence[Case]) -> dict[str, Any]:
    """Do generated volumes obey their masks? Dice on them less Dice on the real volumes of the same masks (Med-LSDM's test).

    The segmenters must have seen neither volumes nor masks: they learned from the training split, these are of the test split.
    A mask counts once, however many volumes were made from it, and one without a generated volume is left out.

    Args:
        results: of `score_training` with `synthetic`, one a seed.
        real: the case of each volume in "per_volume".
        made: the case of each generated volume in "on_synthetic".
    Returns: {"masks": how many, "subjects": of how many, "real" and "synthetic": mean Dice on each, "synthetic-real":
        `compare_paired` of the two}.
    """
    of_mask = {case.name: [i for i, other in enumerate(made) if other.name == case.name] for case in real}
    shared = [i for i, case in enumerate(real) if of_mask[case.name]]
    subjects = [real[i].subject for i in shared]
    on_real = np.array([[result["per_volume"][i] for i in shared] for result in results])
    on_made = np.array(
        [
            [np.mean([result["on_synthetic"]["per_volume"][j] for j in of_mask[real[i].name]]) for i in shared]
            for result in results
        ]
    )
    return {
        "masks": len(shared),
        "subjects": len(set(subjects)),
        "real": float(on_real.mean()),
        "synthetic": float(on_made.mean()),
        "synthetic-real": compare_paired(on_made, on_real, subjects, "difference"),
    }


def _score(segmenter: nn.Module, judge: LoadedPairs, num_labels: int, dtype: torch.dtype | None) -> dict[str, Any]:
    """{"dice", "per_label", "per_volume"} of a trained segmenter."""
    rows = volume_dice(segmenter, judge.images, judge.labels, num_labels, dtype=dtype)
    per_label = [row.mean().item() for row in rows]
    return {
        "dice": float(np.mean(per_label)),
        "per_label": per_label,
        "per_volume": torch.stack(rows).mean(0).tolist(),
    }
