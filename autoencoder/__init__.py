"""Voxels to latents and back: models, losses inside the field of view, latent statistics."""

from typing import TYPE_CHECKING

from cli.lazy import lazy_exports

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import (
        ModelMixin,  # the name diffusers looks up when a pipeline folder is loaded
    )

    from .base import VolumeAutoencoder
    from .codebook import Codebook, code_statistics, count_statistics
    from .kl import AutoencoderKL3D
    from .losses.reconstruction import (
        commitment_loss,
        gradient_loss,
        kl_loss,
        l1_loss,
        latent_loss,
        mse_loss,
        spectrum_loss,
    )
    from .monai.kl import MonaiAutoencoderKL
    from .monai.vq import MonaiVQVAE
    from .posterior import DiagonalGaussian3D, LatentDistribution
    from .space_to_depth import SpaceToDepth3D
    from .statistics import latent_statistics
    from .vq import VQGAN3D, QuantisedLatents

__all__ = [
    "AutoencoderKL3D",
    "Codebook",
    "DiagonalGaussian3D",
    "LatentDistribution",
    "ModelMixin",
    "MonaiAutoencoderKL",
    "MonaiVQVAE",
    "QuantisedLatents",
    "SpaceToDepth3D",
    "VQGAN3D",
    "VolumeAutoencoder",
    "code_statistics",
    "count_statistics",
    "commitment_loss",
    "gradient_loss",
    "kl_loss",
    "l1_loss",
    "latent_loss",
    "latent_statistics",
    "mse_loss",
    "spectrum_loss",
]

__getattr__, __dir__ = lazy_exports(__name__, __file__)
