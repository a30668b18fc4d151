"""Train a latent diffusion model:  accelerate launch train_ldm.py --config configs/hippocampus/ldm.yaml [--vae DIR ...]

The run folder ends with `pipeline/`: autoencoder, U-Net (averaged weights), scheduler and what they were trained on,
for `MedVolumePipeline.from_pretrained`. With a `lora:` section it ends with `lora/` instead, for
`pipe.load_lora_weights`: --config configs/hippocampus/lora.yaml --init_from PIPELINE/unet --vae PIPELINE/vae
"""

from cli.command import run_command
from training.config import TrainLdmConfig, parse_config

if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse_config(TrainLdmConfig))

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from autoencoder import LatentDistribution, VolumeAutoencoder
from autoencoder.model import RECORDS
from autoencoder.residual_noise import check_noise_shape, measure_noise
from autoencoder.weights import weight_files
from diffusion import (
    Conditions,
    LatentAugmentation,
    LatentDataset,
    LatentUNet3D,
    build_latent_cache,
    collate_latents,
    denoise,
    drop_conditions,
    fold_mask,
    image_condition,
    make_scheduler,
    moved_embeddings,
    training_loss,
)
from diffusion.completion import complete_model
from diffusion.denoise import set_timesteps
from diffusion.latent_cache import weights_hash
from diffusion.latent_entry import check_latents
from diffusion.objectives import Scheduler
from files.documents import read_object
from pipelines import MedVolumePipeline
from pipelines.lora import add_lora, save_lora
from pipelines.storage.loading import load_autoencoder
from pipelines.storage.provenance import content_hash, stored_tensors
from training import (
    Learner,
    Loop,
    build_model,
    initialize_from,
    open_run,
    save_model,
)
from training.engine.previews import preview_case
from training.splits import PaddedVolumes, digests, load_split, own_record, refuse_seen
from volumes import VolumeDataset, describe, slices_figure
from volumes.data.preprocessing import preprocessing, refuse_differences
from volumes.data.subjects import join_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("training")
VALIDATION_DRAWS = 8  # timesteps and noises per held-out volume; the same at every validation


class DiffusionStep:
    """The U-Net's training step: latents drawn from their posterior, timesteps and noise, the objective's loss."""

    def __init__(
        self,
        learner: Learner[LatentUNet3D],
        vae: VolumeAutoencoder,
        inference_steps: int,
        channels: Sequence[str],
        sampler: Callable[[], Scheduler],
        loss: str = "mse",
        label_maps: bool = False,
    ):
        self.label_maps = label_maps
        self.unet, self.learners, self.vae, self.inference_steps = learner, (learner,), vae, inference_steps
        self.channels = channels
        network = learner.network
        self.make_scheduler = sampler
        self.loss = partial(training_loss, train_steps=network.train_steps, absolute=loss == "l1")
        self.objective: str = network.config["objective"]
        self.schema = learner.network.condition_schema
        self.dropout: dict[str, float] = learner.network.config["condition_dropout"] or {}

    def __call__(self, batch: dict[str, Any], generators: list[torch.Generator]) -> dict[str, Tensor]:
        """One batch of `collate_latents`."""
        noise = randn_tensor(batch["mean"].shape, generator=generators, device=batch["mean"].device)
        latents = batch["mean"] + batch["std"] * noise
        torch.manual_seed(
            generators[0].initial_seed()
        )  # dropout knows the global state alone, and a resume must find it
        conditions = drop_conditions(batch["conditions"], self.schema, self.dropout, generators)
        loss = self.loss(self.unet.model, self.objective, latents, conditions, batch["weight"], generators)
        self.unet.backward(loss)
        return {"loss": loss.detach()}

    def after_update(self, taken: bool) -> None:
        """All state moves by gradients."""

    def review(self, values: dict[str, float]) -> list[str]:
        """Nothing but the loss could go wrong."""
        return []

    @torch.no_grad()
    def validate(self, item: dict[str, Any], generator: torch.Generator) -> dict[str, float]:
        """The loss on a held-out volume's latents, conditions left out as often as in training; of all channels together, and of each
        where the autoencoder codes them apart."""

        def repeat(values: Tensor) -> Tensor:
            return values.expand(VALIDATION_DRAWS, *values.shape[1:])

        latents, conditions = repeat(item["latents"]), item["conditions"].map(repeat)
        conditions = drop_conditions(conditions, self.schema, self.dropout, generator)
        weight = torch.ones_like(latents[:, :1])  # padding is thinner than a cell, so every cell has a voxel inside
        with self.unet.accelerator.autocast():
            losses = self.loss(self.unet.average, self.objective, latents, conditions, weight, generator, each=True)
        apart = len(self.channels) > 1 and self.vae.num_channel_groups == len(self.channels) and not self.label_maps
        of_channel = {
            f"loss/{name}": losses[self.vae.latents_of(i)] for i, name in enumerate(self.channels if apart else ())
        }
        return {"loss": losses.mean().item(), **{name: own.mean().item() for name, own in of_channel.items()}}

    @torch.no_grad()
    def preview(self, items: list[dict[str, Any]]) -> "Figure":
        """Mask, real volume and the volume generated from its conditions side by side, a row for each channel of each case, always from
        the same noise; without the images that can be left out."""
        cases, images = [], [name for name, _ in self.schema.images if self.dropout.get(name)]
        for index, item in enumerate(items):
            shape, device = item["latents"].shape, item["latents"].device
            noise = randn_tensor(shape, generator=torch.Generator().manual_seed(index), device=device)
            scheduler, steps = self.make_scheduler(), self.inference_steps
            conditions = item["conditions"].drop(images, self.schema)
            with self.unet.accelerator.autocast():
                latents = denoise(self.unet.average, noise, scheduler, conditions, num_inference_steps=steps)
                generated = self.vae.decode(latents, return_dict=False)[0][0].float().clamp(-1, 1)
            shown = {"real": item["image"], "generated": generated}
            cases.append(preview_case(item, shown, self.channels, self.label_maps))
        return slices_figure(cases)


