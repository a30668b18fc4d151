"""Objectives: what is predicted inverts to what was noised; schedulers that fit, are converted, or are refused."""

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffusion import OBJECTIVES, Conditions, denoise, fit_scheduler, make_scheduler, training_loss
from diffusion.objectives import noisy_and_target, sample_timesteps

FLOW, V, EPS, _ = OBJECTIVES


def test_rectified_flow_is_a_straight_line():
    x, noise = torch.randn(3, 4, 2, 2, 2), torch.randn(3, 4, 2, 2, 2)
    t = torch.tensor([0.0, 250.0, 1000.0])
    noisy, target = noisy_and_target(FLOW, x, noise, t)
    assert torch.equal(noisy[0], x[0]) and torch.allclose(noisy[2], noise[2])
    sigma = (t / 1000).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(noisy - sigma * target, x)
    torch.testing.assert_close(noisy + (1 - sigma) * target, noise)


@pytest.mark.parametrize("objective", [V, EPS])
def test_v_and_eps_invert_to_the_clean_latents(objective):
    x, noise, t = (
        torch.randn(2, 4, 2, 2, 2, dtype=torch.float64),
        torch.randn(2, 4, 2, 2, 2, dtype=torch.float64),
        torch.tensor([3, 700]),
    )
    noisy, target = noisy_and_target(objective, x, noise, t)
    a = make_scheduler(objective).alphas_cumprod[t].double().view(-1, 1, 1, 1, 1)
    clean = (
        a.sqrt() * noisy - (1 - a).sqrt() * target if objective == V else (noisy - (1 - a).sqrt() * target) / a.sqrt()
    )
    torch.testing.assert_close(clean, x, atol=1e-5, rtol=1e-4)


