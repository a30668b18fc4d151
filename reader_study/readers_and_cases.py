"""Several readers on the same cases: means and differences that hold for other readers and other cases.

The method of Obuchowski and Rockette (1995) with the degrees of freedom of Hillis (2007): figures of readers are
random, and covary because the cases are the same.
"""

from typing import TypedDict

import numpy as np
from scipy.stats import f as f_distribution
from scipy.stats import norm, t

RESAMPLES = 2000
LIMITS = (2.5, 97.5)


class MeanFigure(TypedDict):
    """The mean over readers, its standard error, degrees of freedom (None: infinite) and 95 % interval."""

    value: float
    standard_error: float
    freedom: float | None
    interval: tuple[float, float]


class Difference(TypedDict):
    """The difference of two models' figures, and the test that there is none."""

    value: float
    standard_error: float
    freedom: float
    interval: tuple[float, float]
    f: float
    p: float


def delong_covariance(scores: np.ndarray, generated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the areas under the ROC curves of readers, and their covariances (DeLong et al. 1988).

    Args:
        scores: (readers, cases), higher for generated.
        generated: (cases,) bool.
    Returns: (readers,) and (readers, readers).
    """
    positive, negative = scores[:, generated], scores[:, ~generated]
    wins = (positive[:, :, None] > negative[:, None, :]) + 0.5 * (positive[:, :, None] == negative[:, None, :])
    by_positive, by_negative = wins.mean(axis=2), wins.mean(axis=1)
    covariance = np.atleast_2d(np.cov(by_positive)) / positive.shape[1]
    return wins.mean(axis=(1, 2)), covariance + np.atleast_2d(np.cov(by_negative)) / negative.shape[1]


def accuracy_covariance(correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the accuracies of readers and their covariances, from (readers, cases) bool."""
    return correct.mean(axis=1), np.atleast_2d(np.cov(correct.astype(float))) / correct.shape[1]


def mean_figure(figures: np.ndarray, covariance: np.ndarray) -> MeanFigure:
    """Compute the mean figure of readers (Obuchowski and Rockette 1995; Hillis 2007).

    A single reader has the error of the cases alone.
    """
    count = len(figures)
    mean = float(figures.mean())
    if count == 1:
        error, freedom = float(np.sqrt(covariance[0, 0])), np.inf
    else:
        between = float(figures.var(ddof=1))
        shared = count * max(float(covariance[~np.eye(count, dtype=bool)].mean()), 0.0)
        error = float(np.sqrt((between + shared) / count))
        freedom = (between + shared) ** 2 / (between**2 / (count - 1)) if between > 0 else np.inf
    reach = error * (t.ppf(0.975, freedom) if np.isfinite(freedom) else norm.ppf(0.975))
    return {
        "value": mean,
        "standard_error": error,
        "freedom": float(freedom) if np.isfinite(freedom) else None,
        "interval": (float(mean - reach), float(mean + reach)),
    }


def difference(first: np.ndarray, second: np.ndarray, covariance: np.ndarray) -> Difference:
    """Test whether two models differ, for other readers and other cases.

    Args:
        first: (readers,) figures of the first model.
        second: of the second.
        covariance: (2 readers, 2 readers), the first model's readers before the second's.
    """
    count = len(first)
    rows = np.stack([first, second])
    effect = rows - rows.mean(axis=1, keepdims=True) - rows.mean(axis=0) + rows.mean()
    interaction = float((effect**2).sum() / (count - 1))
    treatment = float(count * ((rows.mean(axis=1) - rows.mean()) ** 2).sum())
    others = ~np.eye(count, dtype=bool)
    within = (covariance[:count, :count][others].mean() + covariance[count:, count:][others].mean()) / 2
    across = covariance[:count, count:][others].mean()
    return difference_of_squares(
        float(first.mean() - second.mean()), treatment, interaction, float(within), float(across), count
    )


def difference_of_squares(
    value: float, treatment: float, interaction: float, within: float, across: float, readers: int
) -> Difference:
    """Compute the test from MS(T), MS(T:R), Cov2 (`within`) and Cov3 (`across`) of two models."""
    denominator = interaction + max(readers * (within - across), 0.0)
    freedom = denominator**2 / (interaction**2 / (readers - 1)) if interaction > 0 else np.inf
    ratio = treatment / denominator if denominator > 0 else np.nan
    error = float(np.sqrt(2 / readers * denominator))
    reach = error * t.ppf(0.975, freedom)
    p = f_distribution.sf(ratio, 1, freedom) if np.isfinite(freedom) else 2 * norm.sf(np.sqrt(ratio))
    return {
        "value": value,
        "standard_error": error,
        "freedom": float(freedom),
        "interval": (float(value - reach), float(value + reach)),
        "f": float(ratio),
        "p": float(p),
    }


def equivalence(figure: MeanFigure, margin: float, chance: float = 0.5) -> float:
    """Return the p value of two one-sided tests (Schuirmann 1987): small if the mean lies within `margin` of chance."""
    freedom = np.inf if figure["freedom"] is None else figure["freedom"]
    error = max(figure["standard_error"], 1e-12)
    below = t.sf((figure["value"] - (chance - margin)) / error, freedom)
    above = t.sf((chance + margin - figure["value"]) / error, freedom)
    return float(max(below, above))


def unlike_chance(figure: MeanFigure, chance: float = 0.5) -> float:
    """Return the two-sided p value that the mean figure is chance."""
    freedom = np.inf if figure["freedom"] is None else figure["freedom"]
    return float(2 * t.sf(abs(figure["value"] - chance) / max(figure["standard_error"], 1e-12), freedom))


def bootstrap_mean(correct: np.ndarray, random: np.random.Generator) -> tuple[float, float]:
    """Compute the 95 % interval of the mean accuracy over resampled readers, and resampled cases within them.

    Args:
        correct: (readers, cases) bool.
        random: the generator.
    """
    readers, cases = correct.shape
    by_reader = random.multinomial(readers, np.full(readers, 1 / readers), RESAMPLES) / readers
    by_case = random.multinomial(cases, np.full(cases, 1 / cases), RESAMPLES) / cases
    low, high = np.percentile(np.einsum("br,rc,bc->b", by_reader, correct, by_case, optimize=True), LIMITS).tolist()
    return low, high
