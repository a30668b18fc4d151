"""Thresholds that a further subject exceeds with a known probability at most (split conformal: Vovk et al. 2005; with
subjects: Lee, Barber, Willett 2023)."""

import numpy as np

from .bootstrap import Units, subject_weights


def conformal_threshold(scores: np.ndarray, units: Units, alpha: float) -> float:
    """Return the threshold that a volume of a further unit exceeds with a probability of at most `alpha`.

    It is the (1 - alpha) quantile of the scores (N,) and of one more unit with an infinite score.

    Raises: ValueError if there are too few units for any threshold at this alpha: 1 / alpha - 1 are needed.
    """
    weights = subject_weights(units)
    count = round(weights.sum())
    if not 0 < alpha < 1:
        raise ValueError(f"alpha {alpha:g}: take a fraction of unseen subjects between 0 and 1, such as 0.05")
    if (count + 1) * alpha < 1 - 1e-9:
        raise ValueError(
            f"{count} subjects are too few for a threshold that 1 in {1 / alpha:g} exceeds: take alpha >= "
            f"{1 / (count + 1):.3g}"
        )
    return conformal_quantile(scores, weights, alpha)


def conformal_quantile(scores: np.ndarray, weights: np.ndarray, alpha: float) -> float:
    """Compute `conformal_threshold` with a weight for each score; with too few units it is the lowest score."""
    order = np.argsort(scores, kind="stable")
    reached = np.cumsum(weights[order]) >= (round(weights.sum()) + 1) * (1 - alpha) - 1e-9
    return float(scores[order][reached.argmax()])


def check_unseen(units: Units, alpha: float) -> None:
    """Check that unseen units are enough for alpha, before the work of comparing.

    Raises: ValueError where `evaluation.metrics.memorization.memorized` would.
    """
    others = len(set(units)) - 1  # each unit is compared with the threshold of the others
    try:
        conformal_threshold(np.zeros(others), range(others), alpha)
    except ValueError as error:
        if not 0 < alpha < 1:
            raise
        needed = round(np.ceil(1 / alpha - 1e-9))
        raise ValueError(
            f"each of {others + 1} unseen subjects is compared with the others, and {error}, or hold out {needed} "
            "subjects (data.test_fraction)"
        ) from error
