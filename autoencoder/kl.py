"""AutoencoderKL3D: a small convolutional KL autoencoder whose receptive field is finite. Axes: (B, C, X, Y, Z).

Space-to-depth by `patch_size` first (lossless), so no convolution ever runs at full resolution; then one level per
entry of `strides`. Most of the capacity sits in the decoder at the coarsest level, where a channel costs an eighth of
what it costs one level up.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from .layers import (
    ChannelRMSNorm,
    Conv3d,
    Downsample,
    ResidualBlock,
    Stride,
    Upsample,
    as_stride,
    depth_to_space,
    space_to_depth,
)
from .model import VolumeModel
from .posterior import DiagonalGaussian3D
from .streaming import stream_slabs, streaming, whole_cells

SLAB_BYTES = 1 << 28  # of a slab's activations; thicker slabs are not faster
WHOLE_BYTES = 1 << 29  # of a volume's activations, up to which it is coded in one piece unless tiling is asked for
LIVE_ACTIVATIONS = 4  # a residual block in inference: its input, and norm, activation and convolution one after another


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
    """(B, in_channels * patch, X/p, Y/p, Z/p) -> raw moments (B, 2 * latent_channels, h, w, d)."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        channels: Sequence[int],
        strides: Sequence[Stride],
        blocks: Sequence[int],
    ):
        layers: list[nn.Module] = [Conv3d(in_channels, channels[0], 3, padding=1), *_blocks(channels[0], blocks[0])]
        for (fine, coarse), stride, count in zip(pairwise(channels), strides, blocks[1:], strict=True):
            layers += [Downsample(fine, coarse, stride), *_blocks(coarse, count)]
        layers += [ChannelRMSNorm(channels[-1]), nn.SiLU(), Conv3d(channels[-1], 2 * latent_channels, 3, padding=1)]
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


