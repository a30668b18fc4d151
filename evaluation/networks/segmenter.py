"""The test of usefulness: a small segmenter, the same minute of training whatever it learns from, judged on real subjects.

Volumes are useful for a task when a network trained on them does the task on real ones (Med-DDPM, Dorjsembe et al. 2024, judged its
tumors so). Everything but the volumes is fixed: network, schedule, augmentation and the draws of each seed, so that two sources of
volumes differ in nothing else. Images are (N, C, X, Y, Z) float32 in [0, 1], labels (N, X, Y, Z) label indices, all of one shape.
"""

from collections.abc import Callable, Mapping

import torch
from monai.losses.dice import DiceCELoss
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

from evaluation.metrics.dice import dice_per_volume

from .defaults import SEGMENTER_STEPS as ITERATIONS

BATCH_SIZE = 4
LEARNING_RATE = 2e-3


def make_segmenter(in_channels: int, num_labels: int) -> nn.Module:
    """Three-level residual U-Net, about a million parameters; X, Y and Z must be multiples of 8."""
    return UNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=num_labels,
        channels=(24, 48, 96, 96),
        strides=(2, 2, 2),
        num_res_units=1,
        norm=("instance", {"affine": True}),
    )


def train_segmenter(
    images: Tensor,
    labels: Tensor,
    num_labels: int,
    *,
    seed: int,
    iterations: int = ITERATIONS,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    on_step: Callable[[int, float], None] | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Train a segmenter from scratch with AdamW under a one-cycle schedule; returns it in evaluation mode.

    Every batch is drawn, brightened (gain 0.9 to 1.1, shift -0.05 to 0.05) and given noise (0.02) by generators on the CPU that
    `seed` starts, so the draws are the same on every device. A step with a non-finite gradient is skipped. `dtype` is what forward
    passes autocast to; None computes in float32.
    `on_step(step, loss)` is called after each step, counted from 1. `start` holds parameters by name that take the place of the
    random ones (`pretraining.body`); no draw changes by it.
    """
    device = torch.device(device)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    segmenter = make_segmenter(images.shape[1], num_labels)
    if start is not None:
        segmenter.load_state_dict({**segmenter.state_dict(), **start})
    segmenter.to(device)
    optimizer = torch.optim.AdamW(segmenter.parameters(), LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=iterations)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    for step in range(1, iterations + 1):
        chosen = torch.randint(0, len(images), (BATCH_SIZE,), generator=generator)
        gain = 1 + 0.2 * (torch.rand(BATCH_SIZE, 1, 1, 1, 1, generator=generator) - 0.5)
        shift = 0.1 * (torch.rand(BATCH_SIZE, 1, 1, 1, 1, generator=generator) - 0.5)
        batch = images[chosen] * gain + shift
        batch = batch + 0.02 * torch.randn(batch.shape, generator=generator)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = segmenter(batch.to(device))
        loss = loss_of(logits.float(), labels[chosen][:, None].long().to(device))
        optimizer.zero_grad()
        loss.backward()
        if torch.nn.utils.clip_grad_norm_(segmenter.parameters(), 1.0).isfinite():
            optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, loss.item())
    return segmenter.eval()


@torch.inference_mode()
def volume_dice(
    segmenter: nn.Module,
    images: Tensor,
    labels: Tensor,
    num_labels: int,
    *,
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
) -> list[Tensor]:
    """Dice of each label but the background (index 0), in the order of the labels: (N,) float32 each, in [0, 1]."""
    device = next(segmenter.parameters()).device
    rows: dict[int, list[Tensor]] = {label: [] for label in range(1, num_labels)}
    for start in range(0, len(images), batch_size):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            predicted = segmenter(images[start : start + batch_size].to(device)).argmax(1).cpu()
        for label, scores in rows.items():
            scores.append(dice_per_volume(predicted, labels[start : start + batch_size], label))
    return [torch.cat(scores) for scores in rows.values()]


def segmenter_dice(
    segmenter: nn.Module,
    images: Tensor,
    labels: Tensor,
    num_labels: int,
    *,
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
) -> list[float]:
    """Mean of `volume_dice` over the volumes, of each label but the background."""
    rows = volume_dice(segmenter, images, labels, num_labels, dtype=dtype, batch_size=batch_size)
    return [row.mean().item() for row in rows]
