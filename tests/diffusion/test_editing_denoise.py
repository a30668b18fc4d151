"""The denoising loop that begins from an image, and keeps some of it, with every scheduler."""

import diffusers
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from known_answer import KnowsTheAnswer
from tiny import seeded

from diffusion import Conditions, denoise, fit_scheduler, make_scheduler
from diffusion.denoise import steps_of
from diffusion.objectives import DIFFUSION_SCHEDULERS, FLOW_SCHEDULERS


def rounding(solver: str, objective: str, strength: float) -> float:
    """Some steps lie between the timesteps that are named: whole ones of flows' solvers, and the first of v, at an
    infinite ratio."""
    if objective == "rectified_flow":
        return 5e-3 if solver in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler") else 1e-5
    whole = solver in ("DDIMScheduler", "DDPMScheduler")
    return 1e-3 if objective == "v_prediction" and strength == 1 and not whole else 1e-5


FAMILIES = [(name, "rectified_flow") for name in FLOW_SCHEDULERS]
FAMILIES += [(name, objective) for name in DIFFUSION_SCHEDULERS for objective in ("v_prediction", "epsilon")]


@pytest.mark.parametrize(("solver", "objective"), FAMILIES)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_every_scheduler_keeps_the_image_outside_the_region(solver, objective, strength):
    """Of a model that knows the answer: it is reached inside, the image stays outside, and what the model sees outside
    is at every step the image at that step's noise, from the same noise."""
    scheduler = fit_scheduler(getattr(diffusers, solver)(), objective)
    draw = torch.Generator().manual_seed(0)
    answer, image, noise = (torch.randn(1, 2, 3, 4, 5, generator=draw, dtype=torch.float64) for _ in range(3))
    region = torch.zeros(1, 1, 3, 4, 5, dtype=torch.bool)
    region[..., :2, 1:, :3] = True
    model = KnowsTheAnswer(answer, objective)
    settings = {"num_inference_steps": 10, "generator": seeded(0), "image": image, "strength": strength}
    out = denoise(model, noise, scheduler, Conditions(), region=region, **settings)
    inside = region.expand_as(out)
    assert torch.equal(out[~inside], image[~inside])
    atol = rounding(solver, objective, strength)
    torch.testing.assert_close(out[inside], answer[inside], atol=atol, rtol=0)
    hidden = None  # the noise that is left inside, by the first call
    for timestep, seen in model.seen:
        if objective == "rectified_flow":
            signal, level = 1 - timestep / 1000, timestep / 1000
        else:
            a = float(model.alphas[round(timestep)].double())
            signal, level = a**0.5, (1 - a) ** 0.5
        expected = signal * image + level * noise
        torch.testing.assert_close(seen[~inside], expected[~inside], atol=atol, rtol=0)
        if hidden is None:
            begun = noise if strength == 1 else expected
            torch.testing.assert_close(seen[inside], begun[inside], atol=atol, rtol=0)
            hidden = (seen - signal * answer) / level
        elif solver != "DDPMScheduler":  # whose steps have noise of their own
            expected = signal * answer + level * hidden
            torch.testing.assert_close(seen[inside], expected[inside], atol=atol, rtol=0)
    calls = len(model.seen)
    assert calls == {True: 10, False: 5}[strength == 1] or isinstance(scheduler, FlowMatchHeunDiscreteScheduler)


def test_the_share_of_the_steps():
    assert [steps_of(s, 20) for s in (1.0, 0.99, 0.5, 0.35, 0.05)] == [20, 19, 10, 7, 1]
    assert steps_of(0.29, 100) == 29  # 28.999999999999996
    scheduler, image = make_scheduler("rectified_flow"), torch.zeros(1, 1, 2, 2, 2)
    model = KnowsTheAnswer(torch.zeros(1), "rectified_flow")
    denoise(
        model, torch.ones(1, 1, 2, 2, 2), scheduler, Conditions(), num_inference_steps=20, image=image, strength=0.25
    )
    assert [round(timestep) for timestep, _ in model.seen] == [250, 200, 150, 100, 50]
    torch.testing.assert_close(model.seen[0][1], torch.full((1, 1, 2, 2, 2), 0.25))
    heun = KnowsTheAnswer(torch.zeros(1), "rectified_flow")
    denoise(
        heun,
        image + 1,
        FlowMatchHeunDiscreteScheduler(),
        Conditions(),
        num_inference_steps=4,
        image=image,
        strength=0.5,
    )
    first, seen = heun.seen[0]
    torch.testing.assert_close(seen, torch.full_like(seen, first / 1000))
    assert len(heun.seen) == 3


def test_full_strength_without_a_region_ignores_the_image():
    """All of it is generated: from the noise itself, not from what is left of the image in the noisiest step."""
    scheduler = fit_scheduler(diffusers.DDIMScheduler(), "epsilon")
    answer, image, noise = (torch.randn(1, 2, 3, 4, 5, generator=seeded(seed)[0]) for seed in range(3))
    model = KnowsTheAnswer(answer, "epsilon")
    denoise(model, noise, scheduler, Conditions(), num_inference_steps=4, image=image, strength=1.0)
    torch.testing.assert_close(model.seen[0][1], noise, atol=1e-6, rtol=0)
