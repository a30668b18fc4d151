"""Pre-training of the segmenter without labels, as Medical Diffusion judged its volumes (Khader et al. 2023).

The task is to restore what was hidden: blocks of voxels are replaced by noise (in-painting: Pathak et al. 2016; in volumes, Models
Genesis: Zhou et al. 2019) and the rest is noisy (denoising: Vincent et al. 2008). The network is the segmenter's with a head of its
own; only what lies before the head goes into the fine-tuning. Images are (N, C, X, Y, Z) float32 in [0, 1], 0 where padded.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .defaults import PRETRAINING_STEPS as ITERATIONS
from .segmenter import BATCH_SIZE, LEARNING_RATE, make_segmenter

BLOCK = 8  # voxels a side
HIDDEN = 0.5  # share of the blocks
NOISE = 0.1  # standard deviation, on what is not hidden
WIDTH = 16  # channels before the last convolution
HEAD = "model.2."  # the segmenter's last layer, whose width is that of its task

DIFFERENCES = (("synthetic", "scratch"), ("real", "scratch"), ("synthetic", "real"))


def hide(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images with half of their blocks of 8 voxels a side replaced by uniform noise in [0, 1], and noise on the rest.

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
    """Parameters of all layers before the head, by name, on the CPU: the `start` of `train_segmenter`."""
    return {name: value.detach().cpu() for name, value in segmenter.state_dict().items() if not name.startswith(HEAD)}


def pretrain(
    images: Tensor,
    *,
    seed: int,
    iterations: int = ITERATIONS,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Tensor]:
    """Learn to restore `images` and return the network's `body`. No label is seen.

    The schedule and the changes of gain and shift are the segmenter's own. The loss is the mean absolute error over all voxels
    but those that are 0 in every channel, which holds the padding. `on_step(step, loss)` is called after each step, from 1.
    """
    device = torch.device(device)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    segmenter = make_segmenter(images.shape[1], WIDTH)
    network = nn.Sequential(segmenter, nn.Conv3d(WIDTH, images.shape[1], 1)).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=iterations)
    for step in range(1, iterations + 1):
        chosen = torch.randint(0, len(images), (BATCH_SIZE,), generator=generator)
        seen = (images[chosen] > 0).any(1, keepdim=True).to(device)
        gain = 1 + 0.2 * (torch.rand(BATCH_SIZE, 1, 1, 1, 1, generator=generator) - 0.5)
        shift = 0.1 * (torch.rand(BATCH_SIZE, 1, 1, 1, 1, generator=generator) - 0.5)
        wanted = images[chosen] * gain + shift
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            restored = network(hide(wanted, generator).to(device))
        errors = (restored.float() - wanted.to(device)).abs() * seen
        loss = errors.sum() / (seen.sum() * images.shape[1]).clamp_min(1)
        optimizer.zero_grad()
        loss.backward()
        if torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0).isfinite():
            optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, loss.item())
    return body(segmenter)
