"""Extractors: averages over space by hand, each channel and each volume by itself, padding left out."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from smooth import smooth_volumes

from autoencoder import AutoencoderKL3D
from autoencoder.losses.perceptual import EncoderFeatures, VGG16Features
from evaluation.metrics.features import (
    EncoderStatistics,
    RandomStatistics,
    SliceStatistics,
    extract,
    level_statistics,
)


class SmallVGG(VGG16Features):
    blocks = ((4,), (6,))  # pyright: ignore[reportAssignmentType]
    smallest = 2


@pytest.fixture
def slices_network(tmp_path) -> SmallVGG:
    weights = {}
    for number, (before, width) in {"0": (3, 4), "3": (4, 6)}.items():
        weights[f"features.{number}.weight"] = torch.randn(width, before, 3, 3)
        weights[f"features.{number}.bias"] = torch.randn(width)
    save_file(weights, tmp_path / "small.safetensors")
    return SmallVGG(tmp_path / "small.safetensors")


def autoencoder(**changes) -> AutoencoderKL3D:
    return AutoencoderKL3D(
        channels=(4, 8), encoder_blocks=(1, 1), decoder_blocks=(0, 0), **{"latent_channels": 2, **changes}
    )


def tensor(count: int = 2, channels: int = 1, shape: tuple[int, int, int] = (16, 20, 12)) -> torch.Tensor:
    return torch.from_numpy(smooth_volumes(count, 0, shape, channels)).float()


def test_padding_counts_by_its_share_of_a_cell():
    features = torch.tensor([2.0, 5.0]).reshape(1, 1, 2, 1, 1)
    inside = torch.tensor([1.0, 1.0, 1.0, 0.0]).reshape(1, 1, 4, 1, 1)  # the second cell is half padding
    assert level_statistics([features], inside, 1)[0].tolist() == pytest.approx(
        [3, (1 * 1 + 0.5 * 4) ** 0.5 / 1.5**0.5]
    )


def test_encoder_statistics_are_those_of_its_levels():
    vae, volumes = autoencoder(), tensor()
    found = EncoderStatistics(vae)(volumes)
    levels = EncoderFeatures(vae)(2 * volumes - 1)
    expected = [part for f in levels for part in (f.mean((2, 3, 4)), f.std((2, 3, 4), correction=0))]
    assert found.shape == (2, 2 * (4 + 8)) and torch.allclose(found, torch.cat(expected, 1), atol=1e-5)


def test_encoder_statistics_take_any_shape_and_single_channels():
    vae = autoencoder(in_channels=2, out_channels=2, latent_channels=4, per_channel=True)
    volumes = tensor(channels=2, shape=(13, 15, 11))
    found = EncoderStatistics(vae)(volumes)
    assert torch.allclose(found[1:], EncoderStatistics(vae)(volumes[1:]), atol=1e-5)
    changed = volumes.clone()
    changed[:, 1] = 0.5
    kept = (EncoderStatistics(vae)(changed) == found).float().mean().item()
    assert kept == pytest.approx(0.5)  # all figures of the first channel


def test_the_random_network_is_fixed_and_spares_the_global_seed():
    volumes = tensor(channels=2)
    state = torch.get_rng_state()
    network = RandomStatistics()
    assert torch.equal(torch.get_rng_state(), state)
    found = network(volumes)
    assert found.shape == (2, 2 * 112) and torch.equal(found, RandomStatistics()(volumes))
    assert not torch.allclose(found, RandomStatistics(seed=1)(volumes))
    assert torch.allclose(network(2 * volumes), 2 * found, rtol=1e-4)  # ReLU without biases
    first = network(volumes[:, :1])
    assert all(any(torch.allclose(column, other) for other in found.T) for column in first.T)
    flat = network(torch.full((1, 1, 9, 8, 10), 0.3))  # edges are continued, so a flat volume stays flat
    assert flat.abs().max() > 0.01
    stds = torch.cat([flat[0, 8:16], flat[0, 32:48], flat[0, 80:112]])
    assert stds.abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"\(7, 8, 8\) voxels are too small for this network; give 8"):
        network(torch.zeros(1, 1, 7, 8, 8))


def test_slice_statistics_ignore_slice_order_and_batch_size(slices_network):
    """Slices are taken along each axis."""
    volumes = tensor(channels=2)
    sagittal = SliceStatistics(slices_network, 0)(volumes)
    assert sagittal.shape == (2, 2 * 6)
    by_hand = torch.stack([slices_network(2 * volumes[1:, :1, x] - 1)[-1].mean((0, 2, 3)) for x in range(16)]).mean(0)
    assert torch.allclose(sagittal[1, :6], by_hand, atol=1e-5)
    for changed in (volumes.flip(2), volumes[:, :, torch.randperm(16)]):
        assert torch.allclose(SliceStatistics(slices_network, 0, batch_size=3)(changed), sagittal, atol=1e-5)
    assert torch.allclose(SliceStatistics(slices_network, 2)(volumes.movedim(2, 4)), sagittal, atol=1e-5)
    assert not torch.allclose(SliceStatistics(slices_network, 1)(volumes), sagittal, atol=1e-2)
    with pytest.raises(ValueError, match="too small for this network; give 2"):
        SliceStatistics(slices_network, 0)(torch.zeros(1, 1, 5, 1, 5))


def test_volumes_of_different_shapes_are_extracted_each_alone():
    volumes = [smooth_volumes(1, seed, (8 + seed, 9, 10))[0] for seed in range(3)]
    seen = []
    found = extract(RandomStatistics(), volumes, on_volume=lambda: seen.append(1))
    assert found.shape == (3, 112) and found.dtype == np.float64 and len(seen) == 3
    alone = RandomStatistics()(torch.from_numpy(volumes[2]).float()[None])[0]
    assert found[2] == pytest.approx(alone.numpy())
    with pytest.raises(ValueError, match="volume 1: its features contain NaN"):
        extract(RandomStatistics(), [volumes[0], volumes[1] * np.nan])
