"""A small segmenter that measures utility: always trained the same way, whatever the source of its volumes, and tested
on real ones.

Volumes are useful for a task if a network trained on them solves it on real ones (so tested by Med-DDPM, Dorjsembe et
al. 2024, for tumors). Everything but the volumes is fixed: network, schedule, augmentation and the random numbers of
each seed, so that two sources of volumes differ in nothing else. Images are (N, C, X, Y, Z) float32 in [0, 1], labels
(N, X, Y, Z) label indices, all of one shape.
"""

from collections.abc import Mapping

import torch
from monai.losses.dice import DiceCELoss
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

from evaluation.metrics.dice import dice_per_volume

from .defaults import SEGMENTER_STEPS as ITERATIONS
from .fit import OnStep, brightened, fit

BATCH_SIZE = 4
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-4


def make_segmenter(in_channels: int, num_labels: int) -> nn.Module:
    """Build a residual U-Net of three levels, about a million parameters; X, Y and Z must be multiples of 8."""
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
    on_step: OnStep | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Train a segmenter from scratch (`fit`) and return it in evaluation mode.

    Batches are sampled, brightened (`brightened`) and get noise (0.02) by generators on the CPU with this seed, so they
    are the same on every device.

    Args:
        dtype: autocast type of forward passes; None computes in float32.
        start: parameters by name that replace the random ones (`pretraining.body`); the batches stay the same.
    """
    device = torch.device(device)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    segmenter = make_segmenter(images.shape[1], num_labels)
    if start is not None:
        segmenter.load_state_dict({**segmenter.state_dict(), **start})
    segmenter.to(device)
    criterion = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)

    def batch_loss() -> Tensor:
        chosen = torch.randint(0, len(images), (BATCH_SIZE,), generator=generator)
        batch = brightened(images[chosen], generator)
        batch = batch + 0.02 * torch.randn(batch.shape, generator=generator)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = segmenter(batch.to(device))
        return criterion(logits.float(), labels[chosen][:, None].long().to(device))

    fit(
        segmenter,
        batch_loss,
        iterations=iterations,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        on_step=on_step,
    )
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
    """Compute the Dice of each label except the background (index 0), in the order of the labels: (N,) float32 each, in
    [0, 1]."""
    device = next(segmenter.parameters()).device
    dice: dict[int, list[Tensor]] = {label: [] for label in range(1, num_labels)}
    for start in range(0, len(images), batch_size):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            predicted = segmenter(images[start : start + batch_size].to(device)).argmax(1).cpu()
        for label, scores in dice.items():
            scores.append(dice_per_volume(predicted, labels[start : start + batch_size], label))
    return [torch.cat(scores) for scores in dice.values()]
