"""Metrics with known answers."""

import math

import numpy as np
import pytest
import torch

from evaluation import (
    band_names,
    band_power,
    center_crop,
    dice_per_volume,
    hann_window,
    mean_band_power,
    mean_gradient,
    psnr,
    ratio_db,
)


def test_psnr_of_a_constant_error():
    target = np.random.default_rng(0).random((1, 6, 7, 8))
    assert psnr(target + 0.1, target) == pytest.approx(20)
    assert psnr(target + 0.01, target) == pytest.approx(40)
    assert psnr(target, target) == math.inf


def test_psnr_leaves_the_padding_out():
    target = np.zeros((2, 4, 4, 8))
    seen = np.zeros((1, 4, 4, 8), bool)
    seen[..., :4] = True
    reconstruction = np.where(seen, 0.1, 1.0) * np.ones_like(target)  # wildly wrong in the padding
    assert psnr(reconstruction, target, seen) == pytest.approx(20)
    with pytest.raises(ValueError, match="field of view is empty"):
        psnr(reconstruction, target, ~seen & seen)
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 8\).*\(2, 4, 4, 4\)"):
        psnr(reconstruction, target[..., :4])


def test_the_gradient_of_a_ramp():
    x, y, z = np.meshgrid(np.arange(5.0), np.arange(6.0), np.arange(7.0), indexing="ij")
    ramp = 2 * x + 3 * y - 6 * z  # |(2, 3, -6)| = 7
    assert mean_gradient(ramp) == pytest.approx(7)
    assert mean_gradient(-0.5 * ramp[None] + 9) == pytest.approx(3.5)
    noise = np.random.default_rng(0).random((8, 8, 8))
    assert mean_gradient((noise + np.roll(noise, 1, 0)) / 2) < 0.9 * mean_gradient(noise)


def test_gradients_leave_the_padding_and_its_edge_out():
    seen = np.zeros((1, 4, 4, 4), bool)
    seen[:, :3, :3, :3] = True
    volume = np.where(seen, np.arange(4.0), 100)  # rises along Z by 1
    assert mean_gradient(volume, seen) == pytest.approx(1)
    seen[:, 1:] = False  # one plane: no neighbor along X
    with pytest.raises(ValueError, match="no voxel with its neighbors"):
        mean_gradient(volume, seen)


def test_white_noise_has_its_variance_in_every_band_of_any_crop():
    random = np.random.default_rng(0)
    for shape in ((28, 36, 28), (31, 40, 24)):
        power = mean_band_power(random.normal(0, 3, (40, *shape)))
        assert power[1:] == pytest.approx(np.full(9, 9.0), rel=0.1)


def test_a_wave_is_found_in_its_band_alone():
    x = np.arange(28).reshape(-1, 1, 1)
    wave = np.cos(2 * np.pi * 0.25 * x) * np.ones((28, 36, 28))  # 0.25 cycles/voxel: first of band 0.25-0.30
    power = band_power(wave)
    assert band_names()[int(power.argmax())] == "0.25-0.30"
    # A Hann window spreads a wave over its two neighbors along X, 1/28 = 0.036 away, and no further.
    elsewhere = [p for name, p in zip(band_names(), power, strict=True) if name not in ("0.20-0.25", "0.25-0.30")]
    assert max(elsewhere) < 1e-12 * power.max()


def test_halving_amplitudes_costs_six_decibels():
    volumes = np.random.default_rng(1).random((3, 28, 36, 28))
    ratio = ratio_db(mean_band_power(volumes / 2), mean_band_power(volumes))
    assert ratio == pytest.approx(np.full(10, -20 * math.log10(2)))


def test_brightness_is_not_in_the_spectrum():
    volume = np.random.default_rng(1).random((28, 36, 28))
    assert band_power(volume + 5) == pytest.approx(band_power(volume))


def test_too_small_a_crop_is_refused():
    with pytest.raises(ValueError, match=r"\(8, 8, 8\).*no frequency in \[0.0, 0.05\)"):
        band_power(np.zeros((8, 8, 8)))


def test_no_volume_is_refused():
    with pytest.raises(ValueError, match="no volume"):
        mean_band_power([])


def test_hann_window_peaks_in_the_middle_and_sums_as_it_should():
    window = hann_window((8, 4))
    assert window[4, 2] == 1 and window[0].max() == 0
    assert window.sum() == pytest.approx(8 * 4 / 4)  # mean of a periodic Hann window is a half along each axis


def test_center_crop_keeps_the_middle():
    volume = np.arange(6)[:, None, None] * np.ones((6, 3, 4))
    cropped = center_crop(volume, (2, 5, 4))
    assert cropped.shape == (2, 3, 4) and cropped[:, 0, 0].tolist() == [2, 3]


def test_dice_of_planted_overlaps():
    target = torch.zeros(3, 4, 4, 4, dtype=torch.uint8)
    prediction = target.clone()
    target[0, :2] = 1  # 32 voxels
    prediction[0, 1:3] = 1  # 32 voxels, 16 of them right
    target[1, 0] = prediction[1, 0] = 1
    assert dice_per_volume(prediction, target, 1).tolist() == [0.5, 1.0, 0.0]
