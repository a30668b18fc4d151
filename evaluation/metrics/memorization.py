"""Measure what generated volumes reveal of training subjects: memorized volumes, membership and re-identification, with
intervals.

Everything is a function of similarities (`evaluation.metrics.nearest`): larger is nearer. Volumes of one subject are
not independent, so the subject is the unit throughout: every unit weighs the same, whatever its number of volumes, and
bootstraps resample units (`evaluation.stats.bootstrap`). Intervals are of 95 %. `units` are (N,) names or numbers, one
per volume.
"""

from typing import TypedDict

import numpy as np

from evaluation.stats.bootstrap import Units, interval_of, resample_weights, subject_mean, subject_weights
from evaluation.stats.conformal import conformal_quantile, conformal_threshold
from evaluation.stats.intervals import wilson

FALSE_POSITIVES = (0.01, 0.1)  # rates at which the true positives of an attack are reported (Carlini et al. 2022)


class Rate(TypedDict):
    """A fraction of volumes and its Wilson interval."""

    fraction: float
    interval: list[float]


class Attack(TypedDict):
    """How well a score tells members of the training set from others; 0.5 is chance.

    `auc` is the probability that a member scores higher, with ties counted half. `true_positives` are by false-positive
    rate.
    """

    auc: float
    interval: list[float]  # bootstrap of the units of both sides
    true_positives: dict[str, float]


class Memorized(TypedDict):
    """How many generated volumes are nearer to the training set than unseen real ones, see `memorized`."""

    alpha: float
    threshold: float
    fraction: float  # of generated volumes above the threshold
    interval: list[float]  # Wilson, for a fixed threshold
    interval_drawn: list[float]  # bootstrap of generated and of unseen units, with the threshold
    false_positives: Rate  # of unseen volumes above the threshold of all other subjects
    excess: float  # `fraction` less that of the false positives
    nearer: Attack  # how often a generated volume is nearer than an unseen one; 0.5 for equal distributions


class MeanSimilarity(TypedDict):
    """Mean similarity of volumes to the real volume of their mask."""

    volumes: int
    mean: float
    interval: list[float]


class OwnMask(TypedDict):
    """Similarity to the real volume of the mask, for training masks and for unseen ones; `interval` is of the
    difference."""

    training_masks: MeanSimilarity
    unseen_masks: MeanSimilarity
    difference: float
    interval: list[float]


class TopRate(TypedDict):
    """How often the patient is among the nearest; the Wilson interval is over the sources."""

    rate: float
    interval: list[float]
    chance: float


class Reidentification(TypedDict):
    """How often the patient of an anonymized volume is among the nearest real patients."""

    patients: int
    median_rank: float
    top_1: TopRate
    top_5: TopRate


def check_references(units: Units) -> None:
    """Raise ValueError for references of one subject, which have no second nearest."""
    if len(set(units)) < 2:
        raise ValueError("a ratio of distances needs references of two subjects or more")


def memorized(
    generated: np.ndarray,
    unseen: np.ndarray,
    unseen_units: Units,
    *,
    alpha: float = 0.05,
    generated_units: Units | None = None,
    seed: int = 0,
) -> Memorized:
    """Measure how many generated volumes are nearer to the training set than unseen real ones.

    Args:
        generated: (G,) score of each generated volume, such as the similarity to its nearest training volume; larger is
            nearer.
        unseen: (U,) the same for real volumes that the generator was not trained on, of `unseen_units`.
        alpha: false-positive rate of the threshold (`conformal_threshold`).
        generated_units: the independent units, such as the subjects whose masks were used; by default every volume.
    Raises: ValueError for too few subjects for alpha (one more than 1 / alpha - 1).
    """
    generated_units = range(len(generated)) if generated_units is None else generated_units
    threshold = conformal_threshold(unseen, unseen_units, alpha)
    fraction = subject_mean(generated > threshold, generated_units)
    names = np.asarray(unseen_units)
    above = np.zeros(len(unseen))
    for unit in np.unique(names):
        of_unit = names == unit
        above[of_unit] = unseen[of_unit] > conformal_threshold(unseen[~of_unit], names[~of_unit], alpha)
    wrong = subject_mean(above, names)
    random = np.random.default_rng(seed)
    of_generated = resample_weights(generated_units, random)
    resampled = [
        np.average(generated > conformal_quantile(unseen, of_unseen, alpha), weights=weights)
        for of_unseen, weights in zip(resample_weights(names, random), of_generated, strict=True)
    ]
    return {
        "alpha": alpha,
        "threshold": threshold,
        "fraction": fraction,
        "interval": wilson(fraction, len(set(generated_units))),
        "interval_drawn": interval_of(resampled),
        "false_positives": {"fraction": wrong, "interval": wilson(wrong, len(np.unique(names)))},
        "excess": fraction - wrong,
        "nearer": attack(generated, unseen, generated_units, unseen_units, seed=seed),
    }


