"""MonaiVQVAE: MONAI's VQVAE as one of ours. Axes: (B, C, X, Y, Z).

Its layers are MONAI's, which see a few voxels around each; so they can work slab by slab (`autoencoder.streaming`).
The codebook is ours: it finds codes without a table of all latents by all codes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from monai.networks.nets.vqvae import VQVAE, VQVAEResidualUnit
from torch import Tensor, nn

from autoencoder.base import LIVE_ACTIVATIONS, LatentMean, LatentStd
from autoencoder.codebook import Codebook
from autoencoder.layers import Conv3d, as_stride
from autoencoder.monai.intensity import intensity_scale
from autoencoder.streaming import delayed, spread, streaming
from autoencoder.vq import QuantisedAutoencoder
from cli.settings import FiniteFloat, NonNegativeInt, PositiveInt, ShareBelowOne, TwoOrMore

Level = Sequence[NonNegativeInt]


class StreamedTranspose3d(nn.ConvTranspose3d):
    """nn.ConvTranspose3d that can also work on a stream of slabs."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, X, Y, Z)."""
        if not streaming():
            return super().forward(x)
        reach = self.dilation[2] * (self.kernel_size[2] - 1) + 1
        return spread(self, x, self._unpadded, reach, self.stride[2], int(self.padding[2]))

    def _unpadded(self, x: Tensor) -> Tensor:
        """Convolve without cropping along the third axis."""
        empty = x.shape[4] == 0  # a convolution refuses an empty volume
        x = x.new_zeros((*x.shape[:4], 1)) if empty else x
        (px, py, _), output_padding = (int(n) for n in self.padding), self.output_padding
        stride, dilation = as_stride(self.stride), as_stride(self.dilation)
        made = F.conv_transpose3d(x, self.weight, self.bias, stride, (px, py, 0), output_padding, self.groups, dilation)
        return made[..., :0] if empty else made


