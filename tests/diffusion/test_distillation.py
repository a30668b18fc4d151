"""The flow map of a teacher: its targets against a map known in closed form, its student, and what it refuses."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion import Conditions, LatentUNet3D, denoise, fit_scheduler, make_scheduler, training_loss
from diffusion.denoise import Autoguidance
from diffusion.distillation import Teacher
from diffusion.objectives import FLOW_MAP, FLOW_SCHEDULERS, RECTIFIED_FLOW, TRAIN_STEPS
from training.build import initialize_from

MEAN, STD = 0.7, 0.4  # of the data, a Gaussian
SHAPE = (1, 4, 3, 5)


class GaussianFlow(nn.Module):
    """The flow from a Gaussian to noise, as a U-Net that knows no conditions."""

    mask_embedding = None

    def __init__(self, base: int | None = None):
        super().__init__()
        self.config = {"objective": RECTIFIED_FLOW}
        self.train_steps, self.base = TRAIN_STEPS, base
        self.condition_schema = LatentUNet3D().condition_schema

    def timestep_shift(self, sides) -> float:
        return 1.0 if self.base is None else math.sqrt(math.prod(sides) / self.base)

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        t = (timestep / TRAIN_STEPS).to(x).expand(len(x)).view(-1, 1, 1, 1, 1)
        spread = (1 - t) ** 2 * STD**2 + t**2
        return ((t - (1 - t) * STD**2) / spread * (x - (1 - t) * MEAN) - MEAN,)


def mapped(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Where the flow takes x from t to s: Gaussians keep their quantiles."""

    def spread(time):
        return ((1 - time) ** 2 * STD**2 + time**2).sqrt()

    return (1 - s) * MEAN + spread(s) / spread(t) * (x - (1 - t) * MEAN)


