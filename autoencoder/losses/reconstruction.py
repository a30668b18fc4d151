"""Reconstruction losses, each averaged over the voxels inside the field of view only. Axes: (B, C, X, Y, Z).

`fov` is boolean, (B, 1, X, Y, Z): False where a volume was padded. Padding has no true values, so it must not influence
the model. Each volume counts the same, however much of it is padding. So the loss of a batch is the mean loss of its
parts, over however many processes or accumulated parts it is divided.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..posterior import DiagonalGaussian3D, LatentDistribution
from ..vq import QuantisedLatents


def masked_mean(values: Tensor, fov: Tensor, emphasis: Tensor | None = None) -> Tensor:
    """Average `values` (B, C, X, Y, Z) over the True voxels of `fov` (B, 1, X, Y, Z), then over volumes; a volume
    without any counts as 0.

    Args:
        emphasis: (B, 1, X, Y, Z), how much each voxel counts beside the others of its volume.
    """
    weight, least = fov.to(values.dtype).expand_as(values), 1.0
    if emphasis is not None:
        weight = weight * emphasis
        least = torch.finfo(weight.dtype).tiny  # the weights of a volume may sum to less than 1
    return ((values * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(least)).mean()


def difference(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return reconstruction - target. Raises: ValueError for different shapes, which would broadcast: one channel
    against all.
    """
    if reconstruction.shape != target.shape:
        raise ValueError(
            f"reconstruction is {tuple(reconstruction.shape)}, its target {tuple(target.shape)}: do the autoencoder's "
            "in_channels and out_channels agree with the data?"
        )
    return reconstruction - target


def l1_loss(reconstruction: Tensor, target: Tensor, fov: Tensor, emphasis: Tensor | None = None) -> Tensor:
    """Compute the mean absolute error inside the field of view, weighted by `emphasis` (`masked_mean`)."""
    return masked_mean(difference(reconstruction, target).abs(), fov, emphasis)


def mse_loss(reconstruction: Tensor, target: Tensor, fov: Tensor, emphasis: Tensor | None = None) -> Tensor:
    """Compute the mean squared error inside the field of view, weighted by `emphasis` (`masked_mean`)."""
    return masked_mean(difference(reconstruction, target) ** 2, fov, emphasis)


def gradient_loss(reconstruction: Tensor, target: Tensor, fov: Tensor, emphasis: Tensor | None = None) -> Tensor:
    """Compute the mean absolute error of the forward differences along each axis, where both voxels are inside (Mathieu
    et al. 2016, Eq. 6, alpha = 1).

    It rewards sharp edges, where an absolute error alone accepts a blur. With `emphasis` (`masked_mean`), a pair has
    the larger weight of its two voxels.
    """
    error, losses = difference(reconstruction, target), []
    for axis in (2, 3, 4):
        n = error.shape[axis] - 1
        both = fov.narrow(axis, 0, n) & fov.narrow(axis, 1, n)
        weight = None
        if emphasis is not None:
            weight = torch.maximum(emphasis.narrow(axis, 0, n), emphasis.narrow(axis, 1, n))
        losses.append(masked_mean((error.narrow(axis, 1, n) - error.narrow(axis, 0, n)).abs(), both, weight))
    return sum(losses) / 3  # pyright: ignore[reportReturnType]


def spectrum_loss(reconstruction: Tensor, target: Tensor, fov: Tensor) -> Tensor:
    """Compute the mean squared logarithm of the ratio of powers, over bands of spatial frequency from 0.1 to 0.5 cycles
    per voxel, each divided by direction: by the axis along which the frequency is highest. A ratio of 2 costs 0.48. The
    power of a part of a band is the batch's mean under a Hann window. White noise of standard deviation 0.003 (about
    the steps of 8 bits) is added to both powers; otherwise flat regions, such as air, would cost more than everything
    else.

    Scans differ in sharpness by axis (thick slices). Bands of all directions together can agree although one axis is
    too soft and another too sharp.

    A decoder that is trained for the mean of all possible volumes loses the fine detail that it cannot know, and the
    power there. This loss restores the power, whatever its phase; the other losses put it in the right places.

    Raises: ValueError for other shapes (`difference`).
    """
    difference(reconstruction, target)
    window = torch.ones((), device=target.device)
    for n in target.shape[2:]:
        window = window[..., None] * torch.hann_window(n, device=target.device)
    pairs = torch.stack([torch.where(fov, reconstruction, target), target]).float()  # padding has no truth
    axes = [torch.fft.fftfreq(n, device=target.device) for n in target.shape[2:]]
    axes[2] = axes[2][: target.shape[4] // 2 + 1].abs()  # of a real transform, which has one half
    with torch.autocast(target.device.type, enabled=False):
        power = (torch.fft.rfftn(pairs * window, dim=(-3, -2, -1)).abs() ** 2).mean((1, 2))  # (2, X, Y, Z / 2 + 1)
    power = power / window.square().sum()  # of white noise: its variance
    components = torch.stack(torch.meshgrid(*axes, indexing="ij")).abs()  # (3, X, Y, Z / 2 + 1)
    frequency, direction = torch.linalg.vector_norm(components, dim=0), components.argmax(0)
    bands = [(frequency >= low / 20) & (frequency < (low + 1) / 20) for low in range(2, 10)]
    parts = [band & (direction == axis) for band in bands for axis in range(3)]
    sums = torch.stack([power[:, part].mean(1) for part in parts if part.any()], dim=1) + 1e-5
    return (sums[0] / sums[1]).log().square().mean()


def cells_inside(fov: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Map (B, 1, X, Y, Z) boolean to (B, 1, h, w, d) boolean: True for latent voxels that contain at least one voxel of
    the field of view.
    """
    return F.adaptive_max_pool3d(fov.float(), shape) > 0


def kl_loss(posterior: DiagonalGaussian3D, fov: Tensor) -> Tensor:
    """Compute the mean KL per latent element in nats, over the latent voxels inside the field of view."""
    values = posterior.kl_map()
    return masked_mean(values, cells_inside(fov, values.shape[2:]))


def commitment_loss(latents: QuantisedLatents, fov: Tensor) -> Tensor:
    """Compute the mean squared distance between latents and their codes, over the latent voxels inside the field of
    view (van den Oord et al. 2017, Eq. 3, last term). It keeps the encoder near the codes, which follow by moving
    averages.
    """
    values = latents.distance_map()
    return masked_mean(values, cells_inside(fov, values.shape[2:]))


def latent_loss(latents: LatentDistribution, fov: Tensor) -> tuple[str, Tensor]:
    """Return the name and value of the latents' regularization: the KL of a Gaussian posterior, or the commitment to a
    codebook."""
    if isinstance(latents, QuantisedLatents):
        return "commitment", commitment_loss(latents, fov)
    assert isinstance(latents, DiagonalGaussian3D)
    return "kl", kl_loss(latents, fov)