def distance_ratio(similarity: np.ndarray, units: Units) -> np.ndarray:
    """Divide the distance to the nearest reference by that to the nearest of another subject, from similarities (Q, R):
    (Q,) in [0, 1].

    A copy has a single nearest reference (Yoon et al. 2023; Carlini et al. 2023 divide by the mean of many). Distances
    are those of standardized volumes, sqrt(2 (1 - correlation)).

    Raises: ValueError for references of one subject.
    """
    check_references(units)
    names, nearest = np.asarray(units), similarity.argmax(1)
    others = np.where(names[None] == names[nearest][:, None], -np.inf, similarity).max(1)
    first, second = (np.sqrt(np.maximum(2 * (1 - s), 0)) for s in (similarity.max(1), others))
    return np.divide(first, second, out=np.ones(len(first)), where=second > 0)


def attack(
    members: np.ndarray,
    others: np.ndarray,
    member_units: Units,
    other_units: Units,
    *,
    seed: int = 0,
) -> Attack:
    """Measure how well a score, larger for members, tells (M,) members of the training set from (N,) others."""
    wins = (members[:, None] > others[None]) + 0.5 * (members[:, None] == others[None])
    random = np.random.default_rng(seed)
    of_members = resample_weights(member_units, random)
    of_others = resample_weights(other_units, random)
    resampled = ((of_members @ wins) * of_others).sum(1) / (of_members.sum(1) * of_others.sum(1))
    member_weights, other_weights = subject_weights(member_units), subject_weights(other_units)
    order = np.argsort(-others, kind="stable")
    share_above = np.cumsum(other_weights[order]) / other_weights.sum()
    true_positives = {}
    for rate in FALSE_POSITIVES:
        allowed = share_above <= rate + 1e-9
        limit = others[order][allowed.sum()] if not allowed.all() else -np.inf  # the first other that must not be above
        true_positives[f"{rate:g}"] = float(np.average(members > limit, weights=member_weights))
    auc = member_weights @ wins @ other_weights / (member_weights.sum() * other_weights.sum())
    return {"auc": float(auc), "interval": interval_of(resampled), "true_positives": true_positives}


def loss_attack(
    member_losses: np.ndarray,
    other_losses: np.ndarray,
    member_units: Units,
    other_units: Units,
    *,
    seed: int = 0,
) -> Attack:
    """Run `attack` by the model's own loss on each volume, (M,) and (N,), lower for members (Yeom et al. 2018; for
    diffusion models Matsumoto et al. 2023). Average each volume's loss over the same times and noise, and use no
    augmentation."""
    return attack(-np.asarray(member_losses), -np.asarray(other_losses), member_units, other_units, seed=seed)


def own_mask(
    training: np.ndarray, training_units: Units, unseen: np.ndarray, unseen_units: Units, *, seed: int = 0
) -> OwnMask:
    """Compare generated volumes with the real volume of their mask: (N,) similarities for training masks, (M,) for
    unseen ones.

    A mask explains part of the similarity in both; the difference is what the model remembers beyond it.
    """
    random = np.random.default_rng(seed)
    of_training = _mean_over_units(training, training_units, random)
    of_unseen = _mean_over_units(unseen, unseen_units, random)
    on_training: MeanSimilarity = {
        "volumes": len(training),
        "mean": subject_mean(training, training_units),
        "interval": interval_of(of_training),
    }
    on_unseen: MeanSimilarity = {
        "volumes": len(unseen),
        "mean": subject_mean(unseen, unseen_units),
        "interval": interval_of(of_unseen),
    }
    return {
        "training_masks": on_training,
        "unseen_masks": on_unseen,
        "difference": on_training["mean"] - on_unseen["mean"],
        "interval": interval_of(of_training - of_unseen),
    }


def _mean_over_units(values: np.ndarray, units: Units, random: np.random.Generator) -> np.ndarray:
    weights = resample_weights(units, random)
    return weights @ values / weights.sum(1)


def reidentification(similarity: np.ndarray, sources: Units, units: Units) -> Reidentification:
    """Measure how often the patient of an anonymized volume is among the nearest real patients; ties count against it.

    Args:
        similarity: (Q, R) of anonymized volumes and real ones; a patient is as near as the nearest of its volumes.
        sources: (Q,) patient of each anonymized volume.
        units: (R,) patient of each real one.
    Raises: ValueError for a source without a real volume.
    """
    names = sorted(set(units))
    if lost := sorted(set(sources) - set(names)):
        raise ValueError(f"no real volume of patients {lost[:5]} to find them by: give real volumes of every source")
    patients = np.asarray(units)
    nearest = np.stack([similarity[:, patients == name].max(1) for name in names], axis=1)
    columns = {name: column for column, name in enumerate(names)}
    of_source = nearest[np.arange(len(nearest)), [columns[source] for source in sources]]
    rank = (nearest >= of_source[:, None]).sum(1)

    def top(count: int) -> TopRate:
        rate = subject_mean(rank <= count, sources)
        return {"rate": rate, "interval": wilson(rate, len(set(sources))), "chance": min(count / len(names), 1.0)}

    return {"patients": len(names), "median_rank": float(np.median(rank)), "top_1": top(1), "top_5": top(5)}
