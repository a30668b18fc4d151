"""Complete a U-Net's config with the entries that autoencoder and data decide."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import diffusion
from autoencoder import VolumeAutoencoder
from volumes.description import NumberStats

from .denoiser import CONTROLNET, LatentDenoiser
from .unet import LatentUNet3D


class DataFacts(Protocol):
    """The facts of a training set that decide a U-Net's config, see `volumes.description.DataDescription`."""

    @property
    def channels(self) -> Sequence[str]: ...
    @property
    def labels(self) -> Mapping[int, str]: ...
    @property
    def classes(self) -> dict[str, list[str]]: ...
    @property
    def numbers(self) -> Mapping[str, NumberStats]: ...


def denoiser_class(section: Mapping[str, Any]) -> type[LatentDenoiser]:
    """Return the class of a model section; LatentUNet3D for one that is not of `diffusion`, which is refused later.

    Raises: ValueError for a ControlNet.
    """
    package, _, name = str(section.get("class", "")).rpartition(".")
    if (package, name) == ("diffusion", "MonaiControlNet3D"):
        raise ValueError(f"model.class {package}.{name}: {CONTROLNET}")
    found = getattr(diffusion, name, None) if package == "diffusion" else None
    return found if isinstance(found, type) and issubclass(found, LatentDenoiser) else LatentUNet3D


def complete_model(
    section: Mapping[str, Any],
    vae: VolumeAutoencoder,
    data: DataFacts,
    images: Mapping[str, slice] | None = None,
) -> dict[str, Any]:
    """Return the model section with the entries that autoencoder and data decide, as the class of the section says
    (`LatentDenoiser.complete`). `num_labels: 0` keeps a model without a mask, and `numbers` may keep the mean and std
    of the model that is fine-tuned.

    Args:
        data: the description of the training volumes (`volumes.describe`), or its facts alone.
        images: for each image condition of the model, the channels of its latents.
    Raises: ValueError if the section says something else, and if the autoencoder learned other channels than the data
    has.
    """
    vae.check_channels(data.channels)
    return denoiser_class(section).complete(section, vae, data, images or {})
