"""Checks after training: whether the latents match their stored statistics, and whether the autoencoder or the
diffusion limits quality."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch

from autoencoder import DiagonalGaussian3D, QuantisedLatents, VolumeAutoencoder, count_statistics
from autoencoder.losses.reconstruction import cells_inside
from evaluation.data.model_units import pipeline_of_boxes
from evaluation.data.pairs import unit_range
from evaluation.metrics.fidelity import mean_gradient
from evaluation.metrics.spectrum import mean_band_power, ratio_db
from evaluation.studies.reconstruction import reconstruct
from pipelines import MedVolumePipeline
from volumes import VolumeDataset, pad_sample

from .cases import (
    Finding,
    names,
    ok,
    warn,
)
from .data_checks import outliers

DRIFT = 0.25  # standard deviations that the mean may be off, and fraction that the std may be off
INFORMED = 0.1  # fraction of a channel's variance that is signal, below which the channel is dead
CERTAIN = 0.5  # the same, below which the posterior's noise is most of what the U-Net is trained to predict
NOISY = 0.2  # fraction of the variance of sampled latents that is noise, above which it is worth a warning
USED = 0.1  # perplexity over the codes that could be used, below which a codebook has collapsed
BANDS = (0.1, 0.2, 0.3, 0.4, 0.5)  # cycles/voxel; 16 voxels per side are enough for them
LEVELS = np.linspace(0, 1, 101)
# Fraction of the generated volumes' distance that reconstructions alone account for: above the first the autoencoder
# limits quality, below the second the diffusion does.
LIMITS = 0.7
FREE = 0.4

OnVolume = Callable[[str], object]


class LatentSummary(TypedDict):
    """Statistics of standardized latents."""

    mean: list[float]  # (C,): 0 if the stored statistics are right
    std: list[float]  # (C,): 1 if the stored statistics are right
    informed: list[
        float
    ]  # (C,): fraction of a channel's variance (posterior mean and noise) in the mean; 1 for a VQ-GAN
    rms: dict[str, float]  # of each volume's latents, by name
    codes: dict[str, float]  # of a VQ-GAN: "perplexity", "usage", "codes" and "latent_voxels"; else empty


Distances = dict[str, float]  # by metric


@torch.inference_mode()
def latent_summary(
    vae: VolumeAutoencoder, dataset: VolumeDataset, on_volume: OnVolume = lambda name: None
) -> LatentSummary:
    """Summarize the latents of all volumes, standardized by the stored statistics, inside the field of view."""
    count = 0
    rms: dict[str, float] = {}
    used: torch.Tensor | None = None  # how often each code is
    total, squares, noise = (torch.zeros(vae.config["latent_channels"], dtype=torch.float64) for _ in range(3))
    for index in range(len(dataset)):
        sample = pad_sample(dataset[index], vae.stride)
        posterior: Any = vae.encode(sample["image"][None].to(vae.device, vae.dtype), return_dict=False)[0]
        mean = posterior.mode()
        inside = cells_inside(sample["fov"][None].to(mean.device), tuple(mean.shape[2:]))[:, 0]
        latents = mean.movedim(1, -1)[inside].double().cpu()
        count, total, squares = count + len(latents), total + latents.sum(0), squares + (latents**2).sum(0)
        if isinstance(posterior, DiagonalGaussian3D):
            noise += (posterior.std.movedim(1, -1)[inside].double().cpu() ** 2).sum(0)
        if isinstance(posterior, QuantisedLatents):
            counts = torch.bincount(posterior.indices[inside].cpu().flatten(), minlength=int(vae.config["num_codes"]))
            used = counts if used is None else used + counts
        rms[sample["name"]] = float(latents.square().mean().sqrt())
        on_volume(sample["name"])
    mean = total / count
    variance = (squares / count - mean**2).clamp_min(0)
    informed = variance / (variance + noise / count).clamp_min(1e-12)
    codes: dict[str, float] = {}
    if used is not None:
        statistics = count_statistics(used)
        codes = {"perplexity": float(statistics["perplexity"]), "usage": float(statistics["usage"])}
        codes |= {"codes": len(used), "latent_voxels": count}
    return {
        "mean": mean.tolist(),
        "std": variance.sqrt().tolist(),
        "informed": informed.tolist(),
        "rms": rms,
        "codes": codes,
    }


def check_latents(summary: LatentSummary, sampled: bool = True) -> list[Finding]:
    """Check a `latent_summary`: drift from the stored statistics, dead and noisy channels, unused codes, outlying
    volumes.

    Args:
        sampled: whether the U-Net learns samples of the posterior (`TrainLdmConfig.latents`), with its noise.
    """
    findings = []
    mean, std, informed = (np.array(summary[key]) for key in ("mean", "std", "informed"))
    text = (
        f"standardized, mean {np.abs(mean).max():.2f} at most and std {std.min():.2f} to {std.max():.2f} (0 and 1 are "
        f"right), the posterior's noise is up to {1 - informed.min():.0%} of the variance"
    )
    drifted = np.flatnonzero((np.abs(mean) > DRIFT) | (np.abs(std - 1) > DRIFT)).tolist()
    if drifted:
        remedy = (
            "the stored latents_mean and latents_std belong to other data or weights: finish train_vae.py on this "
            "set, and train the U-Net again"
        )
        findings.append(warn("latents", f"{text}: channels {drifted} are off", remedy))
    else:
        findings.append(ok("latents", text))
    dead = np.flatnonzero(informed < INFORMED).tolist()
    if dead:
        remedy = "lower losses.kl, or model.latent_channels: the U-Net learns noise there"
        shares = ", ".join(f"{informed[i]:.1%}" for i in dead)
        findings.append(warn("latents", f"channels {dead} are dead: {shares} of their variance is signal", remedy))
    noisy = np.flatnonzero((informed >= INFORMED) & (informed < CERTAIN)).tolist()
    share = float((1 - informed).mean())
    if sampled and share > NOISY and not (dead or noisy):  # which have a finding of their own
        text = f"sampled latents put noise into what the U-Net learns: {share:.1%} of their variance"
        findings.append(warn("latents", text, "set latents: mode in the config of train_ldm.py"))
    if noisy:
        remedy = "lower losses.kl: the U-Net is trained to predict the sampled noise too, which no condition explains"
        shares = ", ".join(f"{1 - informed[i]:.0%}" for i in noisy)
        findings.append(
            warn("latents", f"channels {noisy} are noisy: {shares} of their variance is the posterior's noise", remedy)
        )
    if summary["codes"]:
        findings.append(_check_codes(summary["codes"]))
    odd = [list(summary["rms"])[i] for i in outliers(list(summary["rms"].values()), 1.3)]
    if odd:
        listed = names([f"{name} ({summary['rms'][name]:.2f})" for name in odd])
        findings.append(warn("latents", f"unlike the others (RMS): {listed}", "check these volumes", odd))
    return findings


def _check_codes(codes: Mapping[str, float]) -> Finding:
    """Check how many codes the training volumes use."""
    text = f"{codes['usage']:.1%} of {codes['codes']:.0f} codes are used, perplexity {codes['perplexity']:.1f}"
    if codes["perplexity"] >= USED * min(codes["codes"], codes["latent_voxels"]):
        return ok("codebook", text)
    remedy = (
        "lower model.num_codes to what is used, or train the autoencoder again with a lower optimizer.learning_rate or "
        "a higher losses.commitment"
    )
    return warn("codebook", f"{text}: it has collapsed to few codes", remedy)


def distances(volumes: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> Distances:
    """Return distances between two sets of volumes (X, Y, Z) in [0, 1], 0 if they agree.

    Returns: {"intensity": Wasserstein-1 distance of the pooled intensities, "spectrum": mean |dB| of power from 0.1 to
        0.5 cycles/voxel, "sharpness": |log| of the ratio of mean gradients}.
    """
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
) -> dict[str, Distances]:
    """Compare real volumes with their reconstructions, and with volumes generated from their conditions, one each.

    Args:
        dataset: real volumes, best of the test set.
        floor: other real volumes, which show how far real volumes are from each other.
        steps: denoising steps.
    Returns: `distances` from the real volumes: {"reconstructed", "generated", "floor"}; no "floor" without such
    volumes.
    Raises: ValueError if the pipeline cannot generate from these conditions.
    """
    real: list[np.ndarray] = []
    decoded: list[np.ndarray] = []
    generated: list[np.ndarray] = []
    boxes = pipeline_of_boxes(pipe)
    for index in range(len(dataset)):
        item = dataset[index]
        sample = pad_sample(item, pipe.vae.stride)
        coded = sample["placement"].undo(reconstruct(pipe.vae, sample["image"]).numpy())
        seen = item["seen"].numpy() if "seen" in item else None
        real += [unit_range(channel) for channel in item["image"].numpy()]
        decoded += [unit_range(channel) for channel in _darkened(coded, seen)]
        generated += [unit_range(channel) for channel in _darkened(_generate(boxes, dataset, index, steps), seen)]
        on_volume(sample["name"])
    result = {"reconstructed": distances(decoded, real), "generated": distances(generated, real)}
    if floor is not None:
        others = [unit_range(c) for i in range(len(floor)) for c in floor[i]["image"].numpy()]
        result["floor"] = distances(others, real)
    return result


def _darkened(volume: np.ndarray, seen: np.ndarray | None) -> np.ndarray:
    """Give voxels (C, X, Y, Z) outside the field of view the lowest value inside it, as a real volume has there."""
    if seen is None:
        return volume
    return np.where(seen, volume, volume.min(axis=(1, 2, 3), where=seen, initial=np.inf, keepdims=True))


def _generate(pipe: MedVolumePipeline, dataset: VolumeDataset, index: int, steps: int) -> np.ndarray:
    """Generate (C, X, Y, Z) from the case's mask, classes and numbers, with the case's index as the seed."""
    config, facts = dataset.config, dataset.facts[index]
    mask = dataset.label_map(index) if pipe.denoiser.num_labels else None
    names = config.class_names
    classes = {c: names[c][i] for c, i in zip(sorted(names), facts.classes, strict=True) if i >= 0}
    numbers = {c: v for c, v in zip(sorted(config.numbers), facts.numbers, strict=True) if not math.isnan(v)}
    classes = {name: value for name, value in classes.items() if name in pipe.denoiser.condition_schema.classes}
    numbers = {name: value for name, value in numbers.items() if name in pipe.denoiser.condition_schema.numbers}
    generator = torch.Generator().manual_seed(index)
    volume: Any = pipe(
        mask=mask,
        shape=facts.shape if mask is None else None,
        classes=classes or None,
        numbers=numbers or None,
        num_inference_steps=steps,
        generator=generator,
        output_type="np",
    ).volumes[0]
    return volume


def check_limits(limits: dict[str, Distances], count: int) -> list[Finding]:
    """Check the result of `compare_limits`: for each distance, how much of it the autoencoder alone accounts for."""
    findings = []
    for metric, generated in limits["generated"].items():
        decoded, floor = limits["reconstructed"][metric], limits.get("floor", {}).get(metric)
        text = f"{metric}: reconstructed {decoded:.3g}, generated {generated:.3g} from {count} real volumes"
        if floor is not None:
            text += f"; other real volumes {floor:.3g}"
        if floor is not None and generated <= floor:
            findings.append(ok("quality", f"{text}: as near as real volumes are to each other"))
        elif decoded >= LIMITS * generated:
            remedy = (
                "sharpen or lengthen the autoencoder (configs/hippocampus/sharpen.yaml, more latent_channels, larger "
                "patches)"
            )
            findings.append(warn("quality", f"{text}: the autoencoder limits it", remedy))
        elif decoded <= FREE * generated:
            remedy = "train the U-Net longer or wider, or take more denoising steps"
            findings.append(warn("quality", f"{text}: the diffusion limits it", remedy))
        else:
            findings.append(
                warn("quality", f"{text}: both limit it", "improve the autoencoder first, because it bounds the rest")
            )
    return findings
