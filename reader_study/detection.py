"""How well readers tell generated from real: rates, d', ROC curves, and equivalence to chance."""

from typing import Any, TypedDict

import numpy as np
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve
from statsmodels.stats.proportion import binom_tost, proportion_confint


class Rate(TypedDict):
    """A rate and its 95 % intervals of Wilson and of Clopper and Pearson."""

    count: int
    of: int
    rate: float
    wilson: tuple[float, float]
    clopper_pearson: tuple[float, float]


def rate(count: int, of: int) -> Rate:
    """Compute a rate with its intervals (Wilson 1927; Clopper and Pearson 1934)."""
    ends: list[Any] = [proportion_confint(count, of, 0.05, method) for method in ("wilson", "beta")]
    (low, high), (exact_low, exact_high) = ends
    return {
        "count": count,
        "of": of,
        "rate": count / of,
        "wilson": (float(low), float(high)),
        "clopper_pearson": (float(exact_low), float(exact_high)),
    }


def d_prime(hits: int, signals: int, false_alarms: int, noises: int) -> tuple[float, float]:
    """Compute d' and the criterion c of yes/no answers, with the log-linear correction (Hautus 1995)."""
    z_hit = norm.ppf((hits + 0.5) / (signals + 1))
    z_false = norm.ppf((false_alarms + 0.5) / (noises + 1))
    return float(z_hit - z_false), float(-(z_hit + z_false) / 2)


def d_prime_of_choice(correct: int, of: int) -> float:
    """Compute d' of forced choices between two, with the log-linear correction (Macmillan and Creelman 2005, Eq. 7.2).

    It is sqrt(2) z(share correct).
    """
    return float(np.sqrt(2) * norm.ppf((correct + 0.5) / (of + 1)))


def auc(scores: np.ndarray, generated: np.ndarray) -> float:
    """Compute the area under the empirical ROC curve; ties count half."""
    return float(roc_auc_score(generated, scores))


def roc(scores: np.ndarray, generated: np.ndarray) -> tuple[list[float], list[float]]:
    """Return the false and the true positive rates of the ROC curve."""
    false, true, _ = roc_curve(generated, scores, drop_intermediate=False)
    return false.tolist(), true.tolist()


def equivalence_p(correct: int, of: int, margin: float) -> float:
    """Return the p value of two one-sided exact binomial tests (Schuirmann 1987).

    It is small if the rate of correct answers lies within `margin` of chance, 0.5.
    """
    return float(binom_tost(correct, of, 0.5 - margin, 0.5 + margin)[0])
