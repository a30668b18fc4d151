"""MS-SSIM of volumes whose similarity is known, and of sets that are too alike."""

import numpy as np
import pytest
import torch
from smooth import SHAPE, blurred, collapsed, smooth_volumes

from evaluation.metrics.ms_ssim import (
    CONTRAST,
    LUMINANCE,
    compare_diversity,
    ms_ssim,
    pair_similarity,
    random_pairs,
    scales_of,
    weights_of,
)

SETS = ("training", "test", "generated")


def tensor(volumes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(volumes).float()


def test_small_volumes_have_fewer_scales_and_weights_sum_to_1():
    assert [scales_of((side, 40, 40)) for side in (7, 13, 14, 28, 40)] == [1, 1, 2, 3, 3]
    assert scales_of((500, 400, 300)) == 5
    assert weights_of(2) == pytest.approx([0.0448 / 0.3304, 0.2856 / 0.3304])
    with pytest.raises(ValueError, match="too small for MS-SSIM; give 7"):
        scales_of((6, 40, 40))


def test_flat_volumes_differ_in_luminance_alone():
    flat = torch.ones(1, 1, *SHAPE)
    luminance = (2 * 0.2 * 0.6 + LUMINANCE) / (0.2**2 + 0.6**2 + LUMINANCE)
    found = ms_ssim(0.2 * flat, 0.6 * flat).item()
    assert found == pytest.approx(luminance ** weights_of(2)[-1], rel=1e-4)


def test_a_volume_with_less_contrast_of_one_scale():
    """One window, so one mean: y is x about the same brightness with half the contrast, weighted by the window."""
    x = torch.rand(1, 1, 7, 7, 7, dtype=torch.float64)
    offsets = torch.arange(7, dtype=torch.float64) - 3
    g = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = (g[:, None, None] * g[:, None] * g) / g.sum() ** 3
    mean = (window * x).sum()
    variance = (window * (x - mean) ** 2).sum()
    y = mean + 0.5 * (x - mean)
    expected = (variance + CONTRAST) / (1.25 * variance + CONTRAST)  # luminance is 1
    assert ms_ssim(x, y).item() == pytest.approx(expected.item(), rel=1e-4)


def test_equal_volumes_are_1_the_order_is_free_and_defects_cost():
    volumes = smooth_volumes(3, 0, channels=2)
    x, y = tensor(volumes), tensor(smooth_volumes(3, 1, channels=2))
    assert ms_ssim(x, x).numpy() == pytest.approx(np.ones(3), abs=1e-5)
    assert torch.equal(ms_ssim(x, y), ms_ssim(y, x))
    apart = (ms_ssim(x[:, :1], y[:, :1]) + ms_ssim(x[:, 1:], y[:, 1:])) / 2
    assert torch.allclose(ms_ssim(x, y), apart)
    little, much = (ms_ssim(x, tensor(blurred(volumes, sigma))) for sigma in (0.5, 1.5))
    assert (ms_ssim(x, y) < much).all() and (much < little).all() and (little < 0.999).all()
    with pytest.raises(ValueError, match="their shapes must be equal"):
        ms_ssim(x, y[..., 1:])


def test_pairs_are_different_and_of_different_subjects():
    every = random_pairs(5, 100, 0)
    assert sorted(map(tuple, every.tolist())) == [(i, j) for i in range(5) for j in range(i + 1, 5)]
    some = random_pairs(30, 50, 0)
    assert len({tuple(pair) for pair in some.tolist()}) == 50 and (some[:, 0] < some[:, 1]).all()
    assert not np.array_equal(some, random_pairs(30, 50, 1))
    assert random_pairs(4, 9, 0, ["a", "b", "a", "b"]).tolist() == [[0, 1], [0, 3], [1, 2], [2, 3]]
    with pytest.raises(ValueError, match="pair of different subjects"):
        random_pairs(2, 9, 0, ["a", "a"])


def diversity(generated: np.ndarray) -> dict:
    sets = {"training": smooth_volumes(12, 1), "test": smooth_volumes(10, 2), "generated": generated}
    pairs = {name: random_pairs(len(volumes), 40, 0) for name, volumes in sets.items()}
    values = {name: pair_similarity(list(volumes), pairs[name]) for name, volumes in sets.items()}
    return compare_diversity(values, pairs, {name: len(volumes) for name, volumes in sets.items()})


def test_only_mode_collapse_makes_pairs_of_volumes_alike():
    fresh = smooth_volumes(12, 3)
    good, bad = diversity(fresh), diversity(collapsed(fresh))
    for name in ("generated_minus_test", "training_minus_test", "generated_minus_training"):
        low, high = good[name]["interval"]
        assert low < good[name]["mean"] < high and low < 0 < high
    assert bad["generated_minus_test"]["interval"][0] > 0.02
    assert bad["test"] == good["test"] and bad["generated"]["std"] > 3 * bad["test"]["std"]


def test_the_interval_is_over_volumes_and_a_constant_has_none():
    pairs = random_pairs(6, 15, 0)
    values, same = {"test": np.full(15, 0.5), "training": np.full(15, 0.5)}, np.full(15, 0.75)
    report = compare_diversity({**values, "generated": same}, dict.fromkeys(SETS, pairs), dict.fromkeys(SETS, 6))
    for real in ("test", "training"):
        assert report[f"generated_minus_{real}"] == {"mean": 0.25, "interval": [pytest.approx(0.25)] * 2}
    # volume 0 alone is like the others: how often it is drawn moves the mean more than pairs drawn apart would
    unlike = {**values, "generated": (pairs == 0).any(1).astype(float)}
    low, high = compare_diversity(unlike, dict.fromkeys(SETS, pairs), dict.fromkeys(SETS, 6))["generated"]["interval"]
    assert low == 0 and high > 0.6 and unlike["generated"].mean() == pytest.approx(1 / 3)


def test_volumes_of_one_subject_are_drawn_together():
    """Pairs of subject a are alike, of others not: with subjects, a draw holds both of its volumes or none."""
    pairs = random_pairs(4, 6, 0, ["a", "a", "b", "c"])
    values = {name: np.linspace(0, 1, len(pairs)) for name in SETS}
    counts, whose = dict.fromkeys(SETS, 4), {key: ["a", "a", "b", "c"] for key in SETS}
    apart = compare_diversity(values, dict.fromkeys(SETS, pairs), counts)["test"]["interval"]
    together = compare_diversity(values, dict.fromkeys(SETS, pairs), counts, 0, whose)["test"]["interval"]
    assert together != apart
    with pytest.raises(ValueError, match="3 subjects for 4 volumes"):
        compare_diversity(values, dict.fromkeys(SETS, pairs), counts, 0, {key: ["a", "b", "c"] for key in SETS})
