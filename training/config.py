"""What a training run can be told, as typed dataclasses; jsonargparse makes one of YAML and the command line."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import Namespace

from volumes import DataConfig
from volumes.config_parser import ConfigParser, config_files
from volumes.text import read_yaml

from .output import write_text

Config = TypeVar("Config")
logger = logging.getLogger("training")
RHYTHM = (
    "log_every",
    "validate_every",
    "preview_every",
    "previews",
    "checkpoint_every",
    "keep_checkpoints",
    "trackers",
)
LENGTH = ("max_steps", "max_skipped", "patience", "workers", "compile")
FREE = {"output", "inference_steps", "cache.folder", *(f"loop.{name}" for name in (*RHYTHM, *LENGTH))}  # in a resume


def _require_at_least(config: Any, lowest: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < lowest:
            raise ValueError(f"{name} must be {lowest} or more, got {getattr(config, name)}")


@dataclass
class OptimizerConfig:
    """Muon or AdamW, with linear warm-up and cosine decay.

    Args:
        algorithm: muon updates the kernels of hidden convolutions by Muon and the rest by AdamW (see
            training/muon.py); adamw is AdamW alone.
        learning_rate: highest learning rate, reached after the warm-up.
        betas: AdamW's decay rates of the first and second moment; the first is Muon's momentum too.
        eps: AdamW's epsilon.
        weight_decay: decoupled weight decay of weights (never of biases and norm scales).
        warmup_steps: steps of linear warm-up.
        final_lr_ratio: learning rate at the last step, as a part of `learning_rate`.
        max_grad_norm: gradients are scaled down to this global norm.
        gradient_accumulation: batches whose gradients are averaged for one step.
    """

    algorithm: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 100
    final_lr_ratio: float = 0.01
    max_grad_norm: float = 1.0
    gradient_accumulation: int = 1

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "gradient_accumulation")
        _require_at_least(self, 0, "warmup_steps", "learning_rate", "weight_decay")


@dataclass
class LoopConfig:
    """Length, precision and rhythm of a run.

    Args:
        max_steps: optimiser steps of the whole run; the learning rate ends there.
        batch_size: samples per batch and process.
        seed: of weights, data order, crops and noise.
        mixed_precision: auto is bf16 where the hardware computes in it natively, else no.
        compile: torch.compile the networks, which needs a C++ compiler. Each shape of batch is compiled by itself and
            takes a minute on a CPU; from the ninth shape on, steps run as without it. So it is for long runs on crops,
            or on volumes of one grid.
        shard: divide weights, gradients, optimiser state and moving average among the processes (FSDP), for networks whose
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
        trackers: Accelerate trackers by name, such as tensorboard or wandb.
    """

    max_steps: int = 10_000
    batch_size: int = 4
    seed: int = 0
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    compile: bool = False
    shard: bool = False
    workers: int | None = None
    ema_decay: float = 0.999
    log_every: int = 20
    validate_every: int = 500
    preview_every: int = 500
    previews: int = 4
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    max_skipped: int = 20
    patience: float = 120.0
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "max_steps", "batch_size", "log_every", "max_skipped")
        _require_at_least(self, 0, "seed", "validate_every", "preview_every", "previews")
        if not self.patience > 0:
            raise ValueError(f"patience must be above 0 minutes, got {self.patience}")
        _require_at_least(
            self, 0, "checkpoint_every", "keep_checkpoints", *([] if self.workers is None else ["workers"])
        )


@dataclass
class CropConfig:
    """Random crops of the training volumes.

    Args:
        shape: voxels (X, Y, Z); a multiple of the autoencoder's stride. Smaller volumes are padded, and the padding
            is left out of the losses.
        flip_axes: axes (0, 1, 2) that are mirrored at random.
    """

    shape: tuple[int, int, int] = (32, 32, 32)
    flip_axes: tuple[int, ...] = ()


@dataclass
class AutoencoderLosses:
    """Weights of the autoencoder's losses, each averaged inside the field of view; see autoencoder/losses.py."""

    l1: float = 1.0
    mse: float = 0.0
    gradient: float = 1.0
    spectrum: float = 0.0
    kl: float = 1e-4
    commitment: float = 0.25


@dataclass
class AdversarialConfig:
    """A discriminator of slices and volumes that the autoencoder is to deceive; see autoencoder/adversarial.py.

    Args:
        weight: of the adversarial loss.
        adaptive: scale it so that it pulls on the decoder's last layer as hard as the reconstruction losses do.
        feature_matching: weight of the difference between the discriminator's features of real and reconstructed.
        start_step: optimiser steps before which there is no discriminator.
        warmup_steps: after the start, steps over which both weights rise from 0, while the discriminator learns.
        slices: planes that are looked at of each volume and step; 0 for none.
        volume: whether whole crops are looked at.
        channels, layers: of the discriminators, see `autoencoder.adversarial.VolumeDiscriminator`.
        optimizer: of the discriminator; batches are accumulated as for the autoencoder, whatever it says.
    """

    weight: float = 0.5
    adaptive: bool = True
    feature_matching: float = 1.0
    start_step: int = 0
    warmup_steps: int = 200
    slices: int = 4
    volume: bool = True
    channels: int = 32
    layers: int = 2
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(algorithm="adamw", learning_rate=2e-4, betas=(0.5, 0.9))
    )

    def __post_init__(self) -> None:
        _require_at_least(self, 0, "weight", "feature_matching", "start_step", "warmup_steps", "slices")
        _require_at_least(self, 1, "channels", "layers")


