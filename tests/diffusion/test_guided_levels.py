"""Guidance in an interval acts at the steps whose noise level lies in it, with every scheduler."""

import diffusers
import pytest
import torch

from diffusion import Conditions, denoise, fit_scheduler, make_scheduler
from diffusion.conditioning import ConditionSchema
from diffusion.objectives import DIFFUSION_SCHEDULERS, FLOW_SCHEDULERS

SCHEMA = ConditionSchema(classes=("sex",))
GIVEN = Conditions(classes=torch.zeros(1, 1, dtype=torch.long))
EVERY = [(name, "rectified_flow") for name in FLOW_SCHEDULERS] + [(name, "epsilon") for name in DIFFUSION_SCHEDULERS]


class Spy(torch.nn.Module):
    """Predicts zeros, and notes the timestep and the samples of each call."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[float, int]] = []

    def forward(self, sample, timestep, classes=None, return_dict=True):
        self.seen.append((float(timestep), len(sample)))
        return (torch.zeros_like(sample),)


@pytest.mark.parametrize(("solver", "objective"), EVERY)
def test_guidance_acts_where_the_noise_is_in_the_interval(solver, objective):
    """The level is that of the timestep, which the network is told: sigma of a flow, and the same share of noise in
    noise + signal for others. Steps outside are one call."""
    scheduler, spy, calls = fit_scheduler(getattr(diffusers, solver)(), objective), Spy(), []
    denoise(
        spy,
        torch.zeros(1, 1, 2, 2, 2),
        scheduler,
        GIVEN,
        schema=SCHEMA,
        guidance_scale=2.0,
        guidance_interval=(0.2, 0.62),
        num_inference_steps=9,
        generator=[torch.Generator().manual_seed(0)],
        count_calls=calls.append,
    )

    def level(timestep: float) -> float:
        if objective == "rectified_flow":
            return timestep / 1000
        alpha = float(make_scheduler(objective).alphas_cumprod[round(timestep)])
        ratio = ((1 - alpha) / alpha) ** 0.5
        return ratio / (1 + ratio)

    assert [samples for _, samples in spy.seen] == [1 + (0.2 < level(timestep) <= 0.62) for timestep, _ in spy.seen]
    assert {samples for _, samples in spy.seen} == {1, 2}
    assert calls == [sum(samples for _, samples in spy.seen)]


def test_an_edit_counts_the_levels_of_its_own_steps():
    spy = Spy()
    denoise(
        spy,
        torch.zeros(1, 1, 2, 2, 2),
        make_scheduler("rectified_flow", name="FlowMatchEulerDiscreteScheduler"),
        GIVEN,
        schema=SCHEMA,
        guidance_scale=2.0,
        guidance_interval=(0.0, 0.3),
        num_inference_steps=10,
        image=torch.zeros(1, 1, 2, 2, 2),
        strength=0.5,
    )
    assert [(round(timestep), samples) for timestep, samples in spy.seen] == [
        (500, 1),
        (400, 1),
        (300, 2),
        (200, 2),
        (100, 2),
    ]
