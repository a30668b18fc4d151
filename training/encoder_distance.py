"""How far generated volumes are from held-out ones in the features of the autoencoder's encoder: a validation figure of
a diffusion model's training. `evaluation/` measures with the same features and distance.

Samples are (N, F) arrays with one row per volume; N may differ.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder import VolumeAutoencoder
from autoencoder.losses.perceptual import EncoderFeatures
from volumes import pad_to_multiple

from .splits import PaddedVolumes, WholeVolume

BLOCK = 1024  # rows of a kernel matrix at a time
MIN_SPREAD = 0.1  # of features, see `standardize`: cubic kernels are drowned by rare features without it


class EncoderDistance:
    """The kernel distance of generated volumes from held-out ones, beside its floor.

    The floor is the distance of as many training volumes from the same held-out ones: what a perfect model would have.
    Both are noisy for few volumes, and may be below 0; the held-out volumes and the noise are always the same.

    Args:
        vae: the autoencoder, on the device of the training.
        training: the training volumes.
    Raises: ValueError if the autoencoder has no encoder with features.
    """

    def __init__(self, vae: VolumeAutoencoder, training: PaddedVolumes):
        if not list(vae.encoder.parameters()):
            raise ValueError(
                f"loop.sample_every: {type(vae).__name__} has no encoder whose features could be compared; set it to 0"
            )
        self.statistics, self.training, self.device = EncoderStatistics(vae), training, vae.device

    def row(self, generated: Tensor, item: WholeVolume, number: int, count: int) -> np.ndarray:
        """Return the features (3, F) of a generated volume (C, X, Y, Z) in [-1, 1], of the held-out volume `item` whose
        conditions it has, and of training volume `number` of `count` that are spread over all. Outside the field of
        view the generated volume counts as -1, as the others are."""
        shown = item["fov"].to(generated.device)
        generated = torch.where(shown, generated, torch.full_like(generated, -1))
        other = self.training[number * len(self.training) // count]
        volumes = ((generated, item["fov"]), (item["image"], item["fov"]), (other["image"], other["fov"]))
        return np.stack([self._features(image, fov) for image, fov in volumes])

    def compare(self, rows: Sequence[np.ndarray]) -> dict[str, float]:
        """Return the distance of all rows, and its floor; NaN if a generated volume is not finite."""
        generated, held_out, training = np.stack(rows, axis=1)
        sets = {"generated": generated, "held_out": held_out, "training": training}
        sets = standardize(sets, "training", MIN_SPREAD)
        finite = bool(np.isfinite(generated).all())
        distance = kernel_distance(sets["generated"], sets["held_out"]) if finite else float("nan")
        return {
            "kernel_distance": distance,
            "kernel_distance/floor": kernel_distance(sets["training"], sets["held_out"]),
        }

    def _features(self, image: Tensor, fov: Tensor) -> np.ndarray:
        inside = image.to(self.device)[:, *box(fov)]
        return self.statistics((inside[None].float() + 1) / 2)[0].double().cpu().numpy()


def box(fov: Tensor) -> tuple[slice, slice, slice]:
    """Return the part of a padded volume that is not padding; `fov` (1, X, Y, Z) is true there."""
    inside = fov[0].nonzero()
    x, y, z = (slice(int(low), int(high) + 1) for low, high in zip(inside.amin(0), inside.amax(0), strict=True))
    return x, y, z


class EncoderStatistics(nn.Module):
    """Mean and standard deviation over space of every channel at the end of each level of an autoencoder's encoder.

    Sides are padded to the stride with the lowest intensity; a latent voxel weighs as much as the share of it that is
    not padding.

    Args:
        vae: frozen here. If it encodes channels separately, features are of each channel.
    """

    def __init__(self, vae: VolumeAutoencoder):
        super().__init__()
        self.network = EncoderFeatures(vae)

    @torch.inference_mode()
    def forward(self, volumes: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) in [0, 1] to (B, F)."""
        placement = pad_to_multiple(tuple(volumes.shape[2:]), self.network.stride)
        levels = self.network(placement.apply(2 * volumes - 1, -1.0))
        inside = placement.apply(torch.ones_like(volumes[:1, :1]), 0.0)
        return level_statistics(levels, inside, len(volumes))


def standardize(sets: Mapping[str, np.ndarray], by: str, least: float = 0.0) -> dict[str, np.ndarray]:
    """Subtract the mean of every column in set `by`, and divide by its standard deviation there; a constant column
    keeps its units.

    No standard deviation counts as less than `least` times the root mean square of those of all columns. Else a column
    that is nearly constant in `by`, such as a unit of a network that hardly ever fires, can outweigh all others.
    """
    mean, std = sets[by].mean(0), sets[by].std(0)
    std = np.maximum(std, least * np.sqrt((std**2).mean()))
    std = np.where(std == 0, 1.0, std)
    return {name: (rows - mean) / std for name, rows in sets.items()}


def kernel_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the unbiased squared maximum mean discrepancy under the kernel `(x y / F + 1)^3` (Binkowski et al. 2018,
    section 4).

    It is 0 on average for samples of one distribution, whatever their counts, so it may be negative.

    Raises: ValueError for samples of different features, of fewer than 2, or that are not finite.
    """
    first, second = checked_samples(first, second)

    def kernel_sums(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
        """Sum all entries of the kernel matrix, and those of its diagonal; some rows are held at a time."""
        total = diagonal = 0.0
        for start in range(0, len(x), BLOCK):
            values = (x[start : start + BLOCK] @ y.T / x.shape[1] + 1) ** 3
            total, diagonal = total + values.sum(), diagonal + np.trace(values, offset=start)
        return total, diagonal

    def within(x: np.ndarray) -> float:
        total, diagonal = kernel_sums(x, x)
        return (total - diagonal) / (len(x) * (len(x) - 1))

    between = kernel_sums(first, second)[0] / (len(first) * len(second))
    return float(within(first) + within(second) - 2 * between)


def checked_samples(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"samples of {first.shape} and {second.shape}: both must be (volumes, features)")
    if min(len(first), len(second)) < 2:
        raise ValueError(f"samples of {len(first)} and {len(second)} volumes: two of each are needed")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("samples hold NaN or infinity: a volume or its features are broken")
    return first, second


def level_statistics(levels: list[Tensor], inside: Tensor, batch: int) -> Tensor:
    """Take statistics of features (B * parts, ., x, y, z) of each level where `inside` (1, 1, X, Y, Z) is 1: (B, F)."""
    statistics = []
    for features in levels:
        x, y, z = features.shape[2:]
        weight = F.adaptive_avg_pool3d(inside, (x, y, z))
        weight = weight / weight.sum()
        mean = (weight * features).sum((2, 3, 4), keepdim=True)
        std = (weight * (features - mean) ** 2).sum((2, 3, 4)).sqrt()
        statistics += [mean.flatten(1).reshape(batch, -1), std.reshape(batch, -1)]
    return torch.cat(statistics, 1)
