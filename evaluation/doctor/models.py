"""A training config's models, built as the trainer builds them and run without values: do they fit together, and into
memory?

A dry run executes one step of each stage, at full size, and compares its memory with the estimate.
"""

import copy
import inspect
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autoencoder import AutoencoderKL3D, VolumeAutoencoder
from cli.settings import construct, faults, refuse
from diffusion import LatentDenoiser
from diffusion.completion import complete_model, denoiser_class
from evaluation.report import read_config
from files.documents import read_object, read_yaml
from pipelines import MedVolumePipeline
from pipelines.lora import add_lora
from training import LdmTrainingStep, TrainLdmConfig, TrainVaeConfig, VaeTrainingStep, build_model, ldm, ldm_step, vae
from training.engine.precision import resolve_precision
from training.vae_config import crop_faults
from volumes import PHANTOM_LABELS, DataConfig
from volumes.description import NumberStats

from .cases import (
    Finding,
    fail,
    ok,
    warn,
)
from .memory import (
    GIB,
    OneProcess,
    dataset_bytes,
    format_parts,
    generation_bytes,
    measured_peak,
    networks_of,
    training_bytes,
    training_work,
    unet_inputs,
)

Config = TrainVaeConfig | TrainLdmConfig
REMEDIES = {
    "training": "lower loop.batch_size or the patches, set gradient_checkpointing: true or loop.mixed_precision: bf16",
    "generation": "lower batch_size of the call, or load in bfloat16",
}
GENERATION_BATCH: int = inspect.signature(MedVolumePipeline.__call__).parameters["batch_size"].default
PRECISIONS = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}
AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
EXAMPLES = {TrainVaeConfig: "autoencoder.AutoencoderKL3D", TrainLdmConfig: "diffusion.LatentUNet3D"}
FULL = 0.8  # of the memory, above which an estimate is a warning


@dataclass(frozen=True)
class PlannedData:
    """The facts of a data section that `complete_model` reads (`diffusion.completion.DataFacts`), without reading
    volumes."""

    channels: list[str]
    labels: dict[int, str]
    classes: dict[str, list[str]]
    numbers: Mapping[str, NumberStats]

    @staticmethod
    def of(data: DataConfig, numbers: Mapping[str, NumberStats]) -> "PlannedData":
        """Collect the facts of a data section; `numbers` are the statistics of its numbers."""
        labels = data.label_names or (PHANTOM_LABELS if data.phantom else {})
        return PlannedData(data.channels, labels if data.masks or data.phantom else {}, data.class_names, numbers)


@dataclass
class Models:
    """The models of a config, with fresh weights: the autoencoder, the U-Net if that is trained, and the training step,
    None if there is nothing to train."""

    config: Config
    vae: VolumeAutoencoder
    unet: LatentDenoiser | None
    step: VaeTrainingStep | LdmTrainingStep | None

    def work(self, latent_shape: Sequence[int], device: torch.device) -> Callable[[], None]:
        """Return a function that runs a training step: on patches, or on latents of `latent_shape`."""
        assert self.step is not None
        shape = self.config.crops.shape if isinstance(self.config, TrainVaeConfig) else latent_shape
        accelerator = OneProcess(device, AUTOCAST[self.config.loop.mixed_precision])
        return training_work(self.step, shape, self.config.loop.batch_size, accelerator)


def config_class_of(sections: Mapping[str, object]) -> type[TrainVaeConfig] | type[TrainLdmConfig]:
    """Return which training the sections of a config file are for: that of a diffusion model names its `vae`."""
    return TrainLdmConfig if "vae" in sections else TrainVaeConfig


def config_from_sections(sections: Mapping[str, Any], data: DataConfig) -> TrainVaeConfig | TrainLdmConfig:
    """Build the config of a training from the sections of its YAML file, which may lack `output`.

    Args:
        data: in place of the section `data`.
    Raises: ValueError for values outside their declared range, by name.
    """
    config_class = config_class_of(sections)
    values = {"output": ".", **{name: value for name, value in sections.items() if name != "data"}}
    refuse(faults(config_class, values, raw=True))
    return construct(config_class, {**values, "data": data})


def with_precision(config: Config, precision: str | None = None, accelerator: bool = False) -> Config:
    """Resolve `loop.mixed_precision` as the trainer does.

    Args:
        precision: in place of the config's.
        accelerator: whether to plan for an accelerator that is not here: `auto` is bf16 on it.
    """
    setting = precision or config.loop.mixed_precision
    setting = "bf16" if accelerator and setting == "auto" else resolve_precision(setting)
    resolved = copy.copy(config)
    resolved.loop = replace(config.loop, mixed_precision=setting)
    return resolved


