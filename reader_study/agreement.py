"""Agreement between readers, and of a reader with themselves. Ratings: (readers, volumes), NaN where open."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import krippendorff
import numpy as np
import pandas as pd
import pingouin
from statsmodels.stats.inter_rater import aggregate_raters, cohens_kappa
from statsmodels.stats.inter_rater import fleiss_kappa as kappa_of_table

RESAMPLES = 1000
LIMITS = (2.5, 97.5)


class Agreement(TypedDict):
    """A coefficient and its 95 % interval; NaN or None where the ratings, or their agreement, do not vary."""

    value: float
    interval: tuple[float, float] | None


def fleiss_kappa(ratings: np.ndarray) -> float:
    """Compute Fleiss' kappa of nominal ratings, of the volumes that all readers rated (Fleiss 1971)."""
    whole = ratings[:, ~np.isnan(ratings).any(axis=0)].T.astype(int)
    if whole.size == 0 or len(np.unique(whole)) < 2:
        return float("nan")
    return float(kappa_of_table(aggregate_raters(whole)[0]))


def krippendorff_alpha(ratings: np.ndarray) -> float:
    """Compute Krippendorff's alpha of ordinal ratings (Krippendorff 2011); open ratings are fine."""
    known = ratings[:, (~np.isnan(ratings)).sum(axis=0) > 1]
    if known.size == 0 or len(np.unique(known[~np.isnan(known)])) < 2:
        return float("nan")
    return float(krippendorff.alpha(reliability_data=known, level_of_measurement="ordinal"))


def over_volumes(
    statistic: Callable[[np.ndarray], float], ratings: np.ndarray, random: np.random.Generator
) -> Agreement:
    """Compute a statistic of ratings, with an interval over resampled volumes."""
    count = ratings.shape[1]
    drawn = [statistic(ratings[:, random.integers(count, size=count)]) for _ in range(RESAMPLES)]
    known = [value for value in drawn if np.isfinite(value)]
    interval = _with_width(np.percentile(known, LIMITS)) if len(known) > RESAMPLES / 2 else None
    return {"value": statistic(ratings), "interval": interval}


def icc_2k(ratings: np.ndarray) -> Agreement:
    """Compute ICC(2,k): two-way random effects, absolute agreement, mean of k readers (Shrout and Fleiss 1979)."""
    whole = ratings[:, ~np.isnan(ratings).any(axis=0)]
    if whole.shape[0] < 2 or whole.shape[1] < 5 or len(np.unique(whole)) < 2:
        return {"value": float("nan"), "interval": None}
    readers, volumes = np.indices(whole.shape)
    table = pd.DataFrame({"reader": readers.ravel(), "volume": volumes.ravel(), "rating": whole.ravel()})
    found = pingouin.intraclass_corr(table, targets="volume", raters="reader", ratings="rating")
    row = found[found["Type"].isin(["ICC2k", "ICC(A,k)"])].iloc[0]
    low, high = next(row[name] for name in ("CI95", "CI95%") if name in row.index)
    return {"value": float(row["ICC"]), "interval": (float(low), float(high))}


def intra_reader_kappa(first: Sequence[int], again: Sequence[int], levels: int, *, ordinal: bool) -> Agreement:
    """Compute Cohen's kappa of first and repeated ratings (0 to levels - 1), quadratically weighted if ordinal."""
    table = np.zeros((levels, levels))
    np.add.at(table, (np.asarray(first, int), np.asarray(again, int)), 1)
    used = (table.sum(0) + table.sum(1)) > 0
    if used.sum() < 2:
        return {"value": float("nan"), "interval": None}
    found: Any = cohens_kappa(table, wt="quadratic" if ordinal else None)
    interval = np.array([found.kappa_low, found.kappa_upp]).clip(-1, 1)  # a normal interval leaves the range
    return {"value": float(found.kappa), "interval": _with_width(interval)}


def _with_width(ends: np.ndarray) -> tuple[float, float] | None:
    """Return an interval, or None if it is open or has no width: where nothing varies, no error can be estimated."""
    low, high = ends.tolist()
    return (low, high) if np.isfinite(high - low) and high - low > 1e-9 else None
