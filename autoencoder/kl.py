"""AutoencoderKL3D: a small convolutional KL autoencoder whose receptive field is finite."""

from collections.abc import Sequence
from typing import Any

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from cli.settings import NonNegativeInt, PositiveInt

from .base import LatentMean, LatentStd, VolumeAutoencoder
from .posterior import DiagonalGaussian3D


class AutoencoderKL3D(VolumeAutoencoder[DiagonalGaussian3D]):
    """KL autoencoder (Rombach et al. 2022) for volumes, without GroupNorm or attention.

    Args:
        in_channels, out_channels: channels of the volume.
        latent_channels: channels of the latents, for all image channels together.
        patch_size: space-to-depth before the first convolution, one integer or one per axis.
        channels: width of each level, finest first.
        strides: of each level but the first, one integer or one per axis; (2,) after patch_size 2 gives 4 per axis.
        encoder_blocks, decoder_blocks: residual blocks per level, finest first.
        per_channel: code each image channel separately, with shared weights: those of an autoencoder of one channel
            with latent_channels / in_channels. A missing channel then does not change the latents of the others.
        latents_mean, latents_std: statistics of the raw latents over the training set, set by `set_latent_statistics`.
        channel_names: names of several image channels, in order; train_vae.py sets them.
        data: how its training volumes were prepared (`volumes.data.preprocessing`); train_vae.py sets it.
        subjects: records of the training subjects (`volumes.data.subjects`); train_vae.py sets it.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: PositiveInt = 1,
        out_channels: PositiveInt = 1,
        latent_channels: PositiveInt = 4,
        patch_size: PositiveInt | Sequence[PositiveInt] = 2,
        channels: Sequence[PositiveInt] = (32, 128),
        strides: Sequence[PositiveInt | Sequence[PositiveInt]] = (2,),
        encoder_blocks: Sequence[NonNegativeInt] = (1, 1),
        decoder_blocks: Sequence[NonNegativeInt] = (1, 3),
        latents_mean: Sequence[LatentMean] | None = None,
        latents_std: Sequence[LatentStd] | None = None,
        per_channel: bool | None = None,
        channel_names: Sequence[str] | None = None,
        data: dict[str, object] | None = None,
        subjects: Sequence[Any] | None = None,
    ):
        super().__init__()
        if per_channel and (in_channels != out_channels or latent_channels % in_channels):
            raise ValueError(
                f"per_channel codes each of in_channels ({in_channels}) separately: out_channels ({out_channels}) "
                f"must be as many, and latent_channels ({latent_channels}) a multiple of them"
            )
        self._build(encoded_channels=2 * latent_channels)

    def _distribution(self, encoded: Tensor) -> DiagonalGaussian3D:
        if self.num_channel_groups > 1:  # mean and log-variance of one channel after another: all the means go first
            encoded = encoded.unflatten(1, (self.num_channel_groups, 2, -1)).transpose(1, 2).flatten(1, 3)
        return DiagonalGaussian3D(encoded, *self._statistics(encoded))
