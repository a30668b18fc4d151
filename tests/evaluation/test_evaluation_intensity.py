"""Intensities and spectra of volumes made to measure."""

import numpy as np
import pytest
from smooth import SHAPE, blurred, shuffled, smooth_volumes

from evaluation.metrics.histogram import (
    BINS,
    band_edges_for,
    histogram,
    histogram_distance,
    intensity_statistics,
    names,
    power,
    power_ratio_db,
)
from evaluation.metrics.set_distances import compare_sets


def test_statistics_of_known_intensities():
    found = dict(zip(names(), intensity_statistics(np.linspace(0, 1, 1001).reshape(7, 11, 13)), strict=True))
    assert found["mean"] == pytest.approx(0.5) and found["std"] == pytest.approx(12**-0.5, rel=2e-3)
    assert [found[f"quantile {q}"] for q in ("0.01", "0.25", "0.5", "0.99")] == pytest.approx([0.01, 0.25, 0.5, 0.99])


def test_a_histogram_distance_is_the_shift_whatever_the_sizes():
    random = np.random.default_rng(0)
    small, large = random.random((4, 5, 6)) / 2, random.random((9, 9, 9)) / 2
    first = np.stack([histogram(small), histogram(large)])
    assert first.sum(1) == pytest.approx([1, 1])
    assert histogram_distance(first, np.roll(first, 30, axis=1)) == pytest.approx(30 / BINS)
    assert histogram_distance(first, first[[1, 0, 1, 0]]) == pytest.approx(0, abs=1e-12)
    # one of two volumes moves
    assert histogram_distance(first, np.stack([np.roll(first[0], 10), first[1]])) == pytest.approx(5 / BINS)


def test_halved_amplitudes_cost_6_decibels_in_every_band():
    """Also in a small crop."""
    volumes = smooth_volumes(3, 0)
    powers = [np.stack([power(v[0], SHAPE) for v in of]) for of in (volumes / 2, volumes)]
    assert power_ratio_db(*powers) == pytest.approx(np.full(powers[0].shape[1], -20 * np.log10(2)))


def test_bands_have_frequencies_in_crops_of_any_useful_size():
    assert len(band_edges_for((40, 40, 40))) == 11 and len(band_edges_for((21, 16, 16))) == 11
    assert len(band_edges_for((20, 20, 20))) == 6
    for side in (16, 20, 21, 40):
        assert np.isfinite(power(np.random.default_rng(0).random((side, side, side)), (side, side, side))).all()


def judged(generated: np.ndarray) -> tuple[dict, dict]:
    sets = {"training": smooth_volumes(16, 1), "test": smooth_volumes(16, 2), "generated": generated}
    histograms = {name: np.stack([histogram(v[0]) for v in of]) for name, of in sets.items()}
    powers = {name: np.stack([power(v[0], SHAPE) for v in of]) for name, of in sets.items()}
    return (
        compare_sets(histogram_distance, histograms, subsets=40),
        compare_sets(power_ratio_db, powers, subsets=40)["generated_to_test"],
    )


def test_each_fault_is_seen_by_its_metric():
    """Blur is seen in the spectrum, brightness in the histogram, shuffled slices in the spectrum alone."""
    fresh = smooth_volumes(16, 3)
    levels, spectrum = judged(fresh)
    assert levels["excess"]["interval"][0] < 0 < levels["excess"]["interval"][1]
    assert np.abs(spectrum["mean"]).max() < 1
    _, spectrum = judged(blurred(fresh))
    assert spectrum["interval"][1][-1] < -6 and spectrum["mean"][-1] < spectrum["mean"][0] - 6
    levels, spectrum = judged(np.clip(fresh + 0.1, 0, 1))
    assert levels["excess"]["interval"][0] > 0.05 and np.abs(spectrum["mean"]).max() < 1
    levels, spectrum = judged(shuffled(fresh))
    assert levels["excess"]["interval"][0] < 0 and spectrum["interval"][0][-1] > 6
