"""Discriminators look where they should, and their losses are those of the papers."""

from pathlib import Path

import pytest
import torch
import yaml

from autoencoder.losses.adversarial import (
    Slices,
    VolumeDiscriminator,
    adaptive_weight,
    discriminator_loss,
    draw_slices,
    feature_matching_loss,
    generator_loss,
)
from training import TrainVaeConfig, parse_config

RECIPES = Path(__file__).resolve().parents[2] / "configs/hippocampus"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_slices_are_the_planes_asked_for():
    volumes = torch.randn(2, 3, 4, 5, 6)
    for axis in range(3):
        positions = torch.tensor([[0, 3], [2, 1]])
        planes = Slices(axis, positions).of(volumes)
        for b in range(2):
            for k in range(2):
                assert torch.equal(planes[2 * b + k], volumes[b].select(axis + 1, int(positions[b, k])))


def test_slices_lie_inside_the_field_of_view_on_every_axis():
    fov = torch.zeros(1, 1, 8, 9, 10, dtype=torch.bool)
    fov[:, :, 2:4, 3:6, 7:8] = True
    inside, axes = {0: {2, 3}, 1: {3, 4, 5}, 2: {7}}, set()
    for seed in range(30):
        drawn = draw_slices(fov, 4, seeded(seed))
        axes.add(drawn.axis)
        assert set(drawn.positions.flatten().tolist()) <= inside[drawn.axis]
    assert axes == {0, 1, 2}
    assert draw_slices(torch.zeros_like(fov), 2, seeded()).positions.shape == (1, 2)


def test_hinge_losses_of_known_logits():
    real, fake = [[torch.tensor([2.0, 0.5])]], [[torch.tensor([-2.0, 0.0])]]
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))
    assert generator_loss(fake).item() == pytest.approx(1.0)


def test_feature_matching_has_gradients_for_generated_only():
    """Feature matching leaves the logits and the features of real images alone."""
    real = [[torch.ones(3, requires_grad=True), torch.zeros(1)]]
    fake = [[torch.full((3,), 3.0, requires_grad=True), torch.full((1,), 100.0)]]
    loss = feature_matching_loss(real, fake)
    assert loss.item() == 2
    loss.backward()
    assert real[0][0].grad is None and torch.allclose(fake[0][0].grad, torch.full((3,), 1 / 3))


def test_adaptive_weight_balances_the_pull_on_the_last_layer():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    reconstruction, adversarial = (weight**2).sum(), 10 * (weight * torch.tensor([0.6, 0.8])).sum()
    assert adaptive_weight(reconstruction, adversarial, weight).item() == pytest.approx(1.0, rel=1e-4)  # 10 against 10
    assert adaptive_weight(reconstruction, 0.5 * adversarial, weight).item() == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("slices,volume", [(True, False), (False, True), (True, True)])
def test_a_discriminator_learns_to_tell_blurred_from_sharp(slices, volume):
    torch.manual_seed(0)
    network = VolumeDiscriminator(channels=8, layers=1, slices=slices, volume=volume)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    sharp = torch.randn(4, 1, 12, 12, 12)
    blurred = torch.nn.functional.avg_pool3d(sharp, 3, 1, 1)
    fov = torch.ones(4, 1, 12, 12, 12, dtype=torch.bool)
    for step in range(40):
        drawn = draw_slices(fov, 2, seeded(step))
        loss = discriminator_loss(network(sharp, drawn), network(blurred, drawn))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = draw_slices(fov, 2, seeded(99))
    for real, fake in zip(network(sharp, drawn), network(blurred, drawn), strict=True):
        assert real[-1].mean() > fake[-1].mean() + 1


def test_a_verdict_does_not_depend_on_the_batch():
    network, volumes = VolumeDiscriminator(channels=4, layers=1), torch.randn(3, 1, 8, 8, 8)
    drawn = Slices(0, torch.tensor([[1], [2], [3]]))
    alone = network(volumes[:1], Slices(0, drawn.positions[:1]))
    for together, single in zip(network(volumes, drawn), alone, strict=True):
        assert torch.allclose(together[-1][:1], single[-1], atol=1e-5)


def test_a_discriminator_of_nothing_is_refused():
    with pytest.raises(ValueError, match="neither"):
        VolumeDiscriminator(slices=False, volume=False)


def test_the_sharpening_recipe_matches_its_autoencoder():
    """sharpen.yaml has the data, model and losses of vae.yaml, from whose autoencoder it starts."""
    config = parse_config(TrainVaeConfig, ["--config", str(RECIPES / "sharpen.yaml")])
    assert config.freeze_encoder and config.adversarial is not None
    own, first = (yaml.safe_load((RECIPES / name).read_text()) for name in ("sharpen.yaml", "vae.yaml"))
    assert own["init_from"] == first["output"] + "/vae" and own["output"] != first["output"]
    assert all(own[section] == first[section] for section in ("data", "model"))
    assert own["losses"] == first["losses"] | {"spectrum": 0.1}
