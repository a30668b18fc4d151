"""What a training run can be told, as typed dataclasses; jsonargparse makes one of YAML and the command line."""

import dataclasses
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from cli.command import ArgumentParser
from cli.parsing import parse_settings
from cli.settings import (
    Axis,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Seed,
    Share,
    ShareBelowOne,
    UserPath,
    checked,
    construct,
    faults_of,
    hints_of,
    refuse,
)
from files.atomic import write_text
from files.documents import read_yaml
from volumes.data.config import DataConfig
from volumes.data.config_parser import ConfigParser, config_files
from volumes.data.preprocessing import inherited

Config = TypeVar("Config")
logger = logging.getLogger("training")
MAX_WORKERS, MAX_MINUTES = 1024, 366 * 24 * 60
RHYTHM = (
    "log_every",
    "validate_every",
    "preview_every",
    "previews",
    "checkpoint_every",
    "keep_checkpoints",
    "trackers",
)
LENGTH = ("max_steps", "max_skipped", "timeout_minutes", "workers", "compile")
FREE = {
    "output",
    "inference_steps",
    "accept_overlap",
    "cache.folder",
    *(f"loop.{name}" for name in (*RHYTHM, *LENGTH)),
}  # in a resume
UNCOMPARED = ("resume", "accept_changes", "wait_minutes")  # they say how a command begins, and nothing of the run


@dataclass
@checked
class OptimizerConfig:
    """Muon or AdamW, with linear warm-up and cosine decay.

    Args:
        algorithm: muon updates the kernels of hidden convolutions by Muon and the rest by AdamW (see
            training/engine/muon.py); adamw is AdamW alone.
        learning_rate: highest learning rate, reached after the warm-up.
        betas: AdamW's decay rates of the first and second moment; the first is Muon's momentum too.
        eps: AdamW's epsilon.
        weight_decay: decoupled weight decay of weights (never of biases and norm scales).
        warmup_steps: steps of linear warm-up.
        final_lr_ratio: learning rate at the last step, as a part of `learning_rate`.
        max_grad_norm: gradients are scaled down to this global norm; 0 leaves them as they are.
        gradient_accumulation: batches whose gradients are averaged for one step.
    """

    algorithm: Literal["muon", "adamw"] = "muon"
    learning_rate: PositiveFloat = 1e-3
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.99)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 100
    final_lr_ratio: Share = 0.01
    max_grad_norm: NonNegativeFloat = 1.0
    gradient_accumulation: PositiveInt = 1


@dataclass
@checked
class LoopConfig:
    """Length, precision and rhythm of a run.

    Args:
        max_steps: optimizer steps of the whole run; the learning rate ends there.
        batch_size: samples per batch and process.
        seed: of weights, data order, crops and noise.
        mixed_precision: auto is bf16 where the hardware computes in it natively, else no.
        compile: torch.compile the networks, which needs a C++ compiler. Each shape of batch is compiled by itself and
            takes a minute on a CPU; from the ninth shape on, steps run as without it. So it is for long runs on crops,
            or on volumes of one grid.
        shard: divide weights, gradients, optimizer state and moving average among the processes (FSDP), for networks whose
            training does not fit on one GPU; the weights alone must, since each validates with all of them.
        workers: processes that load data, per training process; 0 loads in the training process. Default: 0 on a CPU,
            2 on other devices. `data_wait` in the log is the part of the time spent waiting for data.
        ema_decay: of the moving average of the weights, which is what is validated and saved.
        log_every: steps between lines of losses; between them nothing is fetched from the device but one flag.
        validate_every: steps between validations on held-out subjects; 0 validates at the end only.
        preview_every: steps between previews; 0 draws one at the end only.
        previews: volumes per preview.
        checkpoint_every: steps between checkpoints; 0 writes one at the end only.
        keep_checkpoints: the newest so many are kept; 0 keeps all.
        max_skipped: so many steps in a row with non-finite gradients stop the run.
        patience: minutes that processes wait for each other; then the job ends. They wait while the main process
            validates, draws previews and measures the training set, and no longer while a dead one does not answer.
        trackers: by name: csv (metrics.csv in the output folder), and those of Accelerate that are installed, such as tensorboard or
            wandb; none for [].
    """

    max_steps: PositiveInt = 10_000
    batch_size: PositiveInt = 4
    seed: Seed = 0
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    compile: bool = False
    fsdp: bool = False
    workers: Annotated[int, Range(0, MAX_WORKERS)] | None = None
    ema_decay: ShareBelowOne = 0.999
    log_every: PositiveInt = 20
    validate_every: NonNegativeInt = 500
    preview_every: NonNegativeInt = 500
    previews: NonNegativeInt = 4
    checkpoint_every: NonNegativeInt = 500
    keep_checkpoints: NonNegativeInt = 2
    max_skipped: PositiveInt = 20
    timeout_minutes: Annotated[float, Range(0, MAX_MINUTES, above=True)] = 120.0
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])


