"""The training step of a latent diffusion model. Axes of latents: (B, C, h, w, d)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from autoencoder import VolumeAutoencoder
from diffusion import (
    Conditions,
    LatentDenoiser,
    denoise,
    drop_conditions,
    training_loss,
)
from diffusion.distillation import Teacher
from diffusion.folding import cells_with, emphasis_of, hide_parts
from diffusion.objectives import Scheduler, default_sampler

from .encoder_distance import EncoderDistance
from .engine.learner import Learner, run_learner
from .held_out import EncodedVolume
from .ldm_config import TrainLdmConfig
from .previews import preview_case

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VALIDATION_SAMPLES = 8  # timesteps and noises per held-out volume; the same at every validation
VALIDATION_TRAJECTORIES = 1  # of a teacher, per held-out volume


class LatentBatch(TypedDict):
    """A batch of `collate_latents`."""

    mean: Tensor  # (B, C, h, w, d)
    std: Tensor
    weight: Tensor  # (B, 1, h, w, d): zero in padding
    conditions: Conditions


class LdmTrainingStep:
    """The training step of a U-Net: latents of their posterior, timesteps and noise, the objective's loss.

    Args:
        realism: compares generated with held-out volumes, if `loop.sample_every` asks for it.
        teacher: of a student, whose objective is `flow_map`.
        label_weights: {label name: (label index, weight)} of the labels whose errors count more or less than others.
        sampled: whether latents are sampled from their posterior; otherwise they are its mode.
    """

    distance = "kernel_distance"

    def __init__(
        self,
        learner: Learner[LatentDenoiser],
        vae: VolumeAutoencoder,
        inference_steps: int,
        channels: Sequence[str],
        make_scheduler: Callable[[], Scheduler],
        loss: str = "mse",
        label_maps: bool = False,
        realism: EncoderDistance | None = None,
        teacher: Teacher | None = None,
        label_weights: Mapping[str, tuple[int, float]] | None = None,
        sampled: bool = True,
    ):
        self.sampled = sampled
        self.label_maps, self.realism = label_maps, realism
        self.unet, self.learners, self.vae, self.inference_steps = learner, (learner,), vae, inference_steps
        self.channels = channels
        network = learner.network
        self.make_scheduler = make_scheduler
        self.loss = partial(
            training_loss,
            **network.loss_settings,
            teacher=teacher,
            absolute=loss == "l1",
        )
        self.validation_samples = VALIDATION_SAMPLES if teacher is None else VALIDATION_TRAJECTORIES
        self.objective: str = network.config["objective"]
        self.schema = network.condition_schema
        self.dropout = self.schema.dropout
        self.coded_apart = len(channels) > 1 and vae.num_channel_groups == len(channels) and not label_maps
        self.label_weights = dict(label_weights or {})
        self.partial_masks: float | None = network.config.get("partial_masks")
        parts = [*(channels if self.coded_apart else ()), *self.label_weights]
        self.metrics = {"loss": False} | {f"loss/{name}": False for name in parts}

    def __call__(self, batch: LatentBatch, generators: list[torch.Generator]) -> dict[str, Tensor]:
        """Train on a batch of `collate_latents`."""
        latents = batch["mean"]
        if self.sampled:
            noise = randn_tensor(latents.shape, generator=generators, device=latents.device)
            latents = latents + batch["std"] * noise
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
        labels, stride = network.num_labels, network.mask_stride
        return replace(conditions, mask=hide_parts(conditions.mask, stride, labels, self.partial_masks, generators))

    def _emphasis(self, conditions: Conditions) -> Tensor:
        """Return the weight of each latent voxel by the whole masks of a batch."""
        assert conditions.mask is not None
        weights = dict(self.label_weights.values())
        return emphasis_of(conditions.mask, weights, self.unet.network.num_labels)

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
        from volumes import slices_figure  # here, for matplotlib takes a second

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
        scheduler = average.fitted(self.make_scheduler(), shift)
        conditions = item["conditions"].drop(images, self.schema)
        with self.unet.accelerator.autocast():
            latents = denoise(self.unet.average, noise, scheduler, conditions, num_inference_steps=steps)
            return self.vae.decode(latents, return_dict=False)[0][0].float().clamp(-1, 1)


def build_step(
    config: TrainLdmConfig,
    unet: LatentDenoiser,
    vae: VolumeAutoencoder,
    realism: EncoderDistance | None = None,
    teacher: Teacher | None = None,
    label_weights: Mapping[str, tuple[int, float]] | None = None,
) -> LdmTrainingStep:
    """Build the training step of `unet`, with its optimizer and average."""
    learner = run_learner("unet", unet, config)
    objective: str = unet.config["objective"]
    name, usual = default_sampler(objective, config.scheduler)
    scheduler = partial(unet.new_scheduler, name, vae.latent_bound())
    label_maps = bool(config.data.image_labels)
    channels, steps = config.data.channels, config.inference_steps or usual
    return LdmTrainingStep(
        learner,
        vae,
        steps,
        channels,
        scheduler,
        config.loss,
        label_maps,
        realism,
        teacher,
        label_weights,
        (config.latents or vae.latents_for_training) == "sample",
    )
