"""Whether a generator gives away whom it learned from: memorized volumes, membership, and re-identification, with intervals.

Everything is a function of similarities (`evaluation.metrics.nearest`): larger is nearer. Volumes of one subject are not independent,
so the subject is the unit throughout: every unit weighs the same however many volumes it has, and bootstraps draw units with replacement
(Efron 1979). Intervals are of 95 %. `units` are (N,) names or numbers, one a volume.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.data.volume_sets import VolumeSet
from evaluation.metrics.nearest import (
    Match,
    Space,
    aligned,
    best_match,
    similarity_matrix,
)
from volumes import slices_figure

Units = Sequence[Any] | np.ndarray
RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles
Z95 = 1.959964
RATIO = (
    1 / 3
)  # of the distances to the nearest and the second nearest, below which a volume counts as memorized (Yoon et al. 2023)
FALSE_POSITIVES = (0.01, 0.1)  # rates at which an attack's true positives are given (Carlini et al. 2022)


def wilson(rate: float, count: int) -> list[float]:
    """95 % interval of a rate that was seen among `count` independent units (Wilson 1927)."""
    center, spread = rate + Z95**2 / (2 * count), Z95 * np.sqrt(rate * (1 - rate) / count + Z95**2 / (4 * count**2))
    return [
        float(max(center - spread, 0) / (1 + Z95**2 / count)),
        float(min((center + spread) / (1 + Z95**2 / count), 1)),
    ]


def unit_mean(values: np.ndarray, units: Units) -> float:
    """Mean over units of the mean over each one's values (N,)."""
    return float(np.average(values, weights=_weights(units)))


def conformal_threshold(scores: np.ndarray, units: Units, alpha: float) -> float:
    """What a volume of a further unit exceeds with a probability of at most `alpha`: the (1 - alpha) quantile of the scores (N,),
    as one more unit, infinitely high, would make it (split conformal: Vovk et al. 2005; with units: Lee, Barber, Willett 2023).

    Raises: ValueError if there are too few units for any threshold at this alpha: it takes 1 / alpha - 1.
    """
    weights = _weights(units)
    count = round(weights.sum())
    if not 0 < alpha < 1:
        raise ValueError(f"alpha {alpha:g} is a fraction of unseen subjects: take one between 0 and 1, such as 0.05")
    if (count + 1) * alpha < 1 - 1e-9:
        raise ValueError(
            f"{count} subjects cannot tell what 1 in {1 / alpha:g} exceeds: take alpha >= {1 / (count + 1):.3g}"
        )
    order = np.argsort(scores, kind="stable")
    reached = np.cumsum(weights[order]) >= (count + 1) * (1 - alpha) - 1e-9
    return float(scores[order][reached.argmax()])


def check_unseen(units: Units, alpha: float) -> None:
    """Raises: ValueError where `memorized` will, for too few unseen units for alpha; ask before the work of comparing."""
    others = sorted(set(units))[1:]  # each unit is judged by the threshold of the others
    try:
        conformal_threshold(np.zeros(len(others)), others, alpha)
    except ValueError as error:
        if not 0 < alpha < 1:
            raise
        needed = round(np.ceil(1 / alpha - 1e-9))
        raise ValueError(
            f"of {len(others) + 1} unseen subjects each is judged by the others, and {error}, or hold out {needed} subjects "
            "(data.test_fraction)"
        ) from error


def check_references(units: Units) -> None:
    """Raises: ValueError for references of one subject, in which nothing is second nearest."""
    if len(set(units)) < 2:
        raise ValueError("a ratio of distances needs references of two subjects")


