"""Usefulness where labels are few: what each arm of a comparison learns from, and the arms against each other.

An arm is one way of training the segmenter of `evaluation.networks.segmenter`. A row is one training: a dict with "arm", "labels"
(the budget: "8", "all", "any"), "seed", and what `score_training` returns. A seed draws the labeled volumes (`draw_labeled`, the same
for every arm) as well as the training, so intervals over seeds have both chances in them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from evaluation.data.pairs import LoadedPairs
from evaluation.networks.defaults import (
    BOTH,
    REAL,
    REAL_LONGER,
    SYNTHETIC,
)
from evaluation.stats.intervals import compare_paired, over_seeds

RATIOS = ((BOTH, REAL), (BOTH, REAL_LONGER), (SYNTHETIC, REAL), (REAL_LONGER, REAL))
ANY = "any"  # the budget of an arm that learns from the same volumes at all of them
Row = Mapping[str, Any]


def steps_of(arm: str, iterations: int) -> int:
    """Training steps of an arm."""
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
    """What an arm learns from when the real volumes `labeled` (indices into `real`) are all that have labels.

    Args:
        synthetic: volumes generated from masks of `real`; not used by the real arms.
        masks: "own" takes only the synthetic volumes that were made from masks of the labeled ones; "all" takes all, which
            says how useful a generator is that learned from more labels than the segmenter has.
        balanced: `both` repeats the real volumes so that about every other volume of a batch is real, as with all labels and
            one volume a mask; otherwise each volume is drawn as often as any other.
    Raises: ValueError for "own" masks that nothing was generated from.
    """
    few = real.take(labeled)
    if arm in (REAL, REAL_LONGER):
        return few
    if masks == "own":
        names = {case.name for case in few.cases}
        rows = [i for i, case in enumerate(synthetic.cases) if case.name in names]
        if not rows:
            raise ValueError(
                f"no synthetic volume was made from the masks of {sorted(names)}; generate some, or take all masks"
            )
        synthetic = synthetic.take(rows)
    if arm == SYNTHETIC:
        return synthetic
    repeats = max(1, round(len(synthetic.cases) / len(labeled))) if balanced else 1
    return few.take(list(range(len(labeled))) * repeats).join(synthetic)


def scores_of(rows: Sequence[Row], arm: str, labels: str) -> dict[int, Row]:
    """The rows of an arm at a budget, by seed; those at `ANY` count at every budget."""
    return {row["seed"]: row for row in rows if row["arm"] == arm and row["labels"] in (labels, ANY)}


def summarize(
    rows: Sequence[Row],
    subjects: Sequence[str],
    comparisons: Sequence[tuple[str, str]],
    how: Literal["difference", "ratio"],
) -> dict[str, Any]:
    """The mean Dice of every arm and budget, and the comparisons between arms, each with its intervals.

    Args:
        subjects: of the judging volumes, in the order of "per_volume".
        comparisons: pairs (arm, reference).
        how: whether an arm's Dice is divided by the reference's or the reference's is taken off it.
    Returns: {"dice": {arm: {budget: {"mean", "interval_seeds", "per_seed"}}}, "ratios" or "differences": {"arm/reference" or
        "arm-reference": {budget: `compare_paired`, over the seeds that both have}}}.
    """
    arms, budgets = (list(dict.fromkeys(row[key] for row in rows)) for key in ("arm", "labels"))
    dice: dict[str, Any] = {}
    for arm in arms:
        for labels in budgets:
            values = [row["dice"] for row in rows if (row["arm"], row["labels"]) == (arm, labels)]
            if values:
                interval = over_seeds(values)
                dice.setdefault(arm, {})[labels] = {
                    "mean": float(np.mean(values)),
                    "interval_seeds": interval,
                    "per_seed": values,
                }
    compared: dict[str, Any] = {}
    for arm, reference in comparisons:
        for labels in (budget for budget in budgets if budget != ANY):
            ours, theirs = scores_of(rows, arm, labels), scores_of(rows, reference, labels)
            if seeds := sorted(set(ours) & set(theirs)):
                values, against = (np.array([found[s]["per_volume"] for s in seeds]) for found in (ours, theirs))
                name = f"{arm}{'/' if how == 'ratio' else '-'}{reference}"
                compared.setdefault(name, {})[labels] = compare_paired(values, against, subjects, how)
    return {"dice": dice, f"{how}s": compared}
