"""The one denoising loop, against denoisers whose answer is known."""

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchHeunDiscreteScheduler
from known_answer import KnowsTheAnswer

from diffusion import Conditions, denoise, fit_scheduler, make_scheduler
from diffusion.denoise import StepChange
from diffusion.objectives import DIFFUSION_SCHEDULERS, FLOW_SCHEDULERS

SHAPE = (2, 4, 3, 4, 5)


def clean() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def recovered(solver: str, objective: str, steps: int) -> torch.Tensor:
    """Latents denoised by a model that knows the answer, with a scheduler of diffusers by name. What the model sees on
    the way is the answer and one noise, mixed as its timestep says: a last step that puts all right would hide the
    others' faults."""
    scheduler, model = fit_scheduler(getattr(diffusers, solver)(), objective), KnowsTheAnswer(clean(), objective)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = [torch.Generator().manual_seed(i) for i in range(2)]
    out = denoise(model, noise, scheduler, Conditions(), num_inference_steps=steps, generator=rows)
    torch.testing.assert_close(model.seen[0][1], noise, atol=1e-6, rtol=0)  # it begins with the noise that is given
    signal, level = model.shares(model.seen[0][0])
    hidden = (noise - signal * model.x) / level
    for timestep, seen in model.seen[1:]:
        signal, level = model.shares(timestep)
        if solver == "DDPMScheduler":  # each step has noise of its own, as strong
            assert ((seen - signal * model.x) / level).std().item() == pytest.approx(1, abs=0.3), timestep
        else:
            torch.testing.assert_close(
                seen, signal * model.x + level * hidden, atol=rounding(solver, objective), rtol=0
            )
    return out


def rounding(solver: str, objective: str) -> float:
    """Some steps lie between the timesteps that are named: v's from an infinite ratio of 4096."""
    if objective == "rectified_flow":
        return 1e-5
    return 1.5e-3 if objective == "v_prediction" and solver not in ("DDIMScheduler", "DDPMScheduler") else 1e-5


@pytest.mark.parametrize("solver", FLOW_SCHEDULERS)
def test_every_flow_scheduler_recovers_x0(solver):
    out = recovered(solver, "rectified_flow", 20)
    torch.testing.assert_close(out, clean(), atol=rounding(solver, "rectified_flow"), rtol=0)


