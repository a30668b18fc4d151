"""The training step in numbers: optimizer, clipping, averages, noise, and which weights are validated and saved."""

import contextlib
import itertools
import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from line import LineStep, line_config, line_loop
from planted_volumes import plant
from safetensors.torch import load_file
from short_runs import run
from torch import Tensor, nn
from vae_steps import batch, make_step
from vae_steps import generators as two_generators

import train_ldm
import train_vae
from autoencoder import VQGAN3D, AutoencoderKL3D, SpaceToDepth3D
from autoencoder.losses.reconstruction import cells_inside
from diffusion import Conditions, LatentUNet3D, make_scheduler
from training import (
    AdversarialConfig,
    Learner,
    MovingAverage,
    OptimizerConfig,
    derive_seed,
    ldm_step,
    learning_rate,
)
from training.engine import precision
from training.engine.loss_spikes import SpikeWatch, StandstillWatch
from training.engine.muon import Muon
from training.engine.tracking import Progress
from training.held_out import EncodedVolumes
from training.ldm_step import LdmTrainingStep
from training.splits import PaddedVolumes, digests, load_split
from training.vae import measure_latents
from volumes import DataConfig, PhantomConfig, VolumeDataset, load_cases

VALIDATION, TRAINING = 1 << 32, 1 << 33  # what keeps their seeds apart (training/engine/)


def learner_of(network: nn.Module, **changes: Any) -> Learner:
    """A learner that is prepared on the CPU, of AdamW alone and without warm-up unless `changes` say so."""
    settings = {"algorithm": "adamw", "warmup_steps": 0, "final_lr_ratio": 1.0} | changes
    ema_decay, max_steps = settings.pop("ema_decay", 0.0), settings.pop("max_steps", 100)
    learner = Learner("line", network, OptimizerConfig(**settings), ema_decay=ema_decay, max_steps=max_steps)
    learner.prepare(Accelerator(cpu=True))
    return learner


def pull(learner: Learner, *gradients: Tensor) -> None:
    """Give the parameters these gradients."""
    for parameter, gradient in zip(learner.network.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()


def two_weights() -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([[3.0]]))])


# the optimizer


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(1.0, [3 / 13, 4 / 13, 12 / 13]), (6.5, [1.5, 2.0, 6.0]), (13.5, [3.0, 4.0, 12.0]), (0.0, [3.0, 4.0, 12.0])],
)
def test_gradients_are_clipped_to_their_norm_over_all_weights(limit, expected):
    """(3, 4) and 12 are 13 long together. Their directions stay; the norm before clipping is told."""
    learner = learner_of(two_weights(), max_grad_norm=limit)
    seen, step = [], learner.optimizer.step

    def watched(*arguments):
        seen.extend(parameter.grad.clone() for parameter in learner.network.parameters())
        return step(*arguments)

    learner.optimizer.step = watched
    pull(learner, torch.tensor([3.0, 4.0]), torch.tensor([[12.0]]))
    taken, norm = learner.update(0)
    assert taken and norm.item() == pytest.approx(13)
    assert torch.cat([one.flatten() for one in seen]).tolist() == pytest.approx(expected, rel=1e-5)
    assert all(parameter.grad is None for parameter in learner.network.parameters())


def test_a_gradient_that_is_not_finite_changes_nothing():
    """Neither the weights nor their average."""
    learner = learner_of(two_weights(), ema_decay=0.5)
    before = [p.clone() for p in (*learner.network.parameters(), *learner.average.parameters())]
    for bad in (math.nan, math.inf):
        pull(learner, torch.tensor([3.0, bad]), torch.tensor([[12.0]]))
        assert not learner.update(0)[0] and learner.updates == 0
        after = [*learner.network.parameters(), *learner.average.parameters()]
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        assert all(parameter.grad is None for parameter in learner.network.parameters())


