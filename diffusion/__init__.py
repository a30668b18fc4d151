"""Diffusion in latents: the U-Net, the mask's folding, objectives and schedulers, the one denoising loop, the latent
cache."""

from typing import TYPE_CHECKING

from cli.lazy import lazy_exports

from .denoise import denoise  # at once: the function has its module's name

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import (
        ModelMixin,  # the name diffusers looks up when a pipeline folder is loaded
    )

    from autoencoder.cache_config import LatentCacheConfig

    from .condition_embedding import moved_embeddings
    from .conditioning import Conditions, ConditionSchema, drop_conditions
    from .denoiser import LatentDenoiser
    from .folding import fold_mask, unfold_mask
    from .guidance import check_guidance
    from .images import fold_images, image_condition
    from .latents.cache import LatentDataset, build_latent_cache, collate_latents
    from .loss import training_loss
    from .med_ddpm.unet import MedDDPMUNet3D
    from .monai.controlnet import MonaiControlNet3D
    from .monai.unet import MonaiUNet3D
    from .objectives import OBJECTIVES, fit_scheduler, make_scheduler
    from .unet import LatentUNet3D

__all__ = [
    "OBJECTIVES",
    "ConditionSchema",
    "Conditions",
    "LatentCacheConfig",
    "LatentDataset",
    "LatentDenoiser",
    "LatentUNet3D",
    "MedDDPMUNet3D",
    "ModelMixin",
    "MonaiControlNet3D",
    "MonaiUNet3D",
    "build_latent_cache",
    "check_guidance",
    "collate_latents",
    "denoise",
    "drop_conditions",
    "fit_scheduler",
    "fold_images",
    "fold_mask",
    "image_condition",
    "make_scheduler",
    "moved_embeddings",
    "training_loss",
    "unfold_mask",
]

__getattr__, __dir__ = lazy_exports(__name__, __file__)
