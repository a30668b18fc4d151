"""The attacker's loss of models whose prediction is known: by hand, and of one that knows its training volumes."""

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline

from evaluation.metrics.memorization import loss_attack
from evaluation.studies.membership_losses import denoising_losses
from volumes import DataConfig, PhantomConfig, VolumeDataset, load_cases, pad_sample

COUNT = 6


def phantoms(first: int) -> VolumeDataset:
    config = DataConfig(phantom=PhantomConfig(count=COUNT, shape=(9, 10, 13), seed=first), validation_fraction=0)
    return VolumeDataset(load_cases(config), config)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(num_labels=0, labels={}, channels=["image"])


def latents_of(pipe, dataset: VolumeDataset, index: int) -> torch.Tensor:
    image = pad_sample(dataset[index], pipe.vae.stride)["image"][None]
    with torch.no_grad():
        return pipe.vae.encode(image, return_dict=False)[0].mode()


def predicting(pipe, monkeypatch, function) -> list[float]:
    """Let the U-Net predict `function(noisy, timestep)`; gives back the timesteps that it is asked at."""
    asked = []

    def forward(noisy, at, return_dict=True):
        asked.append(at.item())
        return (function(noisy, at),)

    monkeypatch.setattr(pipe.unet, "forward", forward)
    return asked


def test_predicting_zero_costs_the_size_of_the_target(pipe, monkeypatch):
    """A flow's target is noise less latents: two draws at each of two times, the same for every volume."""
    asked, dataset = predicting(pipe, monkeypatch, lambda noisy, at: torch.zeros_like(noisy)), phantoms(0)
    losses = denoising_losses(pipe, dataset, times=(300.0, 700.0), draws=2, seed=5)
    assert asked == [300, 300, 700, 700] * COUNT
    for index in range(COUNT):
        latents, generator = latents_of(pipe, dataset, index), torch.Generator().manual_seed(5)
        draws = [torch.randn(latents.shape, generator=generator) for _ in range(4)]
        expected = np.mean([((noise - latents) ** 2).mean().item() for noise in draws])
        assert losses[index] == pytest.approx(expected, rel=1e-5)


def test_times_are_thousandths_of_the_schedule(monkeypatch):
    pipe = tiny_pipeline(num_labels=0, labels={}, channels=["image"], objective="v_prediction")
    pipe.unet.register_to_config(train_steps=500)
    asked = predicting(pipe, monkeypatch, lambda noisy, at: torch.zeros_like(noisy))
    denoising_losses(pipe, phantoms(0), times=(100.0, 701.0), draws=1)
    assert asked == [50, 350] * COUNT


def test_times_are_shifted_as_in_training(monkeypatch):
    """Volumes of 12 x 12 x 16 voxels are 3 x 3 x 4 latent voxels: 36, and sqrt(36 / 9) = 2."""
    pipe = tiny_pipeline(num_labels=0, labels={}, channels=["image"])
    pipe.unet.register_to_config(shift_voxels=9)
    asked = predicting(pipe, monkeypatch, lambda noisy, at: torch.zeros_like(noisy))
    denoising_losses(pipe, phantoms(0), times=(250.0, 500.0), draws=1)
    assert asked == pytest.approx([400, 2000 / 3] * COUNT, rel=1e-5)


def test_a_model_that_memorized_reveals_its_training_volumes(pipe, monkeypatch):
    """It takes the nearest volume that it knows for what is in the noise: x_t = (1 - t) x + t n, and predicts n - x."""
    training, unseen = phantoms(0), phantoms(100)
    known = torch.cat([latents_of(pipe, training, index) for index in range(COUNT)])

    def remembered(noisy, at):
        t = at.item() / 1000
        nearest = ((noisy - (1 - t) * known) ** 2).flatten(1).sum(1).argmin()
        return (noisy - known[nearest]) / t

    predicting(pipe, monkeypatch, remembered)
    losses = [denoising_losses(pipe, dataset, times=(20.0, 50.0), draws=1) for dataset in (training, unseen)]
    assert losses[0] == pytest.approx(np.zeros(COUNT), abs=1e-6) and losses[1].min() > 1e-3
    found = loss_attack(*losses, range(COUNT), range(COUNT))
    assert found["auc"] == 1 and found["true_positives"] == {"0.01": 1, "0.1": 1}
