"""Whether generated volumes reveal training subjects: all measures of `evaluation.metrics.memorization`, in every space
in which volumes are compared, and the pairs that are nearest to each other."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import NotRequired, TypedDict

import numpy as np
from matplotlib.figure import Figure

from evaluation.data.volume_sets import VolumeSet
from evaluation.metrics.memorization import (
    Attack,
    Memorized,
    OwnMask,
    Reidentification,
    attack,
    distance_ratio,
    loss_attack,
    memorized,
    own_mask,
    reidentification,
)
from evaluation.metrics.nearest import (
    Match,
    Space,
    aligned,
    best_match,
    maps_of,
    similarity_matrix,
)
from evaluation.stats.bootstrap import subject_mean
from evaluation.stats.intervals import wilson
from volumes import slices_figure

# Of the distances to the nearest and the second nearest: below it a volume counts as memorized (Yoon et al. 2023).
RATIO = 1 / 3


class ClosePair(TypedDict):
    """A query and its nearest reference, by name, and the flip (axes) and shift (voxels of the space's maps) that align
    them."""

    query: str
    reference: str
    similarity: float
    flip: list[int]
    shift: list[int]


class Yoon(TypedDict):
    """Fraction of volumes whose ratio of distances is below `RATIO`, generated and unseen (Yoon et al. 2023)."""

    fraction: float
    interval: list[float]
    unseen: float
    unseen_interval: list[float]


class MemorizedBy(TypedDict):
    """`other_masks` compares each volume without the training subject whose mask it was generated from."""

    similarity: Memorized
    ratio: Memorized
    other_masks: NotRequired[Memorized]


class SpaceReport(TypedDict):
    """All comparisons in one space."""

    memorized: MemorizedBy
    yoon_2023: Yoon
    membership: Attack
    own_mask: NotRequired[OwnMask]
    closest: NotRequired[list[ClosePair]]
    reidentification: NotRequired[Reidentification]


class Counts(TypedDict):
    """The size of a set."""

    volumes: int
    units: int


class PrivacyReport(TypedDict):
    """All comparisons, by space, and the attack by the model's own losses."""

    counts: dict[str, Counts]
    spaces: dict[str, SpaceReport]
    loss_membership: NotRequired[Attack]


def closest_pairs(
    similarity: np.ndarray, queries: VolumeSet, references: VolumeSet, space: Space, count: int = 8
) -> list[ClosePair]:
    """List the queries that are nearest to a reference, nearest first, each query once."""
    pairs: list[ClosePair] = []
    for index in np.argsort(-similarity.max(1), kind="stable")[:count].tolist():
        nearest = int(similarity[index].argmax())
        match = best_match(queries.volumes[index], references.volumes[nearest], space)
        pairs.append(
            {
                "query": str(queries.names[index]),
                "reference": str(references.names[nearest]),
                "similarity": match.similarity,
                "flip": list(match.flip),
                "shift": list(match.shift),
            }
        )
    return pairs


def pairs_figure(pairs: Sequence[ClosePair], queries: VolumeSet, references: VolumeSet, space: Space) -> Figure:
    """Draw three slices of each of `closest_pairs` (first channel): the query, aligned as the pair says, above the
    reference.

    Shifts are applied in spaces of voxels only: other spaces count them in voxels of their maps.
    """
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
) -> PrivacyReport:
    """Run all comparisons in all spaces.

    Args:
        anonymized: volumes with the source patient as their subject. The gallery is training and unseen volumes
            together.
        stand_ins: use generated volumes as the anonymized volumes of the patients whose masks they were generated from.
        losses: of training and of unseen volumes, in their order.
        pairs: number of closest pairs.
        on_pairs: called with the number of pairs that were just compared.
    Raises: ValueError for subjects that are both in training and unseen (no conclusion would be valid), and for two
        real volumes with one name.
    """
    if shared := sorted(set(training.subjects) & set(unseen.subjects)):
        raise ValueError(f"subjects {shared[:5]} are in training and unseen: split by subject")
    if twice := sorted(set(training.names) & set(unseen.names)):
        raise ValueError(f"volumes {twice[:5]} are in training and unseen: give every volume a unique name")
    report: PrivacyReport = {
        "counts": {
            name: {"volumes": len(volumes.names), "units": len(set(volumes.subjects))}
            for name, volumes in (("training", training), ("unseen", unseen), ("generated", generated))
        },
        "spaces": {},
    }
    patients = dict(zip([*training.names, *unseen.names], [*training.subjects, *unseen.subjects], strict=True))
    for name, space in spaces.items():
        with ExitStack() as opened:  # the maps of a set serve two comparisons
            maps = [opened.enter_context(maps_of(one.volumes, space)) for one in (training, unseen, generated)]
            to_training, baseline, to_unseen = (
                similarity_matrix(maps[queries], maps[references], space, on_pairs=on_pairs)
                for queries, references in ((2, 0), (1, 0), (2, 1))
            )
        of_space = _compare(to_training, baseline, to_unseen, training, unseen, generated, alpha=alpha, seed=seed)
        of_space["closest"] = closest_pairs(to_training, generated, training, space, pairs)
        report["spaces"][name] = of_space
        gallery, sources = [to_training, to_unseen], []
        if anonymized is not None:
            gallery = [
                similarity_matrix(anonymized.volumes, real.volumes, space, on_pairs=on_pairs)
                for real in (training, unseen)
            ]
            sources = list(anonymized.subjects)
        elif stand_ins:
            rows = [row for row, mask in enumerate(generated.masks or ()) if mask in patients]
            gallery = [matrix[rows] for matrix in gallery]
            sources = [patients[str((generated.masks or ())[row])] for row in rows]
        if sources:
            of_space["reidentification"] = reidentification(
                np.concatenate(gallery, 1), sources, list(patients.values())
            )
    if losses is not None:
        report["loss_membership"] = loss_attack(*losses, training.subjects, unseen.subjects, seed=seed)
    return report


