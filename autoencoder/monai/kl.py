"""MonaiAutoencoderKL: MONAI's autoencoder with GroupNorm and attention, as one of ours. Axes: (B, C, X, Y, Z).

The layers are MONAI's own, so that weights trained elsewhere compute what they computed there; `interop` converts them.
GroupNorm needs the statistics of whole feature maps; `autoencoder.monai.slabs` takes them slab by slab.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from monai.networks.blocks import Convolution, Upsample
from monai.networks.nets.autoencoderkl import AutoencoderKL
from torch import Tensor, nn

from autoencoder.base import LIVE_ACTIVATIONS, SLAB_BYTES, LatentMean, LatentStd, VolumeAutoencoder
from autoencoder.layers import as_stride
from autoencoder.monai.intensity import intensity_scale
from autoencoder.posterior import DiagonalGaussian3D
from cli.settings import FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt

from .slabs import SlabCoder, allow_slabs
from .spool import FeatureMap, Spool


class MonaiAutoencoderKL(VolumeAutoencoder[DiagonalGaussian3D]):
    """`monai.networks.nets.AutoencoderKL`, and MAISI's `AutoencoderKlMaisi`, which is the same but for how it
    upsamples (Rombach et al. 2022; Guo et al. 2024).

    Args:
        in_channels, out_channels: channels of the volume.
        latent_channels: channels of the latents.
        channels: width of each level, finest first; each level but the first halves every side.
        num_res_blocks: residual blocks per level.
        attention_levels: whether each level has self-attention.
        norm_num_groups, norm_eps: of GroupNorm.
        encoder_attention, decoder_attention: whether the coarsest level ends, or starts, with attention between two
            more residual blocks (MONAI's with_encoder_nonlocal_attn, with_decoder_nonlocal_attn).
        attention_output: whether attention ends in a linear layer (MONAI's include_fc).
        upsampling: "nearest" (MONAI), "trilinear" (MAISI), each before a convolution, or "transposed" convolutions, of
            two voxels a side (MONAI) or of three, "transposed_3" (MAISI).
        value_range: the intensities that the original takes for our -1 and 1; MAISI's are 0 and 1.
        latents_mean, latents_std: statistics of the raw latents: 0, and one over the original's scale factor.
        label_logits: for a network that generates label maps, as logits of a background, output 0, and of labels: the
            output of each channel of the volume, which is the label's probability less that of the background. So the
            largest channel above 0 is the label. None for images. The volume that is encoded is MAISI's eight bits.
        channel_names: names of several image channels, in order.
        license: of the weights, where generated volumes must name it.
        data: how its training volumes were prepared (`volumes.data.preprocessing`).
        subjects: records of the training subjects (`volumes.data.subjects`).
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["AEKLResBlock"]
    _repeated_blocks = ["AEKLResBlock"]
    latents_for_training = "mode"  # the noise of MAISI's posterior is a quarter of its latents' variance

    # Long: half are its arguments, and those of MONAI's class.
    @register_to_config
    def __init__(
        self,
        in_channels: PositiveInt = 1,
        out_channels: PositiveInt = 1,
        latent_channels: PositiveInt = 4,
        channels: Sequence[PositiveInt] = (64, 128, 256),
        num_res_blocks: Sequence[NonNegativeInt] = (2, 2, 2),
        attention_levels: Sequence[bool] = (False, False, False),
        norm_num_groups: PositiveInt = 32,
        norm_eps: PositiveFloat = 1e-6,
        encoder_attention: bool = False,
        decoder_attention: bool = False,
        attention_output: bool = False,
        upsampling: str = "nearest",
        value_range: Sequence[FiniteFloat] = (-1.0, 1.0),
        latents_mean: Sequence[LatentMean] | None = None,
        latents_std: Sequence[LatentStd] | None = None,
        label_logits: Sequence[PositiveInt] | None = None,
        channel_names: Sequence[str] | None = None,
        license: str | None = None,
        data: dict[str, object] | None = None,
        subjects: Sequence[Any] | None = None,
    ):
        super().__init__()
        if not len(channels) == len(num_res_blocks) == len(attention_levels):
            raise ValueError(
                f"channels {channels}, num_res_blocks {num_res_blocks} and attention_levels {attention_levels} need "
                "one entry per level"
            )
        if upsampling not in ("nearest", "trilinear", "transposed", "transposed_3"):
            raise ValueError(f"upsampling is {upsampling!r}; it is nearest, trilinear, transposed or transposed_3")
        if label_logits is not None and sorted(label_logits) != list(range(1, out_channels + 1)):
            raise ValueError(f"label_logits: give each of 1 to out_channels, {out_channels}, once")
        intensity_scale(value_range)
        self.patch_size = as_stride(1)
        self.stride = as_stride(2 ** (len(channels) - 1))
        network = AutoencoderKL(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=out_channels + (0 if label_logits is None else 1),
            num_res_blocks=num_res_blocks,
            channels=channels,
            attention_levels=attention_levels,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            with_encoder_nonlocal_attn=encoder_attention,
            with_decoder_nonlocal_attn=decoder_attention,
            use_convtranspose=upsampling in ("transposed", "transposed_3"),
            include_fc=attention_output,
        )
        self.encoder, self.decoder = network.encoder, network.decoder
        self.quant_conv_mu, self.quant_conv_log_sigma = network.quant_conv_mu, network.quant_conv_log_sigma
        self.post_quant_conv = network.post_quant_conv
        for module in self.decoder.modules():
            if isinstance(module, nn.Upsample) and upsampling == "trilinear":
                module.mode = "trilinear"
        for module in self.decoder.modules():
            if isinstance(module, Upsample) and upsampling == "transposed_3":
                _transpose_by_three(module)
        allow_slabs(self)
        self.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
        self._check_statistics(latents_mean, latents_std)

    def activation_bytes(self, shape: Sequence[int], batch: int = 1) -> int:
        """Estimate the bytes that encoding or decoding `shape` (X, Y, Z) voxels takes, as `VolumeAutoencoder` does. An
        upsampled volume still has the channels of the coarser level.
        """
        widths = self.config["channels"]
        largest = max(widths[0], *widths[1:2], self.config["out_channels"])
        elements = math.prod(shape) * batch * largest
        return LIVE_ACTIVATIONS * elements * self.dtype.itemsize

    def tiles(self, shape: Sequence[int], batch: int = 1) -> bool:
        """Return what `VolumeAutoencoder.tiles` does; where gradients are needed, False."""
        return not torch.is_grad_enabled() and super().tiles(shape, batch)

    def enable_tiling(self, slab_bytes: int = SLAB_BYTES) -> None:
        """Encode and decode in slabs along the third axis, with the result of one piece, up to rounding: see
        `autoencoder.monai.slabs`. Feature maps that do not fit go to a temporary file, in the folder that the
        environment variable TMPDIR names. Where gradients are needed, the volume is coded in one piece.

        Args:
            slab_bytes: bytes that activations may take: three quarters for one slab, of at least one plane, and a
                quarter for feature maps.
        """
        super().enable_tiling(slab_bytes)

    @apply_forward_hook
    def decode_slabs(self, z: Tensor) -> Iterator[Tensor]:
        """Decode into consecutive slabs (B, C, X, Y, z) along the third axis; into a single one where gradients are
        needed.

        Raises: FileError if the disk is full.
        """
        if torch.is_grad_enabled():
            yield self._decode(z)
            return
        scale, shift = intensity_scale(self.config["value_range"])
        with self._spool() as spool:
            x = FeatureMap(spool)
            x.append(self._raw(z).transpose(2, 4))
            for slab in self._coder(self.decoder, spool).run(x):
                yield self._voxels(slab, scale, shift).transpose(2, 4).contiguous()

    def _encoded_slabs(self, slabs: Iterable[Tensor]) -> Iterator[Tensor]:
        if torch.is_grad_enabled():
            pieces = list(slabs)
            if not pieces:
                raise ValueError("there are no slabs to encode")
            yield self._encode(torch.cat(pieces, dim=4))
            return
        scale, shift = intensity_scale(self.config["value_range"])
        with self._spool() as spool:
            x = FeatureMap(spool)
            for slab in slabs:
                x.append((slab * scale + shift).transpose(2, 4))
            if not x.depth:
                raise ValueError("there are no slabs to encode")
            if x.depth % self.stride[2]:
                raise ValueError(
                    f"the slabs have {x.depth} planes, not a multiple of {self.stride[2]}: pad the volume first"
                )
            for hidden in self._coder(self.encoder, spool).run(x):
                yield self._moments(hidden).transpose(2, 4).contiguous()

    def _spool(self) -> Spool:
        return Spool(self.slab_bytes // 4)

    def _coder(self, network: Any, spool: Spool) -> SlabCoder:
        return SlabCoder(network, spool, self.slab_bytes - self.slab_bytes // 4)

    def _encode(self, x: Tensor) -> Tensor:
        scale, shift = intensity_scale(self.config["value_range"])
        return self._moments(self.encoder(x * scale + shift))

    def _moments(self, hidden: Tensor) -> Tensor:
        return torch.cat([self.quant_conv_mu(hidden), self.quant_conv_log_sigma(hidden)], dim=1)

    def _decode(self, z: Tensor) -> Tensor:
        scale, shift = intensity_scale(self.config["value_range"])
        return self._voxels(self.decoder(self._raw(z)), scale, shift)

    def _voxels(self, decoded: Tensor, scale: float, shift: float) -> Tensor:
        """Return the network's outputs (B, C, ...) as channels between -1 and 1."""
        if (outputs := self.config["label_logits"]) is None:
            return (decoded - shift) / scale
        shares = decoded.softmax(dim=1)
        return shares[:, list(outputs)] - shares[:, :1]

    def _raw(self, z: Tensor) -> Tensor:
        """Return what the decoder takes for standardized latents."""
        mean, std = (v.view(1, -1, 1, 1, 1) for v in self._statistics(z))
        return self.post_quant_conv(z * std + mean)

    def _distribution(self, encoded: Tensor) -> DiagonalGaussian3D:
        return DiagonalGaussian3D(encoded, *self._statistics(encoded))


def _transpose_by_three(block: Upsample) -> None:
    """Replace a transposed convolution of two voxels a side by MAISI's, of three, where interpolation would have its
    convolution."""
    [width] = {layer.in_channels for layer in block.modules() if isinstance(layer, nn.ConvTranspose3d)}
    del block.deconv
    block.add_module(
        "postconv",
        Convolution(
            spatial_dims=3,
            in_channels=width,
            out_channels=width,
            strides=2,
            kernel_size=3,
            padding=1,
            conv_only=True,
            is_transposed=True,
        ),
    )