def check_prepared(config: TrainLdmConfig, vae: VolumeAutoencoder, given: dict[str, Any]) -> None:
    """Raises: ValueError if the autoencoder learned from volumes that were prepared in another way than the facts `given` say. One
    that does not say how (it is older) has a warning, once the spacing is known."""
    vae.check_channels(given["channels"])
    learned = vae.config["data"]
    refuse_differences(learned, given, f"vae {config.vae}")
    if learned is None and "spacing" in given:
        logger.warning(
            "vae %s: does not say how its volumes were prepared (it is older): whether these are was not checked",
            config.vae,
        )


def check_unseen(
    config: TrainLdmConfig, vae: VolumeAutoencoder, held_out: VolumeDataset | None
) -> Sequence[dict[str, Any]]:
    """The records of the U-Net that is trained on, none without one. Raises: ValueError if the autoencoder or that U-Net has seen
    subjects that are held out here."""
    refuse_seen(vae.config["subjects"], config.data, held_out, f"vae {config.vae}", accepted=config.accept_overlap)
    described = Path(config.init_from or "") / "config.json"
    if config.init_from is None:
        return []
    records = read_object(described).get("subjects") if described.is_file() else None
    refuse_seen(records, config.data, held_out, f"init_from {config.init_from}", accepted=config.accept_overlap)
    return join_records(records)


def init_unet(unet: LatentUNet3D, folder: str | Path) -> list[str]:
    """`initialize_from` of a trained U-Net; of its classes and numbers by name, those that it lacks starting at zero."""
    described = Path(folder) / "config.json"
    moved = moved_embeddings(read_object(described), unet.config) if described.is_file() else None
    return initialize_from(unet, folder, new="condition_embedding", moved=moved)


def attach_lora(unet: LatentUNet3D, config: TrainLdmConfig) -> str:
    """Attach the config's LoRA to the U-Net that it started from. Returns the hash of that U-Net.

    Raises: ValueError if there is none, or if the model section does not describe it.
    """
    assert config.lora is not None
    described = Path(config.init_from or "") / "config.json"
    if config.init_from is None or not described.is_file():
        raise ValueError(
            f"lora needs --init_from, the folder of a trained U-Net (PIPELINE/unet); got {config.init_from}"
        )
    base, own = read_object(described), json.loads(unet.to_json_string())
    public = [key for key in own if key[0] != "_" and key not in RECORDS]
    wrong = [f"{key} is {own[key]}, not {base.get(key)}" for key in public if own[key] != base.get(key)]
    if wrong:
        raise ValueError(
            f"a LoRA belongs to one U-Net, but the model differs from {config.init_from}: {'; '.join(wrong)}"
        )
    stored = stored_tensors(weight_files(Path(config.init_from)))  # as the pipeline hashes them, in whatever precision
    add_lora(unet, **dataclasses.asdict(config.lora))
    return content_hash({"unet": (unet.config, stored)})


