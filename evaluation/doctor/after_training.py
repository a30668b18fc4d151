"""After training: whether latents are what their statistics say, and what limits quality, autoencoder or diffusion."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from autoencoder import DiagonalGaussian3D, VolumeAutoencoder
from autoencoder.losses import cells_inside
from evaluation.data.pairs import unit_range
from evaluation.metrics.fidelity import mean_gradient
from evaluation.metrics.spectrum import mean_band_power, ratio_db
from evaluation.studies.reconstruction import reconstruct
from pipelines import MedVolumePipeline
from volumes import Volume, VolumeDataset, pad_sample

from .cases import (
    Finding,
    names,
    ok,
    warn,
)
from .data_checks import outliers

DRIFT = 0.25  # of a standard deviation that the mean, and part that the std, may be from the stored ones
INFORMED = 0.1  # share of a channel's variance that is between cells, below which it tells nothing
BANDS = (0.1, 0.2, 0.3, 0.4, 0.5)  # cycles/voxel; 16 voxels a side are enough for them
LEVELS = np.linspace(0, 1, 101)
LIMITS, FREE = 0.7, 0.4  # of the generated volumes' distance that reconstructions alone make up

OnVolume = Callable[[str], object]


@torch.inference_mode()
def latent_summary(
    vae: VolumeAutoencoder, dataset: VolumeDataset, on_volume: OnVolume = lambda name: None
) -> dict[str, Any]:
    """Latents of all volumes, standardized by the stored statistics, over cells inside the field of view.

    Returns: {"mean", "std" (C,): 0 and 1 if the stored statistics are right; "informed" (C,): the share of a channel's
    variance (that of the posterior's mean and of its noise) that the mean has, 1 of a VQ-GAN; "rms": of each volume's
    latents, by name}.
    """
    count, rms = 0, {}
    total, squares, noise = (torch.zeros(vae.config["latent_channels"], dtype=torch.float64) for _ in range(3))
    for index in range(len(dataset)):
        sample = pad_sample(dataset[index], vae.stride)
        posterior: Any = vae.encode(sample["image"][None].to(vae.device, vae.dtype), return_dict=False)[0]
        mean = posterior.mode()
        inside = cells_inside(sample["fov"][None].to(mean.device), tuple(mean.shape[2:]))[:, 0]
        cells = mean.movedim(1, -1)[inside].double().cpu()
        count, total, squares = count + len(cells), total + cells.sum(0), squares + (cells**2).sum(0)
        if isinstance(posterior, DiagonalGaussian3D):
            noise += (posterior.std.movedim(1, -1)[inside].double().cpu() ** 2).sum(0)
        rms[sample["name"]] = float(cells.square().mean().sqrt())
        on_volume(sample["name"])
    mean = total / count
    variance = (squares / count - mean**2).clamp_min(0)
    informed = variance / (variance + noise / count).clamp_min(1e-12)
    return {"mean": mean.tolist(), "std": variance.sqrt().tolist(), "informed": informed.tolist(), "rms": rms}


def check_latents(summary: dict[str, Any]) -> list[Finding]:
    """Findings of a `latent_summary`: drift from the stored statistics, dead channels, volumes that stand out."""
    findings = []
    mean, std, informed = (np.array(summary[key]) for key in ("mean", "std", "informed"))
    text = f"standardized, mean {np.abs(mean).max():.2f} at most and std {std.min():.2f} to {std.max():.2f} (0 and 1 are right)"
    drifted = np.flatnonzero((np.abs(mean) > DRIFT) | (np.abs(std - 1) > DRIFT)).tolist()
    if drifted:
        remedy = (
            "the stored latents_mean and latents_std are of other data or weights: end train_vae.py on this set, and train "
            "the U-Net anew"
        )
        findings.append(warn("latents", f"{text}: channels {drifted} are off", remedy))
    else:
        findings.append(ok("latents", text))
    dead = np.flatnonzero(informed < INFORMED).tolist()
    if dead:
        remedy = "lower losses.kl, or model.latent_channels: the U-Net learns noise there"
        shares = ", ".join(f"{informed[i]:.1%}" for i in dead)
        findings.append(warn("latents", f"channels {dead} are dead: {shares} of their variance is signal", remedy))
    odd = [list(summary["rms"])[i] for i in outliers(list(summary["rms"].values()), 1.3)]
    if odd:
        listed = names([f"{name} ({summary['rms'][name]:.2f})" for name in odd])
        findings.append(warn("latents", f"unlike the others (RMS): {listed}", "look at these volumes", odd))
    return findings


def distances(volumes: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> dict[str, float]:
    """How far volumes (X, Y, Z) in [0, 1] are from others, 0 where they agree: {"intensity": Wasserstein-1 distance of the
    pooled intensities, "spectrum": mean |dB| of power from 0.1 to 0.5 cycles/voxel, "sharpness": |log| of the ratio of
    mean gradients}."""
    quantiles = [np.quantile(np.concatenate([v.ravel() for v in part]), LEVELS) for part in (volumes, reference)]
    shape: Any = np.min([v.shape for part in (volumes, reference) for v in part], axis=0).tolist()
    power = [mean_band_power(part, tuple(shape), BANDS) for part in (volumes, reference)]
    gradients = [float(np.mean([mean_gradient(v) for v in part])) for part in (volumes, reference)]
    return {
        "intensity": float(np.abs(quantiles[0] - quantiles[1]).mean()),
        "spectrum": float(np.abs(ratio_db(*power)).mean()),
        "sharpness": abs(math.log(gradients[0] / gradients[1])),
    }


def compare_limits(
    pipe: MedVolumePipeline,
    dataset: VolumeDataset,
    floor: VolumeDataset | None,
    *,
    steps: int,
    on_volume: OnVolume = lambda name: None,
) -> dict[str, Any]:
    """Real volumes against themselves after the autoencoder, and against volumes that are generated from their own
    conditions, one each.

    Args:
        dataset: real volumes, best of the test split.
        floor: other real volumes, which say how far real ones are from each other.
        steps: denoising steps.
    Returns: {"reconstructed", "generated", "floor": `distances` from the real volumes}, without "floor" if there is none.
    Raises: ValueError if the pipeline cannot generate from these conditions.
    """
    real: list[np.ndarray] = []
    decoded: list[np.ndarray] = []
    generated: list[np.ndarray] = []
    for index in range(len(dataset)):
        sample = pad_sample(dataset[index], pipe.vae.stride)
        coded = sample["placement"].undo(reconstruct(pipe.vae, sample["image"]).numpy())
        real += [unit_range(channel) for channel in dataset[index]["image"].numpy()]
        decoded += [unit_range(channel) for channel in coded]
        generated += [unit_range(channel) for channel in _generate(pipe, dataset, index, steps)]
        on_volume(sample["name"])
    found = {"reconstructed": distances(decoded, real), "generated": distances(generated, real)}
    if floor is not None:
        others = [unit_range(c) for i in range(len(floor)) for c in floor[i]["image"].numpy()]
        found["floor"] = distances(others, real)
    return found


def _generate(pipe: MedVolumePipeline, dataset: VolumeDataset, index: int, steps: int) -> np.ndarray:
    """(C, X, Y, Z) generated from the case's mask, classes and numbers, with the case's number as its seed."""
    config, prepared = dataset.config, dataset.prepared[index]
    given: dict[str, Any] = {"shape": prepared.image.shape}
    if pipe.unet.config["num_labels"] and prepared.mask is not None:
        values = np.array(sorted(dataset.labels), np.int16)[prepared.mask.array]
        given = {"mask": Volume(values, prepared.image.affine)}
    labels = {c: config.classes[c][i] for c, i in zip(sorted(config.classes), prepared.classes, strict=True) if i >= 0}
    numbers = {c: v for c, v in zip(sorted(config.numbers), prepared.numbers, strict=True) if not math.isnan(v)}
    labels = {name: value for name, value in labels.items() if name in (pipe.unet.config["classes"] or {})}
    numbers = {name: value for name, value in numbers.items() if name in (pipe.unet.config["numbers"] or {})}
    generator = torch.Generator().manual_seed(index)
    volume: Any = pipe(
        **given,
        classes=labels or None,
        numbers=numbers or None,
        num_inference_steps=steps,
        generator=generator,
        output_type="np",
    ).volumes[0]
    return volume


def check_limits(found: dict[str, Any], count: int) -> list[Finding]:
    """Findings of `compare_limits`: for each distance, how much of it the autoencoder alone makes up."""
    findings = []
    for metric, generated in found["generated"].items():
        decoded, floor = found["reconstructed"][metric], found.get("floor", {}).get(metric)
        text = f"{metric}: reconstructed {decoded:.3g}, generated {generated:.3g} from {count} real volumes"
        if floor is not None:
            text += f"; other real ones {floor:.3g}"
        if floor is not None and generated <= floor:
            findings.append(ok("quality", f"{text}: as near as real volumes are to each other"))
        elif decoded >= LIMITS * generated:
            remedy = "sharpen or lengthen the autoencoder (configs/hippocampus/sharpen.yaml, more latent_channels, larger crops)"
            findings.append(warn("quality", f"{text}: the autoencoder limits it", remedy))
        elif decoded <= FREE * generated:
            remedy = "train the U-Net longer or wider, or take more denoising steps"
            findings.append(warn("quality", f"{text}: the diffusion limits it", remedy))
        else:
            findings.append(
                warn("quality", f"{text}: both limit it", "improve the autoencoder first: it bounds the rest")
            )
    return findings
