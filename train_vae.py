"""Train an autoencoder:  accelerate launch train_vae.py --config configs/hippocampus/vae.yaml [--loop.seed 1 ...]

The run folder ends with `vae/`: the averaged weights, with the latents' mean and standard deviation over the training
set in its config. An autoencoder without parameters (autoencoder.SpaceToDepth3D) is measured and saved at once.
"""

from cli.command import run_command
from training.config import TrainVaeConfig, parse_config

if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse_config(TrainVaeConfig))

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from autoencoder import (
    QuantisedLatents,
    VolumeAutoencoder,
    code_statistics,
    gradient_loss,
    l1_loss,
    latent_loss,
    latent_statistics,
    mse_loss,
    spectrum_loss,
)
from autoencoder.adversarial import (
    Slices,
    VolumeDiscriminator,
    adaptive_weight,
    discriminator_loss,
    draw_slices,
    feature_matching_loss,
    generator_loss,
)
from autoencoder.losses import cells_inside
from autoencoder.perceptual import EncoderFeatures, VGG16Features, perceptual_loss
from cli.live_bar import LiveBar
from files.documents import read_object
from pipelines.storage.loading import load_autoencoder
from training import (
    AdversarialConfig,
    AutoencoderLosses,
    Learner,
    Loop,
    PerceptualConfig,
    build_model,
    derive_seed,
    initialize_from,
    open_run,
    save_config,
    save_model,
)
from training.config import crop_faults
from training.engine.previews import preview_case
from training.splits import PaddedVolumes, digests, load_split, own_record, refuse_seen
from volumes import CropDataset, VolumeDataset, slices_figure
from volumes.data.preprocessing import differences, refuse_differences
from volumes.data.subjects import join_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("training")
MIN_CODES = 1.5  # effective codes below which a codebook has collapsed


