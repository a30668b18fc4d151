"""The shift of timesteps by the number of latent voxels: Eq. 23 by hand, in training, in every scheduler of flows."""

import math
import warnings

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from diffusion import Conditions, LatentUNet3D, denoise, fit_scheduler, make_scheduler, training_loss
from diffusion.denoise import set_timesteps
from diffusion.objectives import FLOW_SCHEDULERS, sample_timesteps, shift_of, shifted

FLOW, CPU = "rectified_flow", torch.device("cpu")


def test_the_shift_is_equation_23():
    assert shift_of((4, 4, 4), 16) == 2.0  # sqrt(64 / 16): all three sides count
    assert shift_of((2, 1, 2), 16) == 0.5 and shift_of((4, 4, 4), None) == shift_of((4, 4, 4), 64) == 1.0
    for t, expected in ((0.0, 0.0), (250.0, 400.0), (500.0, 2000 / 3), (1000.0, 1000.0)):  # 2 t / (1 + t)
        assert shifted(t, 2.0, 1000) == pytest.approx(expected, rel=1e-12)
    assert shifted(0.25, 2.0, 1) == pytest.approx(0.4, rel=1e-12)


def test_shifted_grids_are_equally_uncertain():
    """What Eq. 23 is derived from: a constant of n values is known up to t / (1 - t) / sqrt(n)."""
    t, n, m = 0.3, 27, 1000
    there = shifted(t, shift_of((10, 10, 10), n), 1)
    assert there / (1 - there) / math.sqrt(m) == pytest.approx(t / (1 - t) / math.sqrt(n), rel=1e-12)
    assert shifted(there, shift_of((3, 3, 3), m), 1) == pytest.approx(t, rel=1e-12)  # and back


def test_a_shift_of_one_changes_no_bit():
    times = 1000 * torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shifted(times, 1.0, 1000), times)
    assert torch.equal(shifted(times, torch.ones(10_000), 1000), times)


class Watched(torch.nn.Module):
    """Predicts zero, and keeps the timesteps."""

    def forward(self, noisy, timestep, return_dict=False):
        self.seen = timestep
        return (torch.zeros_like(noisy),)


def trained_on(weight: torch.Tensor, **how) -> torch.Tensor:
    """The timesteps that the loss trains on."""
    unet, generator = Watched(), torch.Generator().manual_seed(0)
    latents = torch.zeros(len(weight), 1, *weight.shape[2:])
    training_loss(unet, FLOW, latents, Conditions(), weight, generator, **how)
    return unet.seen


def test_training_shifts_the_density_of_t():
    """sigmoid(N(0, 1)) becomes sigmoid(N(log s, 1)), each sample by its own field of view."""
    weight = torch.ones(20_000, 1, 4, 2, 2)
    weight[::2, :, 1:] = 0  # 4 latent voxels instead of 16
    plain, moved = trained_on(weight), trained_on(weight, shift_voxels=4)
    assert torch.equal(plain, sample_timesteps(FLOW, 20_000, torch.Generator().manual_seed(0)))
    assert torch.equal(moved[::2], plain[::2])  # s = 1
    logits = torch.logit(moved[1::2].double() / 1000)
    assert logits.mean().item() == pytest.approx(math.log(2), abs=0.03)
    assert logits.std().item() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(moved[1::2], 2 * plain[1::2] / (1 + plain[1::2] / 1000))
    smaller = torch.logit(trained_on(weight, shift_voxels=64)[1::2].double() / 1000)
    assert smaller.mean().item() == pytest.approx(-math.log(2), abs=0.03)


def test_padding_of_a_batch_does_not_shift():
    """Two volumes of one size in batches of two shapes have the same timestep."""
    small = torch.ones(1, 1, 2, 2, 2)
    padded = torch.nn.functional.pad(small, (0, 1, 0, 3, 1, 0))
    assert torch.equal(trained_on(small, shift_voxels=1), trained_on(padded, shift_voxels=1))
    assert not torch.equal(trained_on(padded), trained_on(padded, shift_voxels=1))


def levels(name: str, steps: int, shift: float) -> torch.Tensor:
    """The noise levels of a scheduler, and the timesteps that it says, both from 0 to 1."""
    scheduler = fit_scheduler(make_scheduler(FLOW, name=name), FLOW, shift=shift)
    timesteps = set_timesteps(scheduler, steps, None, CPU)
    return torch.stack([scheduler.sigmas[: len(timesteps)].double(), timesteps.double() / 1000])


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_every_scheduler_of_flows_is_shifted(name):
    even = levels(name, 12, 1.0)
    for shift in (0.3, 2.0, 30.0):
        expected = shift * even / (1 + (shift - 1) * even)
        found = levels(name, 12, shift)
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(found[1], expected[0], atol=1.1e-3, rtol=0)  # some say whole timesteps
    assert torch.equal(levels(name, 12, 1.0), even)


def test_it_is_the_dynamic_shift_of_diffusers():
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    dynamic.set_timesteps(sigmas=[1 - i / 12 for i in range(12)], mu=math.log(2.5))
    torch.testing.assert_close(levels("FlowMatchEulerDiscreteScheduler", 12, 2.5)[0], dynamic.sigmas[:-1].double())


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_a_perfect_denoiser_recovers_its_latents(name):
    clean = torch.randn(1, 2, 3, 3, 3, generator=torch.Generator().manual_seed(1))

    class Knows(torch.nn.Module):
        def forward(self, noisy, timestep, return_dict=False):
            place = (scheduler.timesteps - timestep).abs().argmin()
            return ((noisy - clean) / scheduler.sigmas[place],)

    scheduler = fit_scheduler(make_scheduler(FLOW, name=name), FLOW, shift=5.0)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    out = denoise(Knows(), noise, scheduler, Conditions(), num_inference_steps=10)
    torch.testing.assert_close(out, clean, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        UniPCMultistepScheduler(flow_shift=3.0),
        UniPCMultistepScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config),
    ],
)
def test_levels_of_the_scheduler_win_over_the_models(scheduler):
    own = fit_scheduler(scheduler, FLOW)
    with pytest.warns(UserWarning, match=r"is taken for grids of all sizes, in place of .*shift_voxels.*1\.5 here"):
        kept = fit_scheduler(scheduler, FLOW, shift=1.5)
    assert dict(kept.config) == dict(own.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit_scheduler(scheduler, FLOW, shift=1.0)


def unet(**settings) -> LatentUNet3D:
    return LatentUNet3D(2, 2, channels=(8,), strides=(), blocks=(1,), attention=(False,), **settings)


def test_only_rectified_flow_is_shifted():
    for objective in ("epsilon", "v_prediction"):
        with pytest.raises(ValueError, match=f"shift_voxels 64: only rectified_flow.*{objective}.*omit it"):
            unet(objective=objective, shift_voxels=64)
    with pytest.raises(ValueError, match="shift_voxels.*from 1 to"):
        unet(shift_voxels=0)


def test_a_unet_keeps_its_shift(tmp_path):
    unet(shift_voxels=64).save_pretrained(tmp_path)
    loaded = LatentUNet3D.from_pretrained(tmp_path)
    assert loaded.config["shift_voxels"] == 64 and loaded.timestep_shift((8, 8, 4)) == 2.0
    assert unet().timestep_shift((8, 8, 4)) == 1.0
