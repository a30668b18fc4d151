"""An autoencoder's part of a training: the model and its losses, patches, and the latents' statistics at the end."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed

from autoencoder import VolumeAutoencoder, latent_statistics
from cli.live_bar import LiveBar
from files.documents import read_object
from volumes import CropDataset, VolumeDataset
from volumes.data.preprocessing import differences, refuse_differences
from volumes.data.subjects import join_records

from .build import build_model, initialize_from
from .engine.learner import Learner
from .engine.output import save_model
from .engine.step import Training
from .splits import PaddedVolumes, digests, load_split, own_record, refuse_seen
from .vae_config import TrainVaeConfig, crop_faults
from .vae_losses import make_adversary, make_perception
from .vae_step import VaeTrainingStep

logger = logging.getLogger("training")


def build(config: TrainVaeConfig, accelerator: Accelerator) -> Training:
    """Build everything that `run_training` needs to train the autoencoder of `config`."""
    output = Path(config.output)
    set_seed(config.loop.seed)
    vae = build_vae(config)
    if not list(vae.parameters()):
        unused = ("init_from", "freeze_encoder", "adversarial", "perceptual", "resume")
        if settings := [name for name in unused if getattr(config, name)]:
            raise ValueError(f"{type(vae).__name__} has nothing to train: remove {', '.join(settings)}")
        return Training(None, lambda: finish(vae.to(accelerator.device), *load_split(config.data), output))
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
    step = build_step(config, vae)
    if step.perception is not None:
        step.perception.network.to(accelerator.device)
    validation = PaddedVolumes(held_out, vae.stride) if held_out else []

    def save() -> None:
        earlier = inherited_records(config)
        finish(step.vae.average, train, held_out, output, earlier=earlier, measure=not config.freeze_encoder)

    return Training(step, save, crops, validation, contents=digests(train))


def build_vae(config: TrainVaeConfig) -> VolumeAutoencoder:
    """Build the autoencoder of the config, with fresh weights."""
    vae: VolumeAutoencoder = build_model(config.model)
    if config.gradient_checkpointing and list(vae.parameters()):
        vae.enable_gradient_checkpointing()
    return vae


def build_step(config: TrainVaeConfig, vae: VolumeAutoencoder) -> VaeTrainingStep:
    """Build the training step of `vae`, with optimizers, averages, and the discriminator and perceptual network of the config."""
    learner = Learner("vae", vae, config.optimizer, ema_decay=config.loop.ema_decay, max_steps=config.loop.max_steps)
    perception = make_perception(config, vae)
    adversary = make_adversary(config, vae)
    label_maps = bool(config.data.image_labels)
    return VaeTrainingStep(learner, config.losses, adversary, perception, config.data.channels, label_maps)


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

    Raises: ValueError for such subjects, and for volumes prepared otherwise if the encoder is frozen. An encoder that is trained
    may learn the new preparation, with a warning.
    """
    described = read_object(Path(source) / "config.json") if (Path(source) / "config.json").is_file() else {}
    refuse_seen(
        described.get("subjects"), config.data, held_out, f"--init_from {source}", accepted=config.accept_overlap
    )
    learned = described.get("data")
    if learned is None:
        logger.warning("--init_from %s: does not record how its volumes were prepared (it is older)", source)
    elif config.freeze_encoder:
        refuse_differences(learned, train.preprocessing, f"--init_from {source}")
    elif changes := differences(learned, train.preprocessing):
        logger.warning("--init_from %s: was trained on volumes prepared otherwise: %s", source, "; ".join(changes))


def inherited_records(config: TrainVaeConfig) -> Sequence[Mapping[str, object]]:
    """Return the records of the training subjects of the autoencoders that this training starts from or takes features from."""
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
    earlier: Sequence[Mapping[str, object]] = (),
    measure: bool = True,
) -> None:
    """Measure the latents of the training volumes and save the autoencoder to `output`/vae.

    Its config records how the volumes were prepared, and whose they are.
    Args:
        earlier: records of the subjects of what the training started from.
        measure: whether to measure the latents; otherwise their statistics stay.
    """
    if measure:
        items = LiveBar(PaddedVolumes(train, vae.stride), desc="measure latents", unit="volume")
        volumes = ({"name": item["name"], "image": item["image"][None], "fov": item["fov"][None]} for item in items)
        vae.set_latent_statistics(*latent_statistics(vae, volumes))
    if len(train.channels) > 1:
        vae.register_to_config(channel_names=train.channels)
    vae.register_to_config(data=train.preprocessing, subjects=join_records([*earlier, own_record(train, held_out)]))
    save_model(vae, output / "vae")
    logger.info(
        "saved %s (latents: mean %s, std %s)", output / "vae", vae.config["latents_mean"], vae.config["latents_std"]
    )
