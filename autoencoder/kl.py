"""AutoencoderKL3D: a small convolutional KL autoencoder whose receptive field is finite."""

from collections.abc import Sequence

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .base import VolumeAutoencoder
from .posterior import DiagonalGaussian3D


class AutoencoderKL3D(VolumeAutoencoder[DiagonalGaussian3D]):
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
        self._build(encoded_channels=2 * latent_channels)

    def _distribution(self, encoded: Tensor) -> DiagonalGaussian3D:
        return DiagonalGaussian3D(encoded, *self._statistics(encoded))
