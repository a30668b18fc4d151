"""Perceptual losses: zero for equals, dearer for blur than for brightness, and no gradient but to the
reconstruction."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from vae_steps import batch, generators, gradients, make_step

from autoencoder import AutoencoderKL3D
from autoencoder.losses.perceptual import EncoderFeatures, VGG16Features, perceptual_loss
from training import AdversarialConfig, CropConfig, PerceptualConfig, PerceptualLoss
from training.vae_losses import make_perception


def small_autoencoder(**changes: Any) -> AutoencoderKL3D:
    torch.manual_seed(1)
    vae = AutoencoderKL3D(channels=(4, 8), encoder_blocks=(1, 1), decoder_blocks=(0, 0), latent_channels=2, **changes)
    vae.set_latent_statistics([0.0] * 2, [1.0] * 2)
    return vae


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory) -> Path:
    """VGG-16 of random weights (He et al. 2015), in half precision, as torchvision names them."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in VGG16Features._layers(VGG16Features).state_dict().items()}
    weights = {f"features.{key}": torch.zeros(shape, dtype=torch.half) for key, shape in shapes.items()}
    for tensor in weights.values():
        if tensor.ndim > 1:
            tensor.copy_(torch.randn(tensor.shape) * (2 / tensor[0].numel()) ** 0.5)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file({**weights, "classifier.0.bias": torch.zeros(4096)}, path)
    return path


@pytest.fixture(params=["autoencoder", "vgg"])
def network(request, vgg_file):
    return EncoderFeatures(small_autoencoder()) if request.param == "autoencoder" else VGG16Features(vgg_file)


