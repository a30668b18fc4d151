"""An autoencoder without parameters: voxels folded into channels, and back. With it, diffusion in voxels is latent
diffusion: the same training, cache, pipeline and files.

Med-DDPM (Dorjsembe et al. 2024) diffuses voxels themselves; that is `patch_size: 1`. `patch_size: 2` has eight times
fewer latent voxels with eight times as many channels (as in Hoogeboom et al. 2023, "simple diffusion"), and still loses
nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from cli.settings import PositiveInt

from .base import LIVE_ACTIVATIONS, LatentMean, LatentStd, VolumeAutoencoder
from .layers import as_stride
from .posterior import LatentDistribution


class SpaceToDepth3D(VolumeAutoencoder[LatentDistribution]):
    """Latents are the voxels, with blocks of `patch_size` voxels as channels: those of the first image channel, then of
    the next.

    There is nothing to train: train_vae.py measures the latents' mean and standard deviation, as for any autoencoder,
    and saves it.

    Args:
        in_channels: channels of the volume.
        out_channels, latent_channels: follow from the others (in_channels, and in_channels times the voxels of a
            block); a given value must agree.
        patch_size: voxels of a block along each axis, one integer or one per axis; 1 leaves the volume as it is.
        latents_mean, latents_std, channel_names, data, subjects: as `AutoencoderKL3D`.
    Raises: ValueError for other `out_channels` or `latent_channels`.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        in_channels: PositiveInt = 1,
        out_channels: PositiveInt | None = None,
        latent_channels: PositiveInt | None = None,
        patch_size: PositiveInt | Sequence[PositiveInt] = 1,
        latents_mean: Sequence[LatentMean] | None = None,
        latents_std: Sequence[LatentStd] | None = None,
        channel_names: Sequence[str] | None = None,
        data: dict[str, object] | None = None,
        subjects: Sequence[Any] | None = None,
    ):
        super().__init__()
        self.patch_size = self.stride = as_stride(patch_size)
        decided = {"out_channels": in_channels, "latent_channels": in_channels * math.prod(self.patch_size)}
        given = {"out_channels": out_channels, "latent_channels": latent_channels}
        if wrong := [f"{key} {given[key]}" for key, value in decided.items() if given[key] not in (None, value)]:
            raise ValueError(
                f"patch_size {patch_size} of {in_channels} channels makes {decided}; omit {', '.join(wrong)}"
            )
        self.register_to_config(**decided)
        self._check_statistics(latents_mean, latents_std)
        self.encoder, self.decoder = nn.Sequential(), nn.Sequential()
        self.register_buffer("place", torch.zeros(()))  # a model has a device, a type and a file: those of its tensors

    @property
    def num_channel_groups(self) -> int:
        return self.config["in_channels"]

    def activation_bytes(self, shape: Sequence[int], batch: int = 1) -> int:
        return LIVE_ACTIVATIONS * math.prod(shape) * batch * self.config["in_channels"] * self.dtype.itemsize

    def latent_bound(self) -> float:
        """Return the largest absolute value of a standardized latent of voxels in [-1, 1]."""
        ends = [(end - m) / s for m, s in self._channel_statistics() for end in (-1.0, 1.0)]
        return max(map(abs, ends))

    def _distribution(self, encoded: Tensor) -> LatentDistribution:
        return LatentDistribution(encoded, torch.zeros_like(encoded), *self._statistics(encoded))
