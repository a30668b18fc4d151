"""The autoencoder's training step. Axes: (B, C, X, Y, Z)."""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoder import (
    QuantisedLatents,
    VolumeAutoencoder,
    code_statistics,
    gradient_loss,
    l1_loss,
    latent_loss,
    mse_loss,
    spectrum_loss,
)
from autoencoder.adversarial import draw_slices
from autoencoder.losses import cells_inside
from volumes import slices_figure

from .engine.learner import Learner
from .engine.sampling_order import derive_seed
from .previews import preview_case
from .splits import WholeVolume
from .vae_config import AutoencoderLosses
from .vae_losses import AdversarialTrainer, PerceptualLoss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIN_CODES = 1.5  # effective codes below which a codebook has collapsed


class VaeTrainingStep:
    """The training step of an autoencoder: losses of the reconstruction and of the latents inside the field of view, and those
    of its discriminator and its perceptual network if it has them."""

    def __init__(
        self,
        learner: Learner[VolumeAutoencoder],
        weights: AutoencoderLosses,
        adversary: AdversarialTrainer | None = None,
        perception: PerceptualLoss | None = None,
        channels: Sequence[str] = ("image",),
        label_maps: bool = False,
    ):
        self.channels, self.label_maps = channels, label_maps
        self.vae, self.weights, self.adversary, self.perception = learner, weights, adversary, perception
        self.learners = (learner,) if adversary is None else (learner, adversary.learner)
        self._latents: list[Tensor] = []  # inside the field of view, since the last update: for the codebook

    def __call__(self, batch: dict[str, Tensor], generators: list[torch.Generator]) -> dict[str, Tensor]:
        """Train on a batch {"image": (B, C, X, Y, Z) in [-1, 1], "fov": (B, 1, X, Y, Z) boolean}."""
        image, fov, weights = batch["image"], batch["fov"], self.weights
        reconstruction, latents = self.vae.model(image, sample_posterior=True, return_dict=False, generator=generators)
        losses = {"l1": l1_loss(reconstruction, image, fov)}
        loss = weights.l1 * losses["l1"]
        for name, function in (("mse", mse_loss), ("gradient", gradient_loss), ("spectrum", spectrum_loss)):
            if weight := getattr(weights, name):
                losses[name] = function(reconstruction, image, fov)
                loss = loss + weight * losses[name]
        # Padding has no ground truth: there the networks below see the image itself.
        shown = torch.where(fov, reconstruction.float(), image)
        if self.perception is not None:
            with self.vae.accelerator.autocast():
                losses["perceptual"] = self.perception(image, shown, fov, generators[0])
            loss = loss + self.perception.config.weight * losses["perceptual"]
        strength = None if self.adversary is None else self.adversary.strength(self.vae.updates)
        slices = None
        if self.adversary is not None and strength is not None:
            slices = draw_slices(fov, max(self.adversary.config.slices, 1), generators[0])
            last: Any = self.vae.network.decoder[-1].weight
            adversarial, terms = self.adversary.generator_loss(image, shown, slices, loss, last)
            losses |= terms
            loss = loss + strength * adversarial
        name, value = latent_loss(latents, fov)
        losses[name] = value
        loss = loss + getattr(weights, name) * value
        self.vae.backward(loss)
        if self.adversary is not None and slices is not None:
            losses |= self.adversary.discriminator_step(image, shown, slices)
        if isinstance(latents, QuantisedLatents):
            losses |= self._note_codes(latents, fov)
        return {"loss": loss.detach(), **{name: value.detach() for name, value in losses.items()}}

    def _note_codes(self, latents: QuantisedLatents, fov: Tensor) -> dict[str, Tensor]:
        inside = cells_inside(fov, latents.indices.shape[1:])[:, 0]
        self._latents.append(latents.raw_mean.detach().movedim(1, -1)[inside])
        return code_statistics(latents.indices[inside], len(latents.codebook.codes))

    def after_update(self, taken: bool) -> None:
        """Update the codebook, once per step that was taken, from the batches of all processes."""
        latents, self._latents = self._latents, []
        if latents and taken:
            accelerator, network = self.vae.accelerator, self.vae.network
            average: Any = self.vae.ema.module
            generator = torch.Generator().manual_seed(derive_seed(self.vae.updates))
            network.codebook.update(torch.cat(latents), generator, partial(gather_latents, accelerator))
            average.codebook.load_state_dict(network.codebook.state_dict())  # it was copied before this update

    def review(self, values: dict[str, float]) -> list[str]:
        """Return a warning if the codebook has collapsed: nearly all latent voxels have the same code."""
        if values.get("perplexity", MIN_CODES) >= MIN_CODES:
            return []
        return [
            f"the codebook has collapsed: latent voxels use {values['perplexity']:.2f} codes (perplexity). Lower "
            "optimizer.learning_rate or raise losses.commitment, and start again, or resume from an earlier checkpoint "
            "(--resume FOLDER --accept_changes true)"
        ]

    @torch.no_grad()
    def validate(self, item: WholeVolume, generator: torch.Generator) -> dict[str, float]:
        """Reconstruct a whole volume. Return PSNR in dB (of intensities in [0, 1]) and L1 inside the field of view, over all
        channels, and per channel if there are several."""
        image, fov = item["image"][None], item["fov"][None]
        reconstruction = self._reconstruct(image)
        metrics = {"psnr": decibels(reconstruction, image, fov), "l1": l1_loss(reconstruction, image, fov).item()}
        for index, name in enumerate(self.channels if len(self.channels) > 1 else ()):
            channel = slice(index, index + 1)
            metrics[f"psnr/{name}"] = decibels(reconstruction[:, channel], image[:, channel], fov)
            metrics[f"l1/{name}"] = l1_loss(reconstruction[:, channel], image[:, channel], fov).item()
        return metrics

    @torch.no_grad()
    def preview(self, items: list[WholeVolume]) -> "Figure":
        """Draw real and reconstructed volumes side by side, one row per channel and volume, on the gray scale of the channel."""
        cases = []
        for item in items:
            reconstruction = self._reconstruct(item["image"][None])[0].clamp(-1, 1)
            images = {"real": item["image"], "reconstructed": reconstruction}
            cases.append(preview_case(item, images, self.channels, self.label_maps, show_mask=False))
        return slices_figure(cases)

    def _reconstruct(self, image: Tensor) -> Tensor:
        with self.vae.accelerator.autocast():
            return self.vae.average(image, return_dict=False)[0].float()


def decibels(reconstruction: Tensor, image: Tensor, fov: Tensor) -> float:
    """Return the PSNR of (1, C, X, Y, Z) in [-1, 1], where `fov` (1, 1, X, Y, Z) is true, in dB of the whole range."""
    mse = mse_loss(reconstruction.clamp(-1, 1), image, fov).item() / 4  # from [-1, 1] to [0, 1]
    return 10 * math.log10(1 / max(mse, 1e-10))


def gather_latents(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """Gather the rows (N, C) of all processes, whose numbers may differ, in the same order in every process."""
    if accelerator.num_processes == 1:
        return rows
    counts: Any = accelerator.gather(torch.tensor([len(rows)], device=rows.device))
    padded: Any = accelerator.gather(accelerator.pad_across_processes(rows, dim=0))
    parts = padded.view(len(counts), -1, rows.shape[1])
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])
