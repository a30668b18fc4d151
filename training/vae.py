"""Train an autoencoder: the training step, and what a run builds and saves. Axes: (B, C, X, Y, Z)."""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
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
from autoencoder.losses.adversarial import draw_slices
from autoencoder.losses.reconstruction import cells_inside
from autoencoder.statistics import join_moments, latent_moments
from cli.live_bar import LiveBar
from files.documents import read_object
from volumes import CropDataset, VolumeDataset
from volumes.data.preprocessing import differences, refuse_differences
from volumes.data.subjects import join_records
from volumes.foreground import background_index

from .background import check_background
from .build import build_model, initialize_from
from .engine.learner import Learner, run_learner
from .engine.output import save_model
from .engine.sampling_order import derive_seed
from .engine.step import Training
from .label_weights import weights_by_index
from .previews import preview_case
from .splits import PaddedVolumes, WholeVolume, digests, load_split, own_record, refuse_seen
from .vae_config import AutoencoderLosses, TrainVaeConfig, crop_faults
from .vae_losses import AdversarialTrainer, PerceptualLoss, make_adversary, make_perception

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("training")
MIN_CODES = 1.5  # effective codes below which a codebook has collapsed


class VaeTrainingStep:
    """The training step of an autoencoder: losses of the reconstruction and of the latents inside the field of view,
    and those of its discriminator and its perceptual network if it has them.

    Args:
        background: index of the label where volumes are empty (`data.empty_background`), and so are generated ones.
    """

    def __init__(
        self,
        learner: Learner[VolumeAutoencoder],
        weights: AutoencoderLosses,
        adversary: AdversarialTrainer | None = None,
        perception: PerceptualLoss | None = None,
        channels: Sequence[str] = ("image",),
        label_maps: bool = False,
        label_weights: Mapping[int, float] | None = None,
        background: int | None = None,
    ):
        self.label_weights, self.background = dict(label_weights or {}), background
        self.channels, self.label_maps = channels, label_maps
        self.vae, self.weights, self.adversary, self.perception = learner, weights, adversary, perception
        self.learners = (learner,) if adversary is None else (learner, adversary.learner)
        several = channels if len(channels) > 1 else ()
        self.metrics = {"psnr": True, "l1": False}
        self.metrics |= {f"{name}/{channel}": more for channel in several for name, more in self.metrics.items()}
        self.metrics |= {"psnr_foreground": True} if background is not None else {}
        self._latents: list[Tensor] = []  # inside the field of view, since the last update: for the codebook

    def __call__(self, batch: dict[str, Tensor], generators: list[torch.Generator]) -> dict[str, Tensor]:
        """Train on a batch {"image": (B, C, X, Y, Z) in [-1, 1], "fov": (B, 1, X, Y, Z) boolean}."""
        image, fov, weights = batch["image"], batch["fov"], self.weights
        reconstruction, latents = self.vae.model(image, sample_posterior=True, return_dict=False, generator=generators)
        emphasis = label_emphasis(batch["mask"], self.label_weights) if self.label_weights else None
        losses = {"l1": l1_loss(reconstruction, image, fov, emphasis)}
        loss = weights.l1 * losses["l1"]
        for name, function in (("mse", mse_loss), ("gradient", gradient_loss)):
            if weight := getattr(weights, name):
                losses[name] = function(reconstruction, image, fov, emphasis)
                loss = loss + weight * losses[name]
        # An empty background is emptied in what is generated: it has no detail, and nothing to judge.
        judged = fov if self.background is None else fov & (batch["mask"] != self.background)[:, None]
        if weights.spectrum:
            losses["spectrum"] = spectrum_loss(reconstruction, image, judged)
            loss = loss + weights.spectrum * losses["spectrum"]
        # Padding has no ground truth: there the networks below see the image itself.
        shown = torch.where(judged, reconstruction.float(), image)
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
        """Return warnings: nearly all latent voxels have the same code, or the discriminator has nothing to teach."""
        faults = []
        if values.get("perplexity", MIN_CODES) < MIN_CODES:
            faults.append(
                f"the codebook has collapsed: latent voxels use {values['perplexity']:.2f} codes (perplexity). Lower "
                "optimizer.learning_rate or raise losses.commitment, and start again, or resume from an earlier "
                "checkpoint (--resume FOLDER --accept_changes true)"
            )
        if self.adversary is not None and "discriminator" in values:
            fault = self.adversary.watch(values["discriminator"])
            faults += [fault] if fault else []
        return faults

    @torch.no_grad()
    def validate(self, item: WholeVolume, generator: torch.Generator) -> dict[str, float]:
        """Reconstruct a whole volume. Return PSNR in dB (of intensities in [0, 1]) and L1 inside the field of view,
        over all channels, and per channel if there are several; and the PSNR outside of an empty background."""
        image, fov = item["image"][None], item["fov"][None]
        reconstruction = self._reconstruct(image)
        metrics = {"psnr": decibels(reconstruction, image, fov), "l1": l1_loss(reconstruction, image, fov).item()}
        for index, name in enumerate(self.channels if len(self.channels) > 1 else ()):
            channel = slice(index, index + 1)
            metrics[f"psnr/{name}"] = decibels(reconstruction[:, channel], image[:, channel], fov)
            metrics[f"l1/{name}"] = l1_loss(reconstruction[:, channel], image[:, channel], fov).item()
        if self.background is not None and "mask" in item:
            inside = fov & (item["mask"] != self.background)[None, None]
            metrics["psnr_foreground"] = decibels(reconstruction, image, inside)
        return metrics

    @torch.no_grad()
    def preview(self, items: list[WholeVolume]) -> "Figure":
        """Draw real and reconstructed volumes side by side, one row per channel and volume, on the gray scale of the
        channel."""
        from volumes import slices_figure  # here, for matplotlib takes a second

        cases = []
        for item in items:
            reconstruction = self._reconstruct(item["image"][None])[0].clamp(-1, 1)
            images = {"real": item["image"], "reconstructed": reconstruction}
            cases.append(preview_case(item, images, self.channels, self.label_maps, show_mask=False))
        return slices_figure(cases)

    def _reconstruct(self, image: Tensor) -> Tensor:
        with self.vae.accelerator.autocast():
            return self.vae.average(image, return_dict=False)[0].float()


