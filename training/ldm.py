"""Train a latent diffusion model: what a run checks, builds and saves."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import set_seed

from autoencoder import VolumeAutoencoder
from autoencoder.model import RECORDS
from autoencoder.residual_noise import check_noise_shape, measure_noise
from autoencoder.weights import weight_files
from diffusion import LatentDenoiser, collate_latents, moved_embeddings
from diffusion.completion import complete_model, denoiser_class
from diffusion.denoise import set_timesteps
from diffusion.latents.cache import weights_hash
from files.documents import read_object
from pipelines import MedVolumePipeline, SamplingSettings
from pipelines.lora import add_lora, save_lora
from pipelines.storage.loading import load_autoencoder
from pipelines.storage.provenance import content_hash, stored_tensors
from volumes import DataConfig, VolumeDataset, describe
from volumes.data.preprocessing import preprocessing, refuse_differences
from volumes.data.subjects import join_records
from volumes.description import ChannelNoise, DataDescription

from .background import check_background, measure_background
from .build import build_model, initialize_from
from .distill import check_student, load_teacher
from .encoder_distance import EncoderDistance
from .engine.output import save_model
from .engine.step import Training
from .held_out import encode_held_out, latents_of
from .label_weights import check_best_by, check_partial_masks, label_weights
from .ldm_config import TrainLdmConfig
from .ldm_step import build_step
from .splits import PaddedVolumes, digests, load_split, own_record, refuse_seen

logger = logging.getLogger("training")


def build(config: TrainLdmConfig, accelerator: Accelerator) -> Training:
    """Build everything that `run_training` needs to train the U-Net of `config`; encodes the volumes."""
    vae = load_autoencoder(config.vae).to(accelerator.device)
    check_prepared(config, vae, preprocessing(config.data))  # before anything is read
    check_partial_masks(config)
    train, held_out = load_split(config.data)
    check_prepared(config, vae, train.preprocessing)
    teacher, taught = load_teacher(config, vae, accelerator) if config.distill else (None, None)
    earlier = check_unseen(config, vae, held_out)
    config.model = config.model or model_of(config.init_from)
    data = describe(train, constant=denoiser_class(config.model).known_numbers)
    images = image_latents(config.data, vae)
    config.model = complete_model(config.model, vae, data, images)  # the run's config.yaml has all of it
    check_student(config)
    check_residual_noise(config, train)
    check_background(train)
    set_seed(config.loop.seed)
    unet: LatentDenoiser = build_model(config.model, config.gradient_checkpointing)
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

    num_labels = unet.num_labels
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
        average.register_to_config(subjects=records)
        described = measured(data, train, vae, config, known_noise)
        pipe = MedVolumePipeline(vae, cast(Any, average), step.make_scheduler(), data=described)
        # Those of the previews; a student has its teacher's guidance.
        pipe.sampling_settings = SamplingSettings(step.inference_steps, None if teacher is None else 1.0)
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


def measured(
    data: DataDescription,
    train: VolumeDataset,
    vae: VolumeAutoencoder,
    config: TrainLdmConfig,
    known_noise: tuple[ChannelNoise, ...] | None,
) -> DataDescription:
    """Return the description with residual noise (measured, or that of a teacher) and the background's threshold."""
    noise = tuple(measure_noise(train, vae)) if config.residual_noise else known_noise
    threshold = measure_background(train, vae) if config.data.empty_background else None
    return dataclasses.replace(data, residual_noise=noise, background_threshold=threshold)


def model_of(init_from: str | None) -> dict[str, object]:
    """Return the model section of the U-Net that a training starts from; an empty one without its config."""
    described = Path(init_from or "") / "config.json"
    if init_from is None or not described.is_file():
        return {}
    stored = read_object(described)
    arguments = {name: value for name, value in stored.items() if name[0] != "_" and name != "subjects"}
    return {"class": f"diffusion.{stored.get('_class_name')}", **arguments}


def image_latents(data: DataConfig, vae: VolumeAutoencoder) -> dict[str, slice]:
    """Return the latent channels of each condition channel, by its name."""
    return {name: vae.latents_of(data.channels.index(name)) for name in data.condition_channels}


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


def init_unet(unet: LatentDenoiser, folder: str | Path) -> list[str]:
    """Load a trained U-Net's weights (`initialize_from`). Classes and numbers are matched by name; new ones start at
    zero, and so does what a model of whole masks lacks for partial ones. A student's second time stays as it is."""
    described = Path(folder) / "config.json"
    trained = read_object(described) if described.is_file() else None
    moved = None if trained is None else moved_embeddings(trained, unet.config)
    longer = None
    if trained is not None and unet.takes_partial_masks and trained.get("partial_masks") is None:
        same = trained.get("num_labels") == unet.num_labels
        longer = "mask_embedding.table.weight" if same else None  # unknown is the label after the last one
    return initialize_from(unet, folder, new="condition_embedding", moved=moved, longer=longer, own="next_embedding")


def attach_lora(unet: LatentDenoiser, config: TrainLdmConfig) -> str:
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
