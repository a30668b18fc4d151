"""Train a latent diffusion model: the training step, and what a run builds and saves. Axes of latents: (B, C, h, w,
d)."""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from autoencoder import VolumeAutoencoder
from autoencoder.model import RECORDS
from autoencoder.residual_noise import check_noise_shape, measure_noise
from autoencoder.weights import weight_files
from diffusion import (
    Conditions,
    LatentUNet3D,
    collate_latents,
    denoise,
    drop_conditions,
    fit_scheduler,
    make_scheduler,
    moved_embeddings,
    training_loss,
)
from diffusion.completion import complete_model
from diffusion.denoise import set_timesteps
from diffusion.distillation import Teacher
from diffusion.folding import cells_with, emphasis_of, hide_parts
from diffusion.latents.cache import weights_hash
from diffusion.objectives import Scheduler, default_sampler
from files.documents import read_object
from pipelines import MedVolumePipeline, SamplingSettings
from pipelines.lora import add_lora, save_lora
from pipelines.storage.loading import load_autoencoder
from pipelines.storage.provenance import content_hash, stored_tensors
from volumes import DataConfig, VolumeDataset, describe, slices_figure
from volumes.data.preprocessing import preprocessing, refuse_differences
from volumes.data.subjects import join_records

from .background import check_background, measure_background
from .build import build_model, initialize_from
from .distill import check_student, load_teacher
from .encoder_distance import EncoderDistance
from .engine.averages.power import STORED
from .engine.learner import Learner
from .engine.output import save_model
from .engine.step import Training
from .held_out import EncodedVolume, encode_held_out, latents_of
from .label_weights import check_best_by, check_partial_masks, label_weights
from .ldm_config import TrainLdmConfig
from .previews import preview_case
from .splits import PaddedVolumes, digests, load_split, own_record, refuse_seen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("training")
VALIDATION_SAMPLES = 8  # timesteps and noises per held-out volume; the same at every validation
VALIDATION_TRAJECTORIES = 1  # of a teacher, per held-out volume


class LatentBatch(TypedDict):
    """A batch of `collate_latents`."""

    mean: Tensor  # (B, C, h, w, d)
    std: Tensor
    weight: Tensor  # (B, 1, h, w, d): zero in padding
    conditions: Conditions