@dataclass
@checked
class CropConfig:
    """Random crops of the training volumes.

    Args:
        shape: voxels (X, Y, Z); a multiple of the autoencoder's stride. Smaller volumes are padded, and the padding
            is left out of the losses.
        flip_axes: axes (0, 1, 2) that are mirrored at random.
    """

    shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (32, 32, 32)
    flip_axes: tuple[Axis, ...] = ()


@dataclass
@checked
class AutoencoderLosses:
    """Weights of the autoencoder's losses, each averaged inside the field of view; see autoencoder/losses.py."""

    l1: NonNegativeFloat = 1.0
    mse: NonNegativeFloat = 0.0
    gradient: NonNegativeFloat = 1.0
    spectrum: NonNegativeFloat = 0.0
    kl: NonNegativeFloat = 1e-4
    commitment: NonNegativeFloat = 0.25


@dataclass
@checked
class AdversarialConfig:
    """A discriminator of slices and volumes that the autoencoder is to deceive; see autoencoder/adversarial.py.

    Args:
        weight: of the adversarial loss.
        adaptive: scale it so that it pulls on the decoder's last layer as hard as the reconstruction losses do.
        feature_matching: weight of the difference between the discriminator's features of real and reconstructed.
        start_step: optimizer steps before which there is no discriminator.
        warmup_steps: after the start, steps over which both weights rise from 0, while the discriminator learns.
        slices: planes that are looked at of each volume and step; 0 for none.
        volume: whether whole crops are looked at.
        channels, layers: of the discriminators, see `autoencoder.adversarial.VolumeDiscriminator`.
        optimizer: of the discriminator; batches are accumulated as for the autoencoder, whatever it says.
    """

    weight: NonNegativeFloat = 0.5
    adaptive: bool = True
    feature_matching: NonNegativeFloat = 1.0
    start_step: NonNegativeInt = 0
    warmup_steps: NonNegativeInt = 200
    slices: NonNegativeInt = 4
    volume: bool = True
    channels: PositiveInt = 32
    layers: PositiveInt = 2
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(algorithm="adamw", learning_rate=2e-4, betas=(0.5, 0.9))
    )

    def __post_init__(self) -> None:
        if not self.slices and not self.volume:
            raise ValueError(
                "adversarial: slices is 0 and volume false, so the discriminator would see nothing; set one"
            )


@dataclass
@checked
class PerceptualConfig:
    """A frozen network whose features of image and reconstruction are to agree; see autoencoder/perceptual.py.

    Args:
        network: a local path. A folder that train_vae.py wrote (the features are those of its encoder, in three
            dimensions), or a safetensors file of VGG-16 under torchvision's names (features of slices, each channel as a
            gray picture in ImageNet's colors).
        weight: of the squared distances of the features, each of length 1, summed over the network's levels (Zhang et
            al. 2018, Eq. 1).
        slices: planes that VGG-16 looks at of each volume and step.
    """

    network: UserPath
    weight: NonNegativeFloat = 0.1
    slices: PositiveInt = 4


