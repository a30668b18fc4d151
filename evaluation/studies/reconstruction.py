"""Reconstruction: volumes that an autoencoder encoded and decoded, compared with the originals."""

import math
from collections.abc import Callable, Sequence
from typing import NotRequired, TypedDict

import numpy as np
import torch

from autoencoder import LatentDistribution, QuantisedLatents, VolumeAutoencoder, count_statistics
from evaluation.metrics.dice import dice_per_volume
from evaluation.metrics.fidelity import mean_gradient, psnr
from evaluation.metrics.spectrum import (
    BAND_EDGES,
    CROP,
    band_names,
    band_power,
    ratio_db,
)
from volumes import VolumeDataset, merge_channels, pad_sample
from volumes.foreground import background_index


def reconstruct(vae: VolumeAutoencoder, image: torch.Tensor) -> torch.Tensor:
    """Encode one volume (C, X, Y, Z) in [-1, 1], with sides that are multiples of the stride, to the posterior's mean
    and decode it, clamped to [-1, 1]."""
    return _decode(vae, _encode(vae, image))


@torch.inference_mode()
def _encode(vae: VolumeAutoencoder, image: torch.Tensor) -> LatentDistribution:
    return vae.encode(image[None].to(vae.device, vae.dtype)).latent_dist  # pyright: ignore[reportAttributeAccessIssue]


@torch.inference_mode()
def _decode(vae: VolumeAutoencoder, posterior: LatentDistribution) -> torch.Tensor:
    decoded = vae.decode(posterior.mode()).sample  # pyright: ignore[reportAttributeAccessIssue]
    return decoded[0].float().clamp(-1, 1).cpu()


class CodebookReport(TypedDict):
    """Use and cost of the codes of a VQ-GAN over all latent voxels of a split.

    `usage` is the share of codes that occur, `perplexity` their effective number. A code takes `bits_per_cell` =
    log2(num_codes) bits, or on average `entropy_bits_per_cell` with an ideal coder that knows the frequency of each
    code. `bits_per_voxel` divides `bits_per_cell` by the voxels of a latent voxel.
    """

    codes: int
    cells: int
    usage: float
    perplexity: float
    bits_per_cell: float
    entropy_bits_per_cell: float
    bits_per_voxel: float


class Psnr(TypedDict):
    """PSNR in dB inside the field of view, or a part of it."""

    mean: float
    std: float
    per_volume: dict[str, float]


class SpectrumRatio(TypedDict):
    """Power of reconstructions over that of the volumes, by band."""

    unit: str
    crop: list[int]
    ratio_db: dict[str, float]


class LabelDice(TypedDict):
    """Dice of one label over the volumes that contain it."""

    volumes: int
    mean: float
    lowest: float


class ReconstructionReport(TypedDict):
    """All figures of `evaluate_reconstruction`.

    `sharpness` is the mean magnitude of gradients (`mean_gradient`) in all reconstructions over that in all volumes: 1
    where they are equally sharp, less where reconstructions are blurred; noise raises it as detail does. `codebook` is
    for a VQ-GAN, `dice` for label maps, `psnr_foreground_db` for volumes whose background is empty: PSNR where their
    masks have another label.
    """

    volumes: int
    psnr_db: Psnr
    psnr_foreground_db: NotRequired[Psnr]
    spectrum: SpectrumRatio
    sharpness: float
    codebook: NotRequired[CodebookReport]
    dice: dict[str, LabelDice]


def codebook_report(counts: torch.Tensor, stride: tuple[int, int, int]) -> CodebookReport:
    """Measure how the codes of a VQ-GAN are used; `counts` (codes,) say how often each is."""
    statistics = {name: float(value) for name, value in count_statistics(counts).items()}
    bits = math.log2(len(counts))
    return {
        "codes": len(counts),
        "cells": int(counts.sum()),
        "usage": statistics["usage"],
        "perplexity": statistics["perplexity"],
        "bits_per_cell": bits,
        "entropy_bits_per_cell": abs(statistics["bits_per_cell"]),  # for a single code it is -0
        "bits_per_voxel": bits / math.prod(stride),
    }


