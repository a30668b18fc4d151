"""The benchmark of what each training step learns: its changes of the loss, its comparison, and its page."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.learning import per_step, per_step_page
from benchmarks.learning.per_step import alignment, changed_loss, compare, folded, min_snr, reached
from diffusion import Conditions, LatentUNet3D, make_scheduler, training_loss
from diffusion.objectives import EPSILON, FLOW_MAP, OBJECTIVES, V_PREDICTION


def tiny(objective: str) -> LatentUNet3D:
    """A U-Net whose output is not zero."""
    torch.manual_seed(0)
    unet = LatentUNet3D(2, 2, channels=(8, 8), strides=(2,), blocks=(1, 1), head_dim=8, objective=objective)
    nn.init.normal_(unet.conv_out.weight, std=0.1)
    return unet


def arguments(objective: str) -> tuple:
    """Arguments of both losses, with padding at one end."""
    latents, weight = torch.randn(2, 2, 5, 4, 4), torch.ones(2, 1, 5, 4, 4)
    weight[1, :, 4:] = 0
    return objective, latents * weight, Conditions(), weight


@pytest.mark.parametrize("objective", [one for one in OBJECTIVES if one != FLOW_MAP])  # no student is trained here
def test_without_a_change_the_loss_is_that_of_training(objective):
    unet, given = tiny(objective), arguments(objective)
    ours = changed_loss(unet, *given, per_step.generators_of(0, 0, 2), arm="plain", head=nn.Identity())
    theirs = training_loss(unet, *given, per_step.generators_of(0, 0, 2))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("objective", [V_PREDICTION, EPSILON])
def test_min_snr_is_the_clipped_weight_of_the_images_error(objective):
    """An error e of x0 is e sqrt(SNR) of eps, and e sqrt(SNR + 1) of v (Hang et al. 2023, section 3.4)."""
    scheduler, timesteps = make_scheduler(objective), torch.tensor([100, 500, 900])
    x0, noise = torch.randn(3, 1, 2, 2, 2), torch.randn(3, 1, 2, 2, 2)
    share = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1, 1)
    noisy = scheduler.add_noise(x0, noise, timesteps)
    wrong = x0 + 0.1  # and the noise and v that belong to it
    other = (noisy - share.sqrt() * wrong) / (1 - share).sqrt()
    target, told = (noise, other) if objective == EPSILON else (share.sqrt() * n - (1 - share).sqrt() * x
                                                                for n, x in ((noise, x0), (other, wrong)))  # fmt: skip
    weighted = ((told - target) ** 2).mean((1, 2, 3, 4)) * min_snr(timesteps, objective)
    snr = scheduler.alphas_cumprod[timesteps] / (1 - scheduler.alphas_cumprod[timesteps])
    assert weighted.tolist() == pytest.approx((0.01 * snr.clamp(max=5)).tolist(), rel=1e-3)


def test_alignment_is_zero_for_the_latents_without_padding():
    latents, weight = torch.randn(1, 2, 5, 4, 4), torch.ones(1, 1, 5, 4, 4)
    features = folded(torch.nn.functional.pad(latents, (0, 0, 0, 0, 0, 1)), (2, 2, 2))
    assert features.shape == (1, 16, 3, 2, 2)
    assert alignment(features, latents, weight, nn.Identity(), (2, 2, 2)).item() == pytest.approx(0, abs=1e-6)
    outside = features.clone()
    outside[:, :, 2] *= -1  # cells that are half in the padding of the pad to the stride
    assert alignment(outside, latents, weight, nn.Identity(), (2, 2, 2)).item() == pytest.approx(0, abs=1e-6)
    assert alignment(-features, latents, weight, nn.Identity(), (2, 2, 2)).item() == pytest.approx(2)


def test_a_curve_reaches_a_loss_between_two_validations():
    assert reached({"10": 2.0, "20": 1.0}, 1.5) == 15
    assert reached({"10": 2.0, "20": 1.0}, 0.5) is None
    assert reached({"10": 2.0}, 3.0) == 10


def run(arm: str, seed: int, loss: float) -> per_step.Run:
    return per_step.Run(
        objective=EPSILON,
        arm=arm,
        seed=seed,
        loss={"10": 1.0, "20": loss},
        by_timestep={"50": loss},
        seconds_of_training=1.0,
    )


def test_a_change_is_compared_at_the_same_seed(tmp_path):
    runs = [run("plain", 0, 0.5), run("min_snr", 0, 0.45), run("plain", 1, 0.4), run("min_snr", 1, 0.44)]
    found = compare(runs, 20)
    assert found.keys() == {"epsilon: min_snr"}
    row = found["epsilon: min_snr"]
    assert row["loss"]["by_seed"] == pytest.approx([-0.1, 0.1]) and row["loss"]["mean"] == pytest.approx(0)
    assert row["share_of_steps"] == [pytest.approx((10 + 10 * 0.5 / 0.55) / 20), None]
    report = {"compared": found, "steps": 20, "batch": 4, "arithmetic": {"align": 1.04}, "runs": runs}
    report |= {"align_weight": 0.5, "gamma": 5.0, "load": 1.0, "commit": None, "versions": {}}
    report |= {"machine": {"processor": "a CPU"}, "command": "a command", "date": "2026-01-02T03"}
    (tmp_path / "r.json").write_text(json.dumps(report))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{per_step_page.BEGIN}\nold\n{per_step_page.END}\nafter\n")
    per_step_page.main([str(tmp_path / "r.json"), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "\nold" not in text
    options = ["--output", str(tmp_path / "r.json"), "--steps"]
    assert per_step.earlier(per_step.parse([*options, "20"])) == runs  # not trained again
    with pytest.raises(ValueError, match="has trainings of 20 steps, not 30"):
        per_step.earlier(per_step.parse([*options, "30"]))
    assert "4.0 % more arithmetic" in text and "| 1 of 2, after 95 % of the steps |" in text


def test_the_page_holds_the_report():
    """Else run benchmarks.learning.per_step_page on docs/learning_per_step.json, for docs/quality_and_speed.md."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    report = docs / "learning_per_step.json"
    expected = f"\n{per_step_page.page_text(json.loads(report.read_text()))}" if report.exists() else "\n"
    text = (docs / "quality_and_speed.md").read_text()
    assert text.partition(per_step_page.BEGIN)[2].partition(per_step_page.END)[0] == expected
