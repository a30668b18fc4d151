"""A training step of an autoencoder, with its batch."""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from autoencoder import AutoencoderKL3D
from autoencoder.losses.adversarial import VolumeDiscriminator
from training import (
    AdversarialConfig,
    AdversarialTrainer,
    AutoencoderLosses,
    Learner,
    OptimizerConfig,
    VaeTrainingStep,
)


def make_step(model_class=AutoencoderKL3D, adversarial: AdversarialConfig | None = None, **changes) -> VaeTrainingStep:
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    vae = model_class(channels=(4, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1), **changes)
    learner = Learner("vae", vae, OptimizerConfig(warmup_steps=0), ema_decay=0.0, max_steps=100)
    adversary = None
    if adversarial is not None:
        network = VolumeDiscriminator(channels=4, layers=1)
        discriminator = Learner("discriminator", network, adversarial.optimizer, ema_decay=0.0, max_steps=100)
        adversary = AdversarialTrainer(discriminator, adversarial)
    step = VaeTrainingStep(learner, AutoencoderLosses(), adversary)
    for each in step.learners:
        each.prepare(Accelerator(cpu=True))
    return step


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    image = torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    fov = torch.ones(2, 1, 8, 8, 8, dtype=torch.bool)
    fov[..., 6:] = False
    return {"image": torch.where(fov, image, -1.0), "fov": fov}


def generators(seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(2 * seed + i) for i in range(2)]


def gradients(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]