def test_timesteps_are_logit_normal_for_flow_else_uniform():
    """Uniform for diffusion."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.logit(sample_timesteps(FLOW, 20_000, generator).double() / 1000)
    assert logits.mean().item() == pytest.approx(0, abs=0.03) and logits.std().item() == pytest.approx(1, abs=0.03)
    steps = sample_timesteps(EPS, 20_000, generator)
    assert steps.min() == 0 and steps.max() == 999 and steps.float().mean().item() == pytest.approx(499.5, abs=10)


def test_schedulers_that_fit_the_objective_are_copied_unchanged():
    """What is handed out is a copy: no step of it moves the one that was given, whose calls may run at the same
    time."""
    given = [(make_scheduler(objective), objective) for objective in OBJECTIVES]
    given += [(one, FLOW) for one in (FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchHeunDiscreteScheduler())]
    for scheduler, objective in given:
        fitted = fit_scheduler(scheduler, objective)
        assert type(fitted) is type(scheduler) and dict(fitted.config) == dict(scheduler.config)
        before = scheduler.timesteps
        fitted.set_timesteps(3)
        assert fitted is not scheduler and scheduler.timesteps is before and len(fitted.timesteps) != len(before)


def test_the_silent_conversion_to_eps_is_undone():
    """`from_config` of a flow-matching config yields an eps solver without a word: the trap that `fit_scheduler` is
    for."""
    for solver in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        trapped = solver.from_config(FlowMatchEulerDiscreteScheduler().config)
        assert trapped.config.prediction_type == "epsilon"
        fitted = fit_scheduler(trapped, FLOW)
        assert (
            isinstance(fitted, solver)
            and fitted.config.prediction_type == "flow_prediction"
            and fitted.config.use_flow_sigmas
        )


def test_diffusion_schedulers_take_on_the_models_schedule():
    for objective in (V, EPS):
        fitted = fit_scheduler(
            DDIMScheduler(beta_schedule="linear", prediction_type="sample", clip_sample=True), objective
        )
        trained = make_scheduler(objective)
        assert fitted.config.prediction_type == objective and fitted.config.clip_sample is False
        torch.testing.assert_close(fitted.alphas_cumprod, trained.alphas_cumprod)
    assert fit_scheduler(DDPMScheduler(), EPS).config.beta_schedule == "squaredcos_cap_v2"


@pytest.mark.parametrize(
    ("scheduler", "objective"),
    [
        (DDIMScheduler(), FLOW),
        (FlowMatchEulerDiscreteScheduler(), V),
        (PNDMScheduler(), EPS),  # diverges with its defaults
        (DDIMInverseScheduler(), EPS),  # from data to noise
        (DEISMultistepScheduler(), FLOW),  # stops short of the end
        (DDIMScheduler(num_train_timesteps=250), EPS),
    ],
)
def test_schedulers_of_another_objective_are_refused(scheduler, objective):
    """The error names the remedy."""
    with pytest.raises(ValueError, match=f"{type(scheduler).__name__}.*make_scheduler"):
        fit_scheduler(scheduler, objective)


def test_euler_discrete_is_fit_for_eps():
    assert fit_scheduler(EulerDiscreteScheduler(), EPS).config.beta_schedule == "squaredcos_cap_v2"


class AlmostRight(torch.nn.Module):
    """The best prediction for latents of N(0, 1), eps = sqrt(1 - a) x_t, v = 0, but for an error of 0.01."""

    def __init__(self, objective):
        super().__init__()
        self.objective, self.alphas = objective, make_scheduler(objective).alphas_cumprod
        self.generator = torch.Generator().manual_seed(2)

    def forward(self, sample, timestep, return_dict=True):
        best = (1 - self.alphas[timestep.long()]).sqrt() * sample if self.objective == EPS else 0.0 * sample
        return (best + 0.01 * torch.randn(sample.shape, generator=self.generator),)


@pytest.mark.parametrize("objective", [V, EPS])
@pytest.mark.parametrize("solver", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_an_error_of_the_model_does_not_grow_while_sampling(solver, objective):
    """Latents of unit variance come back; from pure noise, eps would give them a standard deviation of 8 to 15."""
    noise = torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    out = denoise(
        AlmostRight(objective), noise, fit_scheduler(solver(), objective), Conditions(), num_inference_steps=20
    )
    assert out.std().item() == pytest.approx(1, abs=0.06)


class Perfect(torch.nn.Module):
    """A denoiser that knows the answer for zero latents: the velocity from 0 to the noise is noisy / sigma."""

    def forward(self, sample, timestep, mask=None, return_dict=True):
        return (sample / (timestep / 1000).view(-1, 1, 1, 1, 1),)


def test_a_perfect_denoiser_has_no_loss_and_padding_is_ignored():
    weight = torch.ones(4, 1, 3, 3, 3)
    weight[:, :, 2] = 0
    latents = torch.zeros(4, 2, 3, 3, 3)
    latents[:, :, 2] = 100.0  # whatever lies in the padding
    loss = training_loss(Perfect(), FLOW, latents, Conditions(), weight, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(0, abs=1e-8)


def test_volumes_count_equally_whatever_their_padding():
    class Zero(torch.nn.Module):
        def forward(self, sample, timestep, return_dict=True):
            return (torch.zeros_like(sample),)

    weight = torch.ones(2, 1, 4, 4, 4)
    weight[0, :, 1:] = 0
    latents = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))

    def loss(chosen: list[int]):
        draws = [torch.Generator().manual_seed(i) for i in chosen]
        return training_loss(Zero(), FLOW, latents[chosen], Conditions(), weight[chosen], draws)

    torch.testing.assert_close(loss([0, 1]), (loss([0]) + loss([1])) / 2)


def test_the_loss_of_predicting_nothing_is_the_targets_variance():
    class Zero(torch.nn.Module):
        def forward(self, sample, timestep, mask=None, return_dict=True):
            return (torch.zeros_like(sample),)

    latents = torch.randn(8, 4, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    loss = training_loss(
        Zero(), FLOW, latents, Conditions(), torch.ones(8, 1, 8, 8, 8), torch.Generator().manual_seed(0)
    )
    assert loss.item() == pytest.approx(2.0, rel=0.03)  # variance of noise plus variance of latents
