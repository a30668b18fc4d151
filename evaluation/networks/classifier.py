"""A small classifier of volumes, always trained the same way, so that what it is asked about is the only difference.

Images are (N, C, X, Y, Z) float32 in [0, 1], all of one shape; classes are (N,) indices.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .defaults import CLASSIFIER_STEPS as ITERATIONS

BATCH_SIZE = 16
LEARNING_RATE = 2e-3
SHIFT = 3  # voxels, by which training moves volumes along each axis at random
MIN_SIZE = 16  # voxels a side: the network halves four times


class VolumeClassifier(nn.Module):
    """Averages 2 x 2 x 2 voxels, halves three times by convolutions, and judges means and maxima over the volume."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        layers: list[nn.Module] = [nn.AvgPool3d(2)]
        for width, stride in ((32, 2), (64, 2), (64, 1), (96, 2)):
            layers += [nn.Conv3d(in_channels, width, 3, stride, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            in_channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(2 * in_channels, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> logits (B, num_classes)."""
        features = self.features(images)
        return self.head(torch.cat([features.mean((2, 3, 4)), features.amax((2, 3, 4))], dim=1))


def train_classifier(
    images: Tensor,
    classes: Tensor,
    num_classes: int,
    *,
    seed: int,
    iterations: int = ITERATIONS,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> VolumeClassifier:
    """Train a classifier from scratch with AdamW under a one-cycle schedule; returns it in evaluation mode.

    Every class is drawn equally often, whatever its share, so that always saying the commonest gains nothing. Volumes
    are moved by up to `SHIFT` voxels (their sides are joined: volumes should end in background) and given noise (0.05).
    All draws are on the CPU, from generators that `seed` starts. `dtype` is what forward passes autocast to; None
    computes in float32. `on_step(step, loss)` is called after each step, counted from 1.

    Raises: ValueError if a class has no volume, or for volumes with less than `MIN_SIZE` voxels a side.
    """
    members = [torch.nonzero(classes == index)[:, 0] for index in range(num_classes)]
    if empty := [index for index, of_class in enumerate(members) if not len(of_class)]:
        raise ValueError(f"classes number {empty} have no volume to learn from")
    if min(images.shape[2:]) < MIN_SIZE:
        raise ValueError(f"volumes of {tuple(images.shape[2:])} voxels are too small; {MIN_SIZE} a side are needed")
    device = torch.device(device)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = VolumeClassifier(images.shape[1], num_classes).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=iterations)
    for step in range(1, iterations + 1):
        wanted = torch.randint(0, num_classes, (BATCH_SIZE,), generator=generator)
        place = torch.rand(BATCH_SIZE, generator=generator)
        chosen = [members[w][int(p * len(members[w]))] for w, p in zip(wanted.tolist(), place.tolist(), strict=True)]
        shifts = torch.randint(-SHIFT, SHIFT + 1, (BATCH_SIZE, 3), generator=generator).tolist()
        moved = [images[i].roll(shift, (1, 2, 3)) for i, shift in zip(chosen, shifts, strict=True)]
        batch = torch.stack(moved)
        batch = batch + 0.05 * torch.randn(batch.shape, generator=generator)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = classifier(batch.to(device))
        loss = F.cross_entropy(logits.float(), wanted.to(device))
        optimizer.zero_grad()
        loss.backward()
        if torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0).isfinite():
            optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, loss.item())
    return classifier.eval()


@torch.inference_mode()
def classify(
    classifier: nn.Module, images: Tensor, *, dtype: torch.dtype | None = None, batch_size: int = 32
) -> Tensor:
    """The class that the classifier gives each volume, (N,) indices."""
    device = next(classifier.parameters()).device
    found = []
    for start in range(0, len(images), batch_size):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            found.append(classifier(images[start : start + batch_size].to(device)).argmax(1).cpu())
    return torch.cat(found)