class LdmTrainingStep:
    """The training step of a U-Net: latents sampled from their posterior, timesteps and noise, the objective's loss.

    Args:
        realism: compares generated with held-out volumes, if `loop.sample_every` asks for it.
        teacher: of a student, whose objective is `flow_map`.
        label_weights: {label name: (label index, weight)} of the labels whose errors count more or less than others.
    """

    distance = "kernel_distance"

    def __init__(
        self,
        learner: Learner[LatentUNet3D],
        vae: VolumeAutoencoder,
        inference_steps: int,
        channels: Sequence[str],
        make_scheduler: Callable[[], Scheduler],
        loss: str = "mse",
        label_maps: bool = False,
        realism: EncoderDistance | None = None,
        teacher: Teacher | None = None,
        label_weights: Mapping[str, tuple[int, float]] | None = None,
    ):
        self.label_maps, self.realism = label_maps, realism
        self.unet, self.learners, self.vae, self.inference_steps = learner, (learner,), vae, inference_steps
        self.channels = channels
        network = learner.network
        self.make_scheduler = make_scheduler
        self.loss = partial(
            training_loss,
            train_steps=network.train_steps,
            shift_voxels=network.config["shift_voxels"],
            teacher=teacher,
            absolute=loss == "l1",
        )
        self.validation_samples = VALIDATION_SAMPLES if teacher is None else VALIDATION_TRAJECTORIES
        self.objective: str = network.config["objective"]
        self.schema = network.condition_schema
        self.dropout: dict[str, float] = network.config["condition_dropout"] or {}
        self.coded_apart = len(channels) > 1 and vae.num_channel_groups == len(channels) and not label_maps
        self.label_weights = dict(label_weights or {})
        self.partial_masks: float | None = network.config["partial_masks"]
        parts = [*(channels if self.coded_apart else ()), *self.label_weights]
        self.metrics = {"loss": False} | {f"loss/{name}": False for name in parts}

    def __call__(self, batch: LatentBatch, generators: list[torch.Generator]) -> dict[str, Tensor]:
        """Train on a batch of `collate_latents`."""
        noise = randn_tensor(batch["mean"].shape, generator=generators, device=batch["mean"].device)
        latents = batch["mean"] + batch["std"] * noise
        # Dropout uses only the global random state, and a resumed run must find it.
        torch.manual_seed(generators[0].initial_seed())
        hidden = self._hide(batch["conditions"], generators)
        conditions = drop_conditions(hidden, self.schema, self.dropout, generators)
        emphasis = self._emphasis(batch["conditions"]) if self.label_weights else None
        loss = self.loss(
            self.unet.model, self.objective, latents, conditions, batch["weight"], generators, emphasis=emphasis
        )
        self.unet.backward(loss)
        return {"loss": loss.detach()}

    def _hide(self, conditions: Conditions, generators: torch.Generator | list[torch.Generator]) -> Conditions:
        """Make a part of some masks unknown, for a model of partial masks."""
        if not self.partial_masks or conditions.mask is None:
            return conditions
        network = self.unet.network
        labels, stride = network.config["num_labels"], network.mask_stride
        return replace(conditions, mask=hide_parts(conditions.mask, stride, labels, self.partial_masks, generators))

    def _emphasis(self, conditions: Conditions) -> Tensor:
        """Return the weight of each latent voxel by the whole masks of a batch."""
        assert conditions.mask is not None
        weights = dict(self.label_weights.values())
        return emphasis_of(conditions.mask, weights, self.unet.network.config["num_labels"])

    def after_update(self, taken: bool) -> None:
        """Do nothing: all state moves by gradients."""

    def review(self, values: dict[str, float]) -> list[str]:
        """Return no warnings: the loop already watches the loss."""
        return []

    @torch.no_grad()
    def validate(self, item: EncodedVolume, generator: torch.Generator) -> dict[str, float]:
        """Return the loss on a held-out volume's latents, with conditions dropped as often as in training: over all
        channels, per channel if the autoencoder codes channels separately, and inside each weighted label that the
        volume has. None of them is weighted by label."""

        def repeat(values: Tensor) -> Tensor:
            return values.expand(self.validation_samples, *values.shape[1:])

        latents = repeat(item["latents"])
        whole = item["conditions"].map(repeat)
        conditions = self._hide(whole, generator)
        conditions = drop_conditions(conditions, self.schema, self.dropout, generator)
        # Padding is thinner than a latent voxel, so without `data.resample_to` all latent voxels are inside.
        weight = repeat(item["inside"]).to(latents)
        state = generator.get_state()
        with self.unet.accelerator.autocast():
            losses = self.loss(self.unet.average, self.objective, latents, conditions, weight, generator, each=True)
        metrics = {"loss": losses.mean().item()}
        for index, name in enumerate(self.channels if self.coded_apart else ()):
            metrics[f"loss/{name}"] = losses[self.vae.latents_of(index)].mean().item()
        for name, (label, _) in self.label_weights.items():
            assert whole.mask is not None
            here = cells_with(whole.mask, label).to(latents)
            if not (here * weight).any():
                continue
            generator.set_state(state)  # the same timesteps and noise
            with self.unet.accelerator.autocast():
                loss = self.loss(
                    self.unet.average, self.objective, latents, conditions, weight, generator, emphasis=here
                )
            metrics[f"loss/{name}"] = loss.item()
        return metrics

    @torch.no_grad()
    def preview(self, items: list[EncodedVolume]) -> "Figure":
        """Draw mask, real volume and the volume generated from its conditions side by side, one row per channel and
        case, always from the same noise, and without the images that training drops."""
        cases = []
        for index, item in enumerate(items):
            generated = self._generate(item, torch.Generator().manual_seed(index))
            shown = {"real": item["image"], "generated": generated}
            cases.append(preview_case(item, shown, self.channels, self.label_maps))
        return slices_figure(cases)

    @property
    def max_samples(self) -> int:
        """Volumes that can be compared: as many as there are training volumes."""
        return 0 if self.realism is None else len(self.realism.training)

    @torch.no_grad()
    def sample(self, item: EncodedVolume, number: int, count: int, generator: torch.Generator) -> np.ndarray:
        """Generate a volume as `preview` does, and return the features of `EncoderDistance.row`."""
        assert self.realism is not None
        return self.realism.row(self._generate(item, generator), item, number, count)

    def compare(self, rows: Sequence[np.ndarray]) -> dict[str, float]:
        """Return the kernel distance of generated from held-out volumes, and its floor."""
        assert self.realism is not None
        return self.realism.compare(rows)

    def _generate(self, item: EncodedVolume, generator: torch.Generator) -> Tensor:
        """Generate a volume (C, X, Y, Z) in [-1, 1] from an item's conditions, without the images that training
        drops."""
        images = [name for name, _ in self.schema.images if self.dropout.get(name)]
        noise = randn_tensor(item["latents"].shape, generator=generator, device=item["latents"].device)
        average, steps = self.unet.average, self.inference_steps
        shift = average.timestep_shift(noise.shape[2:])
        scheduler = fit_scheduler(self.make_scheduler(), self.objective, average.train_steps, shift=shift)
        conditions = item["conditions"].drop(images, self.schema)
        with self.unet.accelerator.autocast():
            latents = denoise(self.unet.average, noise, scheduler, conditions, num_inference_steps=steps)
            return self.vae.decode(latents, return_dict=False)[0][0].float().clamp(-1, 1)


