"""Intensity scaling: known values, clipped, inverted, fitted to the whole volume."""

import numpy as np
import pytest
import torch

from volumes import IntensityScaling, LinearScale, VolumeError


def test_a_ct_window():
    scale = IntensityScaling("window", -1000, 1000).fit(np.array([0.0, 1.0]))
    hounsfield = np.array([-2000, -1000, -500, 0, 250, 1000, 3000], np.float32)
    np.testing.assert_allclose(scale.apply(hounsfield), [-1, -1, -0.5, 0, 0.25, 1, 1])
    inside = hounsfield[1:6]
    np.testing.assert_allclose(scale.invert(scale.apply(inside)), inside, atol=1e-3)


def test_tensors_are_scaled_as_arrays_are():
    values = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    scale = LinearScale(-0.7, 1.9)
    tensor = scale.apply(torch.from_numpy(values))
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(tensor.numpy(), scale.apply(values), atol=1e-6)
    np.testing.assert_allclose(scale.invert(tensor).numpy(), values.clip(-0.7, 1.9), atol=1e-6)


def test_percentiles_of_the_whole_volume():
    """On 0..1000 percentile p is 10 p; the brightness of a slice does not change its scale."""
    volume = np.arange(1001, dtype=np.float32).reshape(7, 11, 13)
    scale = IntensityScaling("percentile", 0.5, 99.5).fit(volume)
    assert (scale.low, scale.high) == (pytest.approx(5, abs=1e-3), pytest.approx(995, abs=1e-3))
    scaled = scale.apply(volume)
    assert scaled[0].max() < scaled[-1].min()


def test_each_end_has_its_own_percentile():
    scale = IntensityScaling("percentile", 5, 90).fit(np.arange(1001, dtype=np.float32))
    assert (scale.low, scale.high) == (pytest.approx(50, abs=1e-3), pytest.approx(900, abs=1e-3))


def test_the_share_in_a_window_excludes_its_ends():
    """Air that is clipped to the lowest value, as scanners write it, is not shown by a window that begins there."""
    scaling = IntensityScaling("window", 0, 10)
    assert scaling.share_inside(np.array([0, 0, 0, 5, 10, 12.0])) == pytest.approx(1 / 6)
    assert scaling.share_inside(np.array([0, 0, 10.0])) == 1  # two values: all is shown


def test_agrees_with_the_reference_at_large_intensities():
    volume = np.random.default_rng(0).gamma(2.0, 2e5, size=(20, 20, 20)).astype(np.float32)
    low, high = np.percentile(volume, [0.5, 99.5]).astype(np.float32)
    reference = np.clip((volume - low) / (high - low), 0, 1)
    scaled = IntensityScaling().fit(volume).apply(volume)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose((scaled + 1) / 2, reference, atol=1e-6)


def test_a_constant_volume_is_refused():
    with pytest.raises(VolumeError, match="constant"):
        IntensityScaling().fit(np.full((4, 4, 4), 3.0))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("percentile", 99, 1), "must be below"),
        (("percentile", -1, 50), "0-100"),
        (("zscore", 0, 1), "kind: got 'zscore' .text., expected one of percentile, window"),
        (("window", float("nan"), 1), "low: got nan"),
        (("window", 0, float("inf")), "high: got inf"),
        (("window", "0", 1), "low: got '0' .text."),
    ],
)
def test_impossible_scalings_are_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        IntensityScaling(*arguments)
