"""Generated volumes against real ones, every figure beside what real volumes of two sets are to each other.

Three sets: real volumes that the generator learned from ("training"), real ones that it never saw ("test"), generated ones.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from evaluation.data.volume_sets import VolumeSet
from evaluation.metrics import histogram as intensity
from evaluation.metrics import slices as consistency
from evaluation.metrics.features import Extractor, extract
from evaluation.metrics.ms_ssim import (
    compare_diversity,
    pair_similarity,
    random_pairs,
    scales_of,
    weights_of,
)
from evaluation.metrics.set_distances import (
    SETS,
    closer_than_test,
    compare_columns,
    compare_sets,
    frechet_caveat,
    frechet_distance,
    kernel_distance,
    standardize,
)
from evaluation.metrics.spectrum import band_names, center_crop
from evaluation.networks.defaults import REALISM_PARTS as PARTS
from evaluation.networks.defaults import SIMILARITY_PAIRS as PAIRS

MIN_SPREAD = 0.1  # of features, see standardize: cubic kernels are drowned by rare features without it
TOLERANCE = 1e-3  # by which intensities may leave [0, 1]


def judge_realism(
    sets: Mapping[str, VolumeSet],
    extractors: Mapping[str, Extractor],
    *,
    channels: Sequence[str] = ("image",),
    parts: Sequence[str] = PARTS,
    standardized: bool = True,
    pairs: int = PAIRS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_step: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """All that is known of how real volumes look, as a plain dict for a report. Intervals are of 95 %.

    Args:
        sets: "training", "test" and "generated". Intensities must be in [0, 1], scaled alike as for a model, and spacings equal.
        extractors: by name, for the part "features"; on `device`.
        channels: names of the volumes' channels.
        parts: which of `PARTS`.
        standardized: features in standard deviations of the training set's, so that all count alike and figures have a
            unit; False for figures that are to be held against a paper's.
        pairs: most pairs of each set for the part "diversity".
        on_step: called with the part after each of `steps_of` volumes and pairs.
    Returns:
        {"volumes": by set how many, "shape": the center crop that fits into all, used for diversity and spectra, and a part each:
        "features": by extractor {"features": how many, "frechet", "kernel": `compare_sets`, "frechet" with "caveat",
        "closer_to_training": `closer_than_test`};
        "diversity": `compare_diversity`, with "scales" and their "weights";
        "consistency": by channel `compare_columns` of `slice_statistics`;
        "intensity": by channel {"statistics": `compare_columns`, "histogram": `compare_sets` of Wasserstein-1 distances,
        "spectrum_db": {"bands", "generated_over_test", "training_over_test": by band {"mean", "interval"}}}}.
    Raises: ValueError for unknown parts, sets that are missing or too small, and volumes of other channels or out of range.
    """
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"parts {unknown} are unknown; there are {list(PARTS)}")
    if missing := [name for name in SETS if name not in sets]:
        raise ValueError(f"no volumes of {missing}; give all of {list(SETS)}")
    for name in SETS:
        _check(name, sets[name], len(channels))
    volumes = {name: sets[name].volumes for name in SETS}
    subjects = {name: sets[name].subjects for name in SETS}
    shape = common_shape([volume for name in SETS for volume in volumes[name]])
    report: dict[str, Any] = {"volumes": {name: len(volumes[name]) for name in SETS}, "shape": list(shape)}
    options = {"subjects": subjects, "seed": seed}

    def steps(part: str) -> Callable[[], None] | None:
        return None if on_step is None else partial(on_step, part)

    if "features" in parts:
        report["features"] = {}
        for name, extractor in extractors.items():
            found = {s: extract(extractor, volumes[s], device, steps("features")) for s in SETS}
            report["features"][name] = compare_features(found, standardized=standardized, **options)
    if "diversity" in parts:
        cropped = {s: [np.stack([center_crop(c, shape) for c in v]) for v in volumes[s]] for s in SETS}
        chosen = {s: random_pairs(len(volumes[s]), pairs, seed, subjects[s]) for s in SETS}
        values = {s: pair_similarity(cropped[s], chosen[s], device, steps("diversity")) for s in SETS}
        counts = {s: len(volumes[s]) for s in SETS}
        scales = scales_of(shape)
        scale_report = {"scales": scales, "weights": weights_of(scales)}
        report["diversity"] = compare_diversity(values, chosen, counts, seed, subjects) | scale_report
    for part, judge in (("consistency", _judge_slices), ("intensity", _judge_intensity)):
        if part in parts:
            report[part] = {}
            for index, channel in enumerate(channels):
                of_channel = {s: [volume[index] for volume in volumes[s]] for s in SETS}
                report[part][channel] = judge(of_channel, shape, options, steps(part))
    return report


def steps_of(
    sets: Mapping[str, VolumeSet], extractors: int, channels: int, parts: Sequence[str] = PARTS, pairs: int = PAIRS
) -> dict[str, int]:
    """How often `judge_realism` calls `on_step` with each part: for progress bars."""
    volumes = sum(len(sets[name].volumes) for name in SETS)
    paired = SETS if "diversity" in parts else ()  # volumes of one subject make no pair, and need none elsewhere
    of_pairs = sum(len(random_pairs(len(sets[s].volumes), pairs, 0, sets[s].subjects)) for s in paired)
    every = dict(zip(PARTS, (volumes * extractors, of_pairs, volumes * channels, volumes * channels), strict=True))
    return {part: count for part, count in every.items() if part in parts}


def compare_features(sets: Mapping[str, np.ndarray], *, standardized: bool = True, **options: Any) -> dict[str, Any]:
    """Frechet and kernel distances of features (N, F) by set; `options` are those of `compare_sets`.

    Warns, and says so in "caveat", where the volumes are too few for the Frechet distance of so many features.
    """
    if standardized:
        sets = standardize(sets, "training", MIN_SPREAD)
    count, features = min(len(rows) for rows in sets.values()), sets["test"].shape[1]
    report: dict[str, Any] = {"features": features}
    for name, distance in (("frechet", frechet_distance), ("kernel", kernel_distance)):
        report[name] = compare_sets(distance, sets, **options)
    if caveat := frechet_caveat(count // 2, features):
        warnings.warn(caveat, stacklevel=2)
        report["frechet"]["caveat"] = caveat
    closer = closer_than_test(sets, subjects=options.get("subjects"), seed=options.get("seed", 0))
    return report | {"closer_to_training": closer}


def common_shape(volumes: Sequence[np.ndarray]) -> tuple[int, int, int]:
    """The smallest side of any of the volumes (C, X, Y, Z), axis by axis: one small volume makes it small for all."""
    x, y, z = np.min([volume.shape[1:] for volume in volumes], axis=0).tolist()
    return x, y, z


def _judge_slices(
    volumes: Mapping[str, Sequence[np.ndarray]],
    shape: tuple[int, int, int],
    options: dict[str, Any],
    on_volume: Callable[[], None] | None,
) -> dict[str, Any]:
    tables = {s: _table(consistency.slice_statistics, volumes[s], on_volume) for s in SETS}
    return compare_columns(tables, consistency.names(), **options)


def _judge_intensity(
    volumes: Mapping[str, Sequence[np.ndarray]],
    shape: tuple[int, int, int],
    options: dict[str, Any],
    on_volume: Callable[[], None] | None,
) -> dict[str, Any]:
    statistics = {s: _table(intensity.intensity_statistics, volumes[s], on_volume) for s in SETS}
    histograms = {s: _table(intensity.histogram, volumes[s]) for s in SETS}
    powers = {s: _table(lambda volume: intensity.power(volume, shape), volumes[s]) for s in SETS}
    ratios = compare_sets(intensity.power_ratio_db, powers, **options)
    return {
        "statistics": compare_columns(statistics, intensity.names(), **options),
        "histogram": compare_sets(intensity.histogram_distance, histograms, **options),
        "spectrum_db": {
            "bands": band_names(intensity.band_edges_for(shape)),
            "generated_over_test": ratios["generated_to_test"],
            "training_over_test": ratios["training_to_test"],
        },
    }


def _table(
    statistics: Callable[[np.ndarray], np.ndarray],
    volumes: Sequence[np.ndarray],
    on_volume: Callable[[], None] | None = None,
) -> np.ndarray:
    """Statistics of each volume, a row each."""
    rows = []
    for volume in volumes:
        rows.append(statistics(volume))
        if on_volume is not None:
            on_volume()
    return np.stack(rows)


def _check(name: str, volumes: VolumeSet, channels: int) -> None:
    for index, volume in enumerate(volumes.volumes):
        if volume.ndim != 4 or volume.shape[0] != channels:
            raise ValueError(f"{name} volume {index} is {volume.shape}; ({channels}, X, Y, Z) is needed")
        low, high = float(volume.min()), float(volume.max())
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # NaN too
            raise ValueError(
                f"{name} volume {index} has intensities from {low:g} to {high:g}; scale them to [0, 1] (see unit_range)"
            )