def _compare(
    to_training: np.ndarray,
    baseline: np.ndarray,
    to_unseen: np.ndarray,
    training: VolumeSet,
    unseen: VolumeSet,
    generated: VolumeSet,
    *,
    alpha: float,
    seed: int,
) -> SpaceReport:
    """Compare in one space: similarities of generated to training (G, T), unseen to training (U, T), generated to
    unseen (G, U)."""

    def memorized_by(of_generated: np.ndarray, of_unseen: np.ndarray) -> Memorized:
        return memorized(
            of_generated, of_unseen, unseen.subjects, alpha=alpha, generated_units=generated.subjects, seed=seed
        )

    ratios, floor_ratios = (distance_ratio(matrix, training.subjects) for matrix in (to_training, baseline))
    yoon = subject_mean(ratios < RATIO, generated.subjects)
    floor = subject_mean(floor_ratios < RATIO, unseen.subjects)
    report: SpaceReport = {
        "memorized": {
            "similarity": memorized_by(to_training.max(1), baseline.max(1)),
            "ratio": memorized_by(-ratios, -floor_ratios),
        },
        "yoon_2023": {
            "fraction": yoon,
            "interval": wilson(yoon, len(set(generated.subjects))),
            "unseen": floor,
            "unseen_interval": wilson(floor, len(set(unseen.subjects))),
        },
        "membership": attack(to_training.max(0), to_unseen.max(0), training.subjects, unseen.subjects, seed=seed),
    }
    if generated.masks is None:
        return report
    training_rows, training_columns = _of_own_masks(generated.masks, training)
    unseen_rows, unseen_columns = _of_own_masks(generated.masks, unseen)
    without = to_training.copy()
    subjects = np.asarray(training.subjects)
    for row, column in zip(training_rows, training_columns, strict=True):
        without[row, subjects == subjects[column]] = -1
    report["memorized"]["other_masks"] = memorized_by(without.max(1), baseline.max(1))
    if training_rows and unseen_rows:
        report["own_mask"] = own_mask(
            to_training[training_rows, training_columns],
            [training.subjects[column] for column in training_columns],
            to_unseen[unseen_rows, unseen_columns],
            [unseen.subjects[column] for column in unseen_columns],
            seed=seed,
        )
    return report


def _of_own_masks(masks: Sequence[str | None], real: VolumeSet) -> tuple[list[int], list[int]]:
    """Find the generated volumes whose mask is of a real volume of the set, and that volume: (rows, columns)."""
    columns = {name: column for column, name in enumerate(real.names)}
    places = [(row, columns[mask]) for row, mask in enumerate(masks) if mask is not None and mask in columns]
    return [row for row, _ in places], [column for _, column in places]
