"""The base class of all autoencoders: coding in one piece or in slabs, and latents in standardized units.

Axes: volumes (B, C, X, Y, Z) in [-1, 1], latents (B, C, h, w, d).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

import torch
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from cli.settings import Range, faults_of, refuse

from .layers import as_stride, depth_to_space, space_to_depth
from .model import VolumeModel
from .networks import Decoder, Encoder
from .posterior import LatentDistribution
from .streaming import stream_slabs, whole_cells

SLAB_BYTES = 1 << 28  # of a slab's activations; thicker slabs are not faster
WHOLE_BYTES = 1 << 29  # of a volume's activations, up to which it is coded in one piece unless tiling is asked for
LIVE_ACTIVATIONS = 4  # a residual block in inference: its input, and norm, activation and convolution one after another

LatentMean = Annotated[float, Range(-1e6, 1e6)]  # of raw latents, which are usually about 1
LatentStd = Annotated[float, Range(1e-6, 1e6)]

Distribution = TypeVar("Distribution", bound=LatentDistribution)


@dataclass
class DecoderOutput(BaseOutput):
    """What `decode` returns. It is that of `diffusers.models.autoencoders.vae`, whose import takes seconds.

    Attributes:
        sample: volumes (B, C, X, Y, Z), about [-1, 1].
    """

    sample: Tensor


class VolumeAutoencoder(VolumeModel, Generic[Distribution], ABC):
    """An encoder, a decoder and the statistics of the latents between them.

    A subclass calls `_build` in its constructor, or sets `patch_size`, `stride`, `encoder` and `decoder`. It interprets
    the encoder's output in `_distribution`, and may change latents before they are decoded in `_decodable`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock"]
    latents_for_training = "sample"  # by default; or "mode", without the posterior's noise
    _repeated_blocks = ["ResidualBlock"]  # of `compile_repeated_blocks`
    _group_offload_block_modules = ["encoder", "decoder"]  # diffusers would slice them, and cannot rebuild a slice

    use_tiling: bool | None = None  # by size, until enable_tiling or disable_tiling is called
    slab_bytes: int = SLAB_BYTES

    def _build(self, encoded_channels: int) -> None:
        """Make encoder and decoder as the config says. `encoded_channels`: of what the encoder gives.

        Raises: ValueError if the levels do not agree in number.
        """
        config = self.config
        channels, strides, latent_channels = config["channels"], config["strides"], config["latent_channels"]
        encoder_blocks, decoder_blocks = config["encoder_blocks"], config["decoder_blocks"]
        if not len(channels) == len(strides) + 1 == len(encoder_blocks) == len(decoder_blocks):
            raise ValueError(
                f"channels {channels}, encoder_blocks {encoder_blocks} and decoder_blocks {decoder_blocks} need one "
                f"entry per level, strides {strides} one fewer"
            )
        self.patch_size = as_stride(config["patch_size"])
        level_strides = [as_stride(s) for s in strides]
        self.stride = as_stride([math.prod(axis) for axis in zip(self.patch_size, *level_strides, strict=True)])
        patch = math.prod(self.patch_size)
        apart = self.num_channel_groups
        self.encoder = Encoder(
            config["in_channels"] // apart * patch, encoded_channels // apart, channels, level_strides, encoder_blocks
        )
        self.decoder = Decoder(
            latent_channels // apart, config["out_channels"] // apart * patch, channels, level_strides, decoder_blocks
        )
        self.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
        self._check_statistics(config["latents_mean"], config["latents_std"])

    def _check_statistics(self, mean: Any, std: Any) -> None:
        """Raise ValueError unless both are None, or there is one of each for every latent channel, in its range."""
        channels = self.config["latent_channels"]
        for name, values, hint in (("latents_mean", mean, LatentMean), ("latents_std", std, LatentStd)):
            if (mean is None) != (std is None):
                raise ValueError("latents_mean and latents_std belong together; give both or neither")
            if values is not None and not (isinstance(values, Sequence) and len(values) == channels):
                raise ValueError(f"{name}: need {channels} numbers, one for each latent channel; got {values!r:.80}")
            refuse(faults_of(Sequence[hint] | None, values, name))

    @property
    def num_channel_groups(self) -> int:
        """Number of groups of channels, each coded separately with the same weights: 1 unless
        `per_channel`."""
        return self.config["in_channels"] if self.config.get("per_channel") else 1

    def latents_of(self, channel: int) -> slice:
        """Return the slice of latent channels that encodes image channel number `channel`.

        Raises: ValueError if channels share their latents, and for a channel that does not exist.
        """
        channels, apart = self.config["in_channels"], self.num_channel_groups
        if apart != channels:
            raise ValueError(
                "this autoencoder mixes the channels of a volume in its latents; train one with per_channel: true"
            )
        if not 0 <= channel < channels:
            raise ValueError(f"channel {channel}: this autoencoder's channels are numbered 0 to {channels - 1}")
        width = self.config["latent_channels"] // channels
        return slice(channel * width, (channel + 1) * width)

    @abstractmethod
    def _distribution(self, encoded: Tensor) -> Distribution:
        """Return the encoder's output as a distribution of standardized latents."""

    def _decodable(self, raw: Tensor) -> Tensor:
        """Return what the decoder takes for raw latents: the latents themselves, unless there is a codebook."""
        return raw

    def enable_tiling(self, slab_bytes: int = SLAB_BYTES) -> None:
        """Encode and decode in slabs along the third axis. The result is the same as in one piece, up to rounding: see
        `autoencoder.streaming`. Apart from the result, memory then does not grow with the third axis.

        Without this call, and without `disable_tiling`, inference uses slabs for volumes whose `activation_bytes`
        exceed 512 MiB.

        Args:
            slab_bytes: bytes that the activations of one slab may take. At least one plane of latents is coded at a
                time. The first and the last slab also hold the few planes by which layers wait for each other.
        """
        self.use_tiling = True
        self.slab_bytes = slab_bytes

    def disable_tiling(self) -> None:
        """Encode and decode in one piece, whatever the size."""
        self.use_tiling = False

    def activation_bytes(self, shape: Sequence[int], batch: int = 1) -> int:
        """Estimate the bytes that encoding or decoding `shape` (X, Y, Z) voxels in one piece takes, besides weights,
        volume and latents. It counts the largest level's channels, once for each tensor that is alive at the same time.
        """
        strides, widths = [self.patch_size, *map(as_stride, self.config["strides"])], self.config["channels"]
        elements, voxels = 0, math.prod(shape) * batch * self.num_channel_groups
        for width, stride in zip(widths, strides, strict=True):
            voxels = voxels / math.prod(stride)
            elements = max(elements, round(width * voxels))
        return LIVE_ACTIVATIONS * elements * self.dtype.itemsize

    def slab_planes(self, shape: Sequence[int], batch: int = 1) -> int:
        """Return how many planes of latents fit into one slab of a volume of `shape` (X, Y, Z) voxels."""
        plane = self.activation_bytes((*shape[:2], self.stride[2]), batch)
        return max(self.slab_bytes // plane, 1)

    def tiles(self, shape: Sequence[int], batch: int = 1) -> bool:
        """Return whether `encode` and `decode` of `shape` (X, Y, Z) voxels work slab by slab, by `use_tiling` and by
        size.
        """
        if self.use_tiling is None:
            return not torch.is_grad_enabled() and self.activation_bytes(shape, batch) > WHOLE_BYTES
        return self.use_tiling

    def set_latent_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Store the training set's statistics of the raw latents (see `latent_statistics`) in the config, where
        saving keeps them.

        Raises: ValueError on another number of channels, and for a mean or std that no latents have (0, NaN, 1e300).
        """
        self._check_statistics(mean, std)
        self.register_to_config(latents_mean=[float(v) for v in mean], latents_std=[float(v) for v in std])

    def check_channels(self, names: Sequence[str]) -> None:
        """Raise ValueError unless `names` are the image channels that this autoencoder learned, in their order."""
        own = self.config.get("channel_names")
        own = list(own) if isinstance(own, list | tuple) else own  # else a damaged config's
        if own and own != list(names):
            raise ValueError(
                f"the data's channels are {list(names)}, the autoencoder learned {own}; give them in that order"
            )

    def latent_bound(self) -> float | None:
        """Return the largest absolute value that a valid standardized latent can have, for samplers that clip
        (`clip_sample`). None if there is no such bound.
        """
        return None

    def _channel_statistics(self) -> list[tuple[float, float]]:
        """Return mean and std of each channel of the raw latents; 0 and 1 before they are measured."""
        n = self.config["latent_channels"]
        return list(zip(self.config["latents_mean"] or [0.0] * n, self.config["latents_std"] or [1.0] * n, strict=True))

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return `_channel_statistics` as (C,) tensors."""
        mean, std = zip(*self._channel_statistics(), strict=True)
        return like.new_tensor(mean), like.new_tensor(std)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[Distribution]:
        """Encode volumes (B, C, X, Y, Z) in [-1, 1] to a posterior over standardized latents (B, latent_channels, h, w,
        d).

        Raises: ValueError for another number of channels, and if a side is not a multiple of the stride (pad first:
        `volumes.pad_to_multiple`).
        """
        self._checked(x, sides=3)
        if self.tiles(x.shape[2:], len(x)):
            slabs = x.split(self.stride[2] * self.slab_planes(x.shape[2:], len(x)), dim=4)
            cells = [n // s for n, s in zip(x.shape[2:], self.stride, strict=True)]
            encoded = _assemble(self._encoded_slabs(slabs), cells)
        else:
            encoded = self._encode(x)
        posterior = self._distribution(encoded)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode standardized latents (B, latent_channels, h, w, d) to volumes (B, C, X, Y, Z), not clamped."""
        voxels = [n * s for n, s in zip(z.shape[2:], self.stride, strict=True)]
        if self.tiles(voxels, len(z)):
            sample = _assemble(self.decode_slabs(z), voxels)
        else:
            sample = self._decode(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def encode_slabs(self, slabs: Iterable[Tensor]) -> Iterator[Distribution]:
        """Encode a volume that is read piece by piece. Takes consecutive slabs (B, C, X, Y, z) along the third axis, of
        any thickness, and yields posteriors (B, latent_channels, h, w, d), which together cover the volume.

        Raises: ValueError if there are no slabs, for another number of channels, and if their total thickness is not a
        multiple of the stride.
        """
        for encoded in self._encoded_slabs(self._checked(slab, sides=2) for slab in slabs):
            yield self._distribution(encoded)

    @apply_forward_hook
    def decode_slabs(self, z: Tensor) -> Iterator[Tensor]:
        """Decode into consecutive slabs (B, C, X, Y, z) along the third axis, for results that go to disk."""
        voxels = [n * s for n, s in zip(z.shape[2:], self.stride, strict=True)]
        return stream_slabs(self._decode, z.split(self.slab_planes(voxels, len(z)), dim=4))

    def _checked(self, x: Tensor, sides: int) -> Tensor:
        """Return `x`, after a check that its channels and its first `sides` sides can be encoded."""
        if x.shape[1] != self.config["in_channels"]:
            raise ValueError(
                f"volume of {x.shape[1]} channels: this autoencoder takes {self.config['in_channels']} (its "
                "in_channels)"
            )
        if any(n % s for n, s in zip(x.shape[2 : 2 + sides], self.stride, strict=False)):
            raise ValueError(
                f"volume of {tuple(x.shape[2:])} voxels: every side must be a multiple of {self.stride}; pad it first"
            )
        return x

    def _encoded_slabs(self, slabs: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the encoder's output for consecutive slabs of volumes."""
        return stream_slabs(self._encode, slabs)

    def _encode(self, x: Tensor) -> Tensor:
        """Map volumes to the encoder's output."""
        parts = _split_groups(whole_cells(self, x, self.patch_size[2]), self.num_channel_groups)
        return _merge_groups(self.encoder(space_to_depth(parts, self.patch_size)), self.num_channel_groups)

    def _decode(self, z: Tensor) -> Tensor:
        """Map standardized latents to volumes."""
        mean, std = (v.view(1, -1, 1, 1, 1) for v in self._statistics(z))
        parts = self.decoder(_split_groups(self._decodable(z * std + mean), self.num_channel_groups))
        return _merge_groups(depth_to_space(parts, self.patch_size), self.num_channel_groups)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> DecoderOutput | tuple[Tensor, Distribution]:
        """Reconstruct `sample` (B, C, X, Y, Z). With `return_dict=False`, also return the posterior, for the losses."""
        posterior: Distribution = self.encode(sample, return_dict=False)[0]
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        reconstruction: Tensor = self.decode(latents, return_dict=False)[0]
        return DecoderOutput(sample=reconstruction) if return_dict else (reconstruction, posterior)


def _split_groups(x: Tensor, parts: int) -> Tensor:
    """Map (B, parts * C, ...) to (B * parts, C, ...)."""
    return x if parts == 1 else x.unflatten(1, (parts, x.shape[1] // parts)).flatten(0, 1)


def _merge_groups(x: Tensor, parts: int) -> Tensor:
    """Invert `_split_groups`."""
    return x if parts == 1 else x.unflatten(0, (len(x) // parts, parts)).flatten(1, 2)


def _assemble(slabs: Iterator[Tensor], sides: Sequence[int]) -> Tensor:
    """Join slabs (B, C, X, Y, z) along the third axis into one tensor of `sides` (X, Y, Z), without a second copy in
    memory.
    """
    whole, done = torch.empty(0), 0
    for slab in slabs:
        if not done:
            whole = slab.new_empty((*slab.shape[:2], *sides))
        whole[..., done : done + slab.shape[4]] = slab
        done += slab.shape[4]
    assert done == sides[2]
    return whole
