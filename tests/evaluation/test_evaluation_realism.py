"""All of it together: good volumes are at the floor, each planted defect is named by the metric meant for it."""

import json
import warnings
from collections import Counter

import numpy as np
import pytest
from smooth import blurred, collapsed, drifting, shuffled, smooth_volumes

from evaluation.metrics.features import RandomStatistics
from evaluation.metrics.nearest import common_crop
from evaluation.studies.realism import (
    PARTS,
    VolumeSet,
    compare_features,
    measure_realism,
    steps_of,
)

TRAINING, TEST = smooth_volumes(24, 1), smooth_volumes(16, 2)
FRESH = smooth_volumes(20, 3)


def sets(generated: np.ndarray) -> dict[str, VolumeSet]:
    every = {"training": TRAINING, "test": TEST, "generated": generated}
    return {name: VolumeSet(list(volumes)) for name, volumes in every.items()}


def test_only_diversity_needs_pairs_of_different_subjects():
    of = sets(FRESH) | {"generated": VolumeSet(list(FRESH), subjects=["one mask"] * len(FRESH))}
    assert steps_of(of, 1, 1, ["consistency"]) == {"consistency": 60}
    with pytest.raises(ValueError, match="pair of different subjects"):
        steps_of(of, 1, 1, ["diversity"])


def features(generated: np.ndarray) -> dict:
    with pytest.warns(UserWarning, match="8 volumes do not determine the covariance of 112 features"):
        report = measure_realism(sets(generated), {"random": RandomStatistics()}, parts=["features"])
    return report["features"]["random"]


def test_a_whole_report_of_good_volumes_is_at_the_floor():
    seen: Counter[str] = Counter()
    of = sets(FRESH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        report = measure_realism(
            of, {"random": RandomStatistics()}, channels=["MR"], pairs=40, on_step=lambda p: seen.update([p])
        )
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["volumes"] == {"training": 24, "test": 16, "generated": 20} and report["shape"] == [20, 22, 18]
    assert (
        seen == steps_of(of, 1, 1, pairs=40) == {"features": 60, "diversity": 120, "consistency": 60, "intensity": 60}
    )
    found = report["features"]["random"]
    intervals = [found[name]["excess"]["interval"] for name in ("frechet", "kernel")]
    intervals += [
        report["diversity"]["generated_minus_test"]["interval"],
        report["intensity"]["MR"]["histogram"]["excess"]["interval"],
    ]
    assert all(low < 0 < high for low, high in intervals)
    assert found["closer_to_training"]["interval"][0] < 0.5 < found["closer_to_training"]["interval"][1]
    spectrum = report["intensity"]["MR"]["spectrum_db"]
    assert spectrum["bands"][0] == "0.00-0.05" and np.abs(spectrum["generated_over_test"]["mean"]).max() < 1
    assert report["diversity"]["scales"] == 2 and sum(report["diversity"]["weights"]) == pytest.approx(1)


def strongly_drifting(volumes: np.ndarray) -> np.ndarray:
    return drifting(volumes, 0.06)  # half of it is for `consistency` to find


@pytest.mark.parametrize("defect", [blurred, shuffled, strongly_drifting])
def test_feature_distances_see_blur_shuffled_slices_and_drift(defect):
    good, bad = features(FRESH), features(defect(FRESH))
    for name in ("frechet", "kernel"):
        assert good[name]["excess"]["interval"][0] < 0 < bad[name]["excess"]["interval"][0]
        assert bad[name]["whole"] > 2 * good[name]["whole"]
        assert bad[name]["training_to_test"] == good[name]["training_to_test"]  # the same draws
    assert "8 volumes" in bad["frechet"]["caveat"]


def test_collapse_is_seen_by_diversity_and_copies_by_closeness():
    collapse = measure_realism(sets(collapsed(FRESH)), {}, parts=["diversity"], pairs=60)["diversity"]
    assert collapse["generated_minus_test"]["interval"][0] > 0.02
    noise = np.random.default_rng(0).standard_normal(TRAINING[:20].shape)
    copies = features(np.clip(TRAINING[:20] + 0.003 * noise, 0, 1))
    assert copies["closer_to_training"]["interval"][0] > 0.9
    assert copies["kernel"]["excess"]["interval"][0] < 0  # to distances of sets they are the best of volumes


def test_channels_are_judged_each_by_itself():
    two = {name: smooth_volumes(8, seed, channels=2) for seed, name in enumerate(("training", "test", "generated"))}
    two["generated"][:, 1] = shuffled(two["generated"][:, 1])
    of = {name: VolumeSet(list(volumes)) for name, volumes in two.items()}
    report = measure_realism(of, {}, channels=["T1", "T2"], parts=["consistency"])["consistency"]
    assert abs(report["T1"]["z correlation"]["shift"]) < 1.5 and report["T2"]["z correlation"]["shift"] < -3


def test_standardized_features_do_not_depend_on_their_units():
    random = np.random.default_rng(0)
    of = {name: random.standard_normal((40, 3)) for name in ("training", "test", "generated")}
    scaled = {name: rows * [1, 2, 0.5] for name, rows in of.items()}
    same = [compare_features(s, subsets=2)["kernel"]["whole"] for s in (of, scaled)]
    assert same[0] == pytest.approx(same[1])
    raw = [compare_features(s, standardized=False, subsets=2)["kernel"]["whole"] for s in (of, scaled)]
    assert raw[0] != pytest.approx(raw[1], rel=0.1)


def test_the_common_shape_is_of_the_smallest_sides():
    assert common_crop([(1, 9, 5, 7), (1, 4, 8, 7)]) == common_crop([(9, 5, 7), (4, 8, 7)]) == (4, 5, 7)


def test_what_cannot_be_judged_is_refused():
    good = sets(FRESH)
    with pytest.raises(ValueError, match=r"unknown parts \['beauty'\]"):
        measure_realism(good, {}, parts=["beauty"])
    with pytest.raises(ValueError, match=r"no volumes of \['test'\]"):
        measure_realism({"training": good["training"], "generated": good["generated"]}, {}, parts=PARTS)
    with pytest.raises(ValueError, match=r"training volume 0 has shape \(1, 20, 22, 18\), not \(2, X, Y, Z\)"):
        measure_realism(good, {}, channels=["a", "b"])
    with pytest.raises(ValueError, match="generated volume 1 has intensities from .* scale them"):
        measure_realism({**good, "generated": VolumeSet([FRESH[0], 2 * FRESH[1] - 1])}, {})
