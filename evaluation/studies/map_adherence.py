"""Map adherence: whether volumes show the tissues where their label maps have them, and nothing outside.

For maps that a clustering of intensities can find again, such as those of gray and white matter. The voxels that a map
calls tissue are clustered (`metrics.tissues`) into as many tissues as the data has labels, from the darkest to the
brightest, which must be the order of the labels' values. A segmenter needs no such order: `evaluate.py dice`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np

from autoencoder import VolumeAutoencoder
from evaluation.data.maps import mapped_volume, tissue_names
from evaluation.metrics.set_distances import MIN_SIZE
from evaluation.metrics.tissues import outside_share, tissue_dice, tissue_map
from evaluation.stats.bootstrap import Estimate, mean_over_subjects
from evaluation.stats.intervals import compare_paired
from volumes import VolumeDataset, pad_sample

from .reconstruction import reconstruct

Rows = dict[str, list[np.ndarray]]  # Dice of each tissue, of the volumes of each map, by the map's case


class TissueDice(TypedDict):
    """Dice of tissue maps. `mean` is over the tissues of each map; volumes of one map are averaged first."""

    mean: Estimate[float]
    per_label: dict[str, Estimate[float]]
    per_map: dict[str, float]


class Ratio(TypedDict):
    """A ratio of mean Dice of the same maps."""

    of_means: float
    interval: list[float]


class MapAdherence(TypedDict):
    """All figures of `measure_map_adherence`. Intervals are of 95 %, over subjects.

    `dice` is that of the clusters of each source against the maps, `reconstruction_to_real` that of the clusters of
    reconstructions against those of their originals. `outside` is the share of the voxels outside of the maps' tissues
    that are brighter than the lowest intensity, for data whose background is empty.
    """

    labels: list[str]
    maps: int
    volumes: dict[str, int]
    dice: dict[str, TissueDice]
    ratios: dict[str, Ratio]
    reconstruction_to_real: NotRequired[TissueDice]
    outside: NotRequired[dict[str, Estimate[float]]]


def measure_map_adherence(
    real: VolumeDataset,
    generated: VolumeDataset | None = None,
    map_of: Mapping[str, str] | None = None,
    vae: VolumeAutoencoder | None = None,
    on_volume: Callable[[str], None] | None = None,
) -> MapAdherence:
    """Compare the tissues of generated volumes and of reconstructions with their maps, beside those of real volumes.

    Args:
        real: volumes of one channel with maps. With generated volumes only those count whose maps these have, so that
            all sources have the same maps.
        generated: volumes with the same maps.
        map_of: by the name of a generated volume, the name of the case whose map it has.
        vae: an autoencoder, which reconstructs the real volumes.
        on_volume: called with the name of each volume that was measured.
    Raises: ValueError for data with several channels, or with fewer than 2 labels beside the background.
    """
    names = tissue_names(real.config)
    check_tissues(real.channels, names)
    dice: dict[str, Rows] = {"real": {}} | ({"generated": {}} if generated else {})
    dice |= {"reconstruction": {}, "reconstruction_to_real": {}} if vae else {}
    outside: dict[str, dict[str, list[float]]] = {source: {} for source in ("real", "generated") if source in dice}

    def measure(dataset: VolumeDataset, index: int, source: str, case: str) -> None:
        volume, expected = mapped_volume(dataset, index)
        tissues = tissues_of_map(volume, expected)
        dice[source].setdefault(case, []).append(tissue_dice(tissues, expected, len(names)))
        outside[source].setdefault(case, []).append(outside_share(volume, expected == 0))
        if source == "real" and vae is not None:
            found = tissues_of_map(_reconstructed(vae, dataset, index), expected)
            dice["reconstruction"][case] = [tissue_dice(found, expected, len(names))]
            dice["reconstruction_to_real"][case] = [tissue_dice(found, tissues, len(names))]
        if on_volume is not None:
            on_volume(dataset.cases[index].name)

    for index, case in enumerate(generated.cases if generated else ()):
        assert generated is not None and map_of is not None
        measure(generated, index, "generated", map_of[case.name])
    for index, case in enumerate(real.cases):
        if generated is None or case.name in dice["generated"]:
            measure(real, index, "real", case.name)
    return _summarize(names, dice, outside if real.config.empty_background else {}, real)


def tissues_of_map(volume: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Cluster a volume (X, Y, Z) into the tissues that its map (X, Y, Z) has: a map of a part of the organ may lack
    one."""
    inside = expected > 0
    present = np.unique(expected[inside])
    if len(present) < 2:
        return np.where(inside, expected, 0)
    return np.append(0, present)[tissue_map(volume, inside, len(present))]


