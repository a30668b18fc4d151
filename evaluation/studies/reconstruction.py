"""What an autoencoder loses: volumes coded, decoded and compared with themselves."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from autoencoder import LatentDistribution, QuantisedLatents, VolumeAutoencoder, code_statistics
from evaluation.metrics.dice import dice_per_volume
from evaluation.metrics.fidelity import mean_gradient, psnr
from evaluation.metrics.spectrum import (
    BAND_EDGES,
    CROP,
    band_names,
    mean_band_power,
    ratio_db,
)
from volumes import VolumeDataset, merge_channels, pad_sample


def reconstruct(vae: VolumeAutoencoder, image: torch.Tensor) -> torch.Tensor:
    """One volume (C, X, Y, Z) in [-1, 1], sides multiples of the stride, through the posterior's mean and back, clamped to [-1, 1]."""
    return _decode(vae, _encode(vae, image))


@torch.inference_mode()
def _encode(vae: VolumeAutoencoder, image: torch.Tensor) -> LatentDistribution:
    return vae.encode(image[None].to(vae.device, vae.dtype)).latent_dist  # pyright: ignore[reportAttributeAccessIssue]


@torch.inference_mode()
def _decode(vae: VolumeAutoencoder, posterior: LatentDistribution) -> torch.Tensor:
    decoded = vae.decode(posterior.mode()).sample  # pyright: ignore[reportAttributeAccessIssue]
    return decoded[0].float().clamp(-1, 1).cpu()


def codebook_report(indices: torch.Tensor, num_codes: int, stride: tuple[int, int, int]) -> dict[str, Any]:
    """How a VQ-GAN's codes are used, over all cells of a split, and what they cost.

    `indices` (cells,). `usage` is the share of codes that occur at least once, `perplexity` their effective number. An index takes
    `bits_per_cell` = log2(num_codes) bits, or on average `entropy_bits_per_cell` with an ideal coder that knows how often each code
    occurs; `bits_per_voxel` is the former, over the voxels of a cell.
    """
    found = {name: float(value) for name, value in code_statistics(indices, num_codes).items()}
    bits = math.log2(num_codes)
    return {
        "codes": num_codes,
        "cells": indices.numel(),
        "usage": found["usage"],
        "perplexity": found["perplexity"],
        "bits_per_cell": bits,
        "entropy_bits_per_cell": abs(found["bits_per_cell"]),  # of a single code it is -0
        "bits_per_voxel": bits / math.prod(stride),
    }


def evaluate_reconstruction(
    vae: VolumeAutoencoder,
    dataset: VolumeDataset,
    *,
    crop: tuple[int, int, int] = CROP,
    on_volume: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """PSNR of every volume and the power spectrum of all reconstructions against all volumes, ready for a report.

    Intensities are those of the data set's own scaling brought to [0, 1] (hippocampus: percentiles 0.5-99.5 of each volume).
    PSNR is taken inside the field of view, in dB, a figure a volume; `mean` is the mean of those. Spectra are taken of center crops
    of at most `crop` voxels, each channel a volume of its own. `on_volume(name, psnr)` is called after each.
    `sharpness` is the mean magnitude of gradients (`mean_gradient`) inside the field of view in all reconstructions over that in all
    volumes: 1 where they are as sharp, less where they are blurred; noise raises it as detail does. Of a VQ-GAN there is also
    `codebook` (`codebook_report`).
    Of label maps there is also `dice`, by label: over the volumes that have the label, of the label map that is decoded.
    Raises ValueError for an empty data set.
    """
    count = len(dataset)
    if count == 0:
        raise ValueError("there is no volume to reconstruct: the split is empty")
    per_volume: dict[str, float] = {}
    real: list[np.ndarray] = []
    decoded: list[np.ndarray] = []
    names = [name for _, name in sorted(dataset.config.image_labels.items())]
    dice: dict[str, list[float]] = {name: [] for name in names[1:]}
    gradients: list[tuple[float, float]] = []  # of each reconstruction and its volume
    indices: list[torch.Tensor] = []
    for index in range(count):
        sample = pad_sample(dataset[index], vae.stride)
        target = (sample["image"].numpy() + 1) / 2
        posterior = _encode(vae, sample["image"])
        reconstruction = (_decode(vae, posterior).numpy() + 1) / 2
        fov = sample["fov"].numpy()
        per_volume[sample["name"]] = psnr(reconstruction, target, fov)
        gradients.append((mean_gradient(reconstruction, fov), mean_gradient(target, fov)))
        if isinstance(posterior, QuantisedLatents):
            indices.append(posterior.indices.cpu().flatten())  # padded to the stride, so each cell holds a voxel
        target, reconstruction = (sample["placement"].undo(array) for array in (target, reconstruction))
        real += list(target)
        decoded += list(reconstruction)
        if names:
            found, wanted = (
                torch.from_numpy(merge_channels(array, range(len(names)), 0.5)) for array in (reconstruction, target)
            )
            for label, name in enumerate(names):
                if label and (wanted == label).any():
                    dice[name].append(dice_per_volume(found, wanted, label).item())
        if on_volume is not None:
            on_volume(sample["name"], per_volume[sample["name"]])
    decibels = ratio_db(mean_band_power(decoded, crop), mean_band_power(real, crop))
    values = list(per_volume.values())
    sharpness = np.divide(*np.mean(gradients, axis=0))
    codebook = {"codebook": codebook_report(torch.cat(indices), vae.config["num_codes"], vae.stride)} if indices else {}
    return {
        "volumes": count,
        "psnr_db": {"mean": float(np.mean(values)), "std": float(np.std(values)), "per_volume": per_volume},
        "spectrum": {
            "unit": "dB of the real power, by radial frequency in cycles/voxel",
            "crop": list(crop),
            "ratio_db": dict(zip(band_names(BAND_EDGES), decibels.tolist(), strict=True)),
        },
        "sharpness": float(sharpness),
        **codebook,
        "dice": {
            name: {"volumes": len(found), "mean": float(np.mean(found)), "lowest": min(found)}
            for name, found in dice.items()
            if found
        },
    }
