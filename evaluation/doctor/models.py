"""A training config's models, built as it says and run without numbers: do they fit together, and into memory? In a dry
run one step of each stage is run for good, at full size, and its memory compared with the estimate."""

import importlib
import inspect
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autoencoder import AutoencoderKL3D, VolumeAutoencoder
from autoencoder.adversarial import VolumeDiscriminator
from cli.settings import faults, refuse
from diffusion import LatentUNet3D
from diffusion.completion import complete_model
from evaluation.report import read_config
from files.documents import read_object
from pipelines import MedVolumePipeline
from pipelines.lora import add_lora
from training.engine.precision import resolve_precision
from training.ldm_config import LoraConfig, TrainLdmConfig
from training.parsing import read_section
from training.vae_config import AdversarialConfig, CropConfig, TrainVaeConfig, crop_faults
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
    autoencoder_step,
    dataset_bytes,
    generation_bytes,
    measured_peak,
    told,
    training_bytes,
    unet_inputs,
    unet_step,
)

REMEDIES = {
    "training": "lower loop.batch_size or the crops, set gradient_checkpointing: true or loop.mixed_precision: bf16",
    "generation": "lower batch_size of the call, or load in bfloat16",
}
GENERATION_BATCH: int = inspect.signature(MedVolumePipeline.__call__).parameters["batch_size"].default
PRECISIONS = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}
EXAMPLES = {TrainVaeConfig: "autoencoder.AutoencoderKL3D", TrainLdmConfig: "diffusion.LatentUNet3D"}
FULL = 0.8  # of the memory, above which an estimate is a warning


@dataclass
class Models:
    """What a config trains or uses: the autoencoder, and its discriminator or the U-Net, with fresh weights."""

    vae: VolumeAutoencoder
    unet: LatentUNet3D | None = None
    discriminator: VolumeDiscriminator | None = None


@dataclass(frozen=True)
class Run:
    """What of a config's training decides its memory, as the trainer reads it.

    `precision` is "no", "bf16" or "fp16"; that of `auto` is the trainer's choice on this machine.
    """

    batch: int
    crops: CropConfig
    adversarial: AdversarialConfig | None
    checkpointing: bool
    precision: str
    algorithm: str = "muon"
    freeze_encoder: bool = False
    lora: LoraConfig | None = None

    @staticmethod
    def of(sections: Mapping[str, Any], precision: str | None = None, accelerator: bool = False) -> "Run":
        """Read a config's sections, with the trainer's defaults.

        Args:
            precision: in place of the config's.
            accelerator: whether it is planned for an accelerator that is not here: `auto` is bf16 on it.
        Raises: ValueError for a section that the trainer refuses.
        """
        loop = read_section(TrainVaeConfig, sections, "loop")
        asked = precision or ("bf16" if accelerator and loop.mixed_precision == "auto" else loop.mixed_precision)
        return Run(
            batch=loop.batch_size,
            crops=read_section(TrainVaeConfig, sections, "crops"),
            adversarial=read_section(TrainVaeConfig, sections, "adversarial"),
            checkpointing=read_section(TrainVaeConfig, sections, "gradient_checkpointing"),
            precision=resolve_precision(asked),
            algorithm=read_section(TrainVaeConfig, sections, "optimizer").algorithm,
            freeze_encoder=read_section(TrainVaeConfig, sections, "freeze_encoder"),
            lora=read_section(TrainLdmConfig, sections, "lora"),
        )

    @property
    def autocast(self) -> torch.dtype | None:
        """The type that networks compute in under autocast; None for float32."""
        return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def __str__(self) -> str:
        return f"{PRECISIONS[self.precision]}, {'with' if self.checkpointing else 'without'} checkpointing"


def check_settings(sections: Mapping[str, Any]) -> list[Finding]:
    """Settings beside `data` and `model` that training would refuse: unknown ones, and values outside their ranges."""
    owner = TrainLdmConfig if "vae" in sections else TrainVaeConfig
    beside = {name: value for name, value in sections.items() if name not in ("data", "model")}
    said = [*faults(owner, beside, raw=True)]
    if not isinstance(sections.get("model", {}), Mapping | None):
        said.append(f"model: got {sections['model']!r}, expected settings such as {{class: {EXAMPLES[owner]}}}")
    return [fail("config", one, "correct it in the config") for one in said]


def build_models(
    sections: Mapping[str, Any], config: DataConfig, numbers: Mapping[str, NumberStats], folder: Path
) -> tuple[Models, list[Finding]]:
    """The models of the config's sections.

    Args:
        numbers: statistics of the data's numbers.
        folder: where the config lies, and perhaps that of an autoencoder that is not trained yet.
    Raises: ValueError (TypeError or KeyError from a model's constructor) for sections that make none.
    """
    if not sections.get("model"):
        raise ValueError("the config has no section `model`")
    section = dict(sections["model"])
    if _class_of(section) is LatentUNet3D:
        vae, findings = _autoencoder_for(sections, config, folder)
        unet = LatentUNet3D(**_arguments(complete_model(section, vae, *_described(vae, config, numbers))))
        return Models(vae, unet=unet), findings
    refuse(faults(_class_of(section), _arguments(section), "model.", raw=True))
    vae = _class_of(section)(**_arguments(section))
    options: AdversarialConfig | None = read_section(TrainVaeConfig, sections, "adversarial")
    if options is None:
        return Models(vae), []
    looks = {"slices": options.slices > 0, "volume": options.volume}
    network = VolumeDiscriminator(vae.config["out_channels"], options.channels, options.layers, **looks)
    return Models(vae, discriminator=network), []