def volumes_for(network, shape=(2, 1, 16, 16, 16)) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise in [-1, 1] of as many axes as the network takes, and a field of view of everything."""
    image = torch.rand(shape[: network.dims + 2], generator=generators()[0]) * 2 - 1
    return image, torch.ones_like(image[:, :1], dtype=torch.bool)


def test_equal_inputs_cost_nothing_and_targets_have_no_gradient(network):
    """Only the reconstruction has a gradient."""
    image, fov = volumes_for(network)
    assert perceptual_loss(network, image.clone(), image, fov).item() == 0
    image.requires_grad_()
    reconstruction = (0.5 * image).detach().requires_grad_()
    perceptual_loss(network, reconstruction, image, fov).backward()
    assert reconstruction.grad is not None and reconstruction.grad.abs().max() > 0
    assert image.grad is None and not gradients(network) and not network.training


def test_a_blur_costs_more_than_a_uniform_error_of_equal_size(network):
    image, fov = volumes_for(network)
    pool = F.avg_pool3d if network.dims == 3 else F.avg_pool2d
    blurred = pool(image, 3, 1, 1)
    brighter = image + ((blurred - image) ** 2).mean().sqrt()
    assert perceptual_loss(network, blurred, image, fov) > 1.5 * perceptual_loss(network, brighter, image, fov) > 0


def test_the_distance_sums_unit_features_over_levels():
    """Features (3, 4) and (4, 3) are unit vectors 0.08 apart; of one cell of two that is inside. The next level
    agrees."""

    class Planted(torch.nn.Module):
        dims, in_channels = 3, 1

        def forward(self, volumes: torch.Tensor) -> list[torch.Tensor]:
            return [torch.cat([volumes, 7 - volumes], 1), torch.ones(1, 2, 1, 1, 1)]

    image, fov = torch.full((1, 1, 2, 1, 1), 3.0), torch.tensor([True, False]).view(1, 1, 2, 1, 1)
    reconstruction = torch.tensor([4.0, 99.0]).view(1, 1, 2, 1, 1)
    loss = perceptual_loss(Planted(), reconstruction, image, fov)  # pyright: ignore[reportArgumentType]
    assert loss.item() == pytest.approx(0.08, rel=1e-5)


def test_features_are_taken_per_level_and_per_channel(vgg_file):
    encoder, vgg = EncoderFeatures(small_autoencoder()), VGG16Features(vgg_file)
    volume, picture = torch.randn(1, 2, 16, 16, 16), torch.randn(1, 2, 16, 16)
    assert [f.shape for f in encoder(volume)] == [(2, 4, 8, 8, 8), (2, 8, 4, 4, 4)]
    assert [f.shape[1:] for f in vgg(picture)] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512, 1, 1)]
    for features, both, one in ((encoder, volume, volume[:, 1:]), (vgg, picture, picture[:, 1:])):
        for together, alone in zip(features(both), features(one), strict=True):
            assert torch.allclose(together[1:], alone, atol=1e-4)


def test_each_channel_has_the_field_of_view_of_its_own_volume():
    network, image = EncoderFeatures(small_autoencoder()), torch.randn(2, 2, 8, 8, 8, generator=generators()[0])
    fov = torch.tensor([True, False]).view(2, 1, 1, 1, 1).expand(2, 1, 8, 8, 8)
    for volume, counts in enumerate((True, False)):
        changed = image.clone()
        changed[volume] *= -1
        assert bool(perceptual_loss(network, changed, image, fov) > 0) is counts


def test_gray_becomes_imagenets_colors(vgg_file):
    vgg, seen = VGG16Features(vgg_file), []
    vgg.features[0].register_forward_hook(lambda module, given, output: seen.append(given[0]))
    vgg(torch.full((1, 1, 16, 16), -0.03))  # 0.485 in [0, 1], the mean of red
    expected = torch.tensor([0.0, (0.485 - 0.456) / 0.224, (0.485 - 0.406) / 0.225])
    assert torch.allclose(seen[0][0, :, 3, 5], expected, atol=1e-6)


def test_a_step_logs_it_and_trains_the_autoencoder_alone(network):
    plain, step = make_step(), make_step()
    step.perception = PerceptualLoss(network, PerceptualConfig("vgg", weight=0.5, slices=2))
    inputs = {key: F.interpolate(value.float(), 16) for key, value in batch().items()}
    inputs["fov"] = inputs["fov"].bool()
    before, found = plain(inputs, generators()), step(inputs, generators())
    assert found["perceptual"] > 0 and found["loss"] > before["loss"]
    pulls = [gradients(s.vae.network.decoder[-1])[0] for s in (plain, step)]
    assert not torch.allclose(pulls[0], pulls[1]) and not gradients(network)


def test_padding_is_not_perceived(network):
    """What the autoencoder draws where there is no truth changes nothing."""
    step = make_step(adversarial=AdversarialConfig(start_step=9))
    step.perception, seen = PerceptualLoss(network, PerceptualConfig("vgg", slices=2)), []
    network.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    image = torch.full((2, 1, 16, 16, 16), -1.0)
    fov = torch.zeros_like(image, dtype=torch.bool)
    step({"image": image, "fov": fov}, generators())
    assert len(seen) == 2 and all((volumes == -1).all() for volumes in seen)


def make(network: Path, shape=(16, 16, 16), vae: AutoencoderKL3D | None = None) -> PerceptualLoss | None:
    config: Any = SimpleNamespace(perceptual=PerceptualConfig(str(network)), crops=CropConfig(shape=shape))
    return make_perception(config.perceptual, config, vae or AutoencoderKL3D())


def test_the_kind_is_told_by_the_path(tmp_path, vgg_file):
    small_autoencoder().save_pretrained(tmp_path / "run" / "vae")
    for path, kind in (
        (tmp_path / "run", EncoderFeatures),
        (tmp_path / "run/vae", EncoderFeatures),
        (vgg_file, VGG16Features),
    ):
        perception = make(path)
        assert perception is not None and isinstance(perception.network, kind)
    assert all(tensor.dtype == torch.float32 for tensor in perception.network.state_dict().values())
    assert not any(p.requires_grad for p in perception.network.parameters())


def test_paths_that_lead_nowhere_are_named(tmp_path, vgg_file):
    with pytest.raises(ValueError, match="nowhere.safetensors: truncated or corrupt safetensors file"):
        make(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match=f"{tmp_path}: no autoencoder there"):
        make(tmp_path)
    torch.save({}, tmp_path / "vgg16.pth")
    with pytest.raises(ValueError, match="vgg16.pth: is a pickle.*convert it: safetensors"):
        make(tmp_path / "vgg16.pth")
    weights = load_file(vgg_file)
    save_file({**weights, "features.30.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match="more.safetensors.*1 tensors are.*such as features.30.weight"):
        make(tmp_path / "more.safetensors")
    del weights["features.28.bias"]
    save_file(weights, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="less.safetensors.*1 tensors are.*such as features.28.bias"):
        make(tmp_path / "less.safetensors")


def test_what_does_not_fit_the_network_is_named(tmp_path, vgg_file):
    with pytest.raises(ValueError, match=r"crops.shape \(16, 12, 16\): VGG-16 needs 16"):
        make(vgg_file, (16, 12, 16))
    small_autoencoder(in_channels=2, out_channels=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="takes 2 channels, but the volumes have 1"):
        make(tmp_path)
    with pytest.raises(ValueError, match=r"not a multiple of \(4, 4, 4\)"):
        make(tmp_path, (16, 16, 10), AutoencoderKL3D(in_channels=2, out_channels=2))


@pytest.mark.parametrize("name", ["weight", "slices"])
def test_settings_out_of_range_are_named(name):
    with pytest.raises(ValueError, match=name):
        PerceptualConfig("vae", **{name: -1})