def build(config: TrainLdmConfig, accelerator: Accelerator) -> Training:
    """Build everything that `run_training` needs to train the U-Net of `config`; encodes the volumes."""
    vae = load_autoencoder(config.vae).to(accelerator.device)
    check_prepared(config, vae, preprocessing(config.data))  # before anything is read
    check_partial_masks(config)
    train, held_out = load_split(config.data)
    check_prepared(config, vae, train.preprocessing)
    teacher, taught = load_teacher(config, vae, accelerator) if config.distill else (None, None)
    earlier = check_unseen(config, vae, held_out)
    data = describe(train)
    images = image_latents(config.data, vae)
    config.model = complete_model(config.model, vae, data, images)  # the run's config.yaml has all of it
    check_student(config)
    check_residual_noise(config, train)
    check_background(train)
    set_seed(config.loop.seed)
    unet: LatentUNet3D = build_model(config.model, config.gradient_checkpointing)
    if config.init_from:
        fresh = init_unet(unet, config.init_from)
        logger.info("started from %s; layers that start fresh: %s", config.init_from, fresh or "none")
    base = attach_lora(unet, config) if config.lora else None
    realism = EncoderDistance(vae, PaddedVolumes(train, vae.stride)) if config.loop.sample_every else None
    step = build_step(config, unet, vae, realism, teacher, label_weights(config, train.labels, unet))
    if held_out:
        check_best_by(config.loop.best_by, step.label_weights, held_out)
    known_noise = data.residual_noise if taught is None else taught.residual_noise
    # An unsupported scheduler is refused now, not at the first preview.
    set_timesteps(step.make_scheduler(), step.inference_steps, None, accelerator.device)

    num_labels = unet.config["num_labels"]
    latents = latents_of(train, vae, config, config.cache, accelerator)
    partial_masks = unet.takes_partial_masks
    validation: Any = []
    if held_out:
        validation = encode_held_out(held_out, vae, config, accelerator, num_labels, images, partial=partial_masks)
    records = join_records([*earlier, own_record(train, held_out)])

    def finish() -> None:
        output, average = Path(config.output), step.unet.average
        if base is not None:
            trained_on = {"data": train.preprocessing, "subjects": records}
            logger.info("saved %s", save_lora(average, output / "lora", base, trained_on=trained_on))
            return
        noise = tuple(measure_noise(train, vae)) if config.residual_noise else known_noise
        average.register_to_config(subjects=records)
        threshold = measure_background(train, vae) if config.data.empty_background else None
        described = dataclasses.replace(data, residual_noise=noise, background_threshold=threshold)
        pipe = MedVolumePipeline(vae, average, step.make_scheduler(), data=described)
        guidance = None if teacher is None else 1.0  # a student has its teacher's
        pipe.sampling_settings = SamplingSettings(step.inference_steps, guidance)  # those of the previews
        save_model(pipe, output / "pipeline")
        logger.info("saved %s", output / "pipeline")

    return Training(
        step,
        finish,
        latents,
        validation,
        collate=partial(
            collate_latents, stride=vae.stride, num_labels=num_labels, images=images, partial=partial_masks
        ),
        contents={**digests(train), "autoencoder": weights_hash(vae.encoder)},
    )


def image_latents(data: DataConfig, vae: VolumeAutoencoder) -> dict[str, slice]:
    """Return the latent channels of each condition channel, by its name."""
    return {name: vae.latents_of(data.channels.index(name)) for name in data.condition_channels}


