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
    """The mean over readers, its standard error, degrees of freedom (None: infinite) and 95 % interval.

    The interval is cut at 0 and 1, and is None where no error can be estimated.
    """

    value: float
    standard_error: float
    freedom: float | None
    interval: tuple[float, float] | None


class Difference(TypedDict):
    """The difference of two models' figures, and the test that there is none.

    The interval is cut at -1 and 1, and is None where no error can be estimated; F and p are then NaN.
    """

    value: float
    standard_error: float
    freedom: float
    interval: tuple[float, float] | None
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


def accuracy_covariance(correct: np.ndarray, generated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the balanced accuracies of readers, and their covariances.

    Balanced accuracy is the mean of the shares of generated and of real cases that are called what they are: who always
    gives one answer has 0.5, however many cases there are of each kind.

    Args:
        correct: (readers, cases) bool.
        generated: (cases,) bool, two or more of each kind.
    Returns: (readers,) and (readers, readers).
    """
    kinds = [correct[:, generated].astype(float), correct[:, ~generated].astype(float)]
    accuracies = (kinds[0].mean(axis=1) + kinds[1].mean(axis=1)) / 2
    return accuracies, (_share_covariance(kinds[0]) + _share_covariance(kinds[1])) / 4


def _share_covariance(correct: np.ndarray) -> np.ndarray:
    """Compute the covariances of the readers' shares of correct answers to one kind of cases."""
    readers, count = correct.shape
    if (correct == correct[:, :1]).all():
        # No answer varies, and yet the error is not 0: as if one case more was answered otherwise, and one as these
        # (Agresti and Coull 1998), by all readers alike.
        return np.full((readers, readers), (count + 1) / (count + 2) ** 2 / count)
    return np.atleast_2d(np.cov(correct)) / count


def mean_figure(figures: np.ndarray, covariance: np.ndarray) -> MeanFigure:
    """Compute the mean figure of readers (Obuchowski and Rockette 1995; Hillis 2007).

    The error is never below that of the cases alone, which a single reader has: readers who happen to agree are not
    without error.
    """
    count = len(figures)
    mean = float(figures.mean())
    of_cases = _cases_variance(covariance)
    if count == 1:
        variance, freedom = of_cases, np.inf
    else:
        between = float(figures.var(ddof=1))
        shared = count * max(float(covariance[~np.eye(count, dtype=bool)].mean()), 0.0)
        variance = max((between + shared) / count, of_cases)
        freedom = (count * variance) ** 2 / (between**2 / (count - 1)) if between > 0 else np.inf
    error = float(np.sqrt(variance))
    reach = error * (t.ppf(0.975, freedom) if np.isfinite(freedom) else norm.ppf(0.975))
    return {
        "value": mean,
        "standard_error": error,
        "freedom": float(freedom) if np.isfinite(freedom) else None,
        "interval": (max(float(mean - reach), 0.0), min(float(mean + reach), 1.0)) if error > 0 else None,
    }


def _cases_variance(covariance: np.ndarray) -> float:
    """Return the variance of the mean of these readers over other cases; negative covariances count as none."""
    count = len(covariance)
    variance = float(np.diag(covariance).mean()) / count
    if count > 1:
        variance += max(float(covariance[~np.eye(count, dtype=bool)].mean()), 0.0) * (count - 1) / count
    return variance


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
    signs = np.repeat([1.0, -1.0], count) / count
    return difference_of_squares(
        float(first.mean() - second.mean()),
        treatment,
        interaction,
        float(within),
        float(across),
        count,
        least=float(signs @ covariance @ signs),
    )


def difference_of_squares(
    value: float, treatment: float, interaction: float, within: float, across: float, readers: int, least: float = 0.0
) -> Difference:
    """Compute the test from MS(T), MS(T:R), Cov2 (`within`) and Cov3 (`across`) of two models.

    `least` is the variance of the difference over other cases with these readers, below which the error never is.
    """
    denominator = max(interaction + max(readers * (within - across), 0.0), readers / 2 * least)
    freedom = denominator**2 / (interaction**2 / (readers - 1)) if interaction > 0 else np.inf
    ratio = treatment / denominator if denominator > 0 else np.nan
    error = float(np.sqrt(2 / readers * denominator))
    reach = error * t.ppf(0.975, freedom)
    p = f_distribution.sf(ratio, 1, freedom) if np.isfinite(freedom) else 2 * norm.sf(np.sqrt(ratio))
    return {
        "value": value,
        "standard_error": error,
        "freedom": float(freedom),
        "interval": (max(float(value - reach), -1.0), min(float(value + reach), 1.0)) if error > 0 else None,
        "f": float(ratio),
        "p": float(p),
    }


def equivalence(figure: MeanFigure, margin: float, chance: float = 0.5) -> float:
    """Return the p value of two one-sided tests (Schuirmann 1987): small if the mean lies within `margin` of chance.

    It is 1 where no error can be estimated: nothing is shown then.
    """
    if not figure["standard_error"] > 0:
        return 1.0
    freedom = np.inf if figure["freedom"] is None else figure["freedom"]
    below = t.sf((figure["value"] - (chance - margin)) / figure["standard_error"], freedom)
    above = t.sf((chance + margin - figure["value"]) / figure["standard_error"], freedom)
    return float(max(below, above))


def unlike_chance(figure: MeanFigure, chance: float = 0.5) -> float:
    """Return the two-sided p value that the mean figure is chance; 1 where no error can be estimated."""
    if not figure["standard_error"] > 0:
        return 1.0
    freedom = np.inf if figure["freedom"] is None else figure["freedom"]
    return float(2 * t.sf(abs(figure["value"] - chance) / figure["standard_error"], freedom))


def bootstrap_mean(
    correct: np.ndarray, generated: np.ndarray, random: np.random.Generator
) -> tuple[float, float] | None:
    """Compute the 95 % interval of the mean balanced accuracy over resampled readers and cases of each kind.

    Args:
        correct: (readers, cases) bool.
        generated: (cases,) bool.
        random: the generator.
    Returns: the interval; None where no answer varies, so that resampling shows no error.
    """
    readers = len(correct)
    by_reader = random.multinomial(readers, np.full(readers, 1 / readers), RESAMPLES) / readers
    means = np.zeros(RESAMPLES)
    for kind in (correct[:, generated], correct[:, ~generated]):
        cases = kind.shape[1]
        by_case = random.multinomial(cases, np.full(cases, 1 / cases), RESAMPLES) / cases
        means += np.einsum("br,rc,bc->b", by_reader, kind, by_case, optimize=True) / 2
    low, high = np.percentile(means, LIMITS).tolist()
    return (low, high) if np.ptp(means) > 1e-12 else None
