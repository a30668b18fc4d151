"""The autoencoder's training step: who gets which gradient, when the adversary acts, when the codebook moves."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from vae_steps import batch, generators, gradients, make_step

from autoencoder import VQGAN3D, AutoencoderKL3D
from autoencoder.losses.adversarial import Slices, VolumeDiscriminator, discriminator_loss
from training import (
    AdversarialConfig,
    AdversarialTrainer,
    AutoencoderLosses,
    CropConfig,
    LoopConfig,
    OptimizerConfig,
)
from training.vae import gather_latents
from training.vae_config import crop_faults
from training.vae_losses import make_adversary


@pytest.mark.parametrize("name", ["l1", "mse", "gradient", "spectrum", "kl"])
def test_each_loss_counts_by_its_weight(name):
    step = make_step()
    step.weights = AutoencoderLosses(**{"l1": 0.0, "gradient": 0.0, "kl": 0.0, name: 3.0})
    losses = step(batch(), generators())
    assert losses[name] > 0 and losses["loss"].item() == pytest.approx(3 * losses[name].item(), rel=1e-5)


def test_before_the_start_there_is_no_adversary():
    plain, step = make_step(), make_step(adversarial=AdversarialConfig(start_step=5))
    expected, found = plain(batch(), generators()), step(batch(), generators())
    assert found.keys() == expected.keys() and found["loss"] == expected["loss"]
    assert not gradients(step.adversary.learner.network)


def test_strength_rises_during_the_warm_up():
    adversary = AdversarialTrainer(None, AdversarialConfig(start_step=10, warmup_steps=3))
    assert [adversary.strength(s) for s in (9, 10, 11, 12, 13, 99)] == [None, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_each_gets_its_own_gradient_only():
    """The autoencoder's gradient is that of its loss alone, the discriminator's that of its own."""
    config = AdversarialConfig(warmup_steps=0, feature_matching=1.0)
    step = make_step(adversarial=config)
    adversary, vae = step.adversary, step.vae.network
    seen = {}
    discriminator_step = adversary.discriminator_step

    def watched(*arguments):
        assert not gradients(adversary.learner.network)  # deceiving left no gradient there
        seen["before"] = [g.clone() for g in gradients(vae)]
        losses = discriminator_step(*arguments)
        seen["after"] = gradients(vae)
        return losses

    adversary.discriminator_step = watched
    losses = step(batch(), generators())
    assert seen["before"] and all(torch.equal(a, b) for a, b in zip(seen["before"], seen["after"], strict=True))
    assert len(gradients(adversary.learner.network)) == len(list(adversary.learner.network.parameters()))
    assert all(p.requires_grad for p in adversary.learner.network.parameters())
    assert {"generator", "discriminator", "feature_matching", "adaptive_weight"} <= losses.keys()


def test_the_adversary_changes_the_autoencoders_gradient():
    found = []
    for weight, features in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        step = make_step(adversarial=AdversarialConfig(weight=weight, feature_matching=features, warmup_steps=0))
        with torch.no_grad():
            step.vae.network.decoder[-1].weight.add_(0.1)
        step(batch(), generators())
        found.append(step.vae.network.decoder[-1].weight.grad)
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_padding_looks_the_same_to_the_discriminator():
    step, inputs = make_step(adversarial=AdversarialConfig(warmup_steps=0)), batch()
    seen = []
    step.adversary.learner.network.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    step(inputs, generators())
    outside = ~inputs["fov"]
    assert len(seen) == 3  # the reconstruction, the image, and both together
    for volumes in (seen[0], seen[1], *seen[2].chunk(2)):
        assert (volumes[outside] == -1).all()


def test_the_codebook_moves_once_a_taken_step_by_all_batches():
    step = make_step(VQGAN3D, num_codes=8, latent_channels=4)
    book, calls = step.vae.network.codebook, []
    update = book.update
    book.update = lambda cells, *rest: (calls.append(len(cells)), update(cells, *rest))
    before = {k: v.clone() for k, v in book.state_dict().items()}
    for seed in range(2):  # two accumulated batches; 2 x 2 x 2 x 2 cells each, all inside or at the edge
        losses = step(batch(seed), generators(seed))
    assert all(torch.equal(v, before[k]) for k, v in book.state_dict().items())
    assert {"commitment", "perplexity", "usage", "bits_per_cell"} <= losses.keys() and "kl" not in losses
    step.after_update(True)
    assert calls == [32] and book.initialized
    average = step.vae.average.codebook.state_dict()
    assert all(torch.equal(v, average[k]) for k, v in book.state_dict().items())  # what is validated and saved
    step(batch(2), generators(2))
    moved = book.codes.clone()
    step.after_update(False)  # gradients were not finite: what the step saw is forgotten
    step.after_update(True)
    assert torch.equal(book.codes, moved) and calls == [32]


def test_cells_of_padding_do_not_reach_the_codebook():
    step, inputs = make_step(VQGAN3D, num_codes=8, latent_channels=4), batch()
    inputs["fov"] = torch.zeros_like(inputs["fov"])
    inputs["fov"][0, ..., :4] = True
    step(inputs, generators())
    assert [len(cells) for cells in step._latents] == [4]


def test_the_loss_is_what_is_minimized():
    for model_class, name in ((AutoencoderKL3D, "kl"), (VQGAN3D, "commitment")):
        step = make_step(model_class)
        step.weights = AutoencoderLosses(l1=0, gradient=0, kl=1, commitment=1)
        losses = step(batch(), generators())
        assert losses["loss"] == losses[name] > 0


def test_crops_too_small_for_the_discriminator_are_refused():
    """3 * 2^layers voxels a side are needed, and enough."""
    for layers, side in ((1, 6), (2, 12)):
        volumes, positions = torch.randn(1, 1, side, side, side), torch.zeros(1, 1, dtype=torch.long)
        features = VolumeDiscriminator(channels=2, layers=layers)(volumes, Slices(0, positions))
        assert [f[-1].numel() for f in features] == [1, 1]
        options = AdversarialConfig(layers=layers)
        assert crop_faults(CropConfig(shape=(32, side, 32)), (1, 1, 1), options) == []
        ((message, remedy),) = crop_faults(CropConfig(shape=(32, side - 1, 32)), (1, 1, 1), options)
        assert f"needs {side} voxels per side" in message
        assert remedy == "enlarge the patches, or lower adversarial.layers"


def test_the_discriminator_accumulates_as_the_autoencoder_does():
    """Its gradient over two equal batches of a step is that of one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config: Any = SimpleNamespace(
        adversarial=AdversarialConfig(channels=2, layers=1),
        crops=CropConfig(shape=(8, 8, 8)),
        loop=LoopConfig(),
        optimizer=OptimizerConfig(gradient_accumulation=2),
    )
    adversary = make_adversary(config.adversarial, config, AutoencoderKL3D())
    assert adversary is not None
    adversary.learner.prepare(Accelerator(cpu=True))
    network, slices = adversary.learner.network, Slices(0, torch.zeros(2, 1, dtype=torch.long))
    real = torch.randn(2, 1, 8, 8, 8, generator=generators()[0])
    loss = discriminator_loss(network(real, slices), network(real.flip(2), slices))
    expected = torch.autograd.grad(loss, list(network.parameters()))
    for _ in range(2):
        adversary.discriminator_step(real, real.flip(2), slices)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, gradients(network), strict=True))


