"""Held-out volumes with their latents, for validations and previews. Axes of latents: (B, C, h, w, d)."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from autoencoder import VolumeAutoencoder
from autoencoder.cache_config import LatentCacheConfig
from autoencoder.layers import as_stride
from diffusion import Conditions, LatentDataset, build_latent_cache, fold_mask, image_condition
from volumes import VolumeDataset

from .ldm_config import TrainLdmConfig
from .splits import PaddedVolumes, WholeVolume


class EncodedVolume(WholeVolume):
    """A held-out volume with its latents (1, C, h, w, d), which of them are inside the field of view (1, 1, h, w, d)
    bool, and its conditions, a batch of one."""

    latents: Tensor
    inside: Tensor
    conditions: Conditions


class EncodedVolumes:
    """Held-out volumes with the mean of their latents. Both are read from the disk when they are asked for.

    Args:
        volumes: padded to the autoencoder's stride.
        latents: their latents.
        num_labels: of the masks that condition the model; 0 without.
        images: the latent channels of each image that conditions it.
        partial: whether it takes partial masks.
    """

    def __init__(
        self,
        volumes: PaddedVolumes,
        latents: LatentDataset,
        num_labels: int,
        images: Mapping[str, slice],
        *,
        partial: bool = False,
    ) -> None:
        self.volumes, self.latents, self.num_labels, self.images = volumes, latents, num_labels, images
        self.partial = partial

    def __len__(self) -> int:
        return len(self.volumes)

    def __iter__(self) -> Iterator[EncodedVolume]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> EncodedVolume:
        item, entry = self.volumes[index], self.latents[index]
        latents, inside = entry["mean"][None], entry["inside"][None]
        columns = {key: item.get(key) for key in ("classes", "numbers")}
        tensors = {key: values[None] for key, values in columns.items() if values is not None}
        if self.num_labels:
            assert "mask" in item
            stride = as_stride(self.volumes.stride)
            tensors["mask"] = fold_mask(item["mask"][None], stride, self.num_labels, partial=self.partial)
        if self.images:
            tensors["image"] = image_condition(latents, self.images, inside)
        return EncodedVolume(**item, latents=latents, inside=inside, conditions=Conditions(**tensors))


def latents_of(
    dataset: VolumeDataset, vae: VolumeAutoencoder, config: TrainLdmConfig, cache: LatentCacheConfig, rank: Accelerator
) -> LatentDataset:
    """Build the latent cache of a data set; each process encodes its share."""
    folder = config.cache.folder or Path(config.output) / "latents"
    shard = (rank.process_index, rank.num_processes)
    progress = rank.is_main_process
    latents = build_latent_cache(dataset, vae, folder, cache, seed=config.loop.seed, shard=shard, progress=progress)
    rank.wait_for_everyone()
    return latents


def encode_held_out(
    dataset: VolumeDataset,
    vae: VolumeAutoencoder,
    config: TrainLdmConfig,
    accelerator: Accelerator,
    num_labels: int,
    images: Mapping[str, slice],
    *,
    partial: bool = False,
) -> EncodedVolumes:
    """Encode the held-out volumes, as they are, into the latent cache."""
    latents = latents_of(dataset, vae, config, LatentCacheConfig(), accelerator)
    return EncodedVolumes(PaddedVolumes(dataset, vae.stride), latents, num_labels, images, partial=partial)