def model_section(sections: Mapping[str, Any]) -> Mapping[str, object]:
    """Return the section `model` of a config, or that of the U-Net that it starts from; empty without either."""
    return sections.get("model") or (ldm.model_of(sections.get("init_from")) if "vae" in sections else {})


def known_numbers(sections: Mapping[str, Any]) -> Sequence[str]:
    """Return the numbers that the U-Net of a config takes whatever their statistics are (`known_numbers`)."""
    return denoiser_class(model_section(sections)).known_numbers


def check_settings(sections: Mapping[str, Any]) -> list[Finding]:
    """Find settings beside `data` and `model` that training would refuse: unknown ones, and values outside their
    ranges."""
    config_class = config_class_of(sections)
    settings = {name: value for name, value in sections.items() if name not in ("data", "model")}
    messages = [*faults(config_class, settings, raw=True)]
    if not isinstance(sections.get("model", {}), Mapping | None):
        example = EXAMPLES[config_class]
        messages.append(f"model: got {sections['model']!r}, expected settings such as {{class: {example}}}")
    return [fail("config", message, "correct it in the config") for message in messages]


def build_models(config: Config, numbers: Mapping[str, NumberStats], folder: Path) -> tuple[Models, list[Finding]]:
    """Build the models of a config, as the trainer does.

    Args:
        numbers: statistics of the data's numbers.
        folder: where the config lies, and perhaps the config of an autoencoder that is not trained yet.
    Raises: ValueError (TypeError or KeyError from a model's constructor) if they cannot be built.
    """
    config = copy.copy(config)
    if isinstance(config, TrainLdmConfig):
        config.model = config.model or ldm.model_of(config.init_from)
    if not config.model:
        raise ValueError("the config has no section `model`")
    if isinstance(config, TrainVaeConfig):
        return _vae_models(config)
    autoencoder, findings = _autoencoder_for(config, folder)
    images = ldm.image_latents(config.data, autoencoder)
    config.model = complete_model(config.model, autoencoder, PlannedData.of(config.data, numbers), images)
    unet = build_model(config.model, config.gradient_checkpointing)
    if not isinstance(unet, LatentDenoiser):
        raise ValueError(f"model.class is {config.model['class']}; a config with `vae` trains a diffusion.LatentUNet3D")
    if config.latents == "sample" and autoencoder.latents_for_training == "mode":
        message = "latents: sample adds the noise of the autoencoder's posterior to what the U-Net learns"
        findings = [*findings, warn("model", message, "set latents: mode")]
    if config.lora is not None:
        add_lora(unet, **asdict(config.lora))
    return Models(config, autoencoder, unet, ldm_step.build_step(config, unet, autoencoder)), findings


def _vae_models(config: TrainVaeConfig) -> tuple[Models, list[Finding]]:
    autoencoder, findings = build_model(config.model, config.gradient_checkpointing), []
    if not isinstance(autoencoder, VolumeAutoencoder):
        raise ValueError(
            f"model.class is {config.model.get('class')}; name an autoencoder, or the `vae` of a diffusion model"
        )
    if not list(autoencoder.parameters()):
        return Models(config, autoencoder, None, None), []
    if config.perceptual is not None and not Path(config.perceptual.network).exists():
        message = f"perceptual.network {config.perceptual.network} does not exist, so its memory is not counted"
        findings.append(warn("model", message, "correct the path"))
        config.perceptual = None
    if config.freeze_encoder:
        autoencoder.encoder.requires_grad_(False)
    models = Models(config, autoencoder, None, None)
    if not check_fit(models):
        models.step = vae.build_step(config, autoencoder)
    return models, findings


def check_fit(models: Models) -> list[Finding]:
    """Find what would stop a training at once, whatever the volumes: channels, and patches."""
    config, autoencoder, channels = models.config, models.vae, models.config.data.channels
    found = []
    if autoencoder.config["in_channels"] != len(channels):
        message = f"the autoencoder takes {autoencoder.config['in_channels']} channels, but the data has {channels}"
        remedy = f"set in_channels and out_channels of the autoencoder to {len(channels)}"
        if len(channels) > 1:
            remedy += (
                "; with per_channel: true it codes each channel separately, and can start from one-channel weights"
            )
        found.append(fail("model", message, remedy))
    if isinstance(config, TrainVaeConfig) and list(autoencoder.parameters()):
        found += [fail("crops", *fault) for fault in crop_faults(config.crops, autoencoder.stride, config.adversarial)]
    return found


