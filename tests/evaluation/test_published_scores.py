"""Precision, recall, density and coverage, and the Frechet distance of slices, on Gaussians with known answers."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from evaluation.html.realism import realism_section
from evaluation.metrics.manifold import SCORES, manifold_scores, shortfalls
from evaluation.metrics.scripted import MEAN, ScriptedSlices, ScriptedVolumes, load_scripted
from evaluation.studies.realism import compare_features, compare_slices


def gaussian(count: int, seed: int, shift: float = 0.0, scale: float = 1.0, features: int = 8) -> np.ndarray:
    return shift + scale * np.random.default_rng(seed).standard_normal((count, features))


def scores(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    return dict(zip(SCORES, manifold_scores(generated, real).tolist(), strict=True))


def test_coverage_does_not_depend_on_the_number_of_features():
    """Naeem et al. 2020, Eq. 9, for 100 rows each and k = 5; the mean of 40 draws has a standard error of 0.004."""
    expected = 1 - math.prod((100 - i) / (200 - i) for i in range(1, 6))
    drawn = [scores(gaussian(100, 2 * s), gaussian(100, 2 * s + 1))["coverage"] for s in range(40)]
    assert np.mean(drawn) == pytest.approx(expected, abs=0.015)


def test_two_samples_of_one_gaussian_have_the_expected_scores():
    """Density is 1 on average, and coverage is that of Naeem et al. 2020, Eq. 9: 0.969 for equal counts and k = 5."""
    count, k = 100, 5
    pairs = ((gaussian(count, 2 * s, features=2), gaussian(count, 2 * s + 1, features=2)) for s in range(40))
    found = np.mean([manifold_scores(*pair) for pair in pairs], axis=0)
    expected = 1 - math.prod((count - i) / (2 * count - i) for i in range(1, k + 1))
    by_name = dict(zip(SCORES, found, strict=True))
    assert by_name["coverage"] == pytest.approx(expected, abs=0.015) and expected == pytest.approx(0.97, abs=0.01)
    assert by_name["density"] == pytest.approx(1, abs=0.05)
    assert by_name["precision"] == pytest.approx(by_name["recall"], abs=0.02) and by_name["recall"] > 0.95


def test_each_score_sees_its_own_fault():
    real = gaussian(200, 0)
    narrow, wide = scores(gaussian(200, 1, scale=0.3), real), scores(gaussian(200, 1, scale=3.0), real)
    assert narrow["precision"] == 1 and narrow["recall"] < 0.3 and narrow["density"] > 1.5
    assert wide["precision"] < 0.1 and wide["recall"] > 0.9 and wide["density"] < 0.1
    assert scores(gaussian(200, 1, shift=20.0), real) == dict.fromkeys(SCORES, 0)
    one_mode = np.concatenate([gaussian(100, 2), gaussian(100, 3, shift=20.0)])
    assert scores(gaussian(200, 4), one_mode)["coverage"] == pytest.approx(0.5, abs=0.05)


def test_scores_by_hand():
    """k = 1: real balls [0, 1], [0, 2] and [1, 7] of radii 1, 1 and 3 about 0, 1 and 4; one row outside of all."""
    real, generated = np.array([[0.0], [1.0], [4.0]]), np.array([[0.5], [1.5], [9.0]])
    found = manifold_scores(generated, real, neighbors=1)
    # 0.5 lies in two balls, 1.5 in two; balls of generated rows: radii 1, 1, 7.5 about 0.5, 1.5, 9: all real rows.
    np.testing.assert_allclose(found, [2 / 3, 1, 4 / 3, 1])
    np.testing.assert_allclose(shortfalls(real, real), 1 - manifold_scores(real, real))


class Mean2D(nn.Module):
    """Features of a slice: its mean in each of three color channels, by a convolution."""

    def __init__(self, kind: type[nn.Conv2d] | type[nn.Conv3d], channels: int):
        super().__init__()
        self.conv = kind(channels, channels, 1, bias=False)
        weight = torch.eye(channels).reshape(channels, channels, *[1] * (2 if kind is nn.Conv2d else 3))
        self.conv.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def test_a_file_of_a_2d_network_gives_an_extractor_per_plane(tmp_path):
    torch.jit.trace(Mean2D(nn.Conv2d, 3), torch.rand(1, 3, 8, 8)).save(tmp_path / "net.ts")
    found = load_scripted(tmp_path / "net.ts")
    assert [*found] == [" sagittal", " coronal", " axial"]
    volume = torch.rand(1, 4, 5, 6) / 2
    scaled = (volume - volume.min()) / (volume.max() - volume.min())
    for axis, extractor in enumerate(found.values()):
        assert isinstance(extractor, ScriptedSlices)
        others = [a for a in range(3) if a != axis]
        expected = scaled[0].mean(others)[:, None] - torch.tensor(MEAN)
        torch.testing.assert_close(extractor.rows(volume), expected)
        torch.testing.assert_close(extractor(volume[None]), expected.mean(0)[None])


def test_a_file_of_a_3d_network_gives_one(tmp_path):
    torch.jit.trace(Mean2D(nn.Conv3d, 1), torch.rand(1, 1, 4, 4, 4)).save(tmp_path / "net.pt")
    [(name, extractor)] = load_scripted(tmp_path / "net.pt").items()
    assert name == "" and isinstance(extractor, ScriptedVolumes)
    volumes = torch.rand(2, 3, 4, 5, 6)
    torch.testing.assert_close(extractor(volumes), volumes.mean((2, 3, 4)))
    (tmp_path / "text.ts").write_text("weights")
    with pytest.raises(ValueError, match="is not a TorchScript file"):
        load_scripted(tmp_path / "text.ts")


def with_extremes(volume: np.ndarray) -> np.ndarray:
    """The volume with 0 and 1 in the first slice, at the same mean, so that it is not scaled."""
    volume[0, 0, 0, 0], volume[0, 0, 1, 0] = 0.0, 1.0
    return volume.clip(0, 1)


def test_the_distance_of_slices_is_that_of_their_gaussians():
    """Means of slices are Gaussian with shift 0.3: of three equal features, the squared distance is 3 x 0.09."""
    random = np.random.default_rng(0)
    shifts = {"training": 0.4, "test": 0.4, "generated": 0.7}
    volumes = {
        name: [with_extremes(np.ones((1, 4, 4, 1)) * random.normal(shift, 0.1, (1, 1, 1, 60))) for _ in range(20)]
        for name, shift in shifts.items()
    }
    subjects = {name: [f"{name}{i // 2}" for i in range(20)] for name in shifts}
    found = compare_slices(ScriptedSlices(Mean2D(nn.Conv2d, 3), 2), volumes, subjects)
    assert found["whole"] == pytest.approx(0.27, abs=0.02) and found["count"] == 600
    assert found["training_to_test"]["mean"] < 0.005 and found["excess"]["interval"][0] > 0.2


def test_scores_are_reported_beside_their_floor():
    sets = {"training": gaussian(40, 0), "test": gaussian(40, 1), "generated": gaussian(40, 2, scale=0.3)}
    features = compare_features(sets, standardized=False, subsets=20)
    shortfall = features["shortfall"]
    assert [*shortfall] == [*SCORES]
    assert shortfall["recall"]["excess"]["interval"][0] > 0.2 and shortfall["precision"]["excess"]["mean"] <= 0
    rows = realism_section({"features": {"random": features}}).tables[0].rows
    assert sum("1 - " in str(row) for row in rows) == 4
