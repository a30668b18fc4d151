"""The U-Net's training step. Axes of latents: (B, C, h, w, d)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypedDict

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from autoencoder import VolumeAutoencoder
from diffusion import LatentUNet3D, denoise, drop_conditions, training_loss
from diffusion.objectives import Scheduler
from volumes import slices_figure

from .engine.learner import Learner
from .previews import preview_case
from .splits import WholeVolume

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VALIDATION_SAMPLES = 8  # timesteps and noises per held-out volume; the same at every validation


class LatentBatch(TypedDict):
    """A batch of `collate_latents`."""

    mean: Tensor  # (B, C, h, w, d)
    std: Tensor
    weight: Tensor  # (B, 1, h, w, d): zero in padding
    conditions: Mapping[str, Tensor]  # the U-Net's keyword arguments


class EncodedVolume(WholeVolume):
    """A held-out volume with its latents (1, C, h, w, d) and its conditions, the U-Net's keyword arguments (1, ...)."""

    latents: Tensor
    conditions: Mapping[str, Tensor]


class LdmTrainingStep:
    """The training step of a U-Net: latents sampled from their posterior, timesteps and noise, the objective's loss."""

    def __init__(
        self,
        learner: Learner[LatentUNet3D],
        vae: VolumeAutoencoder,
        inference_steps: int,
        channels: Sequence[str],
        make_scheduler: Callable[[], Scheduler],
        loss: str = "mse",
        label_maps: bool = False,
    ):
        self.label_maps = label_maps
        self.unet, self.learners, self.vae, self.inference_steps = learner, (learner,), vae, inference_steps
        self.channels = channels
        network = learner.network
        self.make_scheduler = make_scheduler
        self.loss = partial(training_loss, train_steps=network.train_steps, absolute=loss == "l1")
        self.objective: str = network.config["objective"]
        self.names = network.condition_names
        self.dropout: dict[str, float] = network.config["condition_dropout"] or {}

    def __call__(self, batch: LatentBatch, generators: list[torch.Generator]) -> dict[str, Tensor]:
        """Train on a batch of `collate_latents`."""
        noise = randn_tensor(batch["mean"].shape, generator=generators, device=batch["mean"].device)
        latents = batch["mean"] + batch["std"] * noise
        # Dropout uses only the global random state, and a resumed run must find it.
        torch.manual_seed(generators[0].initial_seed())
        conditions = drop_conditions(batch["conditions"], self.names, self.dropout, generators)
        loss = self.loss(self.unet.model, self.objective, latents, conditions, batch["weight"], generators)
        self.unet.backward(loss)
        return {"loss": loss.detach()}

    def after_update(self, taken: bool) -> None:
        """Do nothing: all state moves by gradients."""

    def review(self, values: dict[str, float]) -> list[str]:
        """Return no warnings: the loop already watches the loss."""
        return []

    @torch.no_grad()
    def validate(self, item: EncodedVolume, generator: torch.Generator) -> dict[str, float]:
        """Return the loss on a held-out volume's latents, with conditions dropped as often as in training: over all channels, and
        per channel if the autoencoder codes channels separately."""

        def repeat(values: Tensor) -> Tensor:
            return values.expand(VALIDATION_SAMPLES, *values.shape[1:])

        latents = repeat(item["latents"])
        conditions = {key: repeat(values) for key, values in item["conditions"].items()}
        conditions = drop_conditions(conditions, self.names, self.dropout, generator)
        # Padding is thinner than a latent voxel, so each latent voxel holds some of the volume.
        weight = torch.ones_like(latents[:, :1])
        with self.unet.accelerator.autocast():
            losses = self.loss(self.unet.average, self.objective, latents, conditions, weight, generator, each=True)
        metrics = {"loss": losses.mean().item()}
        if len(self.channels) > 1 and self.vae.num_channel_groups == len(self.channels) and not self.label_maps:
            for index, name in enumerate(self.channels):
                metrics[f"loss/{name}"] = losses[self.vae.latents_of(index)].mean().item()
        return metrics

    @torch.no_grad()
    def preview(self, items: list[EncodedVolume]) -> "Figure":
        """Draw mask, real volume and the volume generated from its conditions side by side, one row per channel and case, always
        from the same noise, and without the images that training drops."""
        cases, images = [], [name for name, _ in self.names.images if self.dropout.get(name)]
        for index, item in enumerate(items):
            shape, device = item["latents"].shape, item["latents"].device
            noise = randn_tensor(shape, generator=torch.Generator().manual_seed(index), device=device)
            scheduler, steps = self.make_scheduler(), self.inference_steps
            conditions = self.names.without(item["conditions"], images)
            with self.unet.accelerator.autocast():
                latents = denoise(self.unet.average, noise, scheduler, conditions, num_inference_steps=steps)
                generated = self.vae.decode(latents, return_dict=False)[0][0].float().clamp(-1, 1)
            shown = {"real": item["image"], "generated": generated}
            cases.append(preview_case(item, shown, self.channels, self.label_maps))
        return slices_figure(cases)
