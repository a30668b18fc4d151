"""Voxels to latents and back: models, losses inside the field of view, latent statistics."""

from diffusers.models.modeling_utils import ModelMixin  # the name diffusers looks up when a pipeline folder is loaded

from .kl import AutoencoderKL3D
from .losses import gradient_loss, kl_loss, l1_loss, mse_loss
from .posterior import DiagonalGaussian3D
from .statistics import latent_statistics

__all__ = [
    "AutoencoderKL3D",
    "DiagonalGaussian3D",
    "ModelMixin",
    "gradient_loss",
    "kl_loss",
    "l1_loss",
    "latent_statistics",
    "mse_loss",
]
