"""Mean and standard deviation of the raw latents over a whole data set."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from .losses.reconstruction import cells_inside

if TYPE_CHECKING:
    from .base import VolumeAutoencoder


@torch.no_grad()
def latent_statistics(
    vae: "VolumeAutoencoder", batches: Iterable[Mapping[str, Any]]
) -> tuple[list[float], list[float]]:
    """Measure mean and standard deviation per channel of the raw posterior mean, over all latent voxels inside the
    field of view.

    Args:
        batches: of {"image": (B, C, X, Y, Z) in [-1, 1], "fov": (B, 1, X, Y, Z) boolean}, and a "name" for messages if
        there is one; shapes may differ between batches.
    Returns: two lists of `latent_channels` floats, for `vae.set_latent_statistics`.
    Raises: ValueError if there is nothing to measure, a channel never varies, or latents are not finite.
    """
    count, total, squares = 0, torch.zeros(vae.config["latent_channels"], dtype=torch.float64), 0.0
    for batch in batches:
        raw = vae.encode(batch["image"].to(vae.device, vae.dtype), return_dict=False)[0].raw_mean
        inside = cells_inside(batch["fov"].to(raw.device), raw.shape[2:])[:, 0]
        cells = raw.movedim(1, -1)[inside].double().cpu()
        if not bool(cells.isfinite().all()):
            raise ValueError(
                f"{batch.get('name', 'a volume')}: its latents are not finite; check its voxels, or exclude it"
            )
        count += len(cells)
        total, squares = total + cells.sum(0), squares + (cells**2).sum(0)
    if not count:
        raise ValueError("latent statistics need at least one volume with a field of view")
    mean = total / count
    variance = squares / count - mean**2
    if not bool((variance > 0).all()):
        raise ValueError(
            f"a latent channel never varies over the training set (variances {variance.tolist()}): train the "
            "autoencoder longer"
        )
    return mean.tolist(), variance.sqrt().tolist()