def evaluate_reconstruction(
    vae: VolumeAutoencoder,
    dataset: VolumeDataset,
    *,
    crop: tuple[int, int, int] = CROP,
    on_volume: Callable[[str, float], None] | None = None,
) -> ReconstructionReport:
    """Compare reconstructions with their volumes.

    Intensities are those of the data set's own scaling, brought to [0, 1] (hippocampus: percentiles 0.5-99.5 of each
    volume). Figures are measured inside the field of view, except spectra, which are of center crops of at most `crop`
    voxels.

    Args:
        on_volume: called after each volume with its name and PSNR.
    Raises: ValueError for an empty data set.
    """
    count = len(dataset)
    if count == 0:
        raise ValueError("the split is empty: there is no volume to reconstruct")
    names = [name for _, name in sorted(dataset.config.image_labels.items())]
    per_volume: dict[str, float] = {}
    foreground: dict[str, float] = {}
    background = background_index(dataset.labels) if dataset.config.empty_background else None
    real: list[np.ndarray] = []  # powers of each channel
    decoded: list[np.ndarray] = []
    dice: dict[str, list[float]] = {name: [] for name in names[1:]}
    gradients: list[tuple[float, float]] = []  # of each reconstruction and its volume
    codes: torch.Tensor | None = None  # how often each is used
    for index in range(count):
        sample = pad_sample(dataset[index], vae.stride)
        target = (sample["image"].numpy() + 1) / 2
        posterior = _encode(vae, sample["image"])
        reconstruction = (_decode(vae, posterior).numpy() + 1) / 2
        fov = sample["fov"].numpy()
        per_volume[sample["name"]] = psnr(reconstruction, target, fov)
        labels = sample.get("mask")
        if background is not None and labels is not None:
            foreground[sample["name"]] = psnr(reconstruction, target, fov & (labels.numpy() != background))
        gradients.append((mean_gradient(reconstruction, fov), mean_gradient(target, fov)))
        if isinstance(posterior, QuantisedLatents):
            # padded to the stride, so each latent voxel holds a voxel
            used = torch.bincount(posterior.indices.cpu().flatten(), minlength=vae.config["num_codes"])
            codes = used if codes is None else codes + used
        target, reconstruction = (sample["placement"].undo(array) for array in (target, reconstruction))
        real += [band_power(channel, crop) for channel in target]
        decoded += [band_power(channel, crop) for channel in reconstruction]
        for name, score in _label_dice(reconstruction, target, names).items():
            dice[name].append(score)
        if on_volume is not None:
            on_volume(sample["name"], per_volume[sample["name"]])
    decoded_gradient, real_gradient = np.mean(gradients, axis=0)
    report: ReconstructionReport = {
        "volumes": count,
        "psnr_db": _mean_psnr(per_volume),
        "spectrum": {
            "unit": "dB of the real power, by radial frequency in cycles/voxel",
            "crop": list(crop),
            "ratio_db": _ratios(decoded, real),
        },
        "sharpness": float(decoded_gradient / real_gradient),
        "dice": {name: _summary(scores) for name, scores in dice.items() if scores},
    }
    if foreground:
        report["psnr_foreground_db"] = _mean_psnr(foreground)
    if codes is not None:
        report["codebook"] = codebook_report(codes, vae.stride)
    return report


def _mean_psnr(per_volume: dict[str, float]) -> Psnr:
    values = list(per_volume.values())
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "per_volume": per_volume}


def _ratios(decoded: Sequence[np.ndarray], real: Sequence[np.ndarray]) -> dict[str, float]:
    decibels = ratio_db(np.mean(decoded, axis=0), np.mean(real, axis=0))
    return dict(zip(band_names(BAND_EDGES), decibels.tolist(), strict=True))


def _summary(scores: Sequence[float]) -> LabelDice:
    return {"volumes": len(scores), "mean": float(np.mean(scores)), "lowest": min(scores)}


def _label_dice(reconstruction: np.ndarray, target: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Compute the Dice of each label that the target contains, except the background (the first name)."""
    if not names:
        return {}
    predicted, labels = (
        torch.from_numpy(merge_channels(array, range(len(names)), 0.5)) for array in (reconstruction, target)
    )
    return {
        name: dice_per_volume(predicted, labels, label).item()
        for label, name in enumerate(names)
        if label and (labels == label).any()
    }
