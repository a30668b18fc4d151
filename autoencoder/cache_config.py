"""Settings of the latent cache. Imports no torch, which diffusion/ does."""

from dataclasses import dataclass
from typing import Annotated

from cli.settings import Axis, NonNegativeFloat, PositiveInt, Range, ShareBelowOne, UserPath, checked


@dataclass(frozen=True)
@checked
class LatentCacheConfig:
    """Latents of the training volumes, computed once: each volume as it is, and augmented versions of it.

    Versions are augmented before encoding, because an autoencoder does not commute with flips and shifts.

    Args:
        folder: where latents are stored, a folder or an fsspec URL; default: latents/ in the output folder. The limit
            of the cache, $MEDVOLUME_CACHE_LIMIT, counts the copies that this machine makes of those at a URL, and not
            those in a folder.
        versions: entries per volume; the first is the volume as it is, the others are augmented.
        flip_axes: axes (0, 1, 2) along which the other versions are mirrored with probability 1/2 (0 is left-right).
        shift: whether the other versions are shifted at random by less than the autoencoder's stride.
        rotate: largest rotation of the other versions about each axis, in degrees.
        scale: largest relative change of each side of the other versions.
        deform: standard deviation in voxels of a smooth random displacement of the other versions.
    Raises: ValueError for values outside the ranges below.
    """

    folder: UserPath | None = None
    versions: PositiveInt = 1
    flip_axes: tuple[Axis, ...] = ()
    shift: bool = False
    rotate: Annotated[float, Range(0, 180)] = 0.0
    scale: ShareBelowOne = 0.0
    deform: NonNegativeFloat = 0.0
