"""Intensities and spectra of volumes made to measure."""

import numpy as np
import pytest
from smooth import SHAPE, blurred, shuffled, smooth_volumes

from evaluation.commands.realism import hounsfield_windows, print_summary
from evaluation.data.volume_sets import VolumeSet
from evaluation.html.realism import realism_section
from evaluation.metrics.histogram import (
    BINS,
    band_edges_for,
    histogram,
    histogram_distance,
    hounsfield_ranges,
    hounsfield_shares,
    intensity_statistics,
    names,
    power,
    power_ratio_db,
)
from evaluation.metrics.set_distances import compare_sets
from evaluation.studies.realism import measure_realism
from volumes import DataConfig, IntensityScaling


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


def test_a_window_tells_ranges_of_hounsfield_units_apart():
    """Air, lung, fat, muscle and bone; then a window that shows no lung, and one that shows no bone."""
    values = np.array([-1000.0, -1000, -700, -100, -100, -100, 50, 400, 1000, -300]).reshape(10, 1, 1)
    names = [*hounsfield_ranges((-1000, 1000))]
    assert names[0] == "air, below -900 HU" and names[3] == "fat, -190 to -30 HU" and names[5] == "bone, above 200 HU"
    shares = hounsfield_shares((values + 1000) / 2000, (-1000, 1000))
    np.testing.assert_allclose(shares, [0.2, 0.1, 0.1, 0.3, 0.1, 0.2])
    narrow = (-200.0, 300.0)
    assert next(iter(hounsfield_ranges(narrow))) == "air or lung or partial volume, below -190 HU"
    np.testing.assert_allclose(hounsfield_shares((values.clip(*narrow) + 200) / 500, narrow), [0.4, 0.3, 0.1, 0.2])
    assert [*hounsfield_ranges((-160.0, 150.0))] == [
        "air or lung or partial volume or fat, below -30 HU",
        "soft tissue or bone, above -30 HU",
    ]
    assert [*hounsfield_ranges((0.0, 100.0))] == ["air or lung or partial volume or fat or soft tissue or bone, all"]


def ct(count: int, seed: int, bone: float) -> VolumeSet:
    """Volumes (1, 16, 18, 16) of soft tissue with about a share of bone, in the window -200 to 300 HU."""
    random = np.random.default_rng(seed)
    volumes = [np.where(random.random((1, *SHAPE)) < bone, 0.98, 0.5) for _ in range(count)]
    return VolumeSet([volume.astype(np.float32) for volume in volumes])


def test_too_much_bone_is_outside_of_its_floor(capsys):
    sets = {"training": ct(8, 1, 0.1), "test": ct(8, 2, 0.1), "generated": ct(8, 3, 0.2)}
    report = measure_realism(sets, {}, channels=("ct",), parts=("intensity",), hounsfield={"ct": (-200, 300)})
    shares = report["intensity"]["ct"]["hounsfield"]
    assert shares["bone, above 200 HU"]["generated"]["mean"] == pytest.approx(0.2, abs=0.01)
    assert shares["bone, above 200 HU"]["test"]["mean"] == pytest.approx(0.1, abs=0.01)
    print_summary(report)
    assert "ct, bone, above 200 HU: 20." in capsys.readouterr().out
    table = realism_section(report).tables[-1]
    verdicts = {row.name.partition(",")[0]: row.verdict for row in table.rows}
    assert table.heading == "Hounsfield units: ct" and verdicts["bone"] == "outside" and verdicts["fat"] == "within"
    without = measure_realism(sets, {}, channels=("ct",), parts=("intensity",))
    assert "hounsfield" not in without["intensity"]["ct"]


def test_hounsfield_units_need_a_window():
    scales = {"ct": IntensityScaling("window", -200, 300), "mr": IntensityScaling()}
    config = DataConfig(images={"ct": "ct/*.nii.gz", "mr": "mr/*.nii.gz"}, intensity=scales)
    assert hounsfield_windows(["ct"], config) == {"ct": (-200, 300)}
    with pytest.raises(ValueError, match="--hounsfield mr: its intensity is of kind percentile"):
        hounsfield_windows(["mr"], config)
    with pytest.raises(ValueError, match="--hounsfield image: the data has the channels ct, mr"):
        hounsfield_windows(["image"], config)
    maps = DataConfig(images="*.nii.gz", image_labels={0: "background", 1: "organ"})
    with pytest.raises(ValueError, match="--hounsfield organ: the data are label maps"):
        hounsfield_windows(["organ"], maps)
