"""Mean and standard deviation of the raw latents over a whole data set."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from .losses.reconstruction import cells_inside

if TYPE_CHECKING:
    from .base import VolumeAutoencoder


Moments = tuple[int, torch.Tensor, torch.Tensor]  # number of latent voxels, and sum and sum of squares per channel


@torch.no_grad()
def latent_moments(vae: "VolumeAutoencoder", batch: Mapping[str, Any]) -> Moments:
    """Measure the raw posterior mean over the latent voxels inside the field of view: float64 of (latent_channels,).

    Args:
        batch: {"image": (B, C, X, Y, Z) in [-1, 1], "fov": (B, 1, X, Y, Z) boolean}, and a "name" for messages if there
            is one.
    Raises: ValueError if latents are not finite.
    """
    raw = vae.encode(batch["image"].to(vae.device, vae.dtype), return_dict=False)[0].raw_mean
    inside = cells_inside(batch["fov"].to(raw.device), raw.shape[2:])[:, 0]
    cells = raw.movedim(1, -1)[inside].double().cpu()
    if not bool(cells.isfinite().all()):
        raise ValueError(
            f"{batch.get('name', 'a volume')}: its latents are not finite; check its voxels, or exclude it"
        )
    return len(cells), cells.sum(0), (cells**2).sum(0)


def join_moments(moments: Iterable[Moments]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel, for `vae.set_latent_statistics`.

    Raises: ValueError if there is nothing to measure, or a channel never varies.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for cells, added, added_squares in moments:
        count, total, squares = count + cells, total + added, squares + added_squares
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


def latent_statistics(
    vae: "VolumeAutoencoder", batches: Iterable[Mapping[str, Any]]
) -> tuple[list[float], list[float]]:
    """Measure mean and standard deviation per channel of the raw posterior mean, over all latent voxels inside the
    field of view.

    Args:
        batches: as `latent_moments` takes them; shapes may differ between batches.
    Returns: two lists of `latent_channels` floats, for `vae.set_latent_statistics`.
    Raises: ValueError if there is nothing to measure, a channel never varies, or latents are not finite.
    """
    return join_moments(latent_moments(vae, batch) for batch in batches)