def build_step(
    config: TrainLdmConfig,
    unet: LatentUNet3D,
    vae: VolumeAutoencoder,
    realism: EncoderDistance | None = None,
    teacher: Teacher | None = None,
    label_weights: Mapping[str, tuple[int, float]] | None = None,
) -> LdmTrainingStep:
    """Build the training step of `unet`, with its optimizer and average."""
    loop = config.loop
    learner = Learner(
        "unet",
        unet,
        config.optimizer,
        ema_decay=loop.ema_decay,
        ema_length=loop.ema_length,
        max_steps=loop.max_steps,
        tracked=STORED if loop.ema_snapshots else (),
    )
    objective: str = unet.config["objective"]
    name, usual = default_sampler(objective, config.scheduler)
    scheduler = partial(make_scheduler, objective, unet.train_steps, name=name, bound=vae.latent_bound())
    label_maps = bool(config.data.image_labels)
    channels, steps = config.data.channels, config.inference_steps or usual
    return LdmTrainingStep(
        learner, vae, steps, channels, scheduler, config.loss, label_maps, realism, teacher, label_weights
    )


def check_prepared(config: TrainLdmConfig, vae: VolumeAutoencoder, facts: Mapping[str, object]) -> None:
    """Check that the autoencoder was trained on volumes that were prepared as `facts` say.

    Raises: ValueError if they were prepared otherwise. An autoencoder that does not record it (it was
    built in Python) gives a warning, once the spacing is known.
    """
    channels = facts["channels"]
    assert isinstance(channels, list)
    vae.check_channels(channels)
    learned = vae.config["data"]
    refuse_differences(learned, facts, f"vae {config.vae}")
    if learned is None and "spacing" in facts:
        logger.warning(
            "vae %s: does not record how its volumes were prepared, so this was not checked",
            config.vae,
        )


def check_unseen(
    config: TrainLdmConfig, vae: VolumeAutoencoder, held_out: VolumeDataset | None
) -> Sequence[Mapping[str, object]]:
    """Return the records of the U-Net that this training starts from; none without `init_from`.

    Raises: ValueError if the autoencoder or that U-Net was trained on subjects that are held out here.
    """
    refuse_seen(vae.config["subjects"], config.data, held_out, f"vae {config.vae}", accepted=config.accept_overlap)
    described = Path(config.init_from or "") / "config.json"
    if config.init_from is None:
        return []
    records = read_object(described).get("subjects") if described.is_file() else None
    refuse_seen(records, config.data, held_out, f"init_from {config.init_from}", accepted=config.accept_overlap)
    return join_records(records)


def check_residual_noise(config: TrainLdmConfig, train: VolumeDataset) -> None:
    """Raises: ValueError if the config asks for residual noise that cannot be measured."""
    if not config.residual_noise:
        return
    if config.data.image_labels:
        raise ValueError("residual_noise: label maps have none; remove it from the config")
    if config.lora:
        raise ValueError("residual_noise: a LoRA uses that of its pipeline; remove it from the config")
    check_noise_shape([min(sides) for sides in zip(*train.shapes, strict=True)])


def init_unet(unet: LatentUNet3D, folder: str | Path) -> list[str]:
    """Load a trained U-Net's weights (`initialize_from`). Classes and numbers are matched by name; new ones start at
    zero, and so does what a model of whole masks lacks for partial ones. A student's second time stays as it is."""
    described = Path(folder) / "config.json"
    trained = read_object(described) if described.is_file() else None
    moved = None if trained is None else moved_embeddings(trained, unet.config)
    longer = None
    if trained is not None and unet.takes_partial_masks and trained.get("partial_masks") is None:
        same = trained.get("num_labels") == unet.config["num_labels"]
        longer = "mask_embedding.table.weight" if same else None  # unknown is the label after the last one
    return initialize_from(unet, folder, new="condition_embedding", moved=moved, longer=longer, own="next_embedding")


def attach_lora(unet: LatentUNet3D, config: TrainLdmConfig) -> str:
    """Attach the config's LoRA to the U-Net that the training starts from. Returns the hash of that U-Net.

    Raises: ValueError without `init_from`, or if the model section differs from it.
    """
    assert config.lora is not None
    described = Path(config.init_from or "") / "config.json"
    if config.init_from is None or not described.is_file():
        raise ValueError(
            f"lora needs --init_from, the folder of a trained U-Net (PIPELINE/unet); got {config.init_from}"
        )
    base, settings = read_object(described), json.loads(unet.to_json_string())
    public = [key for key in settings if key[0] != "_" and key not in RECORDS]
    wrong = [f"{key} is {settings[key]}, not {base.get(key)}" for key in public if settings[key] != base.get(key)]
    if wrong:
        raise ValueError(
            f"a LoRA belongs to one U-Net, but the model differs from {config.init_from}: {'; '.join(wrong)}"
        )
    stored = stored_tensors(weight_files(Path(config.init_from)))  # as the pipeline hashes them, in whatever precision
    add_lora(unet, **dataclasses.asdict(config.lora))
    return content_hash({"unet": (unet.config, stored)})