def test_weights_move_by_rate_and_decay_but_biases_do_not_decay():
    """AdamW's first step is the sign of the gradient times the rate, apart from eps; matrices decay by rate times
    decay."""
    learner = learner_of(
        two_weights(), learning_rate=0.1, warmup_steps=4, weight_decay=0.5, max_grad_norm=0.0, betas=(0.8, 0.9),
        eps=1e-3
    )  # fmt: skip
    pull(learner, torch.tensor([3.0, -4e-3]), torch.tensor([[12.0]]))
    learner.update(1)  # the second of four: half of the rate
    bias, weight = learner.network.parameters()
    signs = [3 / 3.001, -4e-3 / 5e-3]
    assert bias.tolist() == pytest.approx([1 - 0.05 * signs[0], 2 - 0.05 * signs[1]], rel=1e-5)
    assert weight.item() == pytest.approx(3 * (1 - 0.05 * 0.5) - 0.05 * 12 / 12.001, rel=1e-5)
    pull(learner, torch.tensor([1.0, 1.0]), torch.tensor([[-6.0]]))
    learner.update(2)
    first = (0.8 * 0.2 * 12 + 0.2 * -6) / (1 - 0.8**2)
    second = (0.9 * 0.1 * 144 + 0.1 * 36) / (1 - 0.9**2)
    moved = 3 * (1 - 0.05 * 0.5) - 0.05 * 12 / 12.001
    expected = moved * (1 - 0.075 * 0.5) - 0.075 * first / (math.sqrt(second) + 1e-3)
    assert weight.item() == pytest.approx(expected, rel=1e-5)


def test_the_learning_rate_falls_as_a_cosine():
    """From 2 after 10 steps of warm-up to a tenth of that at step 50: a quarter and three quarters of the way down."""
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, final_lr_ratio=0.1)
    expected = [0.2 + 0.9 * (1 + math.cos(math.pi * part)) for part in (0.25, 0.75, 1.0, 1.0)]
    assert [learning_rate(step, 50, config) for step in (20, 40, 50, 60)] == pytest.approx(expected)
    assert [learning_rate(step, 50, config) for step in (0, 8, 9, 10)] == pytest.approx([0.2, 1.8, 2.0, 2.0])


def test_a_muon_step_by_hand():
    """m = mu m + g; the direction of g + mu m, made semi-orthogonal, times 0.4 sqrt(max(rows, columns)) and the
    rate."""
    torch.manual_seed(0)
    conv = nn.Conv3d(9, 12, 3, bias=False)
    rate, decay, momentum = 0.02, 0.3, 0.7
    optimizer = Muon([{"params": [conv.weight], "muon": True}], lr=rate, betas=(momentum, 0.99), weight_decay=decay)
    u, _, v = torch.linalg.svd(torch.randn(12, 9 * 27, dtype=torch.float64), full_matrices=False)
    m, expected = torch.zeros(12, 9 * 27, dtype=torch.float64), conv.weight.detach().double().flatten(1)
    for strength in (torch.full((12,), 2.0), torch.tensor([-0.4] * 6 + [-0.8] * 6)):  # signs that momentum decides
        gradient = u * strength.double() @ v
        conv.weight.grad = gradient.float().view_as(conv.weight)
        optimizer.step()
        m = momentum * m + gradient
        left, _, right = torch.linalg.svd(gradient + momentum * m, full_matrices=False)
        expected = expected * (1 - rate * decay)
        moved = (expected - conv.weight.detach().double().flatten(1)) / (rate * 0.4 * math.sqrt(243))
        along = (left.T @ moved @ right.T).diagonal()  # 1 each, to what five iterations reach
        assert along.min() > 0.65 and along.max() < 1.25
        assert (moved - left * along @ right).abs().max() < 1e-3
        expected = conv.weight.detach().double().flatten(1)


def test_kernels_are_muons_and_the_rest_decays_by_its_shape():
    network = nn.Sequential(nn.Conv3d(9, 12, 3), nn.Conv3d(12, 4, 3), nn.LayerNorm(5), nn.Linear(5, 6))
    network[3].weight.requires_grad_(False)
    config = OptimizerConfig(learning_rate=0.3, betas=(0.7, 0.95), eps=1e-5, weight_decay=0.2)
    optimizer = Learner("some", network, config, ema_decay=0.0, max_steps=9).optimizer
    names = {id(p): name for name, p in network.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert groups == [["0.weight"], ["1.weight"], ["0.bias", "1.bias", "2.weight", "2.bias", "3.bias"]]
    assert [group.get("muon", False) for group in optimizer.param_groups] == [True, False, False]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.2, 0.0]
    assert {(group["betas"], group["eps"], group["lr"]) for group in optimizer.param_groups} == {
        ((0.7, 0.95), 1e-5, 0.3)
    }
    plain = Learner("some", network, OptimizerConfig(algorithm="adamw"), ema_decay=0.0, max_steps=9).optimizer
    assert not any(group.get("muon") for group in plain.param_groups)


