"""Complete a U-Net's config with the entries that autoencoder and data decide."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from autoencoder import VolumeAutoencoder
from volumes.description import NumberStats


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


def complete_model(
    section: Mapping[str, Any],
    vae: VolumeAutoencoder,
    data: DataFacts,
    images: Mapping[str, slice] | None = None,
) -> dict[str, Any]:
    """Return the model section with the entries that autoencoder and data decide. `num_labels: 0` keeps a model without
    a mask, and `numbers` may keep the mean and std of the model that is fine-tuned.

    Args:
        data: the description of the training volumes (`volumes.describe`), or its facts alone.
        images: for each image condition of the model, the channels of its latents.
    Raises: ValueError if the section says something else, and if the autoencoder learned other channels than the data
    has.
    """
    vae.check_channels(data.channels)
    channels = vae.config["latent_channels"]
    decided = {
        "in_channels": channels,
        "out_channels": channels,
        "mask_stride": list(vae.stride),
        "num_labels": len(data.labels),
        "classes": data.classes or None,
        "numbers": {name: {"mean": stats.mean, "std": stats.std} for name, stats in data.numbers.items()} or None,
        "images": {name: own.stop - own.start for name, own in (images or {}).items()} or None,
    }
    for name, value in decided.items():
        given = section.get(name, value)
        known_numbers = name == "numbers" and given and value and set(given) == set(value)
        if given != value and not (name == "num_labels" and given == 0) and not known_numbers:
            raise ValueError(f"model.{name} is {given}, but autoencoder and data make it {value}; omit it")
    return {**decided, **section}
