"""Settings of `train_vae.py`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from cli.settings import (
    Axis,
    Checkpoint,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    UserPath,
    checked,
)
from volumes.data.config import DataConfig, Label

from .engine.config import MAX_MINUTES, LoopConfig, OptimizerConfig, warn_of_long_warmup

logger = logging.getLogger("training")


@dataclass
@checked
class CropConfig:
    """Random patches of the training volumes.

    Args:
        shape: voxels (X, Y, Z); a multiple of the autoencoder's stride. Smaller volumes are padded, and the losses
            ignore the padding.
        flip_axes: axes (0, 1, 2) that are mirrored at random.
    """

    shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (32, 32, 32)
    flip_axes: tuple[Axis, ...] = ()


@dataclass
@checked
class AutoencoderLosses:
    """Weights of the autoencoder's losses, each averaged inside the field of view; see autoencoder/losses/.

    Args:
        l1: weight of the mean absolute error.
        mse: weight of the mean squared error.
        gradient: weight of the mean absolute error of the differences between neighboring voxels, which keeps edges.
        spectrum: weight of the error of the power in each frequency band, which keeps fine detail.
        kl: weight of the Kullback-Leibler divergence of the latents from a normal distribution; only KL autoencoders
            have it.
        commitment: weight of the distance of the latents from their codes; only autoencoders with a codebook have it.
    """

    l1: NonNegativeFloat = 1.0
    mse: NonNegativeFloat = 0.0
    gradient: NonNegativeFloat = 1.0
    spectrum: NonNegativeFloat = 0.0
    kl: NonNegativeFloat = 1e-4
    commitment: NonNegativeFloat = 0.25


@dataclass
@checked
class AdversarialConfig:
    """A discriminator of slices and volumes, which sharpens reconstructions; see autoencoder/losses/adversarial.py.

    Args:
        weight: weight of the adversarial loss.
        adaptive: scale it so that it pulls on the decoder's last layer as hard as the reconstruction losses do.
        feature_matching: weight of the difference between the discriminator's features of real and reconstructed
            volumes.
        start_step: optimizer step at which the discriminator starts.
        warmup_steps: after the start, steps over which both weights rise from 0, while the discriminator learns.
        slices: planes per volume and step that the discriminator sees; 0 for none.
        volume: whether it also sees whole patches.
        channels, layers: size of the discriminators, see `autoencoder.losses.adversarial.VolumeDiscriminator`.
        optimizer: the discriminator's optimizer; its gradient_accumulation is always the autoencoder's.
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
                "adversarial: slices is 0 and volume is false, so the discriminator would see nothing; set one of them"
            )


@dataclass
@checked
class PerceptualConfig:
    """A perceptual loss: a frozen network's features of image and reconstruction should agree; see
    autoencoder/losses/perceptual.py.

    Args:
        network: a local path: a folder that train_vae.py wrote (the features are those of its encoder, in three
            dimensions), or a safetensors file of VGG-16 under torchvision's names (features of slices, each channel as
            a gray picture in ImageNet's colors).
        weight: weight of the squared distances of the features, each of length 1, summed over the network's levels
            (Zhang et al. 2018, Eq. 1).
        slices: planes per volume and step that VGG-16 sees.
    """

    network: UserPath
    weight: NonNegativeFloat = 0.1
    slices: PositiveInt = 4


@dataclass
@checked
class TrainVaeConfig:
    """Train an autoencoder on volumes.

    Args:
        output: folder of the run: config.yaml, metrics.jsonl, checkpoints/, best/, logs/, previews/, and at the end
            vae/ and metrics.json.
        data: the volumes.
        model: `class:` and that class's constructor arguments.
        crops: patches, the training samples.
        losses: weights of the losses.
        loss_weights: how much l1, mse and gradient count inside a label of the masks, by its name or value, such as
            {lesion: 30}; 1 for all other voxels. So lesions of a few voxels are not painted over.
        perceptual: a perceptual loss by a frozen network; default: none.
        adversarial: a discriminator, which sharpens reconstructions; default: none.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        optimizer: optimizer and learning rate.
        loop: length, precision and rhythm.
        resume: "latest", or a checkpoint folder of this run, to continue exactly from there.
        accept_changes: resume although the config or the volumes differ from those the run was started with.
        wait_minutes: how long to wait for another job that writes to `output`, such as one that is ending while its
            requeue starts; 0 stops at once.
        init_from: folder of a trained autoencoder to start from (fine-tuning).
        freeze_encoder: train the decoder only, so that the latents of `init_from` stay valid, and with them a diffusion
            model of these latents.
        accept_overlap: train although `init_from` was trained on subjects, by name, that are held out here.
    """

    output: UserPath
    data: DataConfig
    model: dict[str, Any]
    crops: CropConfig = field(default_factory=CropConfig)
    losses: AutoencoderLosses = field(default_factory=AutoencoderLosses)
    loss_weights: dict[Label | str, PositiveFloat] = field(default_factory=dict)
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None
    gradient_checkpointing: bool = False
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    resume: Checkpoint | None = None
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
                "losses: l1, mse, gradient and spectrum are all 0, so nothing is learned from the volumes; raise one "
                "of them"
            )
        warn_of_long_warmup(self.optimizer, self.loop)
        if self.adversarial is not None and not self.adversarial.weight and not self.adversarial.feature_matching:
            raise ValueError("adversarial: weight and feature_matching are both 0; raise one, or remove the section")
        if self.adversarial is not None and self.adversarial.start_step >= self.loop.max_steps:
            logger.warning(
                "adversarial.start_step %d is not below loop.max_steps %d: the discriminator never starts",
                self.adversarial.start_step,
                self.loop.max_steps,
            )


def crop_faults(
    crops: CropConfig, stride: Sequence[int], adversarial: AdversarialConfig | None = None
) -> list[tuple[str, str]]:
    """Return why an autoencoder of this stride, and its discriminator, cannot be trained on these patches: (fault,
    remedy)."""
    faults = []
    if any(n % s for n, s in zip(crops.shape, stride, strict=True)):
        near = [max(round(n / s), 1) * s for n, s in zip(crops.shape, stride, strict=True)]
        message = f"crops.shape {list(crops.shape)} is not a multiple of the autoencoder's stride {list(stride)}"
        faults.append((message, f"use {near}"))
    if adversarial is not None and min(crops.shape) < (side := 3 * 2**adversarial.layers):
        layers = f"a discriminator of {adversarial.layers} layers needs {side} voxels per side"
        remedy = "enlarge the patches, or lower adversarial.layers"
        faults.append((f"crops.shape {list(crops.shape)}: {layers}", remedy))
    return faults
