"""Settings of `train_ldm.py`."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from autoencoder.cache_config import LatentCacheConfig
from cli.settings import (
    Checkpoint,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Range,
    Share,
    ShareBelowOne,
    UserPath,
    checked,
)
from volumes.data.config import DataConfig, Label

from .engine.config import MAX_MINUTES, LoopConfig, OptimizerConfig, warn_of_long_warmup


@dataclass
@checked
class LoraConfig:
    """Train a LoRA (Hu et al. 2022) instead of all weights.

    Args:
        rank: rank of each layer's update.
        alpha: the update is scaled by alpha / rank.
        target_modules: layers that get an update, by their last names: qkv and out (attention), time, conv1 and conv2,
            ...
        dropout: dropout of the update's input, in training.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 16.0
    target_modules: list[str] = field(default_factory=lambda: ["qkv", "out", "time", "conv1", "conv2"])
    dropout: ShareBelowOne = 0.0


@dataclass
@checked
class DistillConfig:
    """Train a student of a trained pipeline, which samples in a few calls of its U-Net and has its guidance.

    Args:
        teacher: folder of the teacher's pipeline, a rectified flow. The student has the same layers and conditions.
        calls: numbers of denoising steps in which the student learns to sample.
        steps: denoising steps of the teacher, a multiple of each of `calls`. Default: those of its sampling.json,
            rounded up to one.
        scheduler: class of a diffusers scheduler for the teacher, such as UniPCMultistepScheduler, which needs fewer
            steps. Default: that of its folder.
        guidance_scale: the teacher's guidance, which the student learns. Default: that of its sampling.json.
        guidance_interval: noise levels (lo, hi] in which that guidance acts. Default: those of its sampling.json, or
            all.
        autoguidance_scale: of the guidance by the teacher's weaker U-Net, which the student learns as well. Default:
            that of its sampling.json.
        pairs: steps of the student that are trained on each trajectory of the teacher. A trajectory costs as much as
            sampling, so fewer make a training step cheaper, and more make better use of it.
        from_images: share of the trajectories that begin at noised training images instead of noise, for editing.
    """

    teacher: UserPath
    calls: list[PositiveInt] = field(default_factory=lambda: [1, 2, 4])
    steps: PositiveInt | None = None
    scheduler: str | None = None
    guidance_scale: NonNegativeFloat | None = None
    guidance_interval: tuple[Share, Share] | None = None
    autoguidance_scale: NonNegativeFloat | None = None
    pairs: PositiveInt = 8
    from_images: Share = 0.1


@dataclass
@checked
class TrainLdmConfig:
    """Train a latent diffusion model on the latents of a trained autoencoder.

    Args:
        output: folder of the run: config.yaml, metrics.jsonl, checkpoints/, best/, logs/, previews/, and at the end
            metrics.json and pipeline/ (lora/ if a LoRA is trained).
        vae: folder of the trained autoencoder (`vae/` of its run).
        data: the volumes. It may be absent if the folder of the run that trained `vae` is there: its section is used.
        model: `class:` and that class's constructor arguments, except those that the autoencoder and the data decide.
            Default: that of `init_from`. With `distill` it is the teacher's, and absent.
        cache: latents of the training volumes.
        latents: what the U-Net learns of each volume: sample, from the autoencoder's posterior, again in each step; or
            mode, its mean, without the posterior's noise, which may be a large part of it (doctor names it). Default:
            sample, and mode for autoencoders of MAISI and MONAI.
        loss: mse, the mean squared error of the prediction, or l1, its mean absolute error.
        loss_weights: how much the error inside a label counts, by its name or value, such as {lesion: 100} for lesions
            of a few voxels; 1 for all others. A latent voxel has the largest weight of its voxels. The loss is the
            weighted mean of each volume. Validations log the plain loss, and beside it loss/lesion, that of the latent
            voxels of the label.
        scheduler: class of a diffusers scheduler for previews and for the pipeline, such as DDPMScheduler; default:
            UniPC for rectified flow, DDIM for the other objectives (`diffusion.objectives.default_sampler`).
        residual_noise: measure the texture that the autoencoder removes from the training volumes, so that the pipeline
            can add it. A student has its teacher's without.
        gradient_checkpointing: recompute the U-Net's activations in the backward pass instead of keeping them.
        inference_steps: denoising steps of the previews, of the volumes that `loop.sample_every` compares, and of the
            pipeline where a call does not say. Default: 10 of UniPC or DPM-Solver++ for rectified flow, otherwise 20.
        optimizer: optimizer and learning rate.
        loop: length, precision and rhythm.
        resume: "latest", or a checkpoint folder of this run, to continue exactly from there.
        accept_changes: resume although the config or the volumes differ from those the run was started with.
        wait_minutes: how long to wait for another job that writes to `output`, such as one that is ending while its
            requeue starts; 0 stops at once.
        init_from: folder of a trained U-Net to start from (fine-tuning). Default with `distill`: the teacher's.
        distill: train a student of a trained pipeline.
        lora: train a LoRA of the U-Net `init_from` instead of its weights.
        accept_overlap: train although `vae` or `init_from` were trained on subjects, by name, that are held out here.
    """

    output: UserPath
    vae: UserPath
    data: DataConfig
    model: dict[str, Any] = field(default_factory=dict)
    cache: LatentCacheConfig = field(default_factory=LatentCacheConfig)
    latents: Literal["sample", "mode"] | None = None
    loss: Literal["mse", "l1"] = "mse"
    loss_weights: dict[Label | str, PositiveFloat] = field(default_factory=dict)
    scheduler: str | None = None
    residual_noise: bool = False
    gradient_checkpointing: bool = False
    inference_steps: PositiveInt | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    resume: Checkpoint | None = None
    accept_changes: bool = False
    wait_minutes: Annotated[float, Range(0, MAX_MINUTES)] = 0.0
    init_from: UserPath | None = None
    distill: DistillConfig | None = None
    lora: LoraConfig | None = None
    accept_overlap: bool = False

    def __post_init__(self) -> None:
        warn_of_long_warmup(self.optimizer, self.loop)
