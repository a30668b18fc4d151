"""Losses of the autoencoder that need another network: a discriminator that is trained with it, and a frozen one."""

from collections import deque
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from autoencoder import VolumeAutoencoder
from autoencoder.losses.adversarial import (
    Slices,
    VolumeDiscriminator,
    adaptive_weight,
    discriminator_loss,
    draw_slices,
    feature_matching_loss,
    generator_loss,
)
from autoencoder.losses.perceptual import EncoderFeatures, VGG16Features, perceptual_loss

from .engine.learner import Learner
from .vae_config import AdversarialConfig, PerceptualConfig, TrainVaeConfig

WATCHED = 10  # reports that must agree before a warning
WON = 0.05  # loss of a discriminator, of 0 at the least, that tells nearly all real volumes from reconstructions
GUESS = 1e-3  # distance from 1, the hinge loss of logits that are 0 everywhere; useful ones stay near 1 too, but vary


class DiscriminatorWatch:
    """Watch whether a discriminator's reported loss stays where the autoencoder learns nothing from it."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=WATCHED)

    def __call__(self, loss: float) -> str | None:
        """Return a warning if the last reports are all near 0 or all near 1, once in `WATCHED` reports."""
        self.losses.append(loss)
        if len(self.losses) < WATCHED:
            return None
        low, high = min(self.losses), max(self.losses)
        if high <= WON:
            fault = (
                f"the discriminator wins: its loss was {high:.2g} or less in {WATCHED} reports, so it tells every "
                "reconstruction from a real volume. Lower adversarial.optimizer.learning_rate, or let it start later "
                "(adversarial.start_step)"
            )
        elif low >= 1 - GUESS and high <= 1 + GUESS:
            fault = (
                f"the discriminator guesses: its loss was {low:.4f} to {high:.4f} in {WATCHED} reports, and 1 means "
                "that it tells nothing apart. Raise adversarial.optimizer.learning_rate, or remove the section "
                "adversarial if reconstructions are sharp"
            )
        else:
            return None
        self.losses.clear()
        return fault


class AdversarialTrainer:
    """Discriminator training and the adversarial loss terms for the autoencoder."""

    def __init__(self, learner: Learner[VolumeDiscriminator], config: AdversarialConfig):
        self.learner, self.config, self.watch = learner, config, DiscriminatorWatch()

    def strength(self, step: int) -> float | None:
        """Return the warm-up factor, which rises from 0 to 1; None before the start."""
        since = step - self.config.start_step
        return None if since < 0 else min(1.0, (since + 1) / (self.config.warmup_steps + 1))

    def generator_loss(
        self, image: Tensor, reconstruction: Tensor, slices: Slices, reconstruction_loss: Tensor, last_weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the autoencoder's adversarial loss and its terms. No gradient reaches the discriminator."""
        network = self.learner.network.requires_grad_(False)
        with self.learner.accelerator.autocast():
            fake = network(reconstruction, slices)
            with torch.no_grad():
                real = network(image, slices)
        network.requires_grad_(True)
        generator, features = generator_loss(fake), feature_matching_loss(real, fake)
        scale = torch.ones_like(generator)
        if self.config.adaptive:
            scale = adaptive_weight(reconstruction_loss, generator, last_weight)
        loss = self.config.weight * scale * generator + self.config.feature_matching * features
        return loss, {"generator": generator, "feature_matching": features, "adaptive_weight": scale}

    def discriminator_step(self, image: Tensor, reconstruction: Tensor, slices: Slices) -> dict[str, Tensor]:
        """Compute the discriminator's loss and gradients. No gradient reaches the autoencoder."""
        both = Slices(slices.axis, slices.positions.repeat(2, 1))
        # One pass for both: DDP allows one forward per backward.
        outputs = self.learner.model(torch.cat([image, reconstruction.detach()]), both)
        halves = [[layer.chunk(2) for layer in features] for features in outputs]
        real, fake = ([[layer[i] for layer in features] for features in halves] for i in range(2))
        loss = discriminator_loss(real, fake)
        self.learner.backward(loss)
        return {"discriminator": loss}


class PerceptualLoss:
    """The perceptual loss by a frozen network."""

    def __init__(self, network: EncoderFeatures | VGG16Features, config: PerceptualConfig):
        self.network, self.config = network, config

    def __call__(self, image: Tensor, reconstruction: Tensor, fov: Tensor, generator: torch.Generator) -> Tensor:
        """Return the loss of whole volumes, or of random planes of them if the network takes slices."""
        if self.network.dims == 2:
            planes = draw_slices(fov, self.config.slices, generator)
            image, reconstruction, fov = planes.of(image), planes.of(reconstruction), planes.of(fov)
        return perceptual_loss(self.network, reconstruction, image, fov)


def make_adversary(options: AdversarialConfig, config: TrainVaeConfig, vae: VolumeAutoencoder) -> AdversarialTrainer:
    """Build the discriminator of `options`, the config's section `adversarial`."""
    channels, layers = options.channels, options.layers
    network = VolumeDiscriminator(
        vae.config["out_channels"], channels, layers, slices=options.slices > 0, volume=options.volume
    )
    optimizer = replace(options.optimizer, gradient_accumulation=config.optimizer.gradient_accumulation)
    learner = Learner("discriminator", network, optimizer, ema_decay=0.0, max_steps=config.loop.max_steps)
    return AdversarialTrainer(learner, options)


def make_perception(options: PerceptualConfig, config: TrainVaeConfig, vae: VolumeAutoencoder) -> PerceptualLoss:
    """Load the frozen network of `options`, the config's section `perceptual`.

    Raises: ValueError if it does not fit the patches or the channels.
    """
    from pipelines.storage.loading import load_autoencoder  # takes seconds; few runs need it

    path, side, channels = Path(options.network), config.crops.shape, vae.config["out_channels"]
    network = EncoderFeatures(load_autoencoder(path)) if path.is_dir() else VGG16Features(path)
    if network.in_channels not in (1, channels):
        raise ValueError(
            f"perceptual.network {path}: takes {network.in_channels} channels, but the volumes have {channels}; give "
            "an autoencoder of as many channels, or of one channel"
        )
    if isinstance(network, VGG16Features) and min(side) < network.smallest:
        raise ValueError(f"crops.shape {side}: VGG-16 needs {network.smallest} voxels per side; enlarge the patches")
    if isinstance(network, EncoderFeatures) and any(n % s for n, s in zip(side, network.stride, strict=True)):
        raise ValueError(
            f"crops.shape {side}: is not a multiple of {network.stride}, the stride of perceptual.network {path}"
        )
    return PerceptualLoss(network, options)