def test_gathering_of_one_process_is_the_identity():
    AcceleratorState._reset_state(reset_partial_state=True)
    cells = torch.randn(5, 3)
    assert gather_latents(Accelerator(cpu=True), cells) is cells


@pytest.mark.parametrize("name", ["weight", "start_step", "slices"])
def test_negative_settings_are_named(name):
    with pytest.raises(ValueError, match=name):
        AdversarialConfig(**{name: -1})


def test_previews_and_metrics_have_all_channels_in_file_units():
    """Channel 0 is 0 to 100 and channel 1 -1000 to 1000 in its files; the reconstruction is the mean of the posterior,
    decoded."""
    step = make_step(in_channels=2, out_channels=2)
    step.channels = ["PET", "CT"]
    image, fov = torch.rand(2, 8, 8, 8) * 2 - 1, torch.ones(1, 8, 8, 8, dtype=torch.bool)
    item = {"image": image, "fov": fov, "name": "a", "spacing": (1.0, 1.0, 3.0), "axes": ("R", "A", "S")}
    item["scale"] = ((0.0, 100.0), (-1000.0, 1000.0))
    made = step._reconstruct(image[None])[0].clamp(-1, 1)
    figure = step.preview([item, {**item, "name": "b"}])
    axes = np.array(figure.axes).reshape(4, 6)
    assert [panel.get_ylabel() for panel in axes[:, 0]] == [
        "a\nPET\n0 to 100", "a\nCT\n-1000 to 1000", "b\nPET\n0 to 100", "b\nCT\n-1000 to 1000",
    ]  # fmt: skip
    assert [panel.get_title().split()[-1] for panel in axes[0]] == ["real", "reconstructed"] * 3
    np.testing.assert_allclose(axes[0, 0].images[0].get_array(), (image[0, :, :, 4].T + 1) * 50, atol=1e-3)
    np.testing.assert_allclose(axes[1, 1].images[0].get_array(), made[1, :, :, 4].T * 1000, atol=1e-2)
    assert axes[0, 2].get_aspect() == 3.0
    metrics = step.validate(item, torch.Generator())
    errors = ((made - image) ** 2 / 4).mean((1, 2, 3))
    assert metrics["psnr/PET"] == pytest.approx(-10 * math.log10(errors[0]), abs=1e-4)
    assert metrics["psnr/CT"] == pytest.approx(-10 * math.log10(errors[1]), abs=1e-4)
    assert metrics["psnr"] == pytest.approx(-10 * math.log10(errors.mean()), abs=1e-4)
    assert metrics["l1"] == pytest.approx((metrics["l1/PET"] + metrics["l1/CT"]) / 2, rel=1e-4)
    assert set(make_step().validate({**item, "image": image[:1]}, torch.Generator())) == {"psnr", "l1"}