def test_accumulated_gradients_are_a_mean():
    learner = learner_of(nn.Linear(1, 1, bias=False), gradient_accumulation=4)
    for x in (1.0, 2.0, 3.0, 6.0):
        learner.backward(learner.model(torch.tensor([[x]])).sum())
    assert learner.network.weight.grad.item() == pytest.approx(3.0)


# the average


def test_the_average_follows_each_step_that_was_taken():
    """By 1 - (1 + n) / (10 + n) of the way at update n, and never slower than 1 - decay."""
    learner = learner_of(nn.Linear(1, 1, bias=False), ema_decay=0.3, learning_rate=0.5)
    average = learner.average.weight.item()
    for update, share in ((1, 2 / 11), (2, 3 / 12), (3, 0.3), (4, 0.3)):
        pull(learner, torch.tensor([[float(update)]]))
        learner.update(50 + update)
        average = average * share + learner.network.weight.item() * (1 - share)
        assert learner.average.weight.item() == pytest.approx(average, rel=1e-6) and learner.updates == update
    assert not learner.average.training and learner.network.training
    assert not any(p.requires_grad for p in learner.average.parameters())


def test_a_decay_of_zero_copies():
    model = nn.Linear(2, 2)
    average = MovingAverage(model, decay=0.0)
    with torch.no_grad():
        model.weight.add_(1)
    average.update(model, 1)
    torch.testing.assert_close(average.module.weight, model.weight)


def unlike(learner: Learner) -> None:
    """Move the weights, and not their average, so that what is computed tells with which."""
    with torch.no_grad():
        for parameter in learner.network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def test_an_autoencoder_is_validated_by_its_average():
    step = make_step()
    unlike(step.vae)
    image = batch()["image"][0]
    item = {"image": image, "fov": batch()["fov"][0]}
    metrics = step.validate(item, torch.Generator())
    average, trained = (net(image[None]).sample.detach() for net in (step.vae.average, step.vae.network))
    inside = item["fov"].expand_as(image)
    assert metrics["l1"] == pytest.approx((average - image)[0][inside].abs().mean().item(), rel=1e-5)
    error = (average.clamp(-1, 1) - image)[0][inside].square().mean().item()
    assert metrics["psnr"] == pytest.approx(10 * math.log10(4 / error), rel=1e-5)
    assert metrics["l1"] != pytest.approx((trained - image)[0][inside].abs().mean().item(), rel=1e-3)
    assert torch.equal(step._reconstruct(image[None]), average)


CHANNELS = 8  # of the latents of voxels in cells of 2


def diffusion_step(unet: dict[str, Any] | None = None, **changes: Any) -> LdmTrainingStep:
    """On voxels in cells of 2, with a number as condition that training leaves out half the time. `unet`: more of its
    settings."""
    torch.manual_seed(0)
    vae = SpaceToDepth3D(patch_size=2)
    network = LatentUNet3D(
        CHANNELS, CHANNELS, channels=(8,), strides=(), blocks=(1,), attention=(False,),
        numbers={"age": {"mean": 50.0, "std": 10.0}}, condition_dropout={"age": 0.5}, **(unet or {}),
    )  # fmt: skip
    nn.init.normal_(network.conv_out.weight, std=0.1)
    learner = Learner("unet", network, OptimizerConfig(warmup_steps=0), ema_decay=0.0, max_steps=100)
    learner.prepare(Accelerator(cpu=True))
    return LdmTrainingStep(learner, vae, 2, ["MR"], lambda: make_scheduler("rectified_flow"), **changes)


def latent_batch() -> dict[str, Any]:
    mean = torch.randn(2, CHANNELS, 3, 3, 3, generator=torch.Generator().manual_seed(7))
    weight = torch.ones(2, 1, 3, 3, 3)
    weight[1, :, 1:] = 0
    return {
        "mean": mean,
        "std": mean.abs() + 0.5,
        "weight": weight,
        "conditions": Conditions(numbers=torch.tensor([[40.0], [70.0]])),
    }


def test_a_diffusion_step_draws_latents_from_their_posterior(monkeypatch):
    """mean + std times noise from each volume's own generator; padding's weight, the conditions and the generators go
    on."""
    step, given, seen = diffusion_step(), latent_batch(), []

    def loss(model, objective, latents, conditions, weight, generators, emphasis):
        assert emphasis is None
        seen.append((latents, conditions, weight, [one.get_state() for one in generators]))
        return model(latents, torch.tensor([1.0, 2.0]), **conditions.as_kwargs()).sample.square().mean()

    step.loss = loss
    step(given, two_generators(3))
    latents, conditions, weight, states = seen[0]
    ours = two_generators(3)
    noise = torch.cat([torch.randn(1, CHANNELS, 3, 3, 3, generator=one) for one in ours])
    torch.testing.assert_close(latents, given["mean"] + given["std"] * noise)
    assert torch.equal(weight, given["weight"])
    left_out = [torch.rand(1, generator=one).item() < 0.5 for one in ours]  # drawn next, and then the loss's own
    assert conditions.numbers.isnan().flatten().tolist() == left_out
    assert all(torch.equal(a, b.get_state()) for a, b in zip(states, ours, strict=True))
    assert all(p.grad is not None for p in step.unet.network.conv_in.parameters())