@torch.no_grad()
def encode_held_out(
    volumes: PaddedVolumes, vae: VolumeAutoencoder, num_labels: int, images: Mapping[str, slice]
) -> list[dict[str, Any]]:
    """Held-out volumes with their latents (1, C, h, w, d) and "conditions", of a batch of one."""
    items = []
    for item in volumes:
        posterior: LatentDistribution = vae.encode(item["image"][None].to(vae.device), return_dict=False)[0]
        check_latents(posterior, item["name"])
        tensors = {key: item[key][None] for key in ("classes", "numbers") if key in item}
        if num_labels:
            tensors["mask"] = fold_mask(item["mask"][None], vae.stride, num_labels)
        latents = posterior.mode().cpu()
        if images:
            tensors["image"] = image_condition(latents, images)
        items.append({**item, "latents": latents, "conditions": Conditions(**tensors)})
    return items


def encode_training(
    dataset: VolumeDataset, vae: VolumeAutoencoder, config: TrainLdmConfig, accelerator: Accelerator
) -> LatentDataset:
    """The latent cache of the training volumes, each process encoding its share."""
    cache = config.cache
    folder = cache.folder or Path(config.output) / "latents"
    augmentation = LatentAugmentation(
        cache.versions, cache.flip_axes, cache.shift, cache.rotate, cache.scale, cache.deform, config.loop.seed
    )
    shard = (accelerator.process_index, accelerator.num_processes)
    latents = build_latent_cache(dataset, vae, folder, augmentation, shard=shard, progress=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    return latents


def main(args: list[str] | None = None) -> dict[str, float]:
    """Train as the config says. Returns the final validation's metrics."""
    config = parse_config(TrainLdmConfig, args)
    with open_run(config, "train_ldm.py", args) as accelerator:
        return train_as(config, accelerator)


def train_as(config: TrainLdmConfig, accelerator: Accelerator) -> dict[str, float]:
    """`main`, of one config, in one of the processes."""
    output = Path(config.output)
    vae = load_autoencoder(config.vae).to(accelerator.device)
    check_prepared(config, vae, preprocessing(config.data))  # before anything is read
    train, held_out = load_split(config.data)
    check_prepared(config, vae, train.preprocessing)
    earlier = check_unseen(config, vae, held_out)
    data = describe(train)
    channels = config.data.channels
    images = {name: vae.latents_of(channels.index(name)) for name in config.data.condition_channels}
    config.model = complete_model(config.model, vae, data, images)
    if config.residual_noise and config.data.image_labels:
        raise ValueError("residual_noise: label maps have none; leave it out of the config")
    if config.residual_noise and config.lora:
        raise ValueError("residual_noise: a LoRA has that of its pipeline; leave it out of the config")
    if config.residual_noise:
        check_noise_shape([min(sides) for sides in zip(*train.shapes, strict=True)])
    set_seed(config.loop.seed)
    unet: LatentUNet3D = build_model(config.model)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.init_from:
        fresh = init_unet(unet, config.init_from)
        logger.info("started from %s; layers left fresh: %s", config.init_from, fresh or "none")
    base = attach_lora(unet, config) if config.lora else None
    sampler = partial(
        make_scheduler, unet.config["objective"], unet.train_steps, name=config.scheduler, bound=vae.latent_bound()
    )
    set_timesteps(sampler(), config.inference_steps, None, accelerator.device)  # refused now, not at the first preview

    num_labels = config.model["num_labels"]
    latents = encode_training(train, vae, config, accelerator)
    validation = encode_held_out(PaddedVolumes(held_out, vae.stride), vae, num_labels, images) if held_out else []

    learner = Learner("unet", unet, config.optimizer, ema_decay=config.loop.ema_decay, max_steps=config.loop.max_steps)
    label_maps = bool(config.data.image_labels)
    step = DiffusionStep(learner, vae, config.inference_steps, channels, sampler, config.loss, label_maps)
    collate = partial(collate_latents, stride=vae.stride, num_labels=num_labels, images=images)
    contents = {**digests(train), "autoencoder": weights_hash(vae.encoder)}
    metrics = Loop(accelerator, config, step, latents, validation, collate, contents).run()

    records = join_records([*earlier, own_record(train, held_out)])
    if accelerator.is_main_process and base:
        trained_on = {"data": train.preprocessing, "subjects": records}
        logger.info("saved %s", save_lora(learner.average, output / "lora", base, trained_on=trained_on))
    elif accelerator.is_main_process:
        if config.residual_noise:
            data = dataclasses.replace(data, residual_noise=tuple(measure_noise(train, vae)))
        learner.average.register_to_config(subjects=records)
        pipeline = MedVolumePipeline(vae, learner.average, sampler(), data=data)
        save_model(pipeline, output / "pipeline")
        logger.info("saved %s", output / "pipeline")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return metrics
