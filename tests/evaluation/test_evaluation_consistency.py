"""Slices: statistics by hand, and planted defects seen along their own axis only."""

import numpy as np
import pytest
from smooth import blurred, drifting, shuffled, smooth, smooth_volumes

from evaluation.metrics.set_distances import compare_columns
from evaluation.metrics.slices import adjacent_correlation, names, slice_statistics


def of(volume: np.ndarray) -> dict[str, float]:
    return dict(zip(names(), slice_statistics(volume), strict=True))


def test_a_ramp_and_a_zigzag_by_hand():
    ramp = np.broadcast_to(np.linspace(0, 1, 11), (5, 6, 11))
    found = of(ramp)
    assert [found["z difference"], found["z brightness_step"]] == pytest.approx([0.1, 0.1])
    assert found["z second_difference"] == pytest.approx(0, abs=1e-12)
    assert found["z correlation"] == 1  # flat slices
    assert found["x difference"] == found["y brightness_step"] == 0
    assert found["x correlation"] == pytest.approx(1)
    zigzag = of(np.moveaxis(np.broadcast_to(np.arange(8) % 2, (5, 6, 8)), 2, 0))
    assert (zigzag["x difference"], zigzag["x second_difference"]) == (1, 2)
    assert zigzag["y difference"] == zigzag["z difference"] == 0


def test_negated_slices_and_constant_slices():
    pattern = np.random.default_rng(0).random(50)
    assert adjacent_correlation(np.stack([pattern, 1 - pattern, 2 + 3 * pattern])) == pytest.approx(-1)
    assert adjacent_correlation(np.stack([pattern, np.full(50, 0.3), np.full(50, 0.4)])) == pytest.approx(0.5)


def test_correlation_ignores_brightness_and_contrast_of_slices():
    volume = smooth_volumes(1, 0)[0, 0] * 0.5
    gains = np.random.default_rng(0).uniform(0.5, 1.5, volume.shape[2])
    scaled = of(volume * gains + gains)
    assert scaled["z correlation"] == pytest.approx(of(volume)["z correlation"])
    assert scaled["z brightness_step"] > 3 * of(volume)["z brightness_step"]


def test_two_slices_have_no_second_difference():
    with pytest.raises(ValueError, match="fewer than 3 slices"):
        slice_statistics(np.zeros((8, 8, 2)))


def judged(generated: np.ndarray) -> dict[str, dict]:
    sets = {"training": smooth_volumes(16, 1), "test": smooth_volumes(16, 2), "generated": generated}
    tables = {name: np.stack([slice_statistics(v[0]) for v in volumes]) for name, volumes in sets.items()}
    return compare_columns(tables, names(), subsets=40)


def beyond(report: dict[str, dict]) -> set[str]:
    """Statistics whose distance exceeds the floor in all but 2.5 % of draws."""
    return {name for name, found in report.items() if found["wasserstein"]["excess"]["interval"][0] > 0}


def test_good_volumes_are_within_the_floor():
    report = judged(smooth_volumes(16, 3))
    assert not beyond(report)
    assert max(abs(found["shift"]) for found in report.values()) < 1


def test_each_defect_is_seen_where_it_is():
    fresh = smooth_volumes(16, 3)
    shuffle = judged(shuffled(fresh, axis=-1))
    assert beyond(shuffle) == {"z correlation", "z difference", "z second_difference", "z brightness_step"}
    assert shuffle["z correlation"]["shift"] < -3 and shuffle["z second_difference"]["shift"] > 3

    drift = judged(drifting(fresh))
    assert {"z difference", "z second_difference", "z brightness_step"} <= beyond(drift)
    assert not {name for name in beyond(drift) if name != "z correlation" and name[0] != "z"}
    assert drift["z brightness_step"]["shift"] > 3
    assert max(abs(found["shift"]) for name, found in drift.items() if name[0] != "z") < 1

    along_z = judged(smooth(fresh, 1.0, axes=(-1,)))
    assert "z second_difference" in beyond(along_z) and along_z["z second_difference"]["shift"] < -3
    assert along_z["z correlation"]["shift"] > 3
    everywhere = judged(blurred(fresh))
    assert {f"{axis} second_difference" for axis in "xyz"} <= beyond(everywhere)


def test_a_worse_defect_is_further():
    fresh = smooth_volumes(16, 3)
    distances = [
        judged(drifting(fresh, size))["z brightness_step"]["wasserstein"]["whole"] for size in (0.0, 0.01, 0.03)
    ]
    assert distances == sorted(distances)
