"""The noise of several channels: each is fitted on its own, and drawn apart."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from noise_volumes import SIDES, volumes

from autoencoder.residual_noise import (
    ResidualNoiseModel,
    fit_noise,
)
from volumes.description import NOISE_BINS, NOISE_LEVELS, ChannelNoise


def test_channels_are_fitted_each_by_itself():
    """As two data sets of one channel are, whatever the other one holds."""
    weak, strong = volumes(5, 0.02, 0.05), volumes(5, 0.1, 0.3)
    both = [tuple(map(np.concatenate, zip(*pair, strict=True))) for pair in zip(weak, strong, strict=True)]
    together = fit_noise(both, SIDES)
    for found, own in zip(together, (weak, strong), strict=True):
        [expected] = fit_noise(own, SIDES)
        assert found.std == pytest.approx(expected.std)
        for key in ("kernel", "curve", "levels"):
            np.testing.assert_allclose(getattr(found, key), getattr(expected, key))
    assert together[1].std > 2 * together[0].std


def planted(std: float, curve: float, level: float) -> ChannelNoise:
    """White noise of one strength everywhere."""
    kernel = np.zeros((7, 7, 7))
    kernel[3, 3, 3] = 1
    return ChannelNoise(kernel.tolist(), std, [curve] * NOISE_BINS, [level] * NOISE_LEVELS)


def test_noise_is_drawn_apart_with_each_channels_own_strength():
    """std times curve times level: 0, 0.2 and 0.6; no channel's noise is another's, nor a plane's its neighbor's."""
    model = ResidualNoiseModel([planted(0.0, 1.0, 1.0), planted(0.1, 2.0, 1.0), planted(0.1, 2.0, 3.0)])
    flat = torch.stack([torch.full((24, 24, 24), value) for value in (-0.5, 0.0, 0.5)])
    [made] = model.add([flat], seed=3)
    noise = made - flat
    assert torch.equal(made[0], flat[0])
    assert noise[1].std().item() == pytest.approx(0.2, rel=0.03) and noise[2].std().item() == pytest.approx(
        0.6, rel=0.03
    )
    assert noise[1:].mean((1, 2, 3)).abs().max() < 0.02

    def alike(one: torch.Tensor, other: torch.Tensor) -> float:
        return abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].item())

    assert alike(noise[1], noise[2]) < 0.05
    for axis in range(3):
        near, far = (noise[1].narrow(axis, start, 23) for start in (0, 1))
        assert alike(near, far) < 0.05


def test_a_level_is_drawn_from_the_quantiles_evenly():
    """Levels of 1 to 3: their mean is 2, and a quarter is below 1.5."""
    model = ResidualNoiseModel([replace(planted(1.0, 1.0, 1.0), levels=np.linspace(1, 3, NOISE_LEVELS).tolist())])
    drawn = [next(model.add([torch.zeros(1, 10, 10, 10)], seed))[0].std().item() for seed in range(200)]
    assert np.mean(drawn) == pytest.approx(2.0, abs=0.12) and np.mean(np.array(drawn) < 1.5) == pytest.approx(
        0.25, abs=0.09
    )