class ExactMap(nn.Module):
    """The student that has learned its teacher's map, but for a `fault`."""

    def __init__(self, fault: float = 0.0):
        super().__init__()
        self.fault = nn.Parameter(torch.tensor(fault))

    def forward(self, x: Tensor, timestep: Tensor, next_timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        t, s = (time.view(-1, 1, 1, 1, 1) / TRAIN_STEPS for time in (timestep, next_timestep))
        return ((x - mapped(x, t, s)) / (t - s) + self.fault,)


def teacher_of(unet: Any, **changes: Any) -> Teacher:
    options = {"scheduler": make_scheduler(RECTIFIED_FLOW), "steps": 8, "pairs": 7, **changes}
    return Teacher(unet, **options)


def batch(count: int = 3) -> tuple[Tensor, Conditions, Tensor, list[torch.Generator]]:
    """Latents of a Gaussian, no conditions, weights and generators."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    latents = MEAN + STD * torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(9))
    return latents, Conditions(), torch.ones(count, 1, *SHAPE[1:]), generators


@pytest.mark.parametrize("from_images", [0.0, 0.5])
def test_minimizer_is_the_true_map(from_images):
    teacher = teacher_of(GaussianFlow(), steps=400, from_images=from_images)
    student = ExactMap()
    loss = training_loss(student, FLOW_MAP, *batch(), teacher=teacher)
    loss.backward()
    assert loss < 1e-4  # what Euler leaves at 400 steps
    assert student.fault.grad is not None and abs(float(student.fault.grad)) < 5e-3
    for fault in (-0.1, 0.1):
        wrong = training_loss(ExactMap(fault), FLOW_MAP, *batch(), teacher=teacher)
        assert float(wrong.detach()) == pytest.approx(0.01, rel=0.2)


def test_steps_are_those_of_each_number_of_calls():
    teacher = teacher_of(GaussianFlow(), pairs=12)
    latents, conditions, weight, generators = batch()
    noisy, velocity, begins, ends = teacher.steps_of_map(latents, conditions, weight, generators)
    assert noisy.shape == velocity.shape == (36, *SHAPE)
    steps = list(zip(begins.tolist(), ends.tolist(), strict=True))
    known = {1: {(1000, 0)}, 2: {(1000, 500), (500, 0)}, 4: {(1000, 750), (750, 500), (500, 250), (250, 0)}}
    for wanted in known.values():  # 12 are spread evenly over the numbers of calls
        assert sum(step in wanted for step in steps) == 12
        assert {step for step in steps if step in wanted} == wanted


def test_samples_do_not_depend_on_their_batch():
    teacher = teacher_of(GaussianFlow(), from_images=0.5)
    latents, conditions, weight, generators = batch(4)
    together = teacher.steps_of_map(latents, conditions, weight, generators)
    for row in range(4):
        own = torch.Generator().manual_seed(row)
        alone = teacher.steps_of_map(latents[[row]], conditions, weight[[row]], [own])
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(one, all_of_them[row::4])


def test_padding_is_nothing_to_the_teacher():
    teacher = teacher_of(GaussianFlow(base=30), pairs=12)
    latents, conditions, weight, generators = batch(1)
    weight[..., 3:] = 0
    noisy, velocity, begins, _ = teacher.steps_of_map(latents * weight, conditions, weight, generators)
    assert not (noisy * (1 - weight)).any() and not (velocity * (1 - weight)).any()
    shift = math.sqrt(4 * 3 * 3 / 30)  # of the cells inside
    assert sorted({round(float(t)) for t in begins}) == sorted(
        round(1000 * shift * t / (1 + (shift - 1) * t)) for t in (0.25, 0.5, 0.75, 1)
    )


def conditioned(**changes: Any) -> LatentUNet3D:
    """A small U-Net of a mask, with random weights everywhere."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"channels": (8, 8), "blocks": (1, 1), "attention": (False, False), "num_labels": 3}
    unet = LatentUNet3D(
        1, 1, **{**options, "mask_width": 4, "mask_stride": 2, "condition_dropout": {"mask": 0.1}, **changes}
    )
    with torch.no_grad():
        for weight in unet.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    return unet.eval()


def test_trajectory_is_the_guided_sampling_of_the_teacher():
    unet = conditioned()
    scheduler = make_scheduler(RECTIFIED_FLOW, name="UniPCMultistepScheduler")
    weak = conditioned(channels=(8, 4), mask_width=2)
    teacher = Teacher(unet, scheduler, 4, 3.0, (0.3, 0.9), weak, 1.5, calls=[1, 2])
    latents, _, weight, _ = batch(2)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    conditions = Conditions(mask=torch.randint(0, 3, (2, *SHAPE[1:], 8)))
    states, levels = teacher.trajectories(latents, noise, conditions, weight, [0, 2])
    for row, start in ((0, {}), (1, {"image": latents[1:], "strength": 0.5})):
        own = conditions.map(lambda tensor, row=row: tensor[[row]])
        fitted = fit_scheduler(scheduler, RECTIFIED_FLOW)
        options = {"guidance_scale": 3.0, "schema": unet.condition_schema, "num_inference_steps": 4, **start}
        options |= {"guidance_interval": (0.3, 0.9), "autoguidance": Autoguidance(weak, own, 1.5)}
        sampled = denoise(unet, noise[[row]], fitted, own, **options)
        torch.testing.assert_close(states[-1, [row]], sampled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[0, 0], noise[0])
    torch.testing.assert_close(states[2, 1], (1 - levels[2, 1]) * latents[1] + levels[2, 1] * noise[1])


def test_weights_and_conditions_follow_their_samples():
    """The loss of a batch is the mean over its samples alone, whose masks and padding differ."""
    teacher = Teacher(conditioned(), make_scheduler(RECTIFIED_FLOW), steps=4, guidance=2.0, pairs=3)
    student = conditioned(objective=FLOW_MAP)
    latents, _, weight, _ = batch(2)
    weight[1, ..., 2:] = 0
    mask = torch.randint(0, 3, (2, *SHAPE[1:], 8), generator=torch.Generator().manual_seed(2))

    def loss(rows: list[int]) -> float:
        seeds = [torch.Generator().manual_seed(row) for row in rows]
        own = latents[rows] * weight[rows], Conditions(mask=mask[rows]), weight[rows]
        return float(training_loss(student, FLOW_MAP, *own, seeds, teacher=teacher).detach())

    assert loss([0, 1]) == pytest.approx((loss([0]) + loss([1])) / 2, rel=1e-4)


def test_student_is_its_teacher_at_first(tmp_path):
    teacher = conditioned()
    teacher.save_pretrained(tmp_path)
    student = conditioned(objective=FLOW_MAP)
    fresh = initialize_from(student, tmp_path, own="next_embedding")
    assert fresh == ["next_embedding.linear_1", "next_embedding.linear_2"]
    for layer in ("weight", "bias"):  # `conditioned` has moved them
        nn.init.zeros_(getattr(student.next_embedding.linear_2, layer))
    x, mask = torch.randn(2, *SHAPE), torch.randint(0, 3, (2, *SHAPE[1:], 8))
    velocity = teacher(x, 700, mask=mask).sample
    for after in (0, 350.0, torch.tensor([0.0, 600.0])):
        assert torch.equal(student(x, 700, mask=mask, next_timestep=after).sample, velocity)
    student(x, 700, mask=mask, next_timestep=0).sample.square().mean().backward()
    assert student.next_embedding.linear_2.weight.grad.any()  # it can leave zero


def test_gradient_checkpointing_changes_nothing():
    teacher = Teacher(conditioned(), make_scheduler(RECTIFIED_FLOW), steps=4, guidance=2.0, pairs=3)
    gradients = []
    for on in (False, True):
        student = conditioned(objective=FLOW_MAP)
        if on:
            student.enable_gradient_checkpointing()
        latents, _, weight, generators = batch(2)
        mask = torch.randint(0, 3, (2, *SHAPE[1:], 8), generator=torch.Generator().manual_seed(2))
        training_loss(student, FLOW_MAP, latents, Conditions(mask=mask), weight, generators, teacher=teacher).backward()
        gradients.append([weight.grad for weight in student.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert all(gradient.any() for gradient in gradients[0])


def test_new_student_starts_with_a_silent_second_time():
    student = LatentUNet3D(1, 1, channels=(8,), strides=(), blocks=(1,), attention=(False,), objective=FLOW_MAP)
    assert not student.next_embedding.linear_2.weight.any() and not student.next_embedding.linear_2.bias.any()
    assert student.next_embedding.linear_1.weight.any()


def test_denoising_says_where_each_step_ends():
    seen = []

    class Spy(ExactMap):
        takes_next_timestep = True

        def forward(self, x, timestep, next_timestep, return_dict=True):
            seen.append((float(timestep), float(next_timestep)))
            return super().forward(x, timestep.expand(len(x)), next_timestep.expand(len(x)))

    noise = torch.randn(2, *SHAPE)
    for calls in (1, 2, 4):
        sampled = denoise(
            Spy(), noise, fit_scheduler(make_scheduler(FLOW_MAP), FLOW_MAP), Conditions(), num_inference_steps=calls
        )
        torch.testing.assert_close(sampled, mapped(noise, torch.tensor(1.0), torch.tensor(0.0)))  # in any number
    assert seen[:3] == [(1000, 0), (1000, 500), (500, 0)] and seen[3:] == [
        (1000, 750),
        (750, 500),
        (500, 250),
        (250, 0),
    ]
    image = torch.randn(2, *SHAPE)
    scheduler = fit_scheduler(make_scheduler(FLOW_MAP), FLOW_MAP, shift=2.0)
    edited = denoise(Spy(), noise, scheduler, Conditions(), num_inference_steps=4, image=image, strength=0.5)
    level = torch.tensor(2 / 3)  # 0.5, shifted
    torch.testing.assert_close(edited, mapped((1 - level) * image + level * noise, level, torch.tensor(0.0)))


@pytest.mark.parametrize("name", FLOW_SCHEDULERS[1:])
def test_only_euler_samples_a_map(name):
    scheduler = make_scheduler(RECTIFIED_FLOW, name=name)
    with pytest.raises(ValueError, match=f"{name} cannot sample a model that predicts flow_map; use one of FlowMatchE"):
        fit_scheduler(scheduler, FLOW_MAP)


def test_scheduler_of_a_map_adds_no_noise():
    scheduler = type(make_scheduler(FLOW_MAP))(stochastic_sampling=True)
    with pytest.warns(UserWarning, match="stochastic_sampling=True does not fit this model; False is taken"):
        assert not fit_scheduler(scheduler, FLOW_MAP).config.stochastic_sampling


def test_second_time_belongs_to_maps():
    x, mask = torch.randn(1, *SHAPE), torch.zeros(1, *SHAPE[1:], 8, dtype=torch.long)
    with pytest.raises(ValueError, match="rectified_flow has one timestep; omit `next_timestep`"):
        conditioned()(x, 700, mask=mask, next_timestep=0)
    with pytest.raises(ValueError, match="pass `next_timestep`"):
        conditioned(objective=FLOW_MAP)(x, 700, mask=mask)


def test_refusals_of_a_teacher():
    flow = GaussianFlow()
    with pytest.raises(ValueError, match=r"8 steps of the teacher are no multiple of \[3\] calls"):
        teacher_of(flow, calls=[1, 3])
    with pytest.raises(ValueError, match="calls is empty"):
        teacher_of(flow, calls=[])
    with pytest.raises(ValueError, match=r"from_images 0.5: with calls \[1\] all steps begin at noise"):
        teacher_of(flow, calls=[1], from_images=0.5)
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler calls the teacher 2 times a step"):
        teacher_of(flow, scheduler=make_scheduler(RECTIFIED_FLOW, name="FlowMatchHeunDiscreteScheduler"))
    with pytest.raises(ValueError, match="adds noise"):
        teacher_of(flow, scheduler=type(make_scheduler(RECTIFIED_FLOW))(stochastic_sampling=True))
    with pytest.raises(ValueError, match="never trained without mask"):
        teacher_of(conditioned(condition_dropout=None), guidance=2.0)
    student = SimpleNamespace(config={"objective": FLOW_MAP})
    with pytest.raises(ValueError, match="the teacher predicts flow_map; a flow map has a teacher of rectified_flow"):
        teacher_of(student)