def test_a_unet_is_validated_by_its_average_without_its_padding():
    step = diffusion_step()
    unlike(step.unet)
    item = {"latents": latent_batch()["mean"][:1], "conditions": Conditions(numbers=torch.tensor([[40.0]]))}
    item["inside"] = torch.ones(1, 1, 3, 3, 3, dtype=torch.bool)
    found = step.validate(item, torch.Generator().manual_seed(5))
    assert found == step.validate(item, torch.Generator().manual_seed(5))
    assert found != step.validate(item, torch.Generator().manual_seed(6))
    step.unet.network.load_state_dict(step.unet.average.state_dict())
    assert found == step.validate(item, torch.Generator().manual_seed(5))  # the trained weights had no part in it
    with torch.no_grad():
        step.unet.average.conv_out.weight.mul_(2)
    assert found != step.validate(item, torch.Generator().manual_seed(5))
    step.unet.average.conv_out.weight.data.zero_()  # predicts 0: the loss is the square of noise minus latents
    expected = 1 + item["latents"].square().mean().item()
    assert step.validate(item, torch.Generator().manual_seed(5))["loss"] == pytest.approx(expected, rel=0.1)


def test_a_validation_counts_the_field_of_view_alone():
    """What predicts nothing is wrong by noise minus latents: huge latents outside do not count."""
    step = diffusion_step()
    step.unet.average.conv_out.weight.data.zero_()
    inside = torch.zeros(1, 1, 3, 3, 3, dtype=torch.bool)
    inside[..., :2] = True
    latents = torch.where(inside, torch.zeros(1, CHANNELS, 3, 3, 3), torch.full((), 1e3))
    item: Any = {"latents": latents, "inside": inside, "conditions": Conditions(numbers=torch.tensor([[40.0]]))}
    assert step.validate(item, torch.Generator().manual_seed(5))["loss"] == pytest.approx(1, rel=0.1)


class Held(list):
    """Padded volumes, with their stride."""

    def __init__(self, items: list, stride: tuple[int, int, int]) -> None:
        super().__init__(items)
        self.stride = stride


def test_held_out_images_are_given_where_they_are_seen():
    """Cells without a voxel of the field of view have no weight, and the flag of the image is 0 there."""
    vae = SpaceToDepth3D(patch_size=2)
    fov = torch.zeros(1, 4, 4, 8, dtype=torch.bool)
    fov[..., :3] = True  # ends within the second cell
    volumes: Any = Held([{"name": "a", "image": torch.zeros(1, 4, 4, 8), "fov": fov}], (2, 2, 2))
    mean = vae.encode(torch.zeros(1, 1, 4, 4, 8), return_dict=False)[0].mean[0]
    entries: Any = [{"mean": mean, "inside": cells_inside(fov[None], mean.shape[1:])[0]}]
    (found,) = EncodedVolumes(volumes, entries, 0, {"mr": slice(0, 8)})
    expected = torch.tensor([1.0, 1, 0, 0]).expand(1, 1, 2, 2, 4)
    assert torch.equal(found["inside"].float(), expected)
    assert found["conditions"].image is not None and torch.equal(found["conditions"].image[:, -1:], expected)


def test_a_unet_is_trained_with_its_own_steps_and_loss():
    """Of 7 steps all occur, and no other. What predicts nothing is wrong by the noise: E n^2 = 1, E |n| = sqrt(2 /
    pi)."""
    for loss, expected in (("mse", 1.0), ("l1", math.sqrt(2 / math.pi))):
        step, seen = diffusion_step({"objective": "epsilon", "train_steps": 7}, loss=loss), set()
        step.unet.average.conv_out.weight.data.zero_()
        step.unet.average.register_forward_pre_hook(lambda module, given, seen=seen: seen.update(given[1].tolist()))
        item = {"latents": latent_batch()["mean"][:1], "conditions": Conditions(numbers=torch.tensor([[40.0]]))}
        item["inside"] = torch.ones(1, 1, 3, 3, 3, dtype=torch.bool)
        found = [step.validate(item, torch.Generator().manual_seed(seed))["loss"] for seed in range(8)]
        assert sum(found) / 8 == pytest.approx(expected, rel=0.02)
        assert seen == set(range(7))