def label_emphasis(mask: Tensor, weights: Mapping[int, float]) -> Tensor:
    """Map label indices (B, X, Y, Z) to how much each voxel counts, (B, 1, X, Y, Z) float32: the weight of its label,
    or 1."""
    emphasis = torch.ones(mask.shape, device=mask.device)
    for label, weight in weights.items():
        emphasis[mask == label] = weight
    return emphasis[:, None]


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


def build(config: TrainVaeConfig, accelerator: Accelerator) -> Training:
    """Build everything that `run_training` needs to train the autoencoder of `config`."""
    output = Path(config.output)
    set_seed(config.loop.seed)
    vae: VolumeAutoencoder = build_model(config.model, config.gradient_checkpointing)
    if not list(vae.parameters()):
        unused = ("init_from", "freeze_encoder", "adversarial", "perceptual", "resume", "loss_weights")
        if settings := [name for name in unused if getattr(config, name)]:
            raise ValueError(f"{type(vae).__name__} has nothing to train: remove {', '.join(settings)}")
        train, held_out = load_split(config.data)
        measure = partial(measure_latents, vae.to(accelerator.device), train, accelerator)
        return Training(None, lambda: finish(vae, train, held_out, output), measure=measure)
    if config.init_from:
        init_vae(vae, config)
    elif config.freeze_encoder:
        freeze_encoder(vae, None)
    if faults := crop_faults(config.crops, vae.stride, config.adversarial):
        raise ValueError("; ".join(f"{message}; {remedy}" for message, remedy in faults))
    train, held_out = load_split(config.data)
    if config.init_from:
        check_start(config.init_from, config, train, held_out)
    crops = CropDataset(train, config.crops.shape, seed=config.loop.seed, flip_axes=config.crops.flip_axes)
    for dataset in (train, held_out):
        if dataset is not None:
            check_background(dataset)
    background = background_index(train.labels) if config.data.empty_background else None
    step = build_step(config, vae, weights_by_index(config.loss_weights, train.labels), background)
    if step.perception is not None:
        step.perception.network.to(accelerator.device)
    validation = PaddedVolumes(held_out, vae.stride) if held_out else []

    def save() -> None:
        finish(step.vae.average, train, held_out, output, earlier=inherited_records(config))

    def measure() -> None:
        if not config.freeze_encoder:  # its statistics are kept with it
            measure_latents(step.vae.average, train, accelerator)

    return Training(step, save, crops, validation, contents=digests(train), measure=measure)


def build_step(
    config: TrainVaeConfig,
    vae: VolumeAutoencoder,
    label_weights: Mapping[int, float] | None = None,
    background: int | None = None,
) -> VaeTrainingStep:
    """Build the training step of `vae`, with optimizers, averages, and the discriminator and perceptual network of the
    config.

    Args:
        label_weights: {label index: weight} of `loss_weights`.
        background: see `VaeTrainingStep`.
    """
    learner = run_learner("vae", vae, config)
    perception = make_perception(config.perceptual, config, vae) if config.perceptual else None
    adversary = make_adversary(config.adversarial, config, vae) if config.adversarial else None
    label_maps = bool(config.data.image_labels)
    channels = config.data.channels
    return VaeTrainingStep(
        learner, config.losses, adversary, perception, channels, label_maps, label_weights, background
    )


