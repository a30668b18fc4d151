"""Residual noise: the texture that an autoencoder loses, added back as strong, as coarse, and as variable between
volumes as in the volumes that it was fitted on.

Fine noise does not fit into latents, so decoded volumes are all equally smooth. The model of the missing noise is
fitted on real volumes and their reconstructions. It is Gaussian noise whose spectrum is the power that reconstructions
lack. Its strength follows the decoded intensity (none where intensities are clipped), and its level is sampled from
those of the real volumes. It adds no information. Axes: (C, X, Y, Z); intensities in [-1, 1].
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cli.live_bar import LiveBar
from volumes import VolumeDataset, pad_to_multiple
from volumes.description import NOISE_BINS, NOISE_LEVELS, NOISE_RADIUS, ChannelNoise
from volumes.foreground import background_index
from volumes.placement import center_crop

from .base import VolumeAutoencoder

MAX_SIDE = 48  # voxels a side of the center crops whose spectra are compared


def measure_noise(dataset: VolumeDataset, vae: VolumeAutoencoder, *, progress: bool = True) -> list[ChannelNoise]:
    """Run `fit_noise` on a data set and its reconstructions from the posterior's mean, on the autoencoder's device.

    Raises: ValueError for label maps, and as `fit_noise` does.
    """
    if dataset.config.image_labels:
        raise ValueError("noise: label maps have no residual noise; omit it")
    sides = [min(one) for one in zip(*dataset.shapes, strict=True)]
    return fit_noise(_reconstructions(dataset, vae, progress), sides)


@torch.inference_mode()
def _reconstructions(
    dataset: VolumeDataset, vae: VolumeAutoencoder, progress: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for index in LiveBar(range(len(dataset)), desc="measure noise", unit="volume", disable=None if progress else True):
        sample = dataset[index]
        image = sample["image"]
        placement = pad_to_multiple(tuple(image.shape[1:]), vae.stride)
        padded = placement.apply(image, -1.0)[None].to(vae.device, vae.dtype)
        mean = vae.encode(padded, return_dict=False)[0].mean
        made = vae.decode(mean, return_dict=False)[0][0].float().cpu()
        made = placement.undo(made)
        if "seen" in sample:  # outside the field of view nothing is missing
            made = torch.where(sample["seen"], made, image)
        if dataset.config.empty_background and "mask" in sample:  # nor where pipelines empty it
            made = torch.where(sample["mask"] == background_index(dataset.labels), -1.0, made)
        yield image.numpy(), made.numpy()


def check_noise_shape(shape: Sequence[int]) -> None:
    """Raise ValueError for volumes (X, Y, Z) smaller than the noise kernel on any side."""
    if min(shape) < 2 * NOISE_RADIUS + 1:
        raise ValueError(
            f"volumes of {tuple(shape)} voxels are too small for a noise model: "
            f"give {2 * NOISE_RADIUS + 1} or more per side"
        )


def fit_noise(pairs: Iterable[tuple[np.ndarray, np.ndarray]], shape: Sequence[int]) -> list[ChannelNoise]:
    """Fit the noise that reconstructions lack, channel by channel.

    Power spectra are those of Hann-windowed center crops. The noise's spectrum is the mean of real minus reconstructed,
    where positive. Its root is the transfer function of a filter (zero phase), cut to `NOISE_RADIUS`. A volume's level
    is the root of its mean squared error over that of all volumes.

    Args:
        pairs: real volumes and their reconstructions, (C, X, Y, Z) float in [-1, 1] on one grid.
        shape: (X, Y, Z) of the smallest volume; crops have this shape, or `MAX_SIDE` where a side is longer.
    Returns: the noise of each channel; its std is 0 if no power is missing.
    Raises: ValueError without pairs, and for crops smaller than the kernel.
    """
    sides = tuple(min(int(n), MAX_SIDE) for n in shape)
    check_noise_shape(shape)
    missing, errors, squares, counts, weights = 0.0, [], 0.0, 0.0, 0.0
    window = _window(sides).ravel() ** 2
    for real, made in pairs:
        made = made.clip(-1, 1)  # as the pipeline does: values outside the range are not missing noise
        missing += _power(real, sides) - _power(made, sides)
        bins = np.minimum((made + 1) / 2 * NOISE_BINS, NOISE_BINS - 1).astype(int)
        residual = (np.asarray(real, np.float64) - made) ** 2
        errors.append(residual.mean((1, 2, 3)))
        channels = range(len(real))
        squares += np.stack([np.bincount(bins[c].ravel(), residual[c].ravel(), NOISE_BINS) for c in channels])
        counts += np.stack([np.bincount(bins[c].ravel(), minlength=NOISE_BINS) for c in channels])
        seen = center_crop(bins, sides)
        weights += np.stack([np.bincount(seen[c].ravel(), window, NOISE_BINS) for c in channels])
    if not errors:
        raise ValueError("no volumes to fit a noise model on")
    return [
        _channel(
            missing[c] / len(errors),  # type: ignore[index]
            np.array([one[c] for one in errors]),
            squares[c],  # type: ignore[index]
            counts[c],  # type: ignore[index]
            weights[c],  # type: ignore[index]
        )
        for c in range(len(errors[0]))
    ]


def _window(sides: Sequence[int]) -> np.ndarray:
    """Return Hann's window, (*sides), without its two zeros.

    This is not the periodic window of `evaluation.metrics.spectrum` and `spectrum_loss`: the weight of a voxel in the
    spectrum is also its weight in the curve, and shipped noise models were fitted with this one.
    """
    return np.einsum("x,y,z->xyz", *(np.hanning(side + 2)[1:-1] for side in sides))


def _power(volume: np.ndarray, sides: tuple[int, ...]) -> np.ndarray:
    """Compute power spectra (C, *sides) of windowed center crops; their mean is the variance of what varies."""
    crop, window = np.asarray(center_crop(volume, sides), np.float64), _window(sides)
    crop = (crop - (crop * window).sum((1, 2, 3), keepdims=True) / window.sum()) * window
    return np.abs(np.fft.fftn(crop, axes=(1, 2, 3))) ** 2 / (window**2).sum()


def _channel(
    missing: np.ndarray, errors: np.ndarray, squares: np.ndarray, counts: np.ndarray, weights: np.ndarray
) -> ChannelNoise:
    """Fit the noise of one channel from `missing` mean power (*sides), `errors` (N,), the mean squared error of each
    volume, and, by bin of intensity, the squared residuals and voxel counts of whole volumes and the weight of the
    voxels that the power was measured in.
    """
    mean = missing.clip(0)
    if not mean.any():
        kernel = np.zeros((2 * NOISE_RADIUS + 1,) * 3)
        kernel[NOISE_RADIUS, NOISE_RADIUS, NOISE_RADIUS] = 1
        return ChannelNoise(kernel.tolist(), 0.0, [1.0] * NOISE_BINS, [1.0] * NOISE_LEVELS)
    kernel = np.fft.fftshift(np.fft.ifftn(np.sqrt(mean)).real)
    center = [n // 2 for n in kernel.shape]
    x, y, z = (slice(n - NOISE_RADIUS, n + NOISE_RADIUS + 1) for n in center)
    kernel = kernel[x, y, z]
    filled = counts > 0
    places = np.arange(NOISE_BINS)
    spread = np.interp(places, places[filled], squares[filled] / counts[filled])
    curve = np.sqrt(spread / np.average(spread, weights=weights))  # where the power was measured, its mean square is 1
    return ChannelNoise(
        kernel=(kernel / np.sqrt((kernel**2).sum())).tolist(),
        std=float(np.sqrt(mean.mean())),
        curve=curve.tolist(),
        levels=np.quantile(np.sqrt(errors / errors.mean()), np.linspace(0, 1, NOISE_LEVELS)).tolist(),
    )


class ResidualNoiseModel:
    """Adds the noise that `fit_noise` fitted.

    Args:
        channels: the result of `fit_noise`.
    """

    def __init__(self, channels: Sequence[ChannelNoise]):
        self.kernels = [torch.tensor(channel.kernel, dtype=torch.float32) for channel in channels]
        self.stds = [channel.std for channel in channels]
        self.curves = [np.array(channel.curve, np.float32) for channel in channels]
        self.levels = [np.array(channel.levels) for channel in channels]

    def add(self, slabs: Iterable[Tensor], seed: int) -> Iterator[Tensor]:
        """Add the noise of one volume to consecutive slabs (C, X, Y, z) along the third axis: float32, unclipped.

        The noise depends only on the seed and the position, so slabs of any thickness give the same volume.
        Raises: ValueError for another number of channels.
        """
        random = np.random.default_rng([seed])
        levels = [float(np.interp(random.random(), np.linspace(0, 1, len(q)), q)) for q in self.levels]
        done = 0
        for slab in slabs:
            if len(slab) != len(self.kernels):
                raise ValueError(f"a volume of {len(slab)} channels, a noise model of {len(self.kernels)}")
            planes = range(done, done + slab.shape[3] + 2 * NOISE_RADIUS)
            sides = (len(slab), slab.shape[1] + 2 * NOISE_RADIUS, slab.shape[2] + 2 * NOISE_RADIUS)
            drawn = [np.random.default_rng([seed, p + 1]).standard_normal(sides, np.float32) for p in planes]
            white = torch.from_numpy(np.stack(drawn, axis=-1)).to(slab.device)
            done += slab.shape[3]
            slab = slab.float()
            parts = []
            for channel, noise, kernel, std, curve, level in zip(
                slab, white, self.kernels, self.stds, self.curves, levels, strict=True
            ):
                shaped = F.conv3d(noise[None, None], kernel.to(slab.device)[None, None])[0, 0]
                parts.append(channel + std * level * _at(curve, channel) * shaped)
            yield torch.stack(parts)


def _at(curve: np.ndarray, intensities: Tensor) -> Tensor:
    """Evaluate the curve over [-1, 1], which has a value at the center of each bin, at intensities of any shape."""
    values = torch.from_numpy(curve).to(intensities.device)
    places = ((intensities.clamp(-1, 1) + 1) / 2 * len(curve) - 0.5).clamp(0, len(curve) - 1)
    below = places.floor().long().clamp(max=len(curve) - 2)
    return torch.lerp(values[below], values[below + 1], places - below)