def estimate(
    models: Models,
    shapes: Sequence[Sequence[int]],
    batch: int = GENERATION_BATCH,
    memory: float | None = None,
) -> tuple[list[Finding], dict[str, object]]:
    """Estimate the memory of training and generation, and of the volumes: findings, and bytes for the report. The
    models' weights are of no use afterwards.

    Args:
        shapes: (X, Y, Z) of the volumes in voxels.
        batch: volumes that are generated at once.
        memory: GiB of the accelerator to plan for, in place of this machine's.
    """
    config, autoencoder, unet = models.config, models.vae, models.unet
    latent_shapes = -(-np.array(shapes) // np.array(autoencoder.stride))
    largest = latent_shapes[latent_shapes.prod(axis=1).argmax()]
    whole = tuple((largest * autoencoder.stride).tolist())
    available, kind = _memory() if memory is None else (memory * GIB, "accelerator")
    cpu, training = kind == "machine", {"total": 0}
    if models.step is not None:
        training = training_bytes(models.step, models.work(largest.tolist(), torch.device("cpu")), cpu=cpu)
    checkpointing = "with" if config.gradient_checkpointing else "without"
    how = f"{PRECISIONS[config.loop.mixed_precision]}, {checkpointing} checkpointing"
    if isinstance(config, TrainVaeConfig):
        discriminator = ", with the discriminator" if config.adversarial else ""
        size = f"{config.loop.batch_size} patches of {list(config.crops.shape)}, {how}{discriminator}"
    else:
        size = f"{config.loop.batch_size} latents of {largest.tolist()}, the largest volume's, {how}"
    generation = generation_bytes(autoencoder, unet, whole, batch, cpu=cpu)
    data = dataset_bytes(shapes, len(config.data.channels), bool(config.data.masks or config.data.phantom))
    several = f"{batch} volumes of {list(whole)}, decoded one by one" if batch > 1 else f"a volume of {list(whole)}"
    denoised = several if unet else f"a volume of {list(whole)}"
    estimates = {"training": (training, size)} if models.step is not None else {}
    estimates["generation"] = (generation, f"{denoised}, float32")
    findings = []
    for stage, (parts, assumed) in estimates.items():
        total = parts["total"]
        text = f"{stage} takes about {total / GIB:.2f} GiB of the {available / GIB:.1f} GiB of the {kind}"
        text += f" ({assumed}: {format_parts(parts)} GiB)"
        findings.append(warn("memory", text, REMEDIES[stage]) if total > FULL * available else ok("memory", text))
    findings.append(ok("memory", f"{len(shapes)} prepared volumes take up to {data / GIB:.2f} GiB in $MEDVOLUME_CACHE"))
    return findings, {"memory_bytes": {"training": training, "generation": generation, "volumes": data}}


def plan(
    config: Config,
    shape: Sequence[int],
    folder: Path,
    *,
    memory: float | None = None,
    dry_run: bool,
    device: torch.device,
) -> tuple[list[Finding], dict[str, object]]:
    """Plan memory for volumes of `shape` (X, Y, Z), one generated at a time, without any data; with a dry run, measure
    it too."""
    numbers = dict.fromkeys(config.data.numbers, NumberStats(mean=0.0, std=1.0, low=-1.0, high=1.0))
    try:
        models, findings = build_models(config, numbers, folder)
    except (TypeError, ValueError, KeyError) as error:
        return [fail("model", f"cannot be built: {error}", "correct the section `model`, or `vae`")], {}
    if faults_found := check_fit(models):
        return [*findings, *faults_found], {}
    found, measured = estimate(models, [shape], batch=1, memory=memory)
    if not dry_run:
        return findings + found, measured
    fresh, _ = build_models(config, numbers, folder)
    available = _memory()[0] if memory is None else memory * GIB
    tried, took = _dry_run(fresh, measured["memory_bytes"], shape, available, device)
    # Where the dry run contradicts an estimate that fits, the estimate is not shown.
    refuted = {finding.message.partition(":")[0] for finding in tried if finding.level != "OK"}
    stages = {"training" if stage == "training step" else "generation" for stage in refuted}
    found = [f for f in found if f.level != "OK" or f.message.partition(" ")[0] not in stages]
    return findings + found + tried, {**measured, "dry_run": took}


def _dry_run(
    models: Models, sizes: Any, shape: Sequence[int], available: float, device: torch.device
) -> tuple[list[Finding], dict[str, dict[str, float]]]:
    """Run each stage once: findings, and {stage: {"estimate", "measured" in bytes, "seconds"}}."""
    estimates = {"training step": sizes["training"].get("step")}
    estimates |= {key: sizes["generation"].get(key) for key in ("denoising", "decoding")}
    findings: list[Finding] = []
    took: dict[str, dict[str, float]] = {}
    for stage, work in _stages(models, shape, device).items():
        kind, start = "training" if stage == "training step" else "generation", time.perf_counter()
        try:
            peak = measured_peak(work, device)
        except torch.OutOfMemoryError as error:
            findings.append(fail("dry run", f"{stage}: does not fit ({str(error).splitlines()[0]})", REMEDIES[kind]))
            continue
        took[stage] = {"estimate": estimates[stage], "measured": peak, "seconds": time.perf_counter() - start}
        text = (
            f"{stage}: {peak / GIB:.2f} GiB measured on {device}, {estimates[stage] / GIB:.2f} GiB estimated (without "
            f"weights); {took[stage]['seconds']:.0f} s, the first of its kind"
        )
        needed = peak + sum(size for part, size in sizes[kind].items() if part in ("weights", "average", "optimizer"))
        fits = needed <= FULL * available
        findings.append(ok("dry run", text) if fits else warn("dry run", text, REMEDIES[kind]))
    return findings, took


def _stages(models: Models, shape: Sequence[int], device: torch.device) -> dict[str, Callable[[], object]]:
    """Return what a dry run executes, with random weights, by name."""
    autoencoder, unet, step = models.vae, models.unet, models.step
    latent_shape = [-(-n // s) for n, s in zip(shape, autoencoder.stride, strict=True)]
    latents = autoencoder.config["latent_channels"]
    stages: dict[str, Callable[[], object]] = {}
    for network in (autoencoder, unet, None if step is None else networks_of(step)):
        if network is not None:
            nn.Module.to(network, device)
    if step is not None:
        work, networks = models.work(latent_shape, device), networks_of(step)

        def train() -> None:
            work()
            networks.zero_grad(set_to_none=True)

        stages["training step"] = train
    if unet is not None:
        stages["denoising"] = torch.no_grad()(lambda: unet(**unet_inputs(unet, latent_shape, 1), return_dict=False))
    stages["decoding"] = torch.no_grad()(
        lambda: autoencoder.decode(torch.zeros(1, latents, *latent_shape, device=device), return_dict=False)
    )
    return stages


def _memory() -> tuple[int, str]:
    """Return the bytes of memory of the device that would train here, and its kind."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, "accelerator"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "machine"


def _autoencoder_for(config: TrainLdmConfig, folder: Path) -> tuple[VolumeAutoencoder, list[Finding]]:
    """Return the autoencoder of `vae`, with fresh weights. If it is not trained yet, return that of the config in
    `folder` that writes it, or a default one."""
    source = Path(config.vae)
    described = next((path for path in (source, source / "vae") if (path / "config.json").is_file()), None)
    if described is not None:
        stored = read_object(described / "config.json")
        arguments = {key: value for key, value in stored.items() if key[0] != "_"}
        return _build_autoencoder({"class": f"autoencoder.{stored['_class_name']}", **arguments}), [
            ok("model", f"autoencoder of {described}")
        ]
    for path in sorted(folder.glob("*.yaml")):
        if not _trains_autoencoder(path):
            continue
        other = read_config(path)
        output, section = Path(str(other.get("output"))), other.get("model")
        if source in (output, output / "vae") and isinstance(section, dict):
            message = f"vae: {source} does not exist yet; using the autoencoder of {path}, which writes it"
            return _build_autoencoder(section), [ok("model", message)]
    channels = len(config.data.channels)
    message = f"vae: {source} does not exist yet; using a default autoencoder (4 latent channels, stride 4)"
    separate = {"per_channel": True, "latent_channels": 4 * channels} if config.data.condition_channels else {}
    autoencoder = AutoencoderKL3D(in_channels=channels, out_channels=channels, **separate)
    return autoencoder, [warn("model", message, "run train_vae.py first, or correct `vae`")]


def _trains_autoencoder(path: Path) -> bool:
    """Return whether a file is the config of an autoencoder's training, by the names of its settings."""
    content = read_yaml(path)
    return isinstance(content, dict) and {"output", "model"} <= content.keys() and "vae" not in content


def _build_autoencoder(section: Mapping[str, Any]) -> VolumeAutoencoder:
    autoencoder = build_model(section)
    if not isinstance(autoencoder, VolumeAutoencoder):
        raise ValueError(f"model.class is {section.get('class')}, which is not an autoencoder")
    return autoencoder