@pytest.mark.parametrize("steps", [1, 3, 8, 37])
@pytest.mark.parametrize("solver", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_solvers_of_flows_leave_no_noise(solver, steps):
    """diffusers names whole timesteps, by which a perfect denoiser left 0.0015 of the noise."""
    torch.testing.assert_close(recovered(solver, "rectified_flow", steps), clean(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 4])
def test_euler_integrates_a_perfect_flow_exactly(steps):
    torch.testing.assert_close(
        recovered("FlowMatchEulerDiscreteScheduler", "rectified_flow", steps), clean(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("objective", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("solver", DIFFUSION_SCHEDULERS)
def test_every_diffusion_scheduler_recovers_x0(solver, objective):
    try:
        out = recovered(solver, objective, 20)
    except ValueError as refused:
        pytest.fail(f"{solver} is listed but refused: {refused}")
    torch.testing.assert_close(out, clean(), atol=1e-5, rtol=0)


def test_euler_follows_a_known_ordinary_differential_equation():
    """dx/dsigma = x from sigma 1 to 0 multiplies by (1 - 1/N) a step, and tends to 1/e."""

    class Growth(torch.nn.Module):
        def forward(self, sample, timestep, return_dict=True):
            return (sample,)

    noise = torch.ones(1, 1, 2, 2, 2)
    for steps in (5, 50):
        out = denoise(Growth(), noise, make_scheduler("rectified_flow"), Conditions(), num_inference_steps=steps)
        torch.testing.assert_close(out, noise * (1 - 1 / steps) ** steps)


def test_sigmas_are_visited_as_given():
    visited = []

    class Spy(torch.nn.Module):
        def forward(self, sample, timestep, return_dict=True):
            visited.append(round(float(timestep)))
            return (torch.zeros_like(sample),)

    denoise(Spy(), torch.zeros(1, 1, 2, 2, 2), make_scheduler("rectified_flow"), Conditions(), sigmas=[1.0, 0.7, 0.2])
    denoise(Spy(), torch.zeros(1, 1, 2, 2, 2), make_scheduler("rectified_flow"), Conditions(), num_inference_steps=4)
    assert visited == [1000, 700, 200, 1000, 750, 500, 250]
    unipc = make_scheduler("rectified_flow", name="UniPCMultistepScheduler")
    denoise(Spy(), torch.zeros(1, 1, 2, 2, 2), unipc, Conditions(), sigmas=[1.0, 0.7, 0.2])
    assert visited[7:] == [1000, 700, 200]
    model, noise = KnowsTheAnswer(clean(), "rectified_flow"), torch.ones(SHAPE, dtype=torch.float64)
    out = denoise(model, noise, unipc, Conditions(), sigmas=[1.0, 0.7, 0.2])
    torch.testing.assert_close(out, clean(), atol=2e-6, rtol=0)
    shifted = fit_scheduler(unipc, "rectified_flow", shift=2.0)
    with pytest.raises(ValueError, match="UniPCMultistepScheduler's flow_shift would change them"):
        denoise(Spy(), torch.zeros(1, 1, 2, 2, 2), shifted, Conditions(), sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="DDIMScheduler does not take sigmas"):
        denoise(Spy(), torch.zeros(1, 1, 2, 2, 2), make_scheduler("epsilon"), Conditions(), sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="at least 1"):
        denoise(Spy(), torch.zeros(1, 1, 2, 2, 2), make_scheduler("epsilon"), Conditions(), num_inference_steps=0)


def test_each_sample_has_its_own_generator():
    """A stochastic scheduler draws each row's noise from that row's generator: a batch of two is two batches of one."""
    model, noise = (
        KnowsTheAnswer(clean()[:1].float(), "epsilon"),
        torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)),
    )

    def run(rows, seeds):
        scheduler = fit_scheduler(DDPMScheduler(timestep_spacing="trailing"), "epsilon")
        stop_early = []

        def callback(step, timestep, latents):
            stop_early.append(latents)

        denoise(
            model,
            rows,
            scheduler,
            Conditions(),
            num_inference_steps=6,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            callback=callback,
        )
        return stop_early[2]  # half way, where the noise still shows

    together = run(noise, [5, 6])
    torch.testing.assert_close(together, torch.cat([run(noise[:1], [5]), run(noise[1:], [6])]))
    assert not torch.allclose(together[:1], run(noise[:1], [7]))


def test_the_callback_can_replace_latents():
    class Still(torch.nn.Module):
        def forward(self, sample, timestep, return_dict=True):
            return (torch.zeros_like(sample),)

    seen = []

    def callback(step, timestep, latents):
        seen.append(step)
        return StepChange(latents + 1)

    out = denoise(
        Still(),
        torch.zeros(1, 1, 2, 2, 2),
        make_scheduler("rectified_flow"),
        Conditions(),
        num_inference_steps=3,
        callback=callback,
    )
    assert seen == [0, 1, 2] and torch.equal(out, torch.full_like(out, 3.0))


def test_heun_runs_with_its_own_step_count():
    noise = torch.randn(1, 4, 3, 3, 3, dtype=torch.float64)
    out = denoise(
        KnowsTheAnswer(torch.zeros(1, 4, 3, 3, 3, dtype=torch.float64), "rectified_flow"),
        noise,
        FlowMatchHeunDiscreteScheduler(),
        Conditions(),
        num_inference_steps=10,
    )
    assert out.abs().max() < 1e-5 * noise.abs().max()
