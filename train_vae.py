"""Train an autoencoder:  accelerate launch train_vae.py --config configs/hippocampus/vae.yaml [--loop.seed 1 ...]

The run folder ends with `vae/`: the averaged weights, with the latents' mean and standard deviation over the training
set in its config.
"""

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from autoencoder import AutoencoderKL3D, gradient_loss, kl_loss, l1_loss, latent_statistics, mse_loss
from training import (
    AutoencoderLosses,
    Learner,
    Loop,
    TrainVaeConfig,
    build_model,
    initialise_from,
    make_accelerator,
    parse_config,
    save_model,
)
from training.splits import PaddedVolumes, load_split
from volumes import CropDataset, slices_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("training")


class AutoencoderStep:
    """The autoencoder's training step: reconstruction and KL inside the field of view."""

    def __init__(self, learner: Learner[AutoencoderKL3D], weights: AutoencoderLosses):
        self.vae, self.learners, self.weights = learner, (learner,), weights

    def __call__(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """One batch of {"image": (B, C, X, Y, Z) in [-1, 1], "fov": (B, 1, X, Y, Z) boolean}."""
        image, fov, weights = batch["image"], batch["fov"], self.weights
        reconstruction, posterior = self.vae.model(image, sample_posterior=True, return_dict=False, generator=generator)
        losses = {"l1": l1_loss(reconstruction, image, fov), "kl": kl_loss(posterior, fov)}
        loss = weights.l1 * losses["l1"] + weights.kl * losses["kl"]
        for name, weight, function in (("mse", weights.mse, mse_loss), ("gradient", weights.gradient, gradient_loss)):
            if weight:
                losses[name] = function(reconstruction, image, fov)
                loss = loss + weight * losses[name]
        self.vae.backward(loss)
        return {"loss": loss.detach(), **{name: value.detach() for name, value in losses.items()}}

    @torch.no_grad()
    def validate(self, item: dict[str, Any], generator: torch.Generator) -> dict[str, float]:
        """PSNR in dB inside the field of view, of intensities in [0, 1], coding the whole volume."""
        image, fov = item["image"][None], item["fov"][None]
        reconstruction = self._reconstruct(image)
        mse = mse_loss(reconstruction.clamp(-1, 1), image, fov).item() / 4  # from [-1, 1] to [0, 1]
        return {"psnr": 10 * math.log10(1 / max(mse, 1e-10)), "l1": l1_loss(reconstruction, image, fov).item()}

    @torch.no_grad()
    def preview(self, items: list[dict[str, Any]]) -> "Figure":
        """Real above reconstructed, a column per volume."""
        columns = []
        for item in items:
            reconstruction = self._reconstruct(item["image"][None])[0].clamp(-1, 1)
            images = {"real": item["image"][0], "reconstructed": reconstruction[0]}  # the first channel
            columns.append({"title": item["name"], "images": images, "spacing": item["spacing"]})
        return slices_figure(columns)

    def _reconstruct(self, image: Tensor) -> Tensor:
        with self.vae.accelerator.autocast():
            return self.vae.average(image, return_dict=False)[0].float()


def freeze_encoder(vae: AutoencoderKL3D, source: str | None) -> None:
    """Leave the encoder and the latents' statistics as they are in `source`. Raises: ValueError if they are not there."""
    statistics = AutoencoderKL3D.load_config(source) if source else {}
    if not isinstance(statistics, dict) or not statistics.get("latents_std"):
        raise ValueError(
            f"freeze_encoder needs --init_from, an autoencoder with latents_mean and latents_std; got {source}"
        )
    vae.encoder.requires_grad_(False)
    vae.set_latent_statistics(statistics["latents_mean"], statistics["latents_std"])


def main(args: list[str] | None = None) -> dict[str, float]:
    """Train as the config says. Returns the final validation's metrics."""
    config = parse_config(TrainVaeConfig, args)
    output = Path(config.output)
    accelerator = make_accelerator(config)
    set_seed(config.loop.seed)
    vae: AutoencoderKL3D = build_model(config.model)
    fresh = initialise_from(vae, config.init_from) if config.init_from else []
    if config.init_from:
        logger.info("started from %s; layers left fresh: %s", config.init_from, fresh or "none")
    if config.freeze_encoder:
        if untrained := [name for name in fresh if name.startswith("encoder")]:
            raise ValueError(
                f"freeze_encoder: {config.init_from} has no weights that fit {untrained}; train them first"
            )
        freeze_encoder(vae, config.init_from)

    train, held_out = load_split(config.data)
    if any(n % s for n, s in zip(config.crops.shape, vae.stride, strict=True)):
        raise ValueError(f"crops.shape {config.crops.shape}: no multiple of the autoencoder's stride {vae.stride}")
    crops = CropDataset(train, config.crops.shape, seed=config.loop.seed, flip_axes=config.crops.flip_axes)

    learner = Learner("vae", vae, config.optimizer, ema_decay=config.loop.ema_decay, max_steps=config.loop.max_steps)
    validation = PaddedVolumes(held_out, vae.stride) if held_out else []
    metrics = Loop(accelerator, config, AutoencoderStep(learner, config.losses), crops, validation).run()

    if accelerator.is_main_process:
        final = learner.average
        if not config.freeze_encoder:
            volumes = ({key: item[key][None] for key in ("image", "fov")} for item in PaddedVolumes(train, vae.stride))
            final.set_latent_statistics(*latent_statistics(final, volumes))
        save_model(final, output / "vae")
        statistics = (final.config["latents_mean"], final.config["latents_std"])
        logger.info("saved %s (latents: mean %s, std %s)", output / "vae", *statistics)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return metrics


if __name__ == "__main__":
    main()
