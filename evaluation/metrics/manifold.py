"""Precision, recall, density and coverage of generated volumes, in the features of an extractor.

The manifold of a set is the union of balls around its rows, each as large as the distance to the k-th nearest row of
the same set.
"""

import numpy as np
from scipy.spatial.distance import cdist

from training.encoder_distance import checked_samples

SCORES = ("precision", "recall", "density", "coverage")
NEIGHBORS = 5  # of Naeem et al. 2020; fewer for sets of five or less


def manifold_scores(generated: np.ndarray, real: np.ndarray, neighbors: int = NEIGHBORS) -> np.ndarray:
    """Compute the `SCORES` of generated rows (M, F) against real rows (N, F): (4,).

    - precision: share of generated rows in a ball of real ones (Kynkaanniemi et al. 2019, Eq. 1-2).
    - recall: share of real rows in a ball of generated ones (the same).
    - density: number of real balls that a generated row lies in, over k (Naeem et al. 2020, Eq. 4); may exceed 1.
    - coverage: share of real rows whose ball has a generated row (Eq. 5). For two samples of one distribution it is
      1 - (N - 1) ... (N - k) / ((M + N - 1) ... (M + N - k)) on average (Eq. 9), not 1.

    Args:
        neighbors: k; at most one less than the smaller set has rows.
    Raises: ValueError for samples of different features, of fewer than 2, or that are not finite.
    """
    generated, real = checked_samples(generated, real)
    k = min(neighbors, len(generated) - 1, len(real) - 1)
    between = cdist(generated, real)
    in_real = between <= _radii(real, k)
    in_generated = _radii(generated, k) >= between.T
    return np.array(
        [in_real.any(1).mean(), in_generated.any(1).mean(), in_real.sum(1).mean() / k, in_real.any(0).mean()]
    )


def shortfalls(generated: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Return 1 minus each of the scores, which is small for sets that are alike, as distances are."""
    return 1 - manifold_scores(generated, real)


def _radii(rows: np.ndarray, k: int) -> np.ndarray:
    return np.sort(cdist(rows, rows), axis=1)[:, k]  # the first is the row itself