class AdversarialTrainer:
    """A discriminator and what the autoencoder loses and gains by it."""

    def __init__(self, learner: Learner[VolumeDiscriminator], config: AdversarialConfig):
        self.learner, self.config = learner, config

    def strength(self, step: int) -> float | None:
        """Rises from 0 to 1 during the warm-up; None before the start."""
        since = step - self.config.start_step
        return None if since < 0 else min(1.0, (since + 1) / (self.config.warmup_steps + 1))

    def generator_loss(
        self, image: Tensor, reconstruction: Tensor, slices: Slices, reconstruction_loss: Tensor, last_weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The autoencoder's part: to be taken for real. No gradient reaches the discriminator."""
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
        """The discriminator's part: to tell them apart. No gradient reaches the autoencoder."""
        both = Slices(slices.axis, slices.positions.repeat(2, 1))
        found = self.learner.model(torch.cat([image, reconstruction.detach()]), both)  # one pass: DDP wants no more
        halves = [[layer.chunk(2) for layer in features] for features in found]
        real, fake = ([[layer[i] for layer in features] for features in halves] for i in range(2))
        loss = discriminator_loss(real, fake)
        self.learner.backward(loss)
        return {"discriminator": loss}


class PerceptualLoss:
    """A frozen network, and how it is asked."""

    def __init__(self, network: EncoderFeatures | VGG16Features, config: PerceptualConfig):
        self.network, self.config = network, config

    def __call__(self, image: Tensor, reconstruction: Tensor, fov: Tensor, generator: torch.Generator) -> Tensor:
        """The perceptual loss of whole volumes, or of planes of them, drawn at random, if the network is of slices."""
        if self.network.dims == 2:
            planes = draw_slices(fov, self.config.slices, generator)
            image, reconstruction, fov = planes.of(image), planes.of(reconstruction), planes.of(fov)
        return perceptual_loss(self.network, reconstruction, image, fov)


class AutoencoderStep:
    """The autoencoder's training step: reconstruction and latents inside the field of view, and its adversary and its
    perception if it has them."""

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
        self._cells: list[Tensor] = []  # latents inside the field of view since the last update, for the codebook

    def __call__(self, batch: dict[str, Tensor], generators: list[torch.Generator]) -> dict[str, Tensor]:
        """One batch of {"image": (B, C, X, Y, Z) in [-1, 1], "fov": (B, 1, X, Y, Z) boolean}."""
        image, fov, weights = batch["image"], batch["fov"], self.weights
        reconstruction, latents = self.vae.model(image, sample_posterior=True, return_dict=False, generator=generators)
        losses = {"l1": l1_loss(reconstruction, image, fov)}
        loss = weights.l1 * losses["l1"]
        for name, function in (("mse", mse_loss), ("gradient", gradient_loss), ("spectrum", spectrum_loss)):
            if weight := getattr(weights, name):
                losses[name] = function(reconstruction, image, fov)
                loss = loss + weight * losses[name]
        seen = torch.where(fov, reconstruction.float(), image)  # padding has no truth to be told from
        if self.perception is not None:
            with self.vae.accelerator.autocast():
                losses["perceptual"] = self.perception(image, seen, fov, generators[0])
            loss = loss + self.perception.config.weight * losses["perceptual"]
        strength = None if self.adversary is None else self.adversary.strength(self.vae.updates)
        slices = None
        if self.adversary is not None and strength is not None:
            slices = draw_slices(fov, max(self.adversary.config.slices, 1), generators[0])
            last: Any = self.vae.network.decoder[-1].weight
            deceit, parts = self.adversary.generator_loss(image, seen, slices, loss, last)
            losses |= parts
            loss = loss + strength * deceit
        name, value = latent_loss(latents, fov)
        losses[name] = value
        loss = loss + getattr(weights, name) * value
        self.vae.backward(loss)
        if self.adversary is not None and slices is not None:
            losses |= self.adversary.discriminator_step(image, seen, slices)
        if isinstance(latents, QuantisedLatents):
            losses |= self._note_codes(latents, fov)
        return {"loss": loss.detach(), **{name: value.detach() for name, value in losses.items()}}

    def _note_codes(self, latents: QuantisedLatents, fov: Tensor) -> dict[str, Tensor]:
        inside = cells_inside(fov, latents.indices.shape[1:])[:, 0]
        self._cells.append(latents.raw_mean.detach().movedim(1, -1)[inside])
        return code_statistics(latents.indices[inside], len(latents.codebook.codes))

    def after_update(self, taken: bool) -> None:
        """Move the codebook, once a step that was taken, by what all batches and processes saw."""
        cells, self._cells = self._cells, []
        if cells and taken:
            accelerator, network = self.vae.accelerator, self.vae.network
            average: Any = self.vae.ema.module
            generator = torch.Generator().manual_seed(derive_seed(self.vae.updates))
            network.codebook.update(torch.cat(cells), generator, partial(gather_cells, accelerator))
            average.codebook.load_state_dict(network.codebook.state_dict())  # it was copied before this update

    def review(self, values: dict[str, float]) -> list[str]:
        """Whether the codebook collapsed: nearly all cells have one and the same code."""
        if values.get("perplexity", MIN_CODES) >= MIN_CODES:
            return []
        return [
            f"the codebook has collapsed: cells share {values['perplexity']:.2f} codes (perplexity). Lower "
            "optimizer.learning_rate or raise losses.commitment, and begin again, or from a checkpoint before it (--resume "
            "FOLDER --accept_changes true)"
        ]

    @torch.no_grad()
    def validate(self, item: dict[str, Any], generator: torch.Generator) -> dict[str, float]:
        """PSNR in dB inside the field of view, of intensities in [0, 1], coding the whole volume; of all channels together, and of each
        if there are several."""
        image, fov = item["image"][None], item["fov"][None]
        reconstruction = self._reconstruct(image)
        found = {"psnr": decibels(reconstruction, image, fov), "l1": l1_loss(reconstruction, image, fov).item()}
        for channel, name in enumerate(self.channels if len(self.channels) > 1 else ()):
            own = slice(channel, channel + 1)
            found[f"psnr/{name}"] = decibels(reconstruction[:, own], image[:, own], fov)
            found[f"l1/{name}"] = l1_loss(reconstruction[:, own], image[:, own], fov).item()
        return found

    @torch.no_grad()
    def preview(self, items: list[dict[str, Any]]) -> "Figure":
        """Real beside reconstructed, a row for each channel of each volume, on one gray scale: that of the channel's scaling."""
        cases = []
        for item in items:
            reconstruction = self._reconstruct(item["image"][None])[0].clamp(-1, 1)
            images = {"real": item["image"], "reconstructed": reconstruction}
            cases.append(preview_case({**item, "mask": None}, images, self.channels, self.label_maps))
        return slices_figure(cases)

    def _reconstruct(self, image: Tensor) -> Tensor:
        with self.vae.accelerator.autocast():
            return self.vae.average(image, return_dict=False)[0].float()


def decibels(reconstruction: Tensor, image: Tensor, fov: Tensor) -> float:
    """PSNR of (1, C, X, Y, Z) in [-1, 1], where `fov` (1, 1, X, Y, Z) is true, in dB of the whole range."""
    mse = mse_loss(reconstruction.clamp(-1, 1), image, fov).item() / 4  # from [-1, 1] to [0, 1]
    return 10 * math.log10(1 / max(mse, 1e-10))


def gather_cells(accelerator: Accelerator, own: Tensor) -> Tensor:
    """Rows of all processes (N, C), in the same order everywhere; each may have another number of them."""
    if accelerator.num_processes == 1:
        return own
    counts = accelerator.gather(torch.tensor([len(own)], device=own.device))
    parts = accelerator.gather(accelerator.pad_across_processes(own, dim=0)).view(len(counts), -1, own.shape[1])  # pyright: ignore[reportAttributeAccessIssue]
    return torch.cat([part[:n] for part, n in zip(parts, counts.tolist(), strict=True)])  # pyright: ignore[reportAttributeAccessIssue]


def freeze_encoder(vae: VolumeAutoencoder, source: str | None) -> None:
    """Leave the encoder and the latents' statistics as they are in `source`. Raises: ValueError if they are not there."""
    statistics = type(vae).load_config(source) if source else {}
    if not isinstance(statistics, dict) or not statistics.get("latents_std"):
        raise ValueError(
            f"freeze_encoder needs --init_from, an autoencoder with latents_mean and latents_std; got {source}"
        )
    vae.encoder.requires_grad_(False)
    vae.set_latent_statistics(statistics["latents_mean"], statistics["latents_std"])


def make_adversary(config: TrainVaeConfig, vae: VolumeAutoencoder) -> AdversarialTrainer | None:
    """The discriminator that the config asks for, if it does."""
    options = config.adversarial
    if options is None:
        return None
    channels, layers = options.channels, options.layers
    network = VolumeDiscriminator(
        vae.config["out_channels"], channels, layers, slices=options.slices > 0, volume=options.volume
    )
    optimizer = replace(options.optimizer, gradient_accumulation=config.optimizer.gradient_accumulation)
    learner = Learner("discriminator", network, optimizer, ema_decay=0.0, max_steps=config.loop.max_steps)
    return AdversarialTrainer(learner, options)


def make_perception(config: TrainVaeConfig, vae: VolumeAutoencoder) -> PerceptualLoss | None:
    """The frozen network that the config asks for, if it does. Raises: ValueError if it does not fit crops or channels."""
    options = config.perceptual
    if options is None:
        return None
    path, side, channels = Path(options.network), config.crops.shape, vae.config["out_channels"]
    network = EncoderFeatures(load_autoencoder(path)) if path.is_dir() else VGG16Features(path)
    if network.in_channels not in (1, channels):
        raise ValueError(
            f"perceptual.network {path}: takes {network.in_channels} channels at once, and the volumes have {channels}; give "
            "an autoencoder of as many channels, or of one"
        )
    if isinstance(network, VGG16Features) and min(side) < network.smallest:
        raise ValueError(f"crops.shape {side}: VGG-16 needs {network.smallest} voxels a side; enlarge the crops")
    if isinstance(network, EncoderFeatures) and any(n % s for n, s in zip(side, network.stride, strict=True)):
        raise ValueError(
            f"crops.shape {side}: no multiple of {network.stride}, the stride of perceptual.network {path}"
        )
    return PerceptualLoss(network, options)


def check_start(source: str, config: TrainVaeConfig, train: VolumeDataset, held_out: VolumeDataset | None) -> None:
    """Check that the autoencoder `source`, which is trained on, has seen no subject that is held out, and volumes prepared as these.

    Raises: ValueError for such subjects, and for volumes prepared in another way if the encoder is frozen; an encoder that learns
    may learn these, with a warning.
    """
    described = read_object(Path(source) / "config.json") if (Path(source) / "config.json").is_file() else {}
    refuse_seen(
        described.get("subjects"), config.data, held_out, f"--init_from {source}", accepted=config.accept_overlap
    )
    learned = described.get("data")
    if learned is None:
        logger.warning("--init_from %s: does not say how its volumes were prepared (it is older)", source)
    elif config.freeze_encoder:
        refuse_differences(learned, train.preprocessing, f"--init_from {source}")
    elif found := differences(learned, train.preprocessing):
        logger.warning("--init_from %s: learned from volumes prepared in another way: %s", source, "; ".join(found))


def inherited_records(config: TrainVaeConfig) -> list[Any]:
    """Records of the training subjects of the autoencoders that this training starts from or compares features with."""
    sources = [config.init_from] if config.init_from else []
    if config.perceptual and Path(config.perceptual.network).is_dir():
        sources.append(config.perceptual.network)
    records = []
    for source in sources:
        path = next((p for p in (Path(source, "config.json"), Path(source, "vae", "config.json")) if p.is_file()), None)
        records.append(read_object(path).get("subjects") if path else None)
    return join_records(*records)


def finish(
    vae: VolumeAutoencoder,
    train: VolumeDataset,
    held_out: VolumeDataset | None,
    output: Path,
    *,
    earlier: Sequence[Any] = (),
    measure: bool = True,
) -> None:
    """Measure the latents of the training volumes, if asked to, and save the autoencoder to `output`/vae, with what was done to
    them, and records of whose they are: its own, and the `earlier` ones of what it started from."""
    if measure:
        items = LiveBar(PaddedVolumes(train, vae.stride), desc="measure latents", unit="volume")
        volumes = ({"name": item["name"], **{key: item[key][None] for key in ("image", "fov")}} for item in items)
        vae.set_latent_statistics(*latent_statistics(vae, volumes))
    if len(train.channels) > 1:
        vae.register_to_config(channel_names=train.channels)
    vae.register_to_config(data=train.preprocessing, subjects=join_records([*earlier, own_record(train, held_out)]))
    save_model(vae, output / "vae")
    logger.info(
        "saved %s (latents: mean %s, std %s)", output / "vae", vae.config["latents_mean"], vae.config["latents_std"]
    )


def main(args: list[str] | None = None) -> dict[str, float]:
    """Train as the config says. Returns the final validation's metrics; those of a model without parameters, of which only
    the latents are measured, are none."""
    config = parse_config(TrainVaeConfig, args)
    with open_run(config, "train_vae.py", args) as accelerator:
        return train_as(config, accelerator)


def train_as(config: TrainVaeConfig, accelerator: Accelerator) -> dict[str, float]:
    """`main`, of one config, in one of the processes."""
    output = Path(config.output)
    set_seed(config.loop.seed)
    vae: VolumeAutoencoder = build_model(config.model)
    if not list(vae.parameters()):
        unread = ("init_from", "freeze_encoder", "adversarial", "perceptual", "resume")
        if given := [name for name in unread if getattr(config, name)]:
            raise ValueError(f"{type(vae).__name__} has nothing to train: remove {', '.join(given)}")
        if accelerator.is_main_process:
            save_config(config, output / "config.yaml")
            finish(vae.to(accelerator.device), *load_split(config.data), output)
        accelerator.wait_for_everyone()
        return {}
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    fresh = initialize_from(vae, config.init_from) if config.init_from else []
    if config.init_from:
        logger.info("started from %s; layers left fresh: %s", config.init_from, fresh or "none")
    if config.freeze_encoder:
        if untrained := [name for name in fresh if name.startswith("encoder")]:
            raise ValueError(
                f"freeze_encoder: {config.init_from} has no weights that fit {untrained}; train them first"
            )
        freeze_encoder(vae, config.init_from)

    if wrong := crop_faults(config.crops, vae.stride, config.adversarial):
        raise ValueError("; ".join(f"{message}; {remedy}" for message, remedy in wrong))
    train, held_out = load_split(config.data)
    if config.init_from:
        check_start(config.init_from, config, train, held_out)
    crops = CropDataset(train, config.crops.shape, seed=config.loop.seed, flip_axes=config.crops.flip_axes)

    learner = Learner("vae", vae, config.optimizer, ema_decay=config.loop.ema_decay, max_steps=config.loop.max_steps)
    perception = make_perception(config, vae)
    if perception is not None:
        perception.network.to(accelerator.device)
    shown = {"channels": train.channels, "label_maps": bool(config.data.image_labels)}
    step = AutoencoderStep(learner, config.losses, make_adversary(config, vae), perception, **shown)
    validation = PaddedVolumes(held_out, vae.stride) if held_out else []
    metrics = Loop(accelerator, config, step, crops, validation, contents=digests(train)).run()

    if accelerator.is_main_process:
        earlier = inherited_records(config)
        finish(learner.average, train, held_out, output, earlier=earlier, measure=not config.freeze_encoder)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return metrics
