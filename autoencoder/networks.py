"""The encoder and decoder of all autoencoders. Axes: (B, C, X, Y, Z).

The volume comes folded by space-to-depth, so no convolution ever runs at full resolution; then one level per entry of
`strides`. Most of the capacity sits in the decoder at the coarsest level, where a channel costs an eighth of what it
costs one level up.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .layers import ChannelRMSNorm, Conv3d, Downsample, ResidualBlock, Stride, Upsample
from .streaming import streaming


def _blocks(channels: int, count: int) -> list[nn.Module]:
    return [ResidualBlock(channels) for _ in range(count)]


class Trunk(nn.Sequential):
    """Layers one after another; with gradient checkpointing the residual blocks keep only their inputs (Chen et al.
    2016)."""

    gradient_checkpointing = False  # set by diffusers' enable_gradient_checkpointing, with the function

    def forward(self, x: Tensor) -> Tensor:
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled() and not streaming()
        for layer in self:
            if checkpointing and isinstance(layer, ResidualBlock):
                x = self._gradient_checkpointing_func(layer, x)  # pyright: ignore[reportCallIssue]
            else:
                x = layer(x)
        return x


class Encoder(Trunk):
    """(B, in_channels * patch, X/p, Y/p, Z/p) -> (B, out_channels, h, w, d)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        strides: Sequence[Stride],
        blocks: Sequence[int],
    ):
        layers: list[nn.Module] = [Conv3d(in_channels, channels[0], 3, padding=1), *_blocks(channels[0], blocks[0])]
        for (fine, coarse), stride, count in zip(pairwise(channels), strides, blocks[1:], strict=True):
            layers += [Downsample(fine, coarse, stride), *_blocks(coarse, count)]
        layers += [ChannelRMSNorm(channels[-1]), nn.SiLU(), Conv3d(channels[-1], out_channels, 3, padding=1)]
        super().__init__(*layers)


class Decoder(Trunk):
    """Raw latents (B, latent_channels, h, w, d) -> (B, out_channels * patch, X/p, Y/p, Z/p)."""

    def __init__(
        self,
        latent_channels: int,
        out_channels: int,
        channels: Sequence[int],
        strides: Sequence[Stride],
        blocks: Sequence[int],
    ):
        layers: list[nn.Module] = [
            Conv3d(latent_channels, channels[-1], 3, padding=1),
            *_blocks(channels[-1], blocks[-1]),
        ]
        for (coarse, fine), stride, count in zip(pairwise(channels[::-1]), strides[::-1], blocks[-2::-1], strict=True):
            layers += [Upsample(coarse, fine, stride), *_blocks(fine, count)]
        layers += [ChannelRMSNorm(channels[0]), nn.SiLU(), Conv3d(channels[0], out_channels, 3, padding=1)]
        super().__init__(*layers)
