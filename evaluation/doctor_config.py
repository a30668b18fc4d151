"""A training config's models, built as it says and run without numbers: do they fit together, and into memory? In a dry
run one step of each stage is run for good, at full size, and its memory compared with the estimate."""

import importlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autoencoder import AutoencoderKL3D, VolumeAutoencoder
from autoencoder.adversarial import VolumeDiscriminator
from autoencoder.layers import as_stride
from diffusion import LatentUNet3D
from volumes import PHANTOM_LABELS, DataConfig

from .doctor_cases import Finding, fail, ok, warn
from .doctor_memory import (
    GIB,
    autoencoder_step,
    dataset_bytes,
    generation_bytes,
    measured_peak,
    told,
    training_bytes,
    unet_inputs,
    unet_step,
)
from .report import read_config

BATCH_SIZE, CROP, CRITIC = (
    4,
    (32, 32, 32),
    {"channels": 32, "layers": 2, "slices": 4, "volume": True},
)  # configs' defaults
REMEDIES = {
    "training": "lower loop.batch_size or the crops, set gradient_checkpointing: true or loop.mixed_precision: bf16",
    "generation": "lower batch_size of the call, or load in bfloat16",
}
GENERATION_BATCH = 8  # of the pipeline
FULL = 0.8  # of the memory, above which an estimate is a warning


@dataclass
class Models:
    """What a config trains or uses: the autoencoder, and its discriminator or the U-Net, with fresh weights."""

    vae: VolumeAutoencoder
    unet: LatentUNet3D | None = None
    critic: VolumeDiscriminator | None = None


@dataclass(frozen=True)
class Run:
    """What of a config's training decides its memory."""

    batch: int
    crop: tuple[int, ...]
    slices: int
    layers: int  # of the discriminator
    checkpointing: bool
    bf16: bool

    @staticmethod
    def of(sections: Mapping[str, Any]) -> "Run":
        loop, critic = sections.get("loop") or {}, {**CRITIC, **(sections.get("adversarial") or {})}
        return Run(
            batch=int(loop.get("batch_size", BATCH_SIZE)),
            crop=tuple(int(n) for n in (sections.get("crops") or {}).get("shape", CROP)),
            slices=int(critic["slices"]),
            layers=int(critic["layers"]),
            checkpointing=bool(sections.get("gradient_checkpointing")),
            bf16=loop.get("mixed_precision") == "bf16",
        )

    def __str__(self) -> str:
        precision = "bfloat16 autocast" if self.bf16 else "float32"
        return f"{precision}, {'with' if self.checkpointing else 'without'} checkpointing"


def build_models(
    sections: Mapping[str, Any], config: DataConfig, numbers: Mapping[str, Mapping[str, float]], folder: Path
) -> tuple[Models, list[Finding]]:
    """The models of the config's sections.

    Args:
        numbers: mean and std of the data's numbers.
        folder: where the config lies, and perhaps that of an autoencoder that is not trained yet.
    Raises: ValueError (TypeError or KeyError from a model's constructor) for sections that make none.
    """
    section = dict(sections["model"])
    if _class_of(section) is LatentUNet3D:
        vae, findings = _autoencoder_for(sections, config, folder)
        unet = LatentUNet3D(**{**_decided(vae, config, numbers), **_arguments(section)})
        return Models(vae, unet=unet), findings
    vae = _class_of(section)(**_arguments(section))
    if not sections.get("adversarial"):
        return Models(vae), []
    critic = {**CRITIC, **sections["adversarial"]}
    network = VolumeDiscriminator(
        vae.config["out_channels"],
        critic["channels"],
        critic["layers"],
        slices=critic["slices"] > 0,
        volume=critic["volume"],
    )
    return Models(vae, critic=network), []


def check_fit(models: Models, run: Run, config: DataConfig) -> list[Finding]:
    """What would stop a training at once, whatever the volumes: channels, and crops."""
    vae, channels, found = models.vae, len(config.channels), []
    if vae.config["in_channels"] != channels:
        message = f"the autoencoder takes {vae.config['in_channels']} channels, the data has {config.channels}"
        remedy = f"set in_channels and out_channels of the autoencoder to {channels}"
        found.append(fail("model", message, remedy))
    if models.unet is not None or not list(vae.parameters()):
        return found
    if any(n % s for n, s in zip(run.crop, vae.stride, strict=True)):
        near = [max(round(n / s), 1) * s for n, s in zip(run.crop, vae.stride, strict=True)]
        message = f"crops.shape {list(run.crop)} is no multiple of the stride {list(vae.stride)}"
        found.append(fail("crops", message, f"use {near}"))
    if models.critic is not None and min(run.crop) < (side := 3 * 2**run.layers):
        message = f"crops.shape {list(run.crop)}: a discriminator of {run.layers} layers needs {side} voxels a side"
        found.append(fail("crops", message, "enlarge the crops, or lower adversarial.layers"))
    return found


