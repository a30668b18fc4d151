"""Images as conditions: the latents of the channels that are given, beside the noisy latents of all channels.

Axes: latents (B, C, h, w, d). For each image, in alphabetical order of their names: its C latents, then one channel
that is 1 where the image is given; all 0 where it is absent.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor


def image_columns(images: Mapping[str, int]) -> list[str]:
    """Whose each channel of `fold_images` is: the name of an image for each."""
    return [name for name in sorted(images) for _ in range(images[name] + 1)]


def fold_images(
    given: Mapping[str, Tensor], images: Mapping[str, int], cells: Sequence[int], inside: Tensor | None = None
) -> Tensor:
    """Clean, standardized latents of the images that are given -> the U-Net's condition "image".

    Args:
        given: (B, C, h, w, d) for each image that is given.
        images: the U-Net's `config.images`, the number of latent channels C of each image that it knows.
        cells: (h, w, d).
        inside: (B, 1, h, w, d), 0 in cells of padding alone, where the latents are 0 as well; None means that there are none.
    Returns: (B, the sum of C + 1, h, w, d); of a batch of one if nothing is given.
    Raises: ValueError for an image that the model does not know, and for latents of other channels or cells.
    """
    if unknown := sorted(set(given) - set(images)):
        raise ValueError(f"images {unknown} are given; this model can be given {sorted(images) or 'none'}")
    like = next(iter(given.values()), torch.zeros(1))
    folded = like.new_zeros(len(like), len(image_columns(images)), *cells)
    start = 0
    for name in sorted(images):
        flag = start + images[name]
        if name in given:
            expected = (len(like), images[name], *cells)
            if tuple(given[name].shape) != expected:
                raise ValueError(f"image {name}: its latents are {tuple(given[name].shape)}, expected {expected}")
            folded[:, start:flag] = given[name]
            folded[:, flag : flag + 1] = 1 if inside is None else inside
        start = flag + 1
    return folded


def image_condition(latents: Tensor, images: Mapping[str, slice], inside: Tensor | None = None) -> Tensor:
    """Clean latents of all channels (B, C, h, w, d) -> the condition "image", all of `images` given.

    Args:
        images: channels of the latents of each image; inside: as of `fold_images`.
    """
    given = {name: latents[:, own] for name, own in images.items()}
    return fold_images(given, {name: one.shape[1] for name, one in given.items()}, latents.shape[2:], inside)


def check_images(
    images: Mapping[str, int], latent_channels: int, rates: Mapping[str, float], others: Collection[str]
) -> None:
    """Check the images that a model may be given.

    Args:
        latent_channels: of all image channels together, which the model generates.
        rates: `condition_dropout`.
        others: names of the other conditions.
    Raises: ValueError for a name used twice, for numbers of channels that cannot be, and for a model that would always be
    given all that it is to generate.
    """
    if twice := sorted(set(images) & {*others, "mask"}):
        raise ValueError(f"{twice} name two conditions; call the image's channel, the class or the number otherwise")
    if min(images.values(), default=1) < 1 or sum(images.values()) > latent_channels:
        raise ValueError(
            f"images {dict(images)} are latent channels of each image, {latent_channels} or fewer together"
        )
    always = sorted(name for name in images if not rates.get(name))
    if sum(images.values()) == latent_channels and always:
        raise ValueError(
            f"{sorted(images)} are all channels that the model generates, so each must be left out at times; give "
            f"condition_dropout a rate above 0 for {', '.join(always)}"
        )
