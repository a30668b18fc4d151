"""VQGAN3D: the autoencoder whose decoder sees codes of a learned codebook only (Esser et al. 2021; Medical Diffusion,
Khader et al. 2023)."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from cli.settings import (
    NonNegativeInt,
    PositiveInt,
    ShareBelowOne,
    TwoOrMore,
)

from .base import LatentMean, LatentStd, VolumeAutoencoder
from .codebook import Codebook
from .posterior import LatentDistribution


class QuantisedLatents(LatentDistribution):
    """Latents before quantization, without uncertainty; `indices` (B, h, w, d) are their nearest codes."""

    def __init__(self, raw: Tensor, codebook: Codebook, latents_mean: Tensor, latents_std: Tensor):
        super().__init__(raw, torch.zeros_like(raw), latents_mean, latents_std)
        self.codebook = codebook

    @cached_property
    def indices(self) -> Tensor:
        return self.codebook(self.raw_mean)[1]

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """Return the latents: nothing is random."""
        return self.mean

    def distance_map(self) -> Tensor:
        """Compute the squared distance of each latent voxel to its code, averaged over channels, (B, 1, h, w, d). The
        code is treated as a constant (van den Oord et al. 2017, Eq. 3, last term).
        """
        codes = self.codebook.codes[self.indices].movedim(-1, 1)
        return ((self.raw_mean.float() - codes.detach()) ** 2).mean(1, keepdim=True)


class QuantisedAutoencoder(VolumeAutoencoder[QuantisedLatents]):
    """An autoencoder with a codebook: its latents are those before quantization, and `decode` quantizes first."""

    _keep_in_fp32_modules = ["codebook"]
    codebook: Codebook

    def _distribution(self, encoded: Tensor) -> QuantisedLatents:
        return QuantisedLatents(encoded, self.codebook, *self._statistics(encoded))

    def latent_bound(self) -> float:
        """Return the largest absolute value of the standardized codes. Decoding quantizes latents, so nothing beyond
        the codes has a meaning.
        """
        codes = self.codebook.codes.float()
        mean, std = self._statistics(codes)
        return float(((codes - mean) / std).abs().max())

    def _decodable(self, raw: Tensor) -> Tensor:
        return self.codebook(raw)[0]


class VQGAN3D(QuantisedAutoencoder):
    """Vector-quantized autoencoder for volumes, without GroupNorm or attention.

    `encode` gives the latents before quantization, as the diffusion model of Medical Diffusion learns them; `decode`
    quantizes, then decodes. So everything that works on latents works here too.

    Args:
        in_channels, out_channels: channels of the volume.
        latent_channels: numbers in a code.
        num_codes, codebook_decay: size of the codebook, and weight of the past in its moving averages.
        patch_size, channels, strides, encoder_blocks, decoder_blocks, latents_mean, latents_std, channel_names, data,
            subjects: as `AutoencoderKL3D`.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: PositiveInt = 1,
        out_channels: PositiveInt = 1,
        latent_channels: PositiveInt = 8,
        num_codes: TwoOrMore = 2048,
        codebook_decay: ShareBelowOne = 0.99,
        patch_size: PositiveInt | Sequence[PositiveInt] = 2,
        channels: Sequence[PositiveInt] = (32, 128),
        strides: Sequence[PositiveInt | Sequence[PositiveInt]] = (2,),
        encoder_blocks: Sequence[NonNegativeInt] = (1, 1),
        decoder_blocks: Sequence[NonNegativeInt] = (1, 3),
        latents_mean: Sequence[LatentMean] | None = None,
        latents_std: Sequence[LatentStd] | None = None,
        channel_names: Sequence[str] | None = None,
        data: dict[str, object] | None = None,
        subjects: Sequence[Any] | None = None,
    ):
        super().__init__()
        self._build(encoded_channels=latent_channels)
        self.codebook = Codebook(num_codes, latent_channels, codebook_decay)
