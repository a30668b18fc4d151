"""The model's own loss on real volumes: an attacker's view of who was in its training set."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from autoencoder.losses.reconstruction import cells_inside
from diffusion import Conditions, fold_mask, image_condition
from diffusion.objectives import FLOWS, TRAIN_STEPS, noisy_and_target, shifted
from pipelines import MedVolumePipeline
from volumes import VolumeDataset, pad_sample

TIMES = (100.0, 300.0, 500.0, 700.0)  # of 1000; at the ends, losses say little of the volume
DRAWS = 2  # of noise at each time


@torch.inference_mode()
def denoising_losses(
    pipe: MedVolumePipeline,
    dataset: VolumeDataset,
    *,
    times: Sequence[float] = TIMES,
    draws: int = DRAWS,
    seed: int = 0,
    on_volume: Callable[[], object] | None = None,
) -> np.ndarray:
    """Compute the (N,) mean squared error of the model's prediction for each volume's latents, under the volume's own
    conditions.

    It is the mean over `times` (in thousandths of the schedule, shifted as in training for a model with `shift_voxels`)
    and over `draws` of noise, the same for every volume of a shape, inside the field of view and without augmentation
    (Matsumoto et al. 2023, section 3). Of a student it is that of its step to the image.

    Raises: ValueError for a pipeline with masks and a data set without.
    """
    vae, unet = pipe.vae, pipe.unet
    config, schema = unet.config, unet.condition_schema
    end = {"next_timestep": 0} if unet.takes_next_timestep else {}
    losses = []
    for index in range(len(dataset)):
        item = pad_sample(dataset[index], vae.stride)
        latents = vae.encode(item["image"][None].to(vae.device, vae.dtype), return_dict=False)[0].mode().to(unet.dtype)
        weight = cells_inside(item["fov"][None].to(latents.device), tuple(latents.shape[2:])).to(latents)
        tensors = {key: values[None] for key in ("classes", "numbers") if (values := item.get(key)) is not None}
        if unet.num_labels:
            if "mask" not in item:
                raise ValueError("the model is conditioned on masks, and the data has none; give `masks` in its config")
            tensors["mask"] = fold_mask(
                item["mask"][None], vae.stride, unet.num_labels, partial=unet.takes_partial_masks
            )
        if schema.images:
            images = {name: vae.latents_of(dataset.channels.index(name)) for name, _ in schema.images}
            tensors["image"] = image_condition(latents, images)
        conditions = Conditions(**tensors).to(latents.device)
        generator = torch.Generator().manual_seed(seed)
        errors = []
        shift = unet.timestep_shift([int(weight.sum())])
        for time in times:
            for _ in range(draws):
                noise = torch.randn(latents.shape, generator=generator).to(latents)
                step = shifted(time * unet.train_steps / TRAIN_STEPS, shift, unet.train_steps)
                at = torch.full((1,), step if config["objective"] in FLOWS else int(step), device=latents.device)
                noisy, target = noisy_and_target(config["objective"], latents, noise, at, unet.train_steps, unet.betas)
                prediction = unet(noisy * weight, at, **conditions.as_kwargs(), **end, return_dict=False)[0]
                error = (prediction.float() - target.float()) ** 2 * weight
                errors.append(float(error.sum() / (weight.sum() * latents.shape[1])))
        losses.append(np.mean(errors))
        if on_volume is not None:
            on_volume()
    return np.array(losses)