@dataclass
class PerceptualConfig:
    """A frozen network whose features of image and reconstruction are to agree; see autoencoder/perceptual.py.

    Args:
        network: a local path. A folder that train_vae.py wrote (the features are those of its encoder, in three
            dimensions), or a safetensors file of VGG-16 under torchvision's names (features of slices, each channel as a
            grey picture in ImageNet's colours).
        weight: of the squared distances of the features, each of length 1, summed over the network's levels (Zhang et
            al. 2018, Eq. 1).
        slices: planes that VGG-16 looks at of each volume and step.
    """

    network: str
    weight: float = 0.1
    slices: int = 4

    def __post_init__(self) -> None:
        _require_at_least(self, 0, "weight")
        _require_at_least(self, 1, "slices")


@dataclass
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

    folder: str | None = None
    versions: int = 1
    flip_axes: tuple[int, ...] = ()
    shift: bool = False
    rotate: float = 0.0
    scale: float = 0.0
    deform: float = 0.0


@dataclass
class LoraConfig:
    """A LoRA (Hu et al. 2022) in place of all weights.

    Args:
        rank: of each layer's update.
        alpha: the update is scaled by alpha / rank.
        target_modules: which layers get one, by their last names: qkv and out (attention), time, conv1 and conv2, ...
        dropout: of the update's input, in training.
    """

    rank: int = 16
    alpha: float = 16.0
    target_modules: list[str] = field(default_factory=lambda: ["qkv", "out", "time", "conv1", "conv2"])
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "rank")
        _require_at_least(self, 0, "alpha", "dropout")


@dataclass
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
        init_from: folder of a trained autoencoder to start from (fine-tuning).
        freeze_encoder: train the decoder alone, so that the latents of `init_from`, and a diffusion model of them, stay.
    """

    output: str
    data: DataConfig
    model: dict[str, Any]
    crops: CropConfig = field(default_factory=CropConfig)
    losses: AutoencoderLosses = field(default_factory=AutoencoderLosses)
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None
    gradient_checkpointing: bool = False
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    resume: str | None = None
    accept_changes: bool = False
    init_from: str | None = None
    freeze_encoder: bool = False


@dataclass
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
        noise: measure what the autoencoder leaves out of the training volumes, for the pipeline to add it as noise.
        gradient_checkpointing: compute the U-Net's activations again in the backward pass instead of keeping them.
        inference_steps: denoising steps of the previews.
        optimizer: how weights move.
        loop: how long and in which rhythm.
        resume: "latest", or a checkpoint folder of this run, to go on from exactly there.
        accept_changes: resume although config or volumes are not those that the run began with.
        init_from: folder of a trained U-Net to start from (fine-tuning).
        lora: train a LoRA of the U-Net `init_from` instead of its weights.
    """

    output: str
    vae: str
    data: DataConfig
    model: dict[str, Any]
    cache: LatentCacheConfig = field(default_factory=LatentCacheConfig)
    loss: Literal["mse", "l1"] = "mse"
    scheduler: str | None = None
    noise: bool = False
    gradient_checkpointing: bool = False
    inference_steps: int = 20
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    resume: str | None = None
    accept_changes: bool = False
    init_from: str | None = None
    lora: LoraConfig | None = None


def parse_config(config_class: type[Config], args: list[str] | None = None) -> Config:
    """The run's config from `--config FILE.yaml` and overrides such as `--loop.max_steps 100`.

    What comes later on the command line wins, so `--config` comes first. Unknown keys and wrong types end the program
    with a message that names them; `--print_config` shows the result.

    Args:
        args: default: the command line.
    Raises: ValueError for a file that is missing or that `read_yaml` refuses.
    """
    config_files(args)
    parser = ConfigParser(description=config_class.__doc__, exit_on_error=True)
    parser.add_argument("--config", action="config", help="YAML file with the arguments below")
    parser.add_class_arguments(config_class, as_group=False)
    values: Namespace = parser.instantiate(parser.parse_args(args))
    names = [f.name for f in dataclasses.fields(config_class)]  # pyright: ignore[reportArgumentType]
    return config_class(**{name: values[name] for name in names})


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

    `resume` and `accept_changes` are left out, and settings at their defaults that there were none of when `old` was
    written.
    """
    before, after, usual, absent = flatten(old), flatten(to_plain(config)), flatten(defaults(config)), "(absent)"
    changes = {}
    for name in {**before, **after}:
        was, now = before.get(name, absent), after.get(name, absent)
        new = name not in before and name in usual and now == usual[name]
        if was != now and not new and name not in ("resume", "accept_changes"):
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