def init_vae(vae: VolumeAutoencoder, config: TrainVaeConfig) -> None:
    """Load the weights of `init_from`, and freeze the encoder if the config says so."""
    assert config.init_from is not None
    fresh = initialize_from(vae, config.init_from)
    logger.info("started from %s; layers that start fresh: %s", config.init_from, fresh or "none")
    if config.freeze_encoder:
        if untrained := [name for name in fresh if name.startswith("encoder")]:
            raise ValueError(
                f"freeze_encoder: {config.init_from} has no weights that fit {untrained}; train them first"
            )
        freeze_encoder(vae, config.init_from)


def freeze_encoder(vae: VolumeAutoencoder, source: str | None) -> None:
    """Keep the encoder and the latents' statistics of `source`. Raises: ValueError if it has no statistics."""
    statistics = type(vae).load_config(source) if source else {}
    if not isinstance(statistics, dict) or not statistics.get("latents_std"):
        raise ValueError(
            f"freeze_encoder needs --init_from, an autoencoder with latents_mean and latents_std; got {source}"
        )
    vae.encoder.requires_grad_(False)
    vae.set_latent_statistics(statistics["latents_mean"], statistics["latents_std"])


def check_start(source: str, config: TrainVaeConfig, train: VolumeDataset, held_out: VolumeDataset | None) -> None:
    """Check that the autoencoder `source` was trained on volumes prepared as these, and on no subject that is held out.

    Raises: ValueError for such subjects, and for volumes prepared otherwise if the encoder is frozen. An encoder that
    is trained may learn the new preparation, with a warning.
    """
    described = read_object(Path(source) / "config.json") if (Path(source) / "config.json").is_file() else {}
    refuse_seen(
        described.get("subjects"), config.data, held_out, f"--init_from {source}", accepted=config.accept_overlap
    )
    learned = described.get("data")
    if learned is None:
        logger.warning("--init_from %s: does not record how its volumes were prepared", source)
    elif config.freeze_encoder:
        refuse_differences(learned, train.preprocessing, f"--init_from {source}")
    elif changes := differences(learned, train.preprocessing):
        logger.warning("--init_from %s: was trained on volumes prepared otherwise: %s", source, "; ".join(changes))


def inherited_records(config: TrainVaeConfig) -> Sequence[Mapping[str, object]]:
    """Return the records of the training subjects of the autoencoders that this training starts from or takes features
    from."""
    sources = [config.init_from] if config.init_from else []
    if config.perceptual and Path(config.perceptual.network).is_dir():
        sources.append(config.perceptual.network)
    records = []
    for source in sources:
        path = next((p for p in (Path(source, "config.json"), Path(source, "vae", "config.json")) if p.is_file()), None)
        records.append(read_object(path).get("subjects") if path else None)
    return join_records(*records)


def measure_latents(vae: VolumeAutoencoder, train: VolumeDataset, accelerator: Accelerator) -> None:
    """Measure the latents of the training volumes, of which each process takes its share, and set their statistics in
    all processes. The sums are added in the order of the volumes, so they have the bits of one process."""
    volumes, rank, moments = PaddedVolumes(train, vae.stride), accelerator.process_index, {}
    share = range(rank, len(volumes), accelerator.num_processes)
    for index in LiveBar(share, desc="measure latents", unit="volume", disable=True if rank else None):
        item = volumes[index]
        batch = {"name": item["name"], "image": item["image"][None], "fov": item["fov"][None]}
        moments[index] = latent_moments(vae, batch)
    gathered = {index: one for part in gather_object([moments]) for index, one in part.items()}
    vae.set_latent_statistics(*join_moments(gathered[index] for index in range(len(volumes))))


def finish(
    vae: VolumeAutoencoder,
    train: VolumeDataset,
    held_out: VolumeDataset | None,
    output: Path,
    *,
    earlier: Sequence[Mapping[str, object]] = (),
) -> None:
    """Save the autoencoder to `output`/vae.

    Its config records how the volumes were prepared, and whose they are.
    Args:
        earlier: records of the subjects of what the training started from.
    """
    if len(train.channels) > 1:
        vae.register_to_config(channel_names=train.channels)
    vae.register_to_config(data=train.preprocessing, subjects=join_records([*earlier, own_record(train, held_out)]))
    save_model(vae, output / "vae")
    logger.info(
        "saved %s (latents: mean %s, std %s)", output / "vae", vae.config["latents_mean"], vae.config["latents_std"]
    )