def test_previews_are_sampled_with_the_average(monkeypatch):
    step, used = diffusion_step(), []
    monkeypatch.setattr(ldm_step, "denoise", lambda unet, noise, *_, **__: (used.append((unet, noise)), noise)[1])
    monkeypatch.setattr("volumes.slices_figure", lambda cases: cases)
    item = {
        "latents": torch.zeros(1, CHANNELS, 3, 3, 3),
        "image": torch.zeros(1, 6, 6, 6),
        "conditions": Conditions(),
        "name": "a",
    }
    step.preview([item | {"scale": ((0.0, 1.0),)}] * 2)
    assert [unet is step.unet.average for unet, _ in used] == [True, True]
    for number, (_, noise) in enumerate(used):  # always the same, each its own
        assert torch.equal(noise, torch.randn(noise.shape, generator=torch.Generator().manual_seed(number)))


def test_what_is_saved_and_measured_is_the_average(tmp_path, vae_folder):
    """Of both scripts: the files are those of the moving average in the last checkpoint, and not the trained weights;
    the metrics are those of the saved autoencoder."""
    last = "checkpoints/step_000003"
    shorter = ["--loop.max_steps=3", "--loop.ema_decay=0.9", "--loop.checkpoint_every=0", "--loop.previews=0"]
    metrics = run(train_vae, tmp_path / "vae", *shorter)
    run(train_ldm, tmp_path / "ldm", f"--vae={vae_folder}", *shorter)
    for name, saved in (("vae", tmp_path / "vae/vae"), ("unet", tmp_path / "ldm/pipeline/unet")):
        checkpoint = saved.parents[1 if name == "unet" else 0] / last
        average, trained = (
            load_file(checkpoint / f"{name}_ema.safetensors"),
            load_file(checkpoint / "model.safetensors"),
        )
        written = load_file(saved / "diffusion_pytorch_model.safetensors")
        assert written.keys() == average.keys() and all(torch.equal(average[key], written[key]) for key in written)
        assert not all(torch.equal(trained[key], written[key]) for key in written)
    vae = AutoencoderKL3D.from_pretrained(tmp_path / "vae/vae").eval()
    config = DataConfig(phantom=PhantomConfig(count=6, shape=(12, 12, 12)), validation_fraction=0.2)
    cases = [case for case in load_cases(config) if case.split == "validation"]
    errors = []
    for item in PaddedVolumes(VolumeDataset(cases, config), vae.stride):
        with torch.no_grad():
            errors.append((vae(item["image"][None]).sample[0] - item["image"])[item["fov"]].abs().mean().item())
    assert metrics["l1"] == pytest.approx(sum(errors) / len(errors), rel=1e-3)
    cases = [case for case in load_cases(config) if case.split == "train"]
    raw = [
        vae.encode(item["image"][None]).latent_dist.raw_mean
        for item in PaddedVolumes(VolumeDataset(cases, config), vae.stride)
    ]
    cells = torch.cat(raw).movedim(1, -1).flatten(0, 3).double()  # 12 is a multiple of the stride: no padding
    assert vae.config["latents_mean"] == pytest.approx(cells.mean(0).tolist(), abs=1e-4)
    assert vae.config["latents_std"] == pytest.approx(cells.std(0, correction=0).tolist(), rel=1e-3)


# the loop