def estimate(
    models: Models,
    run: Run,
    shapes: Sequence[Sequence[int]],
    config: DataConfig,
    batch: int = GENERATION_BATCH,
    memory: float | None = None,
) -> tuple[list[Finding], dict[str, Any]]:
    """Memory of training and generation, and of the volumes: findings, and bytes for the report. The models' weights are of
    no use afterwards.

    Args:
        shapes: (X, Y, Z) of the volumes in voxels.
        batch: volumes that are generated at once.
        memory: GiB of the accelerator that is planned for, in place of this machine's.
    """
    vae, unet = models.vae, models.unet
    cells = -(-np.array(shapes) // np.array(vae.stride))
    largest = cells[cells.prod(axis=1).argmax()]
    whole = tuple((largest * vae.stride).tolist())
    trained = trained_step(models, run, largest.tolist())
    training = training_bytes(trained[0], trained[1]) if trained else {"total": 0}
    if unet is not None:
        size = f"{run.batch} latents of {largest.tolist()} cells, the largest volume's, {run}"
    else:
        size = f"{run.batch} crops of {list(run.crop)}, {run}{', with the discriminator' if models.critic else ''}"
    generation = generation_bytes(vae, unet, whole, batch)
    data = dataset_bytes(shapes, len(config.channels), bool(config.masks or config.phantom))
    machine, kind = _memory() if memory is None else (memory * GIB, "accelerator")
    several = f"{batch} volumes of {list(whole)}, decoded one by one" if batch > 1 else f"a volume of {list(whole)}"
    denoised = several if unet else f"a volume of {list(whole)}"
    estimates = [
        ("training", training, size),
        ("generation", generation, f"{denoised}, float32"),
    ]
    findings = []
    for what, parts, assumed in estimates if trained else estimates[1:]:
        total = parts["total"]
        text = f"{what} takes about {total / GIB:.2f} GiB of the {machine / GIB:.1f} GiB of the {kind} ({assumed}: {told(parts)} GiB)"
        findings.append(warn("memory", text, REMEDIES[what]) if total > FULL * machine else ok("memory", text))
    text = f"{len(shapes)} volumes in memory: {data / GIB:.2f} GiB in each process"
    if kind == "machine" and data + training["total"] > FULL * machine:
        findings.append(warn("memory", text, "set a coarser data.spacing, or use a larger machine"))
    else:
        findings.append(ok("memory", text))
    return findings, {"memory_bytes": {"training": training, "generation": generation, "volumes": data}}


def trained_step(models: Models, run: Run, cells: Sequence[int]) -> tuple[nn.Module, Callable[[], None]] | None:
    """The network or networks that the config trains, and a step of it; None if there is nothing to train."""
    vae, unet, critic = models.vae, models.unet, models.critic
    network = vae if unet is None else unet
    if not any(True for _ in network.parameters()):
        return None
    if run.checkpointing:
        network.enable_gradient_checkpointing()
    if unet is not None:
        return unet, unet_step(unet, cells, run.batch, bf16=run.bf16)
    step = autoencoder_step(vae, run.crop, run.batch, critic=critic, slices=run.slices, bf16=run.bf16)
    return (vae if critic is None else nn.ModuleList([vae, critic])), step


def plan(
    config: DataConfig,
    sections: dict[str, Any],
    run: Run,
    shape: Sequence[int],
    folder: Path,
    *,
    memory: float | None = None,
    dry_run: bool,
    device: torch.device,
) -> tuple[list[Finding], dict[str, Any]]:
    """Memory for volumes of `shape` (X, Y, Z), one generated at a time, without any data; and what a dry run took."""
    numbers = dict.fromkeys(config.numbers, {"mean": 0.0, "std": 1.0})

    def models() -> tuple[Models, list[Finding]]:
        return build_models(sections, config, numbers, folder)

    try:
        built, findings = models()
    except (TypeError, ValueError, KeyError) as error:
        return [fail("model", f"cannot be built: {error}", "correct the section `model`, or `vae`")], {}
    if wrong := check_fit(built, run, config):
        return [*findings, *wrong], {}
    found, measured = estimate(built, run, [shape], config, batch=1, memory=memory)
    findings += found
    if not dry_run:
        return findings, measured
    sizes = measured["memory_bytes"]
    estimates = {"training step": sizes["training"].get("step")} | {
        key: sizes["generation"].get(key) for key in ("denoising", "decoding")
    }
    room = _memory()[0] if memory is None else memory * GIB
    took: dict[str, dict[str, float]] = {}
    for stage, work in _stages(models()[0], run, shape, device).items():
        kind, start = "training" if stage == "training step" else "generation", time.perf_counter()
        try:
            peak = measured_peak(work, device)
        except torch.OutOfMemoryError as error:
            findings.append(fail("dry run", f"{stage}: does not fit ({str(error).splitlines()[0]})", REMEDIES[kind]))
            continue
        took[stage] = {"estimate": estimates[stage], "measured": peak, "seconds": time.perf_counter() - start}
        text = (
            f"{stage}: {peak / GIB:.2f} GiB measured on {device}, {estimates[stage] / GIB:.2f} GiB estimated (weights not "
            f"counted); {took[stage]['seconds']:.0f} s, the first of its kind"
        )
        needed = peak + sum(size for part, size in sizes[kind].items() if part in ("weights", "average", "optimizer"))
        tight = needed > FULL * room
        findings.append(warn("dry run", text, REMEDIES[kind]) if tight else ok("dry run", text))
    return findings, {**measured, "dry_run": took}


def _stages(models: Models, run: Run, shape: Sequence[int], device: torch.device) -> dict[str, Callable[[], object]]:
    """What is run for good, with random weights, by name."""
    vae, unet = models.vae, models.unet
    cells = [-(-n // s) for n, s in zip(shape, vae.stride, strict=True)]
    latents = vae.config["latent_channels"]
    stages: dict[str, Callable[[], object]] = {}
    for model in (vae, unet, models.critic):
        if model is not None:
            nn.Module.to(model, device)
    if trained := trained_step(models, run, cells):
        network, step = trained

        def train() -> None:
            step()
            network.zero_grad(set_to_none=True)

        stages["training step"] = train
    if unet is not None:
        stages["denoising"] = torch.no_grad()(lambda: unet(**unet_inputs(unet, cells, 1)))
    stages["decoding"] = torch.no_grad()(
        lambda: vae.decode(torch.zeros(1, latents, *cells, device=device), return_dict=False)
    )
    return stages


def _memory() -> tuple[int, str]:
    """Bytes of memory of what would train here, and what that is."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, "accelerator"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "machine"


def _class_of(section: Mapping[str, Any]) -> type:
    module, _, name = str(section.get("class", "")).rpartition(".")
    if module not in ("autoencoder", "diffusion"):
        raise ValueError(f"class {section.get('class')!r} is none of autoencoder. or diffusion.")
    found = getattr(importlib.import_module(module), name, None)
    if not (isinstance(found, type) and issubclass(found, (VolumeAutoencoder, LatentUNet3D))):
        raise ValueError(f"{module} has no model {name!r}")
    return found


def _arguments(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "class"}


def _autoencoder_for(
    sections: Mapping[str, Any], config: DataConfig, configs: Path
) -> tuple[VolumeAutoencoder, list[Finding]]:
    """The autoencoder that the config names, with fresh weights; where it is not trained yet, that of the config in the same
    folder which would write it, or else a default one."""
    folder = Path(str(sections.get("vae")))
    described = next((path for path in (folder, folder / "vae") if (path / "config.json").is_file()), None)
    if described is not None:
        stored = json.loads((described / "config.json").read_text())
        name = f"autoencoder.{stored['_class_name']}"
        arguments = {key: value for key, value in stored.items() if key[0] != "_"}
        return _class_of({"class": name})(**arguments), [ok("model", f"autoencoder of {described}")]
    for path in sorted(configs.glob("*.yaml")):
        other = read_config(path)
        writes = Path(str(other.get("output")))
        if folder in (writes, writes / "vae") and issubclass(_class_of(other["model"]), VolumeAutoencoder):
            message = f"vae: {folder} is not there yet: the autoencoder of {path} is taken, which would write it"
            return _class_of(other["model"])(**_arguments(other["model"])), [ok("model", message)]
    channels = len(config.channels)
    message = f"vae: {folder} is not there yet: a default autoencoder (4 latent channels, stride 4) is taken for it"
    apart = {"per_channel": True, "latent_channels": 4 * channels} if config.given else {}
    vae = AutoencoderKL3D(in_channels=channels, out_channels=channels, **apart)
    return vae, [warn("model", message, "run train_vae.py first, or correct `vae`")]


def _decided(vae: VolumeAutoencoder, config: DataConfig, numbers: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What autoencoder and data say of a U-Net, as train_ldm.py completes it."""
    labels = config.label_names or (PHANTOM_LABELS if config.phantom else {})
    width = vae.config["latent_channels"] // max(vae.channels_apart, 1)
    return {
        "in_channels": vae.config["latent_channels"],
        "out_channels": vae.config["latent_channels"],
        "mask_stride": as_stride(vae.stride),
        "num_labels": len(labels) if config.masks or config.phantom else 0,
        "classes": config.classes or None,
        "numbers": {name: {key: of[key] for key in ("mean", "std")} for name, of in numbers.items()} or None,
        "images": dict.fromkeys(config.given, width) or None,
    }