def check_tissues(channels: Sequence[str], names: Sequence[str]) -> None:
    """Raise ValueError unless there is one channel to cluster, and two tissues or more."""
    if len(channels) != 1:
        raise ValueError(f"tissues are clustered by one intensity, and the data has the channels {', '.join(channels)}")
    if len(names) < 2:
        raise ValueError(
            f"data.label_names has {len(names)} labels beside the background; clusters of intensity need 2 or more"
        )


def _reconstructed(vae: VolumeAutoencoder, dataset: VolumeDataset, index: int) -> np.ndarray:
    sample = pad_sample(dataset[index], vae.stride)
    return sample["placement"].undo((reconstruct(vae, sample["image"]).numpy() + 1) / 2)[0]


def _summarize(
    names: Sequence[str],
    dice: Mapping[str, Rows],
    outside: Mapping[str, Mapping[str, list[float]]],
    real: VolumeDataset,
) -> MapAdherence:
    subject_of = {case.name: case.subject for case in real.cases}
    cases = [case for case in dice["real"] if not np.isnan(dice["real"][case]).all()]  # maps with a tissue
    if not cases:
        raise ValueError("no map has a tissue: there is nothing to compare")
    subjects = [subject_of[case] for case in cases]
    if len(set(subjects)) < MIN_SIZE:
        raise ValueError(
            f"the maps that can be compared are of {len(set(subjects))} subjects, and intervals need {MIN_SIZE}; "
            "generate volumes from masks of more subjects"
        )
    rows = {source: np.stack([np.mean(of_map[case], axis=0) for case in cases]) for source, of_map in dice.items()}
    # A cluster that an original lacks, but not its map, has no Dice against the original.
    means = {source: np.nanmean(of_source, axis=1) for source, of_source in rows.items()}
    described = {source: _describe(rows[source], means[source], names, cases, subjects) for source in rows}
    to_real = described.pop("reconstruction_to_real", None)
    ratios: dict[str, Ratio] = {}
    for first, second in (("generated", "real"), ("generated", "reconstruction"), ("reconstruction", "real")):
        if first in described and second in described:
            compared = compare_paired(means[first][None], means[second][None], subjects, "ratio")
            ratios[f"{first}/{second}"] = {
                "of_means": compared["of_means"],
                "interval": compared["interval_subjects"],
            }
    report: MapAdherence = {
        "labels": list(names),
        "maps": len(cases),
        "volumes": {source: sum(map(len, dice[source].values())) for source in described},
        "dice": described,
        "ratios": ratios,
    }
    if to_real is not None:
        report["reconstruction_to_real"] = to_real
    if outside:
        report["outside"] = {
            source: mean_over_subjects(np.array([np.mean(shares[case]) for case in cases]), subjects)
            for source, shares in outside.items()
        }
    return report


def _describe(
    rows: np.ndarray, means: np.ndarray, names: Sequence[str], cases: Sequence[str], subjects: Sequence[str]
) -> TissueDice:
    per_label = {}
    for column, name in enumerate(names):
        known = [index for index, value in enumerate(rows[:, column]) if not math.isnan(value)]
        if known:
            per_label[name] = mean_over_subjects(rows[known, column], [subjects[index] for index in known])
    return {
        "mean": mean_over_subjects(means, subjects),
        "per_label": per_label,
        "per_map": dict(zip(cases, means.tolist(), strict=True)),
    }