@dataclass
@checked
class LatentCacheConfig:
    """Latents of the training volumes, computed once.

    Args:
        folder: where they are kept, a folder or its fsspec URL; default: latents/ in the output folder.
        versions: entries per volume; the first is the volume as it is, the others are augmented.
        flip_axes: axes (0, 1, 2) along which the other versions are mirrored at random.
        shift: whether the other versions are shifted by less than the autoencoder's stride at random.
        rotate: most degrees about each axis by which the other versions are rotated.
        scale: most by which each side of the other versions grows or shrinks, as a share.
        deform: standard deviation in voxels of a smooth random displacement of the other versions.
    """

    folder: UserPath | None = None
    versions: PositiveInt = 1
    flip_axes: tuple[Axis, ...] = ()
    shift: bool = False
    rotate: Annotated[float, Range(0, 180)] = 0.0
    scale: ShareBelowOne = 0.0
    deform: NonNegativeFloat = 0.0


@dataclass
@checked
class LoraConfig:
    """A LoRA (Hu et al. 2022) in place of all weights.

    Args:
        rank: of each layer's update.
        alpha: the update is scaled by alpha / rank.
        target_modules: which layers get one, by their last names: qkv and out (attention), time, conv1 and conv2, ...
        dropout: of the update's input, in training.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 16.0
    target_modules: list[str] = field(default_factory=lambda: ["qkv", "out", "time", "conv1", "conv2"])
    dropout: ShareBelowOne = 0.0


@dataclass
@checked
class TrainVaeConfig:
    """Train an autoencoder on volumes.

    Args:
        output: folder of the run: config.yaml, checkpoints/, logs/, previews/, and at the end vae/ and metrics.json.
        data: which volumes.
        model: `class:` and that class's constructor arguments.
        crops: what a training sample is.
        losses: weights of the losses.
        perceptual: a frozen network whose features are to agree; none if absent.
        adversarial: a discriminator that sharpens; none if absent.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        optimizer: how weights move.
        loop: how long and in which rhythm.
        resume: "latest", or a checkpoint folder of this run, to go on from exactly there.
        accept_changes: resume although config or volumes are not those that the run began with.
        wait_minutes: how long to wait for another job that writes to `output`, such as one that is ending while its requeue starts; 0
            refuses at once.
        init_from: folder of a trained autoencoder to start from (fine-tuning).
        freeze_encoder: train the decoder alone, so that the latents of `init_from`, and a diffusion model of them, stay.
        accept_overlap: train although `init_from` has seen subjects, by their names, that are held out here.
    """

    output: UserPath
    data: DataConfig
    model: dict[str, Any]
    crops: CropConfig = field(default_factory=CropConfig)
    losses: AutoencoderLosses = field(default_factory=AutoencoderLosses)
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None
    gradient_checkpointing: bool = False
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    resume: UserPath | None = None
    accept_changes: bool = False
    wait_minutes: Annotated[float, Range(0, MAX_MINUTES)] = 0.0
    init_from: UserPath | None = None
    freeze_encoder: bool = False
    accept_overlap: bool = False

    def __post_init__(self) -> None:
        reconstruction = (self.losses.l1, self.losses.mse, self.losses.gradient, self.losses.spectrum)
        others = (self.perceptual and self.perceptual.weight) or self.adversarial
        if not any(reconstruction) and not others:
            raise ValueError(
                "losses: l1, mse, gradient and spectrum are all 0, so nothing is learned of the volumes; raise one"
            )
        _warn_of_length(self.optimizer, self.loop)
        if self.adversarial is not None and not self.adversarial.weight and not self.adversarial.feature_matching:
            raise ValueError("adversarial: weight and feature_matching are both 0; raise one, or remove the section")
        if self.adversarial is not None and self.adversarial.start_step >= self.loop.max_steps:
            logger.warning(
                "adversarial.start_step %d is not below loop.max_steps %d: the discriminator never starts",
                self.adversarial.start_step,
                self.loop.max_steps,
            )


@dataclass
@checked
class TrainLdmConfig:
    """Train a latent diffusion model on the latents of a trained autoencoder.

    Args:
        output: folder of the run: config.yaml, checkpoints/, logs/, previews/, and at the end metrics.json and
            pipeline/ (of a LoRA: lora/ instead).
        vae: folder of the trained autoencoder (`vae/` of its run).
        data: which volumes.
        model: `class:` and that class's constructor arguments; what the autoencoder and the labels decide may be
            left out.
        cache: latents of the training volumes.
        loss: of the prediction: mse, its mean squared error, or l1, its mean absolute error.
        scheduler: class of diffusers' that previews and the pipeline sample with, such as DDPMScheduler; default: Euler for
            rectified flow, DDIM for the others (`diffusion.make_scheduler`).
        residual_noise: measure what the autoencoder leaves out of the training volumes, for the pipeline to add it as noise.
        gradient_checkpointing: compute the U-Net's activations again in the backward pass instead of keeping them.
        inference_steps: denoising steps of the previews.
        optimizer: how weights move.
        loop: how long and in which rhythm.
        resume: "latest", or a checkpoint folder of this run, to go on from exactly there.
        accept_changes: resume although config or volumes are not those that the run began with.
        wait_minutes: how long to wait for another job that writes to `output`, such as one that is ending while its requeue starts; 0
            refuses at once.
        init_from: folder of a trained U-Net to start from (fine-tuning).
        lora: train a LoRA of the U-Net `init_from` instead of its weights.
        accept_overlap: train although `vae` or `init_from` have seen subjects, by their names, that are held out here.
    """

    output: UserPath
    vae: UserPath
    data: DataConfig
    model: dict[str, Any]
    cache: LatentCacheConfig = field(default_factory=LatentCacheConfig)
    loss: Literal["mse", "l1"] = "mse"
    scheduler: str | None = None
    residual_noise: bool = False
    gradient_checkpointing: bool = False
    inference_steps: PositiveInt = 20
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    resume: UserPath | None = None
    accept_changes: bool = False
    wait_minutes: Annotated[float, Range(0, MAX_MINUTES)] = 0.0
    init_from: UserPath | None = None
    lora: LoraConfig | None = None
    accept_overlap: bool = False

    def __post_init__(self) -> None:
        _warn_of_length(self.optimizer, self.loop)


def _warn_of_length(optimizer: OptimizerConfig, loop: LoopConfig) -> None:
    if optimizer.warmup_steps > loop.max_steps:
        logger.warning(
            "optimizer.warmup_steps %d exceed loop.max_steps %d: the learning rate ends at %.2g of %g",
            optimizer.warmup_steps,
            loop.max_steps,
            optimizer.learning_rate * loop.max_steps / optimizer.warmup_steps,
            optimizer.learning_rate,
        )


def crop_faults(
    crops: CropConfig, stride: Sequence[int], adversarial: AdversarialConfig | None = None
) -> list[tuple[str, str]]:
    """Why an autoencoder of this stride, and its discriminator, cannot be trained on these crops: each with a remedy."""
    found = []
    if any(n % s for n, s in zip(crops.shape, stride, strict=True)):
        near = [max(round(n / s), 1) * s for n, s in zip(crops.shape, stride, strict=True)]
        message = f"crops.shape {list(crops.shape)} is no multiple of the autoencoder's stride {list(stride)}"
        found.append((message, f"use {near}"))
    if adversarial is not None and min(crops.shape) < (side := 3 * 2**adversarial.layers):
        layers = f"a discriminator of {adversarial.layers} layers needs {side} voxels a side"
        remedy = "enlarge the crops, or lower adversarial.layers"
        found.append((f"crops.shape {list(crops.shape)}: {layers}", remedy))
    return found


def parse_config(config_class: type[Config], args: Sequence[str] | None = None) -> Config:
    """The run's config from `--config FILE.yaml` and overrides such as `--loop.max_steps 100`.

    What comes later on the command line wins, so `--config` comes first. What `data` leaves out of the preprocessing is as the
    autoencoder learned it, that `vae` names or `init_from` (`volumes.data.preprocessing.inherited`). `--print_config` shows the
    result.

    Args:
        args: default: the command line.
    Raises: ValueError for a file that is missing or that `read_yaml` refuses, for unknown settings and for values that are not
        what they are declared to be, naming them.
    """
    args = list(sys.argv[1:] if args is None else args)
    files = config_files(args)
    source = "vae" if "vae" in hints_of(config_class) else "init_from"
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument(f"--{source}", dest="source")
    folder, section = None, {}
    for path in files:
        found = read_yaml(path)
        folder = found.get(source, folder)
        section |= found["data"] if isinstance(found.get("data"), dict) else {}
    folder = first.parse_known_args(args)[0].source or folder
    learned = inherited(os.path.expanduser(folder), section) if isinstance(folder, str) else {}
    parser = ConfigParser(description=config_class.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with the arguments below")
    parser.add_class_arguments(config_class, as_group=False)
    parser.set_defaults({f"data.{key}": value for key, value in learned.items()})
    return parse_settings(parser, args, {"": config_class}, files).settings


def read_section(owner: Any, sections: Mapping[str, Any], name: str) -> Any:
    """One section of a plain config as its dataclass, with the defaults of what is left out; None if it may be absent and is.

    Args:
        owner: the config's class, TrainVaeConfig or TrainLdmConfig; or one of its sections' dataclasses.
        sections: as a YAML file has them.
    Raises: ValueError for values that are not what they are declared to be.
    """
    hint = hints_of(owner)[name]
    values = sections.get(name)
    if values is None:
        field_ = next(one for one in dataclasses.fields(owner) if one.name == name)
        return field_.default_factory() if field_.default_factory is not dataclasses.MISSING else field_.default
    refuse(faults_of(hint, values, name, raw=True))
    return construct(hint, values, name)


def to_plain(config: Any) -> dict[str, Any]:
    """A config dataclass as nested plain dicts and lists, ready for YAML."""

    return _plain(config)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def save_config(config: Any, path: Path) -> None:
    """Write `config` as YAML that `--config` reads, whole or not at all."""
    write_text(path, yaml.safe_dump(to_plain(config), sort_keys=False))


def read_config(path: Path) -> dict[str, Any]:
    """What `save_config` wrote. Raises: ValueError for a file that it did not write."""
    try:
        found = read_yaml(path)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is no run's config; take it from a copy, or remove it to resume unchecked")
    return found


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value})
    return flat


def defaults(config: Any) -> dict[str, Any]:
    """`to_plain` of the defaults of a config dataclass; what has none is as in `config`."""
    found: dict[str, Any] = {}
    for field_ in dataclasses.fields(config):
        value = getattr(config, field_.name)
        if field_.default is not dataclasses.MISSING:
            value = field_.default if not dataclasses.is_dataclass(value) else defaults(value)
        elif field_.default_factory is not dataclasses.MISSING:
            value = field_.default_factory()
        elif dataclasses.is_dataclass(value):
            value = defaults(value)
        found[field_.name] = value
    return {key: _plain(value) for key, value in found.items()}


def config_changes(old: dict[str, Any], config: Any) -> dict[str, str]:
    """What differs between the plain config `old` and `config`, by name: {"optimizer.learning_rate": "0.001 -> 0.0003"}.

    `resume`, `accept_changes` and `wait_minutes` are left out, and settings at their defaults that there were none of when `old` was
    written.
    """
    before, after, usual, absent = flatten(old), flatten(to_plain(config)), flatten(defaults(config)), "(absent)"
    changes = {}
    for name in {**before, **after}:
        was, now = before.get(name, absent), after.get(name, absent)
        new = name not in before and name in usual and now == usual[name]
        if was != now and not new and name not in UNCOMPARED:
            changes[name] = f"{was} -> {now}"
    return changes


def refuse_changes(changes: Mapping[str, str], accepted: bool) -> None:
    """Log what may change in a run that is resumed, and what was accepted. Raises: ValueError for the rest."""
    refused = [f"{name}: {change}" for name, change in changes.items() if name not in FREE]
    if refused and not accepted:
        raise ValueError(
            "--resume: this is not how the run began:\n  " + "\n  ".join(refused) + "\nUndo that; or, if it is wanted "
            "from here on, add --accept_changes true; or begin another run (--output)"
        )
    for name, change in changes.items():
        logger.warning("changed since the run began: %s: %s", name, change)
