"""Realism: generated volumes compared with real ones, each figure beside that of two sets of real volumes.

Three sets: real volumes that the generator was trained on ("training"), real ones that it was not ("test"), and
generated ones.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NotRequired, TypedDict, TypeVar

import numpy as np
import torch

from evaluation.data.volume_sets import VolumeSet
from evaluation.metrics import histogram, slices
from evaluation.metrics.features import Extractor, extract
from evaluation.metrics.manifold import SCORES, shortfalls
from evaluation.metrics.ms_ssim import (
    Diversity,
    compare_diversity,
    pair_similarity,
    random_pairs,
    scales_of,
    weights_of,
)
from evaluation.metrics.nearest import common_crop
from evaluation.metrics.scripted import ScriptedSlices, slice_rows
from evaluation.metrics.set_distances import (
    SETS,
    SUBSETS,
    Closeness,
    ColumnComparison,
    SetComparison,
    closer_than_test,
    columns_of,
    compare_columns,
    compare_sets,
    frechet_caveat,
    frechet_distance,
    kernel_distance,
    standardize,
)
from evaluation.metrics.spectrum import band_names
from evaluation.networks.defaults import REALISM_PARTS as PARTS
from evaluation.networks.defaults import SIMILARITY_PAIRS as PAIRS
from evaluation.stats.bootstrap import Estimate, Units
from training.encoder_distance import MIN_SPREAD

SLICE_SUBSETS = 10  # pairs of subsets, for slices are many
TOLERANCE = 1e-3  # by which intensities may leave [0, 1]

Volumes = Mapping[str, Sequence[np.ndarray] | np.ndarray]  # by set
Subjects = Mapping[str, Units]  # by set
Figures = TypeVar("Figures")


class FeatureComparison(TypedDict):
    """Distances of the features of one extractor; `features` is their number.

    `shortfall` is 1 minus precision, recall, density and coverage. `frechet_slices` takes slices as samples.
    """

    features: int
    frechet: SetComparison[float]
    kernel: SetComparison[float]
    closer_to_training: Closeness
    shortfall: dict[str, SetComparison[float]]  # by score
    frechet_slices: NotRequired[SetComparison[float]]


class SpectrumComparison(TypedDict):
    """Power over that of the test set, in dB, band by band."""

    bands: list[str]
    generated_over_test: Estimate[list[float]]
    training_over_test: Estimate[list[float]]


class IntensityComparison(TypedDict):
    """Intensities of one channel; the distance of histograms is Wasserstein-1. `hounsfield` are shares of voxels."""

    statistics: dict[str, ColumnComparison]
    histogram: SetComparison[float]
    spectrum_db: SpectrumComparison
    hounsfield: NotRequired[dict[str, ColumnComparison]]  # by range


class Realism(TypedDict):
    """All comparisons; `volumes` are the sizes of the sets, `shape` is the crop for diversity and spectra."""

    volumes: dict[str, int]
    shape: list[int]
    features: NotRequired[dict[str, FeatureComparison]]  # by extractor
    diversity: NotRequired[Diversity]
    consistency: NotRequired[dict[str, dict[str, ColumnComparison]]]  # by channel and statistic
    intensity: NotRequired[dict[str, IntensityComparison]]  # by channel


def measure_realism(
    sets: Mapping[str, VolumeSet],
    extractors: Mapping[str, Extractor],
    *,
    channels: Sequence[str] = ("image",),
    parts: Sequence[str] = PARTS,
    hounsfield: Mapping[str, tuple[float, float]] | None = None,
    standardized: bool = True,
    pairs: int = PAIRS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_step: Callable[[str], None] | None = None,
) -> Realism:
    """Compare how generated and real volumes look. Intervals are of 95 %.

    Args:
        sets: "training", "test" and "generated". Intensities must be in [0, 1], scaled as for a model, and spacings
            equal.
        extractors: by name, for the part "features"; on `device`.
        channels: names of the volumes' channels.
        parts: which of `PARTS`.
        hounsfield: window in Hounsfield units of each channel that is CT, for the part "intensity".
        standardized: divide features by their standard deviations in the training set, so that all weigh the same and
            figures have a unit; False for figures to compare with those of a paper.
        pairs: of each set, at most, for the part "diversity".
        on_step: called with the part after each of `steps_of` volumes and pairs.
    Raises: ValueError for unknown parts, missing or too small sets, and volumes with other channels or intensities.
    """
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"unknown parts {unknown}; choose from {list(PARTS)}")
    if missing := [name for name in SETS if name not in sets]:
        raise ValueError(f"no volumes of {missing}; give all of {list(SETS)}")
    for name in SETS:
        _check(name, sets[name], len(channels))
    volumes = {name: sets[name].volumes for name in SETS}
    subjects = {name: sets[name].subjects for name in SETS}
    shape = common_crop([shape for name in SETS for shape in sets[name].shapes])
    report: Realism = {"volumes": {name: len(volumes[name]) for name in SETS}, "shape": list(shape)}

    def steps(part: str) -> Callable[[], None] | None:
        return None if on_step is None else partial(on_step, part)

    if "features" in parts:
        report["features"] = {}
        for name, extractor in extractors.items():
            features = {s: extract(extractor, volumes[s], device, steps("features")) for s in SETS}
            report["features"][name] = compare_features(
                features, standardized=standardized, subjects=subjects, seed=seed
            )
            if isinstance(extractor, ScriptedSlices):
                report["features"][name]["frechet_slices"] = compare_slices(extractor, volumes, subjects, seed, device)
    if "diversity" in parts:
        report["diversity"] = _diversity(volumes, subjects, shape, pairs, seed, device, steps("diversity"))
    if "consistency" in parts:
        report["consistency"] = {
            channel: _consistency(volumes, index, subjects, seed, steps("consistency"))
            for index, channel in enumerate(channels)
        }
    if "intensity" in parts:
        report["intensity"] = {
            channel: _intensity(
                volumes, index, subjects, seed, shape, steps("intensity"), (hounsfield or {}).get(channel)
            )
            for index, channel in enumerate(channels)
        }
    return report


def steps_of(
    sets: Mapping[str, VolumeSet], extractors: int, channels: int, parts: Sequence[str] = PARTS, pairs: int = PAIRS
) -> dict[str, int]:
    """Count the calls of `measure_realism` to `on_step` for each part, for progress bars."""
    volumes = sum(len(sets[name].volumes) for name in SETS)
    paired = SETS if "diversity" in parts else ()  # volumes of one subject make no pair, and other parts need none
    of_pairs = sum(len(random_pairs(len(sets[s].volumes), pairs, 0, sets[s].subjects)) for s in paired)
    every = dict(zip(PARTS, (volumes * extractors, of_pairs, volumes * channels, volumes * channels), strict=True))
    return {part: count for part, count in every.items() if part in parts}


def compare_features(
    sets: Mapping[str, np.ndarray],
    *,
    standardized: bool = True,
    subjects: Subjects | None = None,
    subsets: int = SUBSETS,
    seed: int = 0,
) -> FeatureComparison:
    """Compute Frechet and kernel distances of features (N, F) by set.

    Warns, also in the "caveat" of the report, if the volumes are too few for the Frechet distance of so many features.
    """
    if standardized:
        sets = standardize(sets, "training", MIN_SPREAD)
    count, features = min(len(rows) for rows in sets.values()), sets["test"].shape[1]
    frechet = compare_sets(frechet_distance, sets, subjects=subjects, subsets=subsets, seed=seed)
    if caveat := frechet_caveat(count // 2, features):
        warnings.warn(caveat, stacklevel=2)
        frechet["caveat"] = caveat
    return {
        "features": features,
        "frechet": frechet,
        "kernel": compare_sets(kernel_distance, sets, subjects=subjects, subsets=subsets, seed=seed),
        "closer_to_training": closer_than_test(sets, subjects=subjects, seed=seed),
        "shortfall": columns_of(compare_sets(shortfalls, sets, subjects=subjects, subsets=subsets, seed=seed), SCORES),
    }


def compare_slices(
    extractor: ScriptedSlices,
    volumes: Volumes,
    subjects: Subjects,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> SetComparison[float]:
    """Compute the Frechet distance whose samples are slices, in the features as they are, as published ones are.

    Slices of one volume are not independent: subsets keep those of a subject together.
    """
    rows, owners = {}, {}
    for name in SETS:
        found = slice_rows(extractor, volumes[name], device)
        rows[name] = np.concatenate(found)
        owners[name] = [owner for owner, part in zip(subjects[name], found, strict=True) for _ in part]
    return compare_sets(frechet_distance, rows, subjects=owners, subsets=SLICE_SUBSETS, seed=seed)


def _diversity(
    volumes: Volumes,
    subjects: Subjects,
    shape: tuple[int, int, int],
    pairs: int,
    seed: int,
    device: torch.device | str,
    on_pair: Callable[[], None] | None,
) -> Diversity:
    chosen = {s: random_pairs(len(volumes[s]), pairs, seed, subjects[s]) for s in SETS}
    similarity = {}
    for name in SETS:
        similarity[name] = pair_similarity(volumes[name], chosen[name], device, on_pair, crop=shape)
    report = compare_diversity(similarity, chosen, {s: len(volumes[s]) for s in SETS}, seed, subjects)
    report["scales"] = scales_of(shape)
    report["weights"] = weights_of(report["scales"])
    return report


def _consistency(
    volumes: Volumes, channel: int, subjects: Subjects, seed: int, on_volume: Callable[[], None] | None
) -> dict[str, ColumnComparison]:
    statistics = {s: np.stack([*_each(slices.slice_statistics, volumes[s], channel, on_volume)]) for s in SETS}
    return compare_columns(statistics, slices.names(), subjects=subjects, seed=seed)


def _intensity(
    volumes: Volumes,
    channel: int,
    subjects: Subjects,
    seed: int,
    shape: tuple[int, int, int],
    on_volume: Callable[[], None] | None,
    window: tuple[float, float] | None,
) -> IntensityComparison:
    def figures(volume: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return (
            histogram.intensity_statistics(volume),
            histogram.histogram(volume),
            histogram.power(volume, shape),
            np.zeros(0) if window is None else histogram.hounsfield_shares(volume, window),
        )

    statistics, histograms, powers, shares = {}, {}, {}, {}
    for name in SETS:  # in one pass, for volumes may be read on access
        rows = zip(*_each(figures, volumes[name], channel, on_volume), strict=True)
        statistics[name], histograms[name], powers[name], shares[name] = (np.stack(column) for column in rows)
    ratios = compare_sets(histogram.power_ratio_db, powers, subjects=subjects, seed=seed)
    report: IntensityComparison = {
        "statistics": compare_columns(statistics, histogram.names(), subjects=subjects, seed=seed),
        "histogram": compare_sets(histogram.histogram_distance, histograms, subjects=subjects, seed=seed),
        "spectrum_db": {
            "bands": band_names(histogram.band_edges_for(shape)),
            "generated_over_test": ratios["generated_to_test"],
            "training_over_test": ratios["training_to_test"],
        },
    }
    if window is not None:
        ranges = [*histogram.hounsfield_ranges(window)]
        report["hounsfield"] = compare_columns(shares, ranges, subjects=subjects, seed=seed)
    return report


def _each(
    figures: Callable[[np.ndarray], Figures],
    volumes: Sequence[np.ndarray] | np.ndarray,
    channel: int,
    on_volume: Callable[[], None] | None = None,
) -> Iterator[Figures]:
    """Compute figures of a channel (X, Y, Z) of each volume, one volume at a time."""
    for volume in volumes:
        yield figures(volume[channel])
        if on_volume is not None:
            on_volume()


def _check(name: str, volumes: VolumeSet, channels: int) -> None:
    for index, volume in enumerate(volumes.volumes):
        if volume.ndim != 4 or volume.shape[0] != channels:
            raise ValueError(f"{name} volume {index} has shape {volume.shape}, not ({channels}, X, Y, Z)")
        low, high = float(volume.min()), float(volume.max())
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # NaN too
            raise ValueError(
                f"{name} volume {index} has intensities from {low:g} to {high:g}; scale them to [0, 1] (see unit_range)"
            )