class Recording(LineStep):
    """Keeps the seeds of the generators that it is given, call by call."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.seeds: list[list[int]] = []
        self.validated: list[int] = []

    def __call__(self, given, generators):
        self.seeds.append([one.initial_seed() for one in generators])
        return super().__call__(given, generators)

    def validate(self, item, generator):
        self.validated.append(generator.initial_seed())
        return {"error": item["x"].item()}


def test_every_sample_of_a_run_has_noise_of_its_own(tmp_path, monkeypatch):
    """Accumulated parts, steps and a resumed run go on counting samples; held-out items have the same noise each
    time."""
    monkeypatch.setattr("line.LineStep", Recording)
    args = [
        "--optimizer.gradient_accumulation=2",
        "--loop.seed=5",
        "--loop.validate_every=2",
        "--loop.checkpoint_every=2",
    ]
    loop, step = line_loop(line_config(tmp_path, *args, "--loop.max_steps=2"))
    loop.run()
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed, more = line_loop(
        line_config(tmp_path, *args, "--loop.max_steps=4", "--resume=latest", "--accept_changes=true")
    )
    metrics = resumed.run()
    seeds = list(itertools.chain(*step.seeds, *more.seeds))
    assert seeds == [derive_seed(5, TRAINING, number) for number in range(4 * 2 * 3)]  # steps, parts, samples
    assert len(set(seeds)) == len(seeds)
    held_out = [derive_seed(5, VALIDATION, number) for number in range(3)]
    # The longer run makes the validation of step 2, too, at which the shorter one ended.
    assert step.validated == held_out and more.validated == 2 * held_out
    assert resumed.state.samples == 24 and more.line.updates == 4 and resumed.state.step == 4
    assert metrics["error"] == pytest.approx((0 + 1 / 8 + 2 / 8) / 3)
    state = json.loads((tmp_path / "run/checkpoints/step_000004/state.json").read_text())
    assert state["updates"] == {"line": 4} and state["samples"] == 24 and state["processes"] == 1


def test_reports_are_means_over_the_steps_since_the_last(tmp_path, monkeypatch):
    """Of taken steps alone, with the learning rate of the step and the number of those that were skipped."""
    logged: dict[int, dict[str, float]] = {}
    losses = iter(range(1, 100))

    def numbered(self, given, generators):
        made = original(self, given, generators)
        return {"loss": torch.full_like(made["loss"], next(losses))}

    original = LineStep.__call__
    monkeypatch.setattr(LineStep, "__call__", numbered)
    args = [
        "--loop.max_steps=6",
        "--loop.log_every=3",
        "--optimizer.gradient_accumulation=2",
        "--optimizer.learning_rate=0.4",
    ]
    loop, step = line_loop(line_config(tmp_path, *args, "--optimizer.warmup_steps=10"), poison=(10,))
    monkeypatch.setattr(loop.accelerator, "log", lambda values, step: logged.setdefault(step, {}).update(values))
    loop.run()
    assert step.taken == [True, True, True, True, True, False]
    assert logged[3]["train/loss"] == pytest.approx((1.5 + 3.5 + 5.5) / 3)
    assert logged[6]["train/loss"] == pytest.approx((7.5 + 9.5) / 2)  # the last step's was not taken
    assert [logged[step]["train/skipped_steps"] for step in (3, 6)] == [0, 1]
    assert [logged[step]["train/learning_rate"] for step in (3, 6)] == pytest.approx([0.4 * 3 / 10, 0.4 * 6 / 10])
    assert logged[6]["validation/error"] == pytest.approx(
        json.loads((tmp_path / "run/metrics.json").read_text())["error"]
    )


def test_a_run_validates_previews_and_saves_when_asked_to(tmp_path, monkeypatch):
    args = ["--loop.max_steps=7", "--loop.validate_every=3", "--loop.preview_every=2", "--loop.checkpoint_every=3"]
    loop, _ = line_loop(line_config(tmp_path, *args, "--loop.keep_checkpoints=0"))
    happened: list[tuple[str, int]] = []

    def watch(name: str) -> None:
        call = getattr(loop.measurements, name)
        monkeypatch.setattr(loop.measurements, name, lambda: (happened.append((name, loop.state.step)), call())[1])

    watch("validate")
    watch("preview")
    loop.run()
    steps = {name: [step for one, step in happened if one == name] for name in ("validate", "preview")}
    assert steps == {"validate": [3, 6, 7], "preview": [2, 4, 6, 7]}
    folders = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert folders == ["step_000003", "step_000006", "step_000007"]  # 0 keeps all


def test_a_jump_of_the_loss_is_reported_against_its_median():
    """The median of the losses before it."""
    watch = SpikeWatch()
    assert [watch(1.0) for _ in range(4)] == [None] * 4
    assert watch(100.0) is None  # five reports come first
    assert watch(4.0) is None and watch(3.9) is None
    assert "rose to 4.01, 4.0 times the median" in (watch(4.01) or "")
    for loss in [2.0] * 20:  # the last twenty are what is usual
        watch(loss)
    assert watch(7.9) is None and watch(8.1) is not None
    sixth, long = SpikeWatch(), SpikeWatch()
    assert [sixth(1.0) for _ in range(5)] == [None] * 5 and sixth(5.0) is not None
    for loss in [1.0] * 30 + [10.0] * 20:
        long(loss)
    assert long(39.0) is None
    noisy = StandstillWatch()
    for loss in [1.0] * 5 + [3.0] + [2.0] * 12 + [2.9] + [3.0] * 5:  # the last quarter is higher, but not all of it
        noisy.note(loss)
    assert noisy.verdict(100, {"vae": (True, True)}, adversarial=False) == []
    below = SpikeWatch()
    assert [below(-1.0) for _ in range(6)] == [None] * 6 and below(50.0) is None


def test_the_adversary_counts_updates_of_the_autoencoder():
    """Steps that were skipped do not count."""
    config = AdversarialConfig(start_step=2, warmup_steps=3, channels=4, layers=1)
    for updates, strength in ((1, None), (2, 0.25), (4, 0.75), (99, 1.0)):
        step, asked = make_step(adversarial=config), []
        step.vae.updates, original = updates, step.adversary.strength
        step.adversary.strength = lambda number, asked=asked, call=original: (asked.append(call(number)), asked[-1])[1]
        found = step(batch(), two_generators())
        assert asked == [strength] and ("discriminator" in found) is (strength is not None)


def test_a_codebook_is_moved_by_a_seed_of_its_step():
    """The same on every process, and another at each step; by raw latents, whatever their statistics are."""
    step, seeds, seen = make_step(VQGAN3D, num_codes=8, latent_channels=4), [], []
    network = step.vae.network
    network.set_latent_statistics([5.0] * 4, [0.1] * 4)
    update = network.codebook.update

    def watched(cells, generator, gather):
        seen.append(cells)
        seeds.append(generator.initial_seed())
        update(cells, generator, gather)

    network.codebook.update = watched
    for number in (3, 4):
        step.vae.updates = number
        step(batch(), two_generators())
        step.after_update(True)
    assert seeds == [derive_seed(3), derive_seed(4)] and not step._latents
    raw = network.encode(batch()["image"]).latent_dist.raw_mean.movedim(1, -1).flatten(0, 3)
    torch.testing.assert_close(
        seen[0], raw
    )  # of 8 voxels a side, the last two are padding: every cell has a voxel inside


# the data of a run


def test_a_volumes_digest_is_of_all_that_training_learns_from():
    config = DataConfig(phantom=PhantomConfig(count=2, shape=(8, 9, 10)), numbers=["spacing_x"])
    dataset = VolumeDataset(load_cases(config), config)
    first = digests(dataset)
    assert list(first) == [case.name for case in dataset.cases] and len(set(first.values())) == 2
    plant(dataset, 0, lambda case: None)
    planted = digests(dataset)
    for name, total in (("image", 1), ("mask", 3)):

        def change(case, name=name, total=total):
            voxel = getattr(case, name).array[..., 3, 4, 5]
            voxel[:] = total - voxel

        plant(dataset, 0, change)
        changed = digests(dataset)
        assert [changed[name] == planted[name] for name in first] == [False, True]
        plant(dataset, 0, change)
    assert digests(dataset) == planted
    conditions = dataset.conditions
    dataset.conditions = lambda index: {"numbers": conditions(index)["numbers"] + index}
    assert [digests(dataset)[name] == first[name] for name in first] == [True, False]


def test_the_sum_of_an_adversarys_losses_is_weighed():
    """loss = own losses + strength (weight scale generator + matching features), by the losses that are logged."""
    config = AdversarialConfig(
        start_step=0, warmup_steps=3, weight=0.7, feature_matching=0.9, adaptive=True, channels=4, layers=1
    )
    plain, step = make_step(), make_step(adversarial=config)
    base, found = plain(batch(), two_generators()), step(batch(), two_generators())
    deceit = 0.7 * found["adaptive_weight"] * found["generator"] + 0.9 * found["feature_matching"]
    assert found["loss"].item() == pytest.approx((base["loss"] + deceit / 4).item(), rel=1e-4)


def test_the_test_split_is_left_alone():
    config = DataConfig(phantom=PhantomConfig(count=10, shape=(8, 8, 8)), test_fraction=0.3, validation_fraction=0.2)
    cases = load_cases(config)
    train, held_out = load_split(config)
    assert held_out is not None
    assert [c.name for c in train.cases] == [c.name for c in cases if c.split == "train"]
    assert [c.name for c in held_out.cases] == [c.name for c in cases if c.split == "validation"]
    assert (len(train), len(held_out), sum(c.split == "test" for c in cases)) == (6, 1, 3)


def test_padded_volumes_tell_their_spacing_axes_and_scale():
    """Padding is outside of the field of view, is -1 in the image, and no label in the mask."""
    config = DataConfig(phantom=PhantomConfig(count=1, shape=(9, 8, 10)), validation_fraction=0)
    dataset = VolumeDataset(load_cases(config), config)
    affine = np.array([[0.0, 3, 0, 0], [-2, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    plant(dataset, 0, lambda case: np.copyto(case.image.affine, affine))
    item = PaddedVolumes(dataset, (4, 2, 4))[0]
    assert item["image"].shape == (1, 12, 8, 12) and item["fov"].sum() == 9 * 8 * 10
    assert item["spacing"] == (2.0, 3.0, 1.0) and item["axes"] == ("P", "R", "S")
    assert item["scale"] == (tuple(dataset[0]["scale"][0].tolist()),)
    outside = ~item["fov"]
    assert (item["image"][outside] == -1).all() and (item["mask"][outside[0]] == -1).all()
    assert torch.equal(item["image"][0][item["fov"][0]], dataset[0]["image"].flatten())
    assert torch.equal(item["mask"][item["fov"][0]], dataset[0]["mask"].flatten())


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bf16_where_that_is_native(native, monkeypatch):
    monkeypatch.setattr(precision, "native_bf16", lambda: native)
    assert precision.resolve_precision("auto") == ("bf16" if native else "no")
    assert [precision.resolve_precision(name) for name in ("no", "bf16")] == ["no", "bf16"]


def test_time_left_uses_the_steps_and_rate_of_this_start(monkeypatch, caplog):
    """Ten steps of a resumed run in 20 s: 2 s a step, and 70 steps left."""
    clock = [100.0]
    monkeypatch.setattr("training.engine.tracking.time.monotonic", lambda: clock[0])
    with caplog.at_level("INFO", logger="training"), Progress(100, 20, enabled=True) as progress:
        clock[0] = 120.0
        progress.report(30, {"loss": 0.125})
    assert "step 30/100  loss 0.125  2.000 s/step  0:02:20 left" in caplog.text


def test_held_out_volumes_are_their_mean_latents():
    """An encoder that is unsure by 3 gives latents of 5, not a sample around them: a validation is the same each
    time."""
    volumes: Any = Held([{"name": "a", "image": torch.zeros(1, 2, 2, 2), "fov": torch.ones(1, 2, 2, 2)}], (1, 1, 1))
    inside = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    entries: Any = [{"mean": torch.full((1, 2, 2, 2), 5.0), "std": torch.full((1, 2, 2, 2), 3.0), "inside": inside}]
    (found,) = EncodedVolumes(volumes, entries, 0, {})
    assert torch.equal(found["latents"], torch.full((1, 1, 2, 2, 2), 5.0)) and found["conditions"].as_kwargs() == {}


def test_all_processes_measure_latents_with_the_bits_of_one(monkeypatch):
    config = DataConfig(phantom=PhantomConfig(count=5, shape=(8, 9, 10)), validation_fraction=0)
    dataset = VolumeDataset(load_cases(config), config)
    vae, parts, found = SpaceToDepth3D(patch_size=4), [], []
    monkeypatch.setattr("training.vae.gather_object", lambda rows: parts.extend(rows) or [{**parts[0]}, *parts])
    for rank, processes in ((0, 2), (1, 2), (0, 1)):
        process: Any = SimpleNamespace(process_index=rank, num_processes=processes)
        if processes == 1:
            parts.clear()
        with contextlib.suppress(KeyError):  # the first has not heard of the second yet
            measure_latents(vae, dataset, process)
            found.append((vae.config["latents_mean"], vae.config["latents_std"]))
        assert len(parts[-1]) == (5 if processes == 1 else 3 - rank)
    assert len(found) == 2 and found[0] == found[1]


# the samples of a step


def test_the_samples_of_each_accumulated_part_follow_each_other(tmp_path):
    """Eight samples, batches of three, two a step: the third part of the first epoch's order ends in the second
    epoch."""
    orders = []
    loop, _ = line_loop(line_config(tmp_path, "--optimizer.gradient_accumulation=2"))
    for epoch in (0, 1):
        generator = torch.Generator().manual_seed(derive_seed(loop.options.seed, epoch))
        orders += torch.randperm(8, generator=generator).tolist()
    expected = [f"sample {index}" for index in orders]
    assert [*loop._names(0), *loop._names(1)] == expected[:6]
    loop.state.samples = 6
    assert [*loop._names(0), *loop._names(1)] == expected[6:12]