class AutoencoderKL3D(VolumeModel, AutoencoderMixin):
    """KL autoencoder (Rombach et al. 2022) for volumes, without GroupNorm or attention.

    Args:
        in_channels, out_channels: channels of the volume.
        latent_channels: channels of the latents.
        patch_size: space-to-depth before the first convolution, one integer or one per axis.
        channels: width of each level, finest first.
        strides: of each level but the first, one integer or one per axis; (2,) after patch_size 2 gives 4 per axis.
        encoder_blocks, decoder_blocks: residual blocks per level, finest first.
        latents_mean, latents_std: statistics of the raw latents over the training set, set by `set_latent_statistics`.
    """

    _supports_gradient_checkpointing = True
    _group_offload_block_modules = ["encoder", "decoder"]  # diffusers would slice them, and cannot rebuild a slice

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        latent_channels: int = 4,
        patch_size: int | Sequence[int] = 2,
        channels: Sequence[int] = (32, 128),
        strides: Sequence[int | Sequence[int]] = (2,),
        encoder_blocks: Sequence[int] = (1, 1),
        decoder_blocks: Sequence[int] = (1, 3),
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ):
        super().__init__()
        if not len(channels) == len(strides) + 1 == len(encoder_blocks) == len(decoder_blocks):
            raise ValueError(
                f"channels {channels}, encoder_blocks {encoder_blocks} and decoder_blocks {decoder_blocks} need one entry a level, "
                f"strides {strides} one fewer"
            )
        self.patch_size = as_stride(patch_size)
        level_strides = [as_stride(s) for s in strides]
        self.stride = as_stride([math.prod(axis) for axis in zip(self.patch_size, *level_strides, strict=True)])
        patch = math.prod(self.patch_size)
        self.encoder = Encoder(in_channels * patch, latent_channels, channels, level_strides, encoder_blocks)
        self.decoder = Decoder(latent_channels, out_channels * patch, channels, level_strides, decoder_blocks)
        self.use_tiling: bool | None = None  # by size, until enable_tiling or disable_tiling is called
        self.slab_bytes = SLAB_BYTES
        self.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]

    def enable_tiling(self, slab_bytes: int = SLAB_BYTES) -> None:
        """Encode and decode in slabs along the third axis, with the same result as in one piece to rounding: see
        `autoencoder.streaming`. Memory then does not grow with the third axis, but for the result itself.

        Without this call, and without `disable_tiling`, volumes whose `activation_bytes` exceed 512 MiB are coded so
        in inference.

        Args:
            slab_bytes: what the activations of one slab may take. At least one plane of latents is coded at a time; the
                first and the last slab also hold the few planes by which layers wait for each other.
        """
        super().enable_tiling()
        self.slab_bytes = slab_bytes

    def activation_bytes(self, shape: Sequence[int], batch: int = 1) -> int:
        """About how much memory encoding or decoding `shape` (X, Y, Z) voxels in one piece takes, in bytes, besides
        weights, volume and latents: the largest level's channels, for the tensors that live at once."""
        strides, widths = [self.patch_size, *map(as_stride, self.config["strides"])], self.config["channels"]
        elements, voxels = 0, math.prod(shape) * batch
        for width, stride in zip(widths, strides, strict=True):
            voxels = voxels / math.prod(stride)
            elements = max(elements, round(width * voxels))
        return LIVE_ACTIVATIONS * elements * self.dtype.itemsize

    def slab_planes(self, shape: Sequence[int], batch: int = 1) -> int:
        """How many planes of latents a slab of a volume of `shape` (X, Y, Z) voxels holds, by `slab_bytes`."""
        plane = self.activation_bytes((*shape[:2], self.stride[2]), batch)
        return max(self.slab_bytes // plane, 1)

    def _tiled(self, shape: Sequence[int], batch: int) -> bool:
        if self.use_tiling is None:
            return not torch.is_grad_enabled() and self.activation_bytes(shape, batch) > WHOLE_BYTES
        return self.use_tiling

    def set_latent_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Store the training set's statistics of the raw latents (see `latent_statistics`) in the config, where
        saving keeps them.

        Raises: ValueError on another number of channels or a std that is not positive.
        """
        if not len(mean) == len(std) == self.config["latent_channels"] or min(std) <= 0:
            raise ValueError(
                f"need {self.config['latent_channels']} means and positive stds, got {list(mean)} and {list(std)}"
            )
        self.register_to_config(latents_mean=[float(v) for v in mean], latents_std=[float(v) for v in std])

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the raw latents as (C,) tensors; 0 and 1 before they were measured."""
        n = self.config["latent_channels"]
        mean, std = self.config["latents_mean"] or [0.0] * n, self.config["latents_std"] or [1.0] * n
        return like.new_tensor(mean), like.new_tensor(std)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussian3D]:
        """Volumes (B, C, X, Y, Z) in [-1, 1] -> posterior over standardised latents (B, latent_channels, h, w, d).

        Raises: ValueError for another number of channels, and if a side is not a multiple of the stride (pad first:
        `volumes.pad_to_multiple`).
        """
        if x.shape[1] != self.config["in_channels"]:
            raise ValueError(
                f"volume of {x.shape[1]} channels: this autoencoder takes {self.config['in_channels']} (its in_channels)"
            )
        if any(n % s for n, s in zip(x.shape[2:], self.stride, strict=True)):
            raise ValueError(
                f"volume of {tuple(x.shape[2:])} voxels: every side must be a multiple of {self.stride}; pad it first"
            )
        if self._tiled(x.shape[2:], len(x)):
            slabs = x.split(self.stride[2] * self.slab_planes(x.shape[2:], len(x)), dim=4)
            cells = [n // s for n, s in zip(x.shape[2:], self.stride, strict=True)]
            moments = _assemble(stream_slabs(self._encode, slabs), cells)
        else:
            moments = self._encode(x)
        posterior = DiagonalGaussian3D(moments, *self._statistics(moments))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)  # pyright: ignore[reportArgumentType]

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Standardised latents (B, latent_channels, h, w, d) -> volumes (B, C, X, Y, Z), not clamped."""
        voxels = [n * s for n, s in zip(z.shape[2:], self.stride, strict=True)]
        if self._tiled(voxels, len(z)):
            sample = _assemble(self.decode_slabs(z), voxels)
        else:
            sample = self._decode(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def encode_slabs(self, slabs: Iterable[Tensor]) -> Iterator[DiagonalGaussian3D]:
        """Encode a volume that is read piece by piece: consecutive slabs (B, C, X, Y, z) along the third axis, of any
        thickness -> posteriors (B, latent_channels, h, w, d), which together are the volume's.

        Raises: ValueError if there are no slabs, or together they are no multiple of the stride.
        """
        for moments in stream_slabs(self._encode, slabs):
            yield DiagonalGaussian3D(moments, *self._statistics(moments))

    def decode_slabs(self, z: Tensor) -> Iterator[Tensor]:
        """Decode into consecutive slabs (B, C, X, Y, z) along the third axis, for results that go to disk."""
        voxels = [n * s for n, s in zip(z.shape[2:], self.stride, strict=True)]
        return stream_slabs(self._decode, z.split(self.slab_planes(voxels, len(z)), dim=4))

    def _encode(self, x: Tensor) -> Tensor:
        """Volumes -> raw moments."""
        return self.encoder(space_to_depth(whole_cells(self, x, self.patch_size[2]), self.patch_size))

    def _decode(self, z: Tensor) -> Tensor:
        """Standardised latents -> volumes."""
        mean, std = (v.view(1, -1, 1, 1, 1) for v in self._statistics(z))
        return depth_to_space(self.decoder(z * std + mean), self.patch_size)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> DecoderOutput | tuple[Tensor, DiagonalGaussian3D]:
        """Reconstruction of `sample` (B, C, X, Y, Z). With `return_dict=False` also the posterior, for the losses."""
        posterior: DiagonalGaussian3D = self.encode(sample, return_dict=False)[0]
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        reconstruction: Tensor = self.decode(latents, return_dict=False)[0]
        return DecoderOutput(sample=reconstruction) if return_dict else (reconstruction, posterior)


def _assemble(slabs: Iterator[Tensor], sides: Sequence[int]) -> Tensor:
    """Slabs (B, C, X, Y, z) along the third axis into one tensor of `sides` (X, Y, Z), without holding both."""
    whole, done = torch.empty(0), 0
    for slab in slabs:
        if not done:
            whole = slab.new_empty((*slab.shape[:2], *sides))
        whole[..., done : done + slab.shape[4]] = slab
        done += slab.shape[4]
    return whole
