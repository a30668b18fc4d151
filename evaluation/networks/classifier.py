"""A small classifier of volumes, always trained the same way, so that the volumes are the only difference; and the same
network as a regressor of a number.

Images are (N, C, X, Y, Z) float32 in [0, 1], all of one shape; classes are (N,) indices, numbers (N,) in any unit.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .defaults import CLASSIFIER_STEPS as ITERATIONS
from .fit import OnStep, fit

BATCH_SIZE = 16
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-2
SHIFT = 3  # voxels: training moves volumes by up to that along each axis
MIN_SIZE = 16  # voxels per side: the network halves four times


class VolumeClassifier(nn.Module):
    """Average 2 x 2 x 2 voxels, halve three times by convolutions, and classify by means and maxima over the volume."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        layers: list[nn.Module] = [nn.AvgPool3d(2)]
        for width, stride in ((32, 2), (64, 2), (64, 1), (96, 2)):
            layers += [nn.Conv3d(in_channels, width, 3, stride, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            in_channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(2 * in_channels, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) to logits (B, num_classes)."""
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
    on_step: OnStep | None = None,
) -> VolumeClassifier:
    """Train a classifier from scratch (`fit`) and return it in evaluation mode.

    Every class is sampled equally often, whatever its share, so that always answering the commonest gains nothing.
    Volumes are moved by up to `SHIFT` voxels (their sides are joined: volumes should end in background) and get noise
    (0.05). Batches are sampled on the CPU by generators with this seed.

    Args:
        dtype: autocast type of forward passes; None computes in float32.
    Raises: ValueError for a class without volumes, and for volumes with fewer than `MIN_SIZE` voxels per side.
    """
    members = [torch.nonzero(classes == index)[:, 0] for index in range(num_classes)]
    if empty := [index for index, of_class in enumerate(members) if not len(of_class)]:
        raise ValueError(f"classes number {empty} have no volume to train on")
    check_sides(images)
    device = torch.device(device)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = VolumeClassifier(images.shape[1], num_classes).to(device)

    def batch_loss() -> Tensor:
        target = torch.randint(0, num_classes, (BATCH_SIZE,), generator=generator)
        place = torch.rand(BATCH_SIZE, generator=generator)
        chosen = [members[c][int(p * len(members[c]))] for c, p in zip(target.tolist(), place.tolist(), strict=True)]
        batch = _augmented(images, chosen, generator)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = classifier(batch.to(device))
        return F.cross_entropy(logits.float(), target.to(device))

    fit(
        classifier,
        batch_loss,
        iterations=iterations,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        on_step=on_step,
    )
    return classifier.eval()


@torch.inference_mode()
def classify(
    classifier: nn.Module, images: Tensor, *, dtype: torch.dtype | None = None, batch_size: int = 32
) -> Tensor:
    """Predict the class of each volume, (N,) indices."""
    device = next(classifier.parameters()).device
    predicted = []
    for start in range(0, len(images), batch_size):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            predicted.append(classifier(images[start : start + batch_size].to(device)).argmax(1).cpu())
    return torch.cat(predicted)


class VolumeRegressor(nn.Module):
    """The network of the classifier with one output, for a number of this mean and standard deviation."""

    def __init__(self, in_channels: int, mean: float, std: float):
        super().__init__()
        self.network = VolumeClassifier(in_channels, 1)
        self.mean, self.std = mean, std

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) to numbers (B,) in standard deviations from the mean."""
        return self.network(images)[:, 0]


def train_regressor(
    images: Tensor,
    numbers: Tensor,
    *,
    seed: int,
    iterations: int = ITERATIONS,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    on_step: OnStep | None = None,
) -> VolumeRegressor:
    """Train a regressor of a number from scratch and return it in evaluation mode, as `train_classifier` but with every
    volume sampled equally often, and with the squared error as its loss.

    Raises: ValueError for numbers that do not vary, and as `train_classifier`.
    """
    std = float(numbers.std()) if len(numbers) > 1 else 0.0
    if std == 0:
        raise ValueError(f"the number is the same for all {len(numbers)} volumes to train on: nothing can be learned")
    check_sides(images)
    device = torch.device(device)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    regressor = VolumeRegressor(images.shape[1], float(numbers.mean()), std).to(device)

    def batch_loss() -> Tensor:
        chosen = torch.randint(0, len(images), (BATCH_SIZE,), generator=generator)
        batch = _augmented(images, chosen.tolist(), generator)
        target = (numbers[chosen] - regressor.mean) / regressor.std
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            predicted = regressor(batch.to(device))
        return F.mse_loss(predicted.float(), target.to(device))

    fit(
        regressor,
        batch_loss,
        iterations=iterations,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        on_step=on_step,
    )
    return regressor.eval()


@torch.inference_mode()
def regress(
    regressor: VolumeRegressor, images: Tensor, *, dtype: torch.dtype | None = None, batch_size: int = 32
) -> Tensor:
    """Predict the number of each volume, (N,) float32."""
    device = next(regressor.parameters()).device
    predicted = []
    for start in range(0, len(images), batch_size):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            predicted.append(regressor(images[start : start + batch_size].to(device)).float().cpu())
    return torch.cat(predicted) * regressor.std + regressor.mean


def check_sides(images: Tensor) -> None:
    """Raise ValueError for volumes with fewer than `MIN_SIZE` voxels per side."""
    if min(images.shape[2:]) < MIN_SIZE:
        raise ValueError(f"volumes of {tuple(images.shape[2:])} voxels are too small; give {MIN_SIZE} or more per side")


def _augmented(images: Tensor, chosen: Sequence[int], generator: torch.Generator) -> Tensor:
    """Make a batch of the chosen images, moved and with noise."""
    shifts = torch.randint(-SHIFT, SHIFT + 1, (len(chosen), 3), generator=generator).tolist()
    batch = torch.stack([images[i].roll(shift, (1, 2, 3)) for i, shift in zip(chosen, shifts, strict=True)])
    return batch + 0.05 * torch.randn(batch.shape, generator=generator)
