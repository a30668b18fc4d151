"""What an autoencoder loses: volumes coded, decoded and compared with themselves."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from autoencoder import VolumeAutoencoder
from volumes import pad_sample

from .fidelity import psnr
from .spectrum import BAND_EDGES, CROP, band_names, mean_band_power, ratio_db


@torch.inference_mode()
def reconstruct(vae: VolumeAutoencoder, image: torch.Tensor) -> torch.Tensor:
    """One volume (C, X, Y, Z) in [-1, 1], sides multiples of the stride, through the posterior's mean and back, clamped to [-1, 1]."""
    posterior = vae.encode(image[None].to(vae.device, vae.dtype)).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    decoded = vae.decode(posterior.mode()).sample  # pyright: ignore[reportAttributeAccessIssue]
    return decoded[0].float().clamp(-1, 1).cpu()


def evaluate_reconstruction(
    vae: VolumeAutoencoder,
    dataset: Dataset,
    *,
    crop: tuple[int, int, int] = CROP,
    on_volume: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """PSNR of every volume and the power spectrum of all reconstructions against all volumes, ready for a report.

    Intensities are those of the data set's own scaling brought to [0, 1] (hippocampus: percentiles 0.5-99.5 of each volume).
    PSNR is taken inside the field of view, in dB, a figure a volume; `mean` is the mean of those. Spectra are taken of centre crops
    of at most `crop` voxels, each channel a volume of its own. `on_volume(name, psnr)` is called after each.
    Raises ValueError for an empty data set.
    """
    count = len(dataset)  # pyright: ignore[reportArgumentType]
    if count == 0:
        raise ValueError("there is no volume to reconstruct: the split is empty")
    per_volume: dict[str, float] = {}
    real: list[np.ndarray] = []
    decoded: list[np.ndarray] = []
    for index in range(count):
        sample = pad_sample(dataset[index], vae.stride)
        target = (sample["image"].numpy() + 1) / 2
        reconstruction = (reconstruct(vae, sample["image"]).numpy() + 1) / 2
        per_volume[sample["name"]] = psnr(reconstruction, target, sample["fov"].numpy())
        real += list(sample["placement"].undo(target))
        decoded += list(sample["placement"].undo(reconstruction))
        if on_volume is not None:
            on_volume(sample["name"], per_volume[sample["name"]])
    decibels = ratio_db(mean_band_power(decoded, crop), mean_band_power(real, crop))
    values = list(per_volume.values())
    return {
        "volumes": count,
        "psnr_db": {"mean": float(np.mean(values)), "std": float(np.std(values)), "per_volume": per_volume},
        "spectrum": {
            "unit": "dB of the real power, by radial frequency in cycles/voxel",
            "crop": list(crop),
            "ratio_db": dict(zip(band_names(BAND_EDGES), decibels.tolist(), strict=True)),
        },
    }