def memorized(
    generated: np.ndarray,
    unseen: np.ndarray,
    unseen_units: Units,
    *,
    alpha: float = 0.05,
    generated_units: Units | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """How many generated volumes are nearer to the training set than unseen real ones are.

    Args:
        generated: (G,) score of each generated volume, such as the similarity to its nearest training volume; larger is nearer.
        unseen: (U,) the same of real volumes that the generator never saw, of `unseen_units`.
        alpha: false-positive rate that the threshold is set to (`conformal_threshold`).
        generated_units: what was drawn independently, such as the subject whose mask was used; each volume by itself by default.

    Returns: {"threshold", "fraction" of generated volumes above it, "interval" (Wilson; the threshold as known), "interval_drawn"
    (bootstrap of generated and of unseen units, with the threshold), "false_positives": {"fraction" of unseen volumes above the
    threshold of all other subjects, "interval"}, "excess" of the former fraction over the latter, "nearer" (`attack`): how often
    a generated volume is nearer than an unseen one, 0.5 where they are alike}.
    Raises: ValueError for too few subjects for alpha (one more than 1 / alpha - 1).
    """
    generated_units = range(len(generated)) if generated_units is None else generated_units
    threshold = conformal_threshold(unseen, unseen_units, alpha)
    fraction = unit_mean(generated > threshold, generated_units)
    names = np.asarray(unseen_units)
    above = np.zeros(len(unseen))
    for unit in np.unique(names):
        own = names == unit
        above[own] = unseen[own] > conformal_threshold(unseen[~own], names[~own], alpha)
    wrong = unit_mean(above, names)
    random = np.random.default_rng(seed)
    drawn_units, drawn = _draws(generated_units, random), []
    for counts, weights in zip(_draws(names, random), drawn_units, strict=True):
        order = np.argsort(unseen, kind="stable")
        total = counts.sum()  # of the units drawn
        reached = np.cumsum(counts[order]) >= (total + 1) * (1 - alpha) - 1e-9
        drawn.append(np.average(generated > unseen[order][reached.argmax()], weights=weights))
    return {
        "alpha": alpha,
        "threshold": threshold,
        "fraction": fraction,
        "interval": wilson(fraction, len(set(generated_units))),
        "interval_drawn": np.percentile(drawn, INTERVAL).tolist(),
        "false_positives": {"fraction": wrong, "interval": wilson(wrong, len(np.unique(names)))},
        "excess": fraction - wrong,
        "nearer": attack(generated, unseen, generated_units, unseen_units, seed=seed),
    }


def distance_ratio(similarity: np.ndarray, units: Units) -> np.ndarray:
    """(Q,) distance to the nearest reference over that to the nearest of another subject, from similarities (Q, R); in [0, 1].

    A copy has one nearest and no other (Yoon et al. 2023; Carlini et al. 2023 divide by the mean of many). Distances are those of
    standardized volumes, sqrt(2 (1 - correlation)). Raises: ValueError for references of one subject.
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
) -> dict[str, Any]:
    """How well a score, larger for members, tells (M,) members of the training set from (N,) others.

    Returns: {"auc": the probability that a member scores higher, ties a half, "interval" (bootstrap of both sides' units),
    "true_positives": {false-positive rate: rate}}. 0.5 is chance.
    """
    wins = (members[:, None] > others[None]) + 0.5 * (members[:, None] == others[None])
    random = np.random.default_rng(seed)
    ours, theirs = _draws(member_units, random), _draws(other_units, random)
    drawn = ((ours @ wins) * theirs).sum(1) / (ours.sum(1) * theirs.sum(1))
    a, b = _weights(member_units), _weights(other_units)
    hits = {}
    for rate in FALSE_POSITIVES:
        order = np.argsort(-others, kind="stable")
        allowed = np.cumsum(b[order]) / b.sum() <= rate + 1e-9
        limit = others[order][allowed.sum()] if not allowed.all() else -np.inf  # the first other that must not be taken
        hits[f"{rate:g}"] = float(np.average(members > limit, weights=a))
    return {
        "auc": float(a @ wins @ b / (a.sum() * b.sum())),
        "interval": np.percentile(drawn, INTERVAL).tolist(),
        "true_positives": hits,
    }


def loss_attack(
    member_losses: np.ndarray,
    other_losses: np.ndarray,
    member_units: Units,
    other_units: Units,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """`attack` by the model's own loss on each volume, (M,) and (N,), lower for members (Yeom et al. 2018; of diffusion models
    Matsumoto et al. 2023). Average each volume's loss over the same draws of times and noise, and use no augmentation."""
    return attack(-np.asarray(member_losses), -np.asarray(other_losses), member_units, other_units, seed=seed)


def own_mask(
    seen: np.ndarray, seen_units: Units, unseen: np.ndarray, unseen_units: Units, *, seed: int = 0
) -> dict[str, Any]:
    """Similarity of generated volumes to the real volume whose mask they were made from: (N,) of training masks against (M,) of unseen
    ones. A mask explains some of it in both; "difference" is what the model remembers beside, with the bootstrap's interval."""
    random = np.random.default_rng(seed)
    report: dict[str, Any] = {}
    drawn = []
    for name, values, units in (("training_masks", seen, seen_units), ("unseen_masks", unseen, unseen_units)):
        counts = _draws(units, random)
        drawn.append(counts @ values / counts.sum(1))
        report[name] = {
            "volumes": len(values),
            "mean": unit_mean(values, units),
            "interval": np.percentile(drawn[-1], INTERVAL).tolist(),
        }
    difference = report["training_masks"]["mean"] - report["unseen_masks"]["mean"]
    return {**report, "difference": difference, "interval": np.percentile(drawn[0] - drawn[1], INTERVAL).tolist()}


def reidentification(
    similarity: np.ndarray, sources: Units, units: Units, ranks: Sequence[int] = (1, 5)
) -> dict[str, Any]:
    """How often the patient of an anonymized volume is among the nearest real patients.

    Args:
        similarity: (Q, R) of anonymized volumes and real ones; a patient is as near as the nearest of its volumes.
        sources: (Q,) patient of each anonymized volume. units: (R,) patient of each real one.

    Returns: {"patients", "top_1": {"rate", "interval" (Wilson, over the sources), "chance"}, "top_5": ...}. A tie counts
    against being found. Raises: ValueError for a source without a real volume.
    """
    names = sorted(set(units))
    if lost := sorted(set(sources) - set(names)):
        raise ValueError(f"the gallery has no real volume of {lost[:5]}: whoever is not in it cannot be found")
    patients = np.asarray(units)
    nearest = np.stack([similarity[:, patients == name].max(1) for name in names], axis=1)
    own = nearest[np.arange(len(nearest)), [names.index(source) for source in sources]]
    rank = (nearest >= own[:, None]).sum(1)
    report: dict[str, Any] = {"patients": len(names), "median_rank": float(np.median(rank))}
    for top in ranks:
        rate = unit_mean(rank <= top, sources)
        report[f"top_{top}"] = {
            "rate": rate,
            "interval": wilson(rate, len(set(sources))),
            "chance": min(top / len(names), 1.0),
        }
    return report


def closest_pairs(
    similarity: np.ndarray, queries: VolumeSet, references: VolumeSet, space: Space, count: int = 8
) -> list[dict[str, Any]]:
    """The queries that are nearest to a reference, nearest first, a query once: {"query", "reference" (names), "similarity",
    "flip" (axes), "shift" (voxels, or cells of the space's maps)}."""
    pairs = []
    for index in np.argsort(-similarity.max(1), kind="stable")[:count]:
        nearest = int(similarity[index].argmax())
        match = best_match(queries.volumes[index], references.volumes[nearest], space)
        names = {"query": queries.names[index], "reference": references.names[nearest]}
        pairs.append({**names, **match._asdict(), "flip": list(match.flip), "shift": list(match.shift)})
    return pairs


def pairs_figure(pairs: Sequence[dict[str, Any]], queries: VolumeSet, references: VolumeSet, space: Space):
    """Three slices of each of `closest_pairs` (of their first channel): the query, placed as the pair says, above the reference.
    A shift is drawn only of a space of voxels: that of other spaces counts cells."""
    columns = []
    for pair in pairs:
        x, y, z = pair["shift"] if space.embed is None else (0, 0, 0)
        match = Match(pair["similarity"], tuple(pair["flip"]), (x, y, z))
        query = queries.volumes[list(queries.names).index(pair["query"])]
        reference = references.volumes[list(references.names).index(pair["reference"])]
        still = Match(1.0, (), (0, 0, 0))
        images = {"query": aligned(query, match, space.crop)[0], "reference": aligned(reference, still, space.crop)[0]}
        windows = {name: tuple(np.percentile(image, (0.5, 99.5))) for name, image in images.items()}
        title = f"{pair['query'].rpartition('/')[2]}\n{pair['reference']}\n{pair['similarity']:.3f}"
        columns.append({"title": title, "images": images, "windows": windows})
    return slices_figure(columns)


def privacy_report(
    training: VolumeSet,
    unseen: VolumeSet,
    generated: VolumeSet,
    spaces: Mapping[str, Space],
    *,
    anonymized: VolumeSet | None = None,
    stand_ins: bool = False,
    losses: tuple[np.ndarray, np.ndarray] | None = None,
    alpha: float = 0.05,
    pairs: int = 8,
    seed: int = 0,
    on_pairs: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Everything above, ready for a report: {"counts", "spaces": {name: {"memorized": {"similarity", "ratio", "other_masks"}, "yoon_2023",
    "membership", "own_mask", "reidentification", "closest"}}, "loss_membership"}.

    `anonymized` volumes have the source patient as their subject; the gallery is training and unseen volumes together. With `stand_ins`
    generated volumes are taken for the anonymized volumes of the patients whose masks they were made from. `losses` are those of
    training and of unseen volumes, in their order. "other_masks" judges each volume without the training subject whose mask it
    was made from. Raises: ValueError for subjects that are both in training and unseen (nothing could be concluded), and for
    two real volumes of one name.
    """
    if shared := sorted(set(training.subjects) & set(unseen.subjects)):
        raise ValueError(f"subjects {shared[:5]} are in training and unseen: split by subject")
    if twice := sorted(set(training.names) & set(unseen.names)):
        raise ValueError(f"volumes {twice[:5]} are in training and unseen: give every volume a name of its own")
    report: dict[str, Any] = {
        "counts": {
            name: {"volumes": len(part.names), "units": len(set(part.subjects))}
            for name, part in (("training", training), ("unseen", unseen), ("generated", generated))
        },
        "spaces": {},
    }
    patients = dict(zip([*training.names, *unseen.names], [*training.subjects, *unseen.subjects], strict=True))
    for name, space in spaces.items():
        to_training, baseline, to_unseen = (
            similarity_matrix(a.volumes, b.volumes, space, on_pairs=on_pairs)
            for a, b in ((generated, training), (unseen, training), (generated, unseen))
        )
        found = _judge(to_training, baseline, to_unseen, training, unseen, generated, alpha=alpha, seed=seed)
        found["closest"] = closest_pairs(to_training, generated, training, space, pairs)
        report["spaces"][name] = found
        gallery, sources = [to_training, to_unseen], []
        if anonymized is not None:
            gallery = [
                similarity_matrix(anonymized.volumes, r.volumes, space, on_pairs=on_pairs) for r in (training, unseen)
            ]
            sources = list(anonymized.subjects)
        elif stand_ins:
            rows = [row for row, mask in enumerate(generated.masks or ()) if mask in patients]
            gallery = [matrix[rows] for matrix in gallery]
            sources = [patients[str((generated.masks or ())[row])] for row in rows]
        if sources:
            found["reidentification"] = reidentification(np.concatenate(gallery, 1), sources, list(patients.values()))
    if losses is not None:
        report["loss_membership"] = loss_attack(*losses, training.subjects, unseen.subjects, seed=seed)
    return report


def _judge(
    to_training: np.ndarray,
    baseline: np.ndarray,
    to_unseen: np.ndarray,
    training: VolumeSet,
    unseen: VolumeSet,
    generated: VolumeSet,
    *,
    alpha: float,
    seed: int,
) -> dict[str, Any]:
    """What one space says: similarities of generated to training (G, T), unseen to training (U, T), generated to unseen (G, U)."""
    settings = {"alpha": alpha, "generated_units": generated.subjects, "seed": seed}
    ratios = distance_ratio(to_training, training.subjects), distance_ratio(baseline, training.subjects)
    memory = {
        "similarity": memorized(to_training.max(1), baseline.max(1), unseen.subjects, **settings),
        "ratio": memorized(-ratios[0], -ratios[1], unseen.subjects, **settings),
    }
    yoon, floor = unit_mean(ratios[0] < RATIO, generated.subjects), unit_mean(ratios[1] < RATIO, unseen.subjects)
    found: dict[str, Any] = {
        "memorized": memory,
        "yoon_2023": {
            "fraction": yoon,
            "interval": wilson(yoon, len(set(generated.subjects))),
            "unseen": floor,
            "unseen_interval": wilson(floor, len(set(unseen.subjects))),
        },
        "membership": attack(to_training.max(0), to_unseen.max(0), training.subjects, unseen.subjects, seed=seed),
    }
    if generated.masks is not None:
        without, own = to_training.copy(), {}
        for name, real, matrix in (("training", training, to_training), ("unseen", unseen, to_unseen)):
            places = {volume: place for place, volume in enumerate(real.names)}
            rows = [row for row, mask in enumerate(generated.masks) if mask in places]
            columns = [places[str(generated.masks[row])] for row in rows]
            own[name] = matrix[rows, columns], [real.subjects[column] for column in columns]
            if name == "training":
                for row, unit in zip(rows, own[name][1], strict=True):
                    without[row, np.asarray(real.subjects) == unit] = -1
        memory["other_masks"] = memorized(without.max(1), baseline.max(1), unseen.subjects, **settings)
        if len(own["training"][0]) and len(own["unseen"][0]):
            found["own_mask"] = own_mask(*own["training"], *own["unseen"], seed=seed)
    return found


def _weights(units: Units) -> np.ndarray:
    """(N,) what each volume weighs, so that every unit's weigh 1 together."""
    _, index, counts = np.unique(np.asarray(units), return_inverse=True, return_counts=True)
    return 1 / counts[index]


def _draws(units: Units, random: np.random.Generator) -> np.ndarray:
    """(RESAMPLES, N) weights of the volumes when as many units as there are get drawn with replacement."""
    names, index = np.unique(np.asarray(units), return_inverse=True)
    counts = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    return counts[:, index] * _weights(units)