def check_fit(models: Models, run: Run, config: DataConfig) -> list[Finding]:
    """What would stop a training at once, whatever the volumes: channels, and crops."""
    vae, channels, found = models.vae, len(config.channels), []
    if vae.config["in_channels"] != channels:
        message = f"the autoencoder takes {vae.config['in_channels']} channels, the data has {config.channels}"
        remedy = f"set in_channels and out_channels of the autoencoder to {channels}" + (
            "; with per_channel: true it codes each channel by itself, and may start from one-channel weights"
            if channels > 1
            else ""
        )
        found.append(fail("model", message, remedy))
    if models.unet is not None or not list(vae.parameters()):
        return found
    return found + [fail("crops", *wrong) for wrong in crop_faults(run.crops, vae.stride, run.adversarial)]


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
    training = training_bytes(*trained, muon=run.algorithm == "muon") if trained else {"total": 0}
    if unet is not None:
        size = f"{run.batch} latents of {largest.tolist()} cells, the largest volume's, {run}"
    else:
        size = f"{run.batch} crops of {list(run.crops.shape)}, {run}{', with the discriminator' if models.discriminator else ''}"
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
    vae, unet, discriminator = models.vae, models.unet, models.discriminator
    network = vae if unet is None else unet
    if not any(True for _ in network.parameters()):
        return None
    if run.checkpointing:
        network.enable_gradient_checkpointing()
    if unet is not None:
        if run.lora is not None:
            add_lora(unet, **asdict(run.lora))
        return unet, unet_step(unet, cells, run.batch, autocast=run.autocast)
    if run.freeze_encoder:
        vae.encoder.requires_grad_(False)
    slices = run.adversarial.slices if run.adversarial else 0
    step = autoencoder_step(
        vae, run.crops.shape, run.batch, discriminator=discriminator, slices=max(slices, 1), autocast=run.autocast
    )
    return (vae if discriminator is None else nn.ModuleList([vae, discriminator])), step


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
    numbers = dict.fromkeys(config.numbers, NumberStats(mean=0.0, std=1.0, low=-1.0, high=1.0))

    def models() -> tuple[Models, list[Finding]]:
        return build_models(sections, config, numbers, folder)

    try:
        built, findings = models()
    except (TypeError, ValueError, KeyError) as error:
        return [fail("model", f"cannot be built: {error}", "correct the section `model`, or `vae`")], {}
    if wrong := check_fit(built, run, config):
        return [*findings, *wrong], {}
    found, measured = estimate(built, run, [shape], config, batch=1, memory=memory)
    if not dry_run:
        return findings + found, measured
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
    refuted = {one.message.partition(":")[0] for one in findings if one.check == "dry run" and one.level != "OK"}
    kinds = {"training" if stage == "training step" else "generation" for stage in refuted}
    found = [
        one for one in found if one.level != "OK" or one.message.partition(" ")[0] not in kinds
    ]  # the dry run knows better
    return found + findings, {**measured, "dry_run": took}


def _stages(models: Models, run: Run, shape: Sequence[int], device: torch.device) -> dict[str, Callable[[], object]]:
    """What is run for good, with random weights, by name."""
    vae, unet = models.vae, models.unet
    cells = [-(-n // s) for n, s in zip(shape, vae.stride, strict=True)]
    latents = vae.config["latent_channels"]
    stages: dict[str, Callable[[], object]] = {}
    for model in (vae, unet, models.discriminator):
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
        stored = read_object(described / "config.json")
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
    apart = {"per_channel": True, "latent_channels": 4 * channels} if config.condition_channels else {}
    vae = AutoencoderKL3D(in_channels=channels, out_channels=channels, **apart)
    return vae, [warn("model", message, "run train_vae.py first, or correct `vae`")]


@dataclass(frozen=True)
class PlannedData:
    """`diffusion.completion.DataFacts` of a config, whose volumes need not be read."""

    channels: list[str]
    labels: dict[int, str]
    classes: dict[str, list[str]]
    numbers: Mapping[str, NumberStats]


def _described(
    vae: VolumeAutoencoder, config: DataConfig, numbers: Mapping[str, NumberStats]
) -> tuple[PlannedData, dict[str, slice]]:
    """What `complete_model` asks of the data, without reading volumes, and where given images lie in the latents."""
    labels = config.label_names or (PHANTOM_LABELS if config.phantom else {})
    data = PlannedData(config.channels, labels if config.masks or config.phantom else {}, config.classes, numbers)
    return data, {name: vae.latents_of(config.channels.index(name)) for name in config.condition_channels}
