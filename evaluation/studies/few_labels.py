"""Utility with few labels: the training set of each arm, and comparisons between arms.

An arm is one way of training the segmenter of `evaluation.networks.segmenter`. A seed decides which volumes are labeled
(`draw_labeled`, the same for every arm) and the training, so intervals over seeds contain both sources of chance.
"""

from collections.abc import Sequence
from typing import Literal, NotRequired, TypedDict

import numpy as np

from evaluation.data.pairs import LoadedPairs
from evaluation.networks.defaults import (
    ANY,
    BOTH,
    REAL,
    REAL_LONGER,
    SYNTHETIC,
)
from evaluation.stats.intervals import PairedComparison, compare_paired, over_seeds

from .training_result import TrainingResult

RATIOS = ((BOTH, REAL), (BOTH, REAL_LONGER), (SYNTHETIC, REAL), (REAL_LONGER, REAL))


def steps_of(arm: str, iterations: int) -> int:
    """Return the number of training steps of an arm."""
    return 2 * iterations if arm in (BOTH, REAL_LONGER) else iterations


def training_set(
    arm: str,
    real: LoadedPairs,
    synthetic: LoadedPairs,
    labeled: Sequence[int],
    *,
    masks: Literal["all", "own"] = "all",
    balanced: bool = True,
) -> LoadedPairs:
    """Return the training set of an arm when only the real volumes `labeled` (indices into `real`) have labels.

    Args:
        synthetic: volumes generated from masks of `real`; the real arms ignore them.
        masks: "own" takes only the synthetic volumes that were generated from masks of the labeled ones. "all" takes
            all, which measures a generator that was trained with more labels than the segmenter has.
        balanced: `both` repeats the real volumes so that about every other volume of a batch is real, as with all
            labels and one volume per mask. Otherwise every volume is sampled equally often.
    Raises: ValueError for "own" masks without a generated volume.
    """
    few = real.take(labeled)
    if arm in (REAL, REAL_LONGER):
        return few
    if masks == "own":
        names = {case.name for case in few.cases}
        rows = [i for i, case in enumerate(synthetic.cases) if case.name in names]
        if not rows:
            raise ValueError(
                f"no synthetic volume was generated from the masks of {sorted(names)}; generate some, or use all masks"
            )
        synthetic = synthetic.take(rows)
    if arm == SYNTHETIC:
        return synthetic
    repeats = max(1, round(len(synthetic.cases) / len(labeled))) if balanced else 1
    return few.take(list(range(len(labeled))) * repeats).join(synthetic)


def results_by_seed(results: Sequence[TrainingResult], arm: str, labels: str) -> dict[int, TrainingResult]:
    """Return the results of an arm at a budget by seed; those at `ANY` count at every budget."""
    return {result.seed: result for result in results if result.arm == arm and result.labels in (labels, ANY)}


class MeanDice(TypedDict):
    """Mean Dice of one arm at one budget."""

    mean: float
    interval_seeds: list[float] | None
    per_seed: list[float]


class Summary(TypedDict):
    """Mean Dice and comparisons, by arm (or pair of arms) and budget."""

    dice: dict[str, dict[str, MeanDice]]
    ratios: NotRequired[dict[str, dict[str, PairedComparison]]]  # by "arm/reference"
    differences: NotRequired[dict[str, dict[str, PairedComparison]]]  # by "arm-reference"


def summarize(
    results: Sequence[TrainingResult],
    subjects: Sequence[str],
    comparisons: Sequence[tuple[str, str]],
    how: Literal["difference", "ratio"],
) -> Summary:
    """Summarize the Dice of every arm and budget, and compare arms over the seeds that both have.

    Args:
        subjects: of the test set, in the order of `per_volume`.
        comparisons: pairs (arm, reference).
        how: whether the reference's Dice is subtracted or divides.
    """
    arms = dict.fromkeys(result.arm for result in results)
    budgets = dict.fromkeys(result.labels for result in results)
    dice: dict[str, dict[str, MeanDice]] = {}
    for arm in arms:
        for labels in budgets:
            values = [result.dice for result in results if (result.arm, result.labels) == (arm, labels)]
            if values:
                dice.setdefault(arm, {})[labels] = {
                    "mean": float(np.mean(values)),
                    "interval_seeds": over_seeds(values),
                    "per_seed": values,
                }
    compared: dict[str, dict[str, PairedComparison]] = {}
    sign = "/" if how == "ratio" else "-"
    for arm, reference in comparisons:
        for labels in budgets:
            if labels == ANY:
                continue
            of_arm, of_reference = (results_by_seed(results, name, labels) for name in (arm, reference))
            if seeds := sorted(set(of_arm) & set(of_reference)):
                values, baseline = (np.array([side[s].per_volume for s in seeds]) for side in (of_arm, of_reference))
                paired = compare_paired(values, baseline, subjects, how)
                compared.setdefault(f"{arm}{sign}{reference}", {})[labels] = paired
    return {"dice": dice, "ratios": compared} if how == "ratio" else {"dice": dice, "differences": compared}
