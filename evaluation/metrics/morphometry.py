"""Morphometry: the sizes of tissues in generated and in real volumes, by class and against numbers such as the age.

Tissues are clusters of intensity (`tissues`) where a volume is not empty, so that no label map is needed: a volume
that was generated from nothing has none.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np

from evaluation.data.volume_sets import VolumeSet
from evaluation.stats.bootstrap import Estimate, Units, interval_of, resample_subjects
from evaluation.stats.intervals import correlations
from volumes.data.tables import read_number

from .set_distances import SETS, MeanStd
from .tissues import tissue_map

WHOLE = "whole"  # all tissues together
ALL = "all"  # the group of all volumes
MIN_SUBJECTS = 3  # of a group, or with a number: fewer give no interval
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]  # numbers (N,), sizes (N, tissues) and subjects (N,) of N volumes


class SizeComparison(TypedDict):
    """Sizes of one tissue in mm^3, in one group of volumes.

    `difference` is that of the generated mean from the real one, in standard deviations of the real volumes, which are
    the training and the test set together. `floor` is that of the test set from the training set, in the same unit.
    """

    real: MeanStd
    generated: MeanStd
    difference: Estimate[float]
    floor: Estimate[float] | None  # None for a group that is too small in one of these sets


class Group(TypedDict):
    """The volumes of one class, or all: their number in each set, and the sizes of each tissue."""

    volumes: dict[str, int]
    tissues: dict[str, SizeComparison]


class NumberCorrelation(TypedDict):
    """Pearson's correlation of a tissue's size with a number, which of generated volumes is the one asked for."""

    real: Estimate[float]
    generated: Estimate[float]
    difference: Estimate[float]  # generated less real


class Morphometry(TypedDict):
    """All figures of `compare_sizes`. Intervals are of 95 %, over subjects.

    `groups` are "all" and then "sex F" and so on; `numbers` are by the number's name and the tissue's. Groups of fewer
    than 3 real or generated subjects are left out, and so are numbers that fewer have, or that do not vary.
    """

    groups: dict[str, Group]
    numbers: dict[str, dict[str, NumberCorrelation]]


def tissue_sizes(volume: np.ndarray, spacing: Sequence[float], count: int) -> np.ndarray:
    """Measure the size (mm^3) of each of `count` tissues of a volume (X, Y, Z) in [0, 1], and of all: (count + 1,).

    Voxels of intensity 0 are empty. A whole size of 0 is that of an empty volume.
    """
    tissues = tissue_map(volume, volume > 0, count)
    sizes = np.bincount(tissues.ravel(), minlength=count + 1)[1:] * float(np.prod(spacing))
    return np.array([*sizes, sizes.sum()])


def compare_sizes(
    sets: Mapping[str, VolumeSet],
    labels: Sequence[str],
    classes: Mapping[str, Sequence[str]],
    numbers: Sequence[str],
    seed: int = 0,
) -> Morphometry:
    """Compare the sizes of tissues in "generated" volumes with those in real ones, "training" and "test".

    Args:
        sets: volumes of one channel in [0, 1], empty where they are 0.
        labels: names of the tissues, from the darkest to the brightest.
        classes: values of each class whose groups are compared, as in the sets' metadata.
        numbers: columns of the metadata with which sizes are correlated.
    """
    sizes = {
        name: np.stack(
            [
                tissue_sizes(volume[0], spacing, len(labels))
                for volume, spacing in zip(sets[name].volumes, sets[name].spacings, strict=True)
            ]
        )
        for name in SETS
    }
    names = [*labels, WHOLE]
    members = {ALL: {name: np.arange(len(sets[name])) for name in SETS}}
    for column, values in classes.items():
        for value in values:
            members[f"{column} {value}"] = {
                name: np.flatnonzero([str(row.get(column)) == value for row in sets[name].metadata]) for name in SETS
            }
    groups: dict[str, Group] = {}
    for group, chosen in members.items():
        subjects = {name: np.asarray(sets[name].subjects)[chosen[name]] for name in SETS}
        of_real = np.union1d(subjects["training"], subjects["test"])
        if min(len(np.unique(subjects["generated"])), len(of_real)) < MIN_SUBJECTS:
            continue
        groups[group] = {
            "volumes": {name: len(chosen[name]) for name in SETS},
            "tissues": {
                tissue: _compare_group(
                    {name: sizes[name][chosen[name], column] for name in SETS},
                    subjects,
                    seed,
                )
                for column, tissue in enumerate(names)
            },
        }
    return {"groups": groups, "numbers": _correlations(sets, sizes, names, numbers, seed)}


def _compare_group(values: Mapping[str, np.ndarray], subjects: Mapping[str, Units], seed: int) -> SizeComparison:
    real = np.concatenate([values["training"], values["test"]])
    of_real = np.concatenate([subjects["training"], subjects["test"]])
    unit = max(float(real.std(ddof=1)), 1e-12)  # mm^3
    enough = min(len(np.unique(subjects[name])) for name in ("training", "test")) >= MIN_SUBJECTS
    training, test = ((values[name], subjects[name]) for name in ("training", "test"))
    return {
        "real": _mean_std(real),
        "generated": _mean_std(values["generated"]),
        "difference": _difference((values["generated"], subjects["generated"]), (real, of_real), unit, seed),
        "floor": _difference(test, training, unit, seed) if enough else None,
    }


def _difference(
    first: tuple[np.ndarray, Units], second: tuple[np.ndarray, Units], unit: float, seed: int
) -> Estimate[float]:
    """Compare two means. A subject that has volumes in both is picked for both, as often."""
    values, subjects = (np.concatenate([one[part] for one in (first, second)]) for part in (0, 1))
    of_first = np.arange(len(values)) < len(first[0])
    counts = resample_subjects(subjects, np.random.default_rng(seed))
    picked = [counts * here for here in (of_first, ~of_first)]
    picked = [one[np.minimum(picked[0].sum(1), picked[1].sum(1)) > 0] for one in picked]  # else one has no mean
    resampled = [one @ values / one.sum(1) for one in picked]
    mean = values[of_first].mean() - values[~of_first].mean()
    return {"mean": float(mean) / unit, "interval": interval_of((resampled[0] - resampled[1]) / unit)}


def _correlations(
    sets: Mapping[str, VolumeSet],
    sizes: Mapping[str, np.ndarray],
    names: Sequence[str],
    numbers: Sequence[str],
    seed: int,
) -> dict[str, dict[str, NumberCorrelation]]:
    report: dict[str, dict[str, NumberCorrelation]] = {}
    for number in numbers:
        values = {name: np.array([_number(row.get(number)) for row in sets[name].metadata]) for name in SETS}
        pairs: dict[str, Pairs] = {}
        for source, parts in (("real", ("training", "test")), ("generated", ("generated",))):
            given, of_source, subjects = (
                np.concatenate([np.asarray(table[name]) for name in parts])
                for table in (values, sizes, {name: sets[name].subjects for name in SETS})
            )
            known = ~np.isnan(given)
            pairs[source] = given[known], of_source[known], subjects[known]
        if any(len(np.unique(who)) < MIN_SUBJECTS or np.ptp(given) == 0 for given, _, who in pairs.values()):
            continue
        report[number] = {name: _correlate(pairs, column, seed) for column, name in enumerate(names)}
    return report


def _correlate(pairs: Mapping[str, Pairs], column: int, seed: int) -> NumberCorrelation:
    random = np.random.default_rng(seed)
    whole, resampled = {}, {}
    for source, (given, sizes, subjects) in pairs.items():
        whole[source] = float(correlations(given, sizes[:, column], np.ones((1, len(given))))[0])
        resampled[source] = correlations(given, sizes[:, column], resample_subjects(subjects, random))
    whole["difference"] = whole["generated"] - whole["real"]
    resampled["difference"] = resampled["generated"] - resampled["real"]
    real, generated, difference = (
        Estimate[float](mean=whole[name], interval=interval_of(resampled[name]))
        for name in ("real", "generated", "difference")
    )
    return {"real": real, "generated": generated, "difference": difference}


def _number(cell: object) -> float:
    return math.nan if cell in (None, "") else read_number(cell)


def _mean_std(values: np.ndarray) -> MeanStd:
    return {"mean": float(values.mean()), "std": float(values.std(ddof=1))}
