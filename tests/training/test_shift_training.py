"""A run with the timestep shift: what it trains, validates, previews, saves, and refuses to resume with."""

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from short_runs import run, vae_folder  # noqa: F401
from torch import nn

import train_ldm
from autoencoder import SpaceToDepth3D
from diffusion import Conditions, LatentUNet3D, make_scheduler
from diffusion.objectives import shifted
from training import LdmTrainingStep, OptimizerConfig
from training.engine.learner import Learner

WEIGHTS = "pipeline/unet/diffusion_pytorch_model.safetensors"


def test_a_run_keeps_its_shift(tmp_path, vae_folder):  # noqa: F811
    """Phantoms of 12 x 12 x 12 voxels are 27 latent voxels."""
    args = [f"--vae={vae_folder}", "--loop.max_steps=2", "--cache.shift=false"]  # whose margins are cells, too
    run(train_ldm, tmp_path / "plain", *args)
    run(train_ldm, tmp_path / "equal", *args, "--model.shift_voxels=27")
    run(train_ldm, tmp_path / "shifted", *args, "--model.shift_voxels=3")
    plain, equal, moved = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "equal", "shifted"))
    assert all(torch.equal(plain[key], equal[key]) for key in plain)  # no bit of the training
    assert not all(torch.equal(plain[key], moved[key]) for key in plain)
    config = json.loads((tmp_path / "shifted/pipeline/unet/config.json").read_text())
    assert config["shift_voxels"] == 3
    with pytest.raises(ValueError, match=r"model\.shift_voxels: 3 -> 9\nUndo these"):
        run(train_ldm, tmp_path / "shifted", *args, "--model.shift_voxels=9", "--resume=latest")
    with pytest.raises(ValueError, match=r"model\.shift_voxels: 3 -> \(absent\)"):
        run(train_ldm, tmp_path / "shifted", *args, "--resume=latest")


def small_step(shift_voxels: int | None) -> LdmTrainingStep:
    torch.manual_seed(0)
    network = LatentUNet3D(1, 1, channels=(8,), strides=(), blocks=(1,), attention=(False,), shift_voxels=shift_voxels)
    nn.init.normal_(network.conv_out.weight, std=0.1)
    learner = Learner("unet", network, OptimizerConfig(warmup_steps=0), ema_decay=0.0, max_steps=10)
    learner.prepare(Accelerator(cpu=True))
    return LdmTrainingStep(learner, SpaceToDepth3D(), 4, ["MR"], lambda: make_scheduler("rectified_flow"))


def asked_in(step: LdmTrainingStep, work) -> torch.Tensor:
    """The timesteps at which the average was asked."""
    asked: list[torch.Tensor] = []
    hook = step.unet.average.register_forward_pre_hook(lambda module, args: asked.append(args[1].flatten()))
    work(step)
    hook.remove()
    return torch.cat(asked)


def test_validation_and_previews_are_shifted():
    """Validation by the field of view, of 4 latent voxels; a preview by the whole grid, of 16, as a pipeline does."""
    inside = torch.zeros(1, 1, 4, 2, 2, dtype=torch.bool)
    inside[:, :, 0] = True
    item = {"latents": torch.randn(1, 1, 4, 2, 2), "inside": inside, "conditions": Conditions()}

    def validate(step):
        step.validate(item, torch.Generator().manual_seed(3))

    def preview(step):
        step._generate(item, torch.Generator().manual_seed(3))

    for work, shift in ((validate, 2.0), (preview, 4.0)):
        plain, moved = asked_in(small_step(None), work), asked_in(small_step(1), work)
        torch.testing.assert_close(moved, shifted(plain, shift, 1000))
        assert (moved > plain)[plain < 1000].all()
