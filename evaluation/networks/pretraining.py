"""Pre-training of the segmenter without labels, with which Medical Diffusion tested its volumes (Khader et al. 2023).

The task is to restore hidden voxels: blocks of voxels are replaced by noise (in-painting: Pathak et al. 2016; in
volumes, Models Genesis: Zhou et al. 2019) and the rest is noisy (denoising: Vincent et al. 2008). The network is the
segmenter with another head; only the layers before the head are fine-tuned. Images are (N, C, X, Y, Z) float32 in [0,
1], 0 where padded.
"""

import torch
from torch import Tensor, nn

from .defaults import PRETRAINING_STEPS as ITERATIONS
from .fit import OnStep, brightened, fit
from .segmenter import BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, make_segmenter

BLOCK = 8  # voxels per side
HIDDEN = 0.5  # share of the blocks
NOISE = 0.1  # standard deviation, on what is not hidden
WIDTH = 16  # channels before the last convolution
HEAD = "model.2."  # the segmenter's last layer, whose width depends on the task

DIFFERENCES = (("synthetic", "scratch"), ("real", "scratch"), ("synthetic", "real"))


def hide(images: Tensor, generator: torch.Generator) -> Tensor:
    """Replace half of the blocks of 8 voxels per side by uniform noise in [0, 1], and add noise to the rest.

    `images` are (B, C, X, Y, Z) on the CPU; blocks are the same in all channels.
    """
    grid = [-(-side // BLOCK) for side in images.shape[2:]]
    hidden = torch.rand(len(images), 1, *grid, generator=generator) < HIDDEN
    for axis, side in enumerate(images.shape[2:], start=2):
        hidden = hidden.repeat_interleave(BLOCK, axis).narrow(axis, 0, side)
    noise = torch.rand(images.shape, generator=generator)
    noisy = images + NOISE * torch.randn(images.shape, generator=generator)
    return torch.where(hidden, noise, noisy)


def body(segmenter: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of all layers before the head by name, on the CPU: the `start` of `train_segmenter`."""
    return {name: value.detach().cpu() for name, value in segmenter.state_dict().items() if not name.startswith(HEAD)}


def pretrain(
    images: Tensor,
    *,
    seed: int,
    iterations: int = ITERATIONS,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Tensor]:
    """Train to restore `images` and return the network's `body`. No label is used.

    The schedule and the brightening are the segmenter's. The loss is the mean absolute error over all voxels except
    those that are 0 in every channel, which include the padding.
    """
    device = torch.device(device)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    segmenter = make_segmenter(images.shape[1], WIDTH)
    network = nn.Sequential(segmenter, nn.Conv3d(WIDTH, images.shape[1], 1)).to(device)

    def batch_loss() -> Tensor:
        chosen = torch.randint(0, len(images), (BATCH_SIZE,), generator=generator)
        valid = (images[chosen] > 0).any(1, keepdim=True).to(device)
        target = brightened(images[chosen], generator)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            restored = network(hide(target, generator).to(device))
        errors = (restored.float() - target.to(device)).abs() * valid
        return errors.sum() / (valid.sum() * images.shape[1]).clamp_min(1)

    fit(
        network,
        batch_loss,
        iterations=iterations,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        on_step=on_step,
    )
    return body(segmenter)
