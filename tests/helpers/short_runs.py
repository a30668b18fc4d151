"""Trainings of a few steps that are interrupted and resumed."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train_vae
from autoencoder import AutoencoderKL3D

STEPS = 9
COMMON = [
    "--data.phantom={count: 6, shape: [12, 12, 12]}",
    "--data.validation_fraction=0.2",
    f"--loop.max_steps={STEPS}",
    "--loop.batch_size=2",
    "--loop.mixed_precision=no",
    "--loop.validate_every=4",
    "--loop.preview_every=0",
    "--loop.previews=1",
    "--loop.checkpoint_every=3",
    "--loop.keep_checkpoints=10",
    "--loop.log_every=2",
    "--loop.trackers=[]",
    "--optimizer.warmup_steps=2",
    "--optimizer.gradient_accumulation=2",
]
VAE = [  # 12 channels are enough for both of the optimizer's algorithms to be used
    "--model={class: autoencoder.AutoencoderKL3D, channels: [4, 12], encoder_blocks: [1, 1], decoder_blocks: [1, 1]}",
    "--crops.shape=[8, 8, 8]",
    "--crops.flip_axes=[0]",
]
LDM = ["--model={class: diffusion.LatentUNet3D, channels: [8, 16], blocks: [1, 1], head_dim: 8, mask_width: 4}"]
LDM += ["--cache.versions=2", "--cache.shift=true", "--inference_steps=2"]


def run(script, output: Path, *args: str):
    AcceleratorState._reset_state(reset_partial_state=True)
    model = VAE if script is train_vae else LDM  # what `args` say of the model wins
    return script.main([f"--output={output}", *COMMON, *model, *args])


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    vae = AutoencoderKL3D(channels=(4, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    vae.set_latent_statistics([0.1] * 4, [0.5] * 4)
    vae.save_pretrained(folder)
    return folder


def everything(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, moving average, optimizer."""
    tensors = {f"{f.name}:{k}": t for f in checkpoint.glob("*.safetensors") for k, t in load_file(f).items()}
    for file in sorted(checkpoint.glob("optimizer*.bin")):
        optimizer = torch.load(file, weights_only=True)
        for index, moments in optimizer["state"].items():
            tensors |= {f"{file.stem}:{index}:{k}": t for k, t in moments.items()}
    assert {"momentum", "exp_avg"} <= {key.rpartition(":")[2] for key in tensors}
    return tensors


class Interrupted(Exception):
    """Stands for the process being killed: nothing is saved on its way."""
