"""Utility of volumes for a task: Dice on real subjects of segmenters trained on one source of volumes or another."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.data.pairs import LoadedPairs
from evaluation.networks.defaults import ANY, REAL
from evaluation.networks.segmenter import (
    BATCH_SIZE,
    LEARNING_RATE,
    train_segmenter,
    volume_dice,
)
from evaluation.stats.intervals import PairedComparison, compare_paired, over_seeds
from volumes import Case

from .training_result import Scores, TrainingResult


def check_shape(shape: Sequence[int]) -> None:
    """Raise ValueError for a shape that the segmenter cannot halve three times."""
    if any(n % 8 or n < 16 for n in shape):
        raise ValueError(f"shape {tuple(shape)}: every side must be a multiple of 8, and at least 16")


class Protocol(TypedDict):
    """The settings that must be equal for two scores to be comparable."""

    shape: list[int]
    iterations: int
    batch_size: int
    learning_rate: float
    precision: str


def protocol(shape: Sequence[int], iterations: int, dtype: torch.dtype | None) -> Protocol:
    """Return the training protocol of the segmenter for a report.

    Raises: ValueError for a shape that the segmenter cannot halve three times.
    """
    check_shape(shape)
    return {
        "shape": list(shape),
        "iterations": iterations,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "precision": "float32" if dtype is None else str(dtype).removeprefix("torch."),
    }


def score_training(
    train_set: LoadedPairs,
    test_set: LoadedPairs,
    num_labels: int,
    *,
    arm: str,
    labels: str = ANY,
    seed: int,
    iterations: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    on_step: Callable[[int, float], None] | None = None,
    start: Mapping[str, Tensor] | None = None,
    synthetic: LoadedPairs | None = None,
) -> TrainingResult:
    """Train one segmenter on `train_set` and score it on `test_set`.

    Args:
        arm, labels: what the result says of the training set, see `TrainingResult`.
        start: as in `train_segmenter`.
        synthetic: generated volumes and the masks that they were generated from. The same segmenter is scored on them
            as well (Med-LSDM's test; `mask_adherence`).
    """
    start_time = time.perf_counter()
    segmenter = train_segmenter(
        train_set.images,
        train_set.labels,
        num_labels,
        seed=seed,
        iterations=iterations,
        device=device,
        dtype=dtype,
        on_step=on_step,
        start=start,
    )
    scores = score_segmenter(segmenter, test_set, num_labels, dtype)
    return TrainingResult(
        arm=arm,
        labels=labels,
        seed=seed,
        dice=scores.dice,
        per_label=scores.per_label,
        per_volume=scores.per_volume,
        on_synthetic=None if synthetic is None else score_segmenter(segmenter, synthetic, num_labels, dtype),
        seconds=round(time.perf_counter() - start_time, 2),
    )


class RatioToReal(TypedDict):
    """Dice of one source over that of the real volumes."""

    of_means: float
    per_seed: dict[str, float]
    interval_seeds: list[float] | None  # of the mean of `per_seed`
    interval_subjects: list[float]  # of `of_means`


def ratios(scores: Mapping[str, Sequence[TrainingResult]], subjects: Sequence[str]) -> dict[str, RatioToReal]:
    """Compare the Dice of every source with that of the real volumes, over the seeds that both have.

    Args:
        scores: results by source.
        subjects: of the volumes of the test set.
    Returns: by "source/real"; {} without real.
    """
    real = {result.seed: result for result in scores.get(REAL, [])}
    report: dict[str, RatioToReal] = {}
    for source, results in scores.items():
        pairs = [(result, real[result.seed]) for result in results if result.seed in real]
        if source == REAL or not pairs:
            continue
        per_seed = {str(result.seed): result.dice / reference.dice for result, reference in pairs}
        of_means = float(np.mean([result.dice for result, _ in pairs]) / np.mean([other.dice for _, other in pairs]))
        values, reference = (np.array([result.per_volume for result in side]) for side in zip(*pairs, strict=True))
        report[f"{source}/real"] = {
            "of_means": of_means,
            "per_seed": per_seed,
            "interval_seeds": over_seeds(list(per_seed.values())),
            "interval_subjects": compare_paired(values, reference, subjects, "ratio")["interval_subjects"],
        }
    return report


# Functional form: one key is not an identifier.
MaskAdherence = TypedDict(
    "MaskAdherence",
    {
        "masks": int,
        "subjects": int,
        "real": float,  # mean Dice
        "synthetic": float,  # mean Dice
        "synthetic-real": PairedComparison,
    },
)


def mask_adherence(results: Sequence[TrainingResult], real: Sequence[Case], generated: Sequence[Case]) -> MaskAdherence:
    """Measure how well generated volumes follow their masks: Dice on them less Dice on the real volumes of the same
    masks (Med-LSDM's test).

    The segmenters must have seen neither the volumes nor the masks: they were trained on the training set, and these
    are of the test set. A mask counts once, whatever the number of volumes generated from it. A mask without a
    generated volume is ignored.

    Args:
        results: one per seed, of `score_training` with `synthetic`.
        real: the case of each volume in `per_volume`.
        generated: the case of each generated volume in `on_synthetic.per_volume`.
    """
    of_mask = {case.name: [i for i, other in enumerate(generated) if other.name == case.name] for case in real}
    shared = [i for i, case in enumerate(real) if of_mask[case.name]]
    subjects = [real[i].subject for i in shared]
    on_real, on_generated = [], []
    for result in results:
        if result.on_synthetic is None:
            raise ValueError(f"{result.arm}, seed {result.seed}: was not scored on generated volumes")
        scores = result.on_synthetic.per_volume
        on_real.append([result.per_volume[i] for i in shared])
        on_generated.append([np.mean([scores[j] for j in of_mask[real[i].name]]) for i in shared])
    return {
        "masks": len(shared),
        "subjects": len(set(subjects)),
        "real": float(np.mean(on_real)),
        "synthetic": float(np.mean(on_generated)),
        "synthetic-real": compare_paired(np.array(on_generated), np.array(on_real), subjects, "difference"),
    }


def score_segmenter(segmenter: nn.Module, pairs: LoadedPairs, num_labels: int, dtype: torch.dtype | None) -> Scores:
    """Score a trained segmenter on volumes and their masks."""
    per_volume = volume_dice(segmenter, pairs.images, pairs.labels, num_labels, dtype=dtype)
    per_label = [dice.mean().item() for dice in per_volume]
    return Scores(float(np.mean(per_label)), per_label, torch.stack(per_volume).mean(0).tolist())