class StreamedResidualUnit(VQVAEResidualUnit):
    """MONAI's residual unit, which can also work on a stream of slabs."""

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(x + conv2(conv1(x)))."""
        hidden = self.conv2(self.conv1(x))
        return F.relu(delayed(self, x, hidden) + hidden)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv3d: Conv3d,
    nn.ConvTranspose3d: StreamedTranspose3d,
    VQVAEResidualUnit: StreamedResidualUnit,
}


class MonaiVQVAE(QuantisedAutoencoder):
    """`monai.networks.nets.VQVAE` (van den Oord et al. 2017; Tudosiu et al. 2022), with ReLU.

    Args:
        in_channels, out_channels: channels of the volume.
        latent_channels: numbers in a code (MONAI's embedding_dim).
        num_codes, codebook_decay: size of the codebook, and weight of the past in its moving averages (MONAI's
            num_embeddings and decay).
        channels: width of each level, finest first.
        num_res_layers: residual units per level.
        num_res_channels: width inside them, per level.
        downsample: stride, kernel, dilation and padding of each level's convolution (downsample_parameters).
        upsample: the same and the output padding of each transposed convolution, coarsest first (upsample_parameters).
        value_range: the intensities that the original takes for our -1 and 1.
        latents_mean, latents_std: statistics of the raw latents: 0, and one over the original's scale factor.
        channel_names: names of several image channels, in order.
        license: of the weights, where generated volumes must name it.
        data: how its training volumes were prepared (`volumes.data.preprocessing`).
        subjects: records of the training subjects (`volumes.data.subjects`).
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["StreamedResidualUnit"]
    _repeated_blocks = ["StreamedResidualUnit"]

    @register_to_config
    def __init__(
        self,
        in_channels: PositiveInt = 1,
        out_channels: PositiveInt = 1,
        latent_channels: PositiveInt = 64,
        num_codes: TwoOrMore = 32,
        codebook_decay: ShareBelowOne = 0.5,
        channels: Sequence[PositiveInt] = (96, 96, 192),
        num_res_layers: NonNegativeInt = 3,
        num_res_channels: Sequence[PositiveInt] = (96, 96, 192),
        downsample: Sequence[Level] = ((2, 4, 1, 1), (2, 4, 1, 1), (2, 4, 1, 1)),
        upsample: Sequence[Level] = ((2, 4, 1, 1, 0), (2, 4, 1, 1, 0), (2, 4, 1, 1, 0)),
        value_range: Sequence[FiniteFloat] = (-1.0, 1.0),
        latents_mean: Sequence[LatentMean] | None = None,
        latents_std: Sequence[LatentStd] | None = None,
        channel_names: Sequence[str] | None = None,
        license: str | None = None,
        data: dict[str, object] | None = None,
        subjects: Sequence[Any] | None = None,
    ):
        super().__init__()
        if not len(channels) == len(num_res_channels) == len(downsample) == len(upsample):
            raise ValueError(
                f"channels {channels}, num_res_channels {num_res_channels}, downsample {downsample} and upsample "
                f"{upsample} need one entry per level"
            )
        intensity_scale(value_range)
        _check_levels(downsample, upsample)
        self.patch_size = as_stride(1)
        self.stride = as_stride(math.prod(level[0] for level in downsample))
        network = VQVAE(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=out_channels,
            channels=channels,
            num_res_layers=num_res_layers,
            num_res_channels=num_res_channels,
            downsample_parameters=[tuple(level) for level in downsample],  # pyright: ignore[reportArgumentType]
            upsample_parameters=[tuple(level) for level in upsample],  # pyright: ignore[reportArgumentType]
            num_embeddings=1,  # its codebook is replaced
            embedding_dim=latent_channels,
        )
        self.encoder, self.decoder = network.encoder, network.decoder
        for module in self.modules():
            if replacement := _CLASSES.get(type(module)):
                module.__class__ = replacement
        self.codebook = Codebook(num_codes, latent_channels, codebook_decay)
        self.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
        self._check_statistics(latents_mean, latents_std)

    def activation_bytes(self, shape: Sequence[int], batch: int = 1) -> int:
        """Estimate the bytes that encoding or decoding `shape` (X, Y, Z) voxels takes, as `VolumeAutoencoder` does."""
        config, voxels = self.config, math.prod(shape) * batch
        elements = voxels * max(config["in_channels"], config["out_channels"])
        for width, level in zip(config["channels"], config["downsample"], strict=True):
            voxels = max(voxels // level[0] ** 3, 1)
            elements = max(elements, width * voxels)
        return LIVE_ACTIVATIONS * elements * self.dtype.itemsize

    def _encode(self, x: Tensor) -> Tensor:
        scale, shift = intensity_scale(self.config["value_range"])
        return self.encoder(x * scale + shift)

    def _decode(self, z: Tensor) -> Tensor:
        scale, shift = intensity_scale(self.config["value_range"])
        mean, std = (v.view(1, -1, 1, 1, 1) for v in self._statistics(z))
        return (self.decoder(self._decodable(z * std + mean)) - shift) / scale


def _check_levels(downsample: Sequence[Level], upsample: Sequence[Level]) -> None:
    """Raise ValueError unless each level divides or multiplies sides by its stride, without a rest."""
    for name, levels, entries in (("downsample", downsample, 4), ("upsample", upsample, 5)):
        for level in levels:
            if len(level) != entries or min(level[:3]) < 1:
                raise ValueError(
                    f"{name}: {level!r:.80} is not a stride, a kernel, a dilation, ... ({entries} numbers)"
                )
            stride, kernel, dilation, padding, *more = level
            if 2 * padding != dilation * (kernel - 1) + 1 - stride + sum(more) or padding < sum(more):
                raise ValueError(
                    f"{name}: {level!r:.80} does not change sides by its stride alone, such as (2, 4, 1, 1); only such "
                    "levels can be converted"
                )
    if math.prod(level[0] for level in downsample) != math.prod(level[0] for level in upsample):
        raise ValueError(f"downsample {downsample} and upsample {upsample}: their strides differ")
