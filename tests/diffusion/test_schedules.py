"""The seeds' cosine schedules against the published formula, and samplers that visit all their steps."""

import itertools
import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from diffusion import Conditions, LatentUNet3D, denoise, fit_scheduler, make_scheduler, training_loss
from diffusion.denoise import set_timesteps
from diffusion.objectives import noisy_and_target, sample_timesteps

EPS = "epsilon"


def published(steps: int) -> tuple[list[float], list[float]]:
    """alpha_bar and beta of steps 1 to T (Nichol & Dhariwal 2021, Eq. 17, s = 0.008): alpha_bar(t) = f(t) / f(0), f(t)
    = cos^2((t/T + s) / (1 + s) pi/2), beta(t) = min(1 - alpha_bar(t) / alpha_bar(t - 1), 0.999)."""

    def f(t: int) -> float:
        return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    alpha_bar = [f(t) / f(0) for t in range(steps + 1)]
    return alpha_bar[1:], [min(1 - b / a, 0.999) for a, b in itertools.pairwise(alpha_bar)]


@pytest.mark.parametrize("name", [None, "DDPMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("steps", [250, 300, 1000])  # Med-DDPM, Medical Diffusion, ours
def test_the_cosine_schedule_is_the_published_one(steps, name):
    scheduler = make_scheduler(EPS, steps, name=name)
    alpha_bar, betas = published(steps)
    torch.testing.assert_close(scheduler.betas, torch.tensor(betas), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(scheduler.alphas_cumprod[:-1], torch.tensor(alpha_bar[:-1]), rtol=1e-3, atol=1e-8)
    assert scheduler.betas[-1] == pytest.approx(0.999) and betas.count(0.999) == 1  # the clip acts at the end alone


def test_training_uses_the_same_steps():
    """x_t = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) n, and every step occurs."""
    steps, (alpha_bar, _) = 250, published(250)
    x, noise = torch.full((3, 1, 2, 2, 2), 0.7), torch.full((3, 1, 2, 2, 2), -0.4)
    noisy, target = noisy_and_target(EPS, x, noise, torch.tensor([0, 124, 248]), steps)
    expected = [0.7 * math.sqrt(alpha_bar[t]) - 0.4 * math.sqrt(1 - alpha_bar[t]) for t in (0, 124, 248)]
    torch.testing.assert_close(noisy[:, 0, 0, 0, 0], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert torch.equal(target, noise)
    drawn = sample_timesteps(EPS, 20_000, torch.Generator().manual_seed(0), steps)
    assert drawn.unique().tolist() == list(range(250))


class Memory(torch.nn.Module):
    """Knows x0 and is wrong by a tenth of a standard deviation everywhere."""

    def __init__(self, x0: torch.Tensor, steps: int):
        super().__init__()
        self.x0, self.alphas = x0, make_scheduler(EPS, steps).alphas_cumprod

    def forward(self, sample, timestep, return_dict=True):
        a = self.alphas[int(timestep)]
        return ((sample - a.sqrt() * self.x0) / (1 - a).sqrt() + 0.1,)


@pytest.mark.parametrize(("bound", "first"), [(None, 3.2), (2.5, 0.0)])
def test_a_bound_keeps_all_steps_of_ddpm_on_course(bound, first):
    """At the last step beta is 0.999: without a bound an error of 0.1 of the noise is multiplied by 1 / sqrt(1 -
    0.999)."""
    x0, seen = torch.linspace(-2, 2, 64).view(1, 1, 4, 4, 4), []
    out = denoise(
        Memory(x0, 250),
        torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)),
        make_scheduler(EPS, 250, name="DDPMScheduler", bound=bound),
        Conditions(),
        num_inference_steps=250,
        generator=torch.Generator().manual_seed(1),
        callback=lambda step, timestep, latents: seen.append(latents.mean().item()),
    )
    assert len(seen) == 250 and abs(seen[0]) == pytest.approx(first, abs=0.5)  # the step's own noise: 1 / sqrt(64)
    assert (out - x0).abs().max() < 0.5


def test_a_bound_stays_and_the_range_of_images_does_not():
    kept = make_scheduler(EPS, 300, name="DDPMScheduler", bound=3.4)
    assert dict(fit_scheduler(kept, EPS, 300).config) == dict(kept.config)
    assert make_scheduler(EPS, 300, bound=3.4).config["clip_sample_range"] == 3.4  # DDIM clips as well
    of_images = DDIMScheduler(num_train_timesteps=300, clip_sample=True)
    assert not fit_scheduler(of_images, EPS, 300).config["clip_sample"]
    assert not make_scheduler(EPS, bound=3.4, name="EulerDiscreteScheduler").config["clip_sample"]  # it cannot


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="counts 1000 training steps, the model was trained with 250"):
        fit_scheduler(make_scheduler(EPS), EPS, 250)
    with pytest.raises(ValueError, match="'PNDMScheduler' does not fit epsilon"):
        make_scheduler(EPS, name="PNDMScheduler")
    with pytest.raises(ValueError, match="'DDPMScheduler' does not fit rectified_flow"):
        make_scheduler("rectified_flow", name="DDPMScheduler")
    with pytest.raises(ValueError, match="continuous; omit it"):
        LatentUNet3D(channels=(8, 8), train_steps=250)
    with pytest.raises(ValueError, match="train_steps.*from 2 to"):
        LatentUNet3D(channels=(8, 8), objective=EPS, train_steps=1)


@pytest.mark.parametrize(
    ("name", "steps", "asked", "remedy"),
    [
        ("DDPMScheduler", 300, 200, "use 150 or 270"),  # one training step each: it would begin at 199
        (None, 250, 130, "use 125 or 225"),
        ("DDPMScheduler", 250, 300, "use 250$"),
        ("DPMSolverMultistepScheduler", 250, 250, "use 249$"),  # diffusers gives 0, 0, 0, ...
    ],
)
def test_steps_that_leave_out_the_noise_are_refused(name, steps, asked, remedy):
    scheduler = make_scheduler(EPS, steps, name=name)
    with pytest.raises(ValueError, match=remedy):
        set_timesteps(scheduler, asked, None, torch.device("cpu"))
    for fitting in (5, 20, int(remedy.split()[1].rstrip("$"))):
        first = set_timesteps(scheduler, fitting, None, torch.device("cpu"))[0].item()
        assert first >= 0.9 * steps * (1 - 1 / fitting) - 1


def test_named_flow_schedulers_speak_flow():
    scheduler = make_scheduler("rectified_flow", name="DPMSolverMultistepScheduler")
    assert scheduler.config["prediction_type"] == "flow_prediction"


def test_the_absolute_error():
    """A model that predicts nothing is wrong by the noise: E n^2 = 1, E |n| = sqrt(2 / pi)."""

    class Zero(torch.nn.Module):
        def forward(self, sample, timestep, return_dict=True):
            return (torch.zeros_like(sample),)

    latents, weight = torch.zeros(8, 4, 8, 8, 8), torch.ones(8, 1, 8, 8, 8)
    for absolute, expected in ((False, 1.0), (True, math.sqrt(2 / math.pi))):
        generator = torch.Generator().manual_seed(0)
        loss = training_loss(Zero(), EPS, latents, Conditions(), weight, generator, train_steps=300, absolute=absolute)
        assert loss.item() == pytest.approx(expected, rel=0.02)  # 16,384 draws: 1 % is the standard error
