"""Images as conditions: the clean latents of the condition channels, beside the noisy latents of all channels.

Axes: latents (B, C, h, w, d). For each image, in alphabetical order of their names: its C latents, then one channel
that is 1 where the image is given; all 0 where it is absent.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def image_columns(images: Mapping[str, int]) -> list[str]:
    """Return the image that each channel of `fold_images` belongs to."""
    return [name for name in sorted(images) for _ in range(images[name] + 1)]


def fold_images(
    given: Mapping[str, Tensor], images: Mapping[str, int], cells: Sequence[int], inside: Tensor | None = None
) -> Tensor:
    """Map clean, standardized latents of the images that are present to the U-Net's condition "image".

    Args:
        given: (B, C, h, w, d) for each image that is present.
        images: the U-Net's `config.images`, the number of latent channels C of each image that it knows.
        cells: sides (h, w, d) of the latent grid.
        inside: (B, 1, h, w, d), 0 where there is only padding (and the latents are 0); None: no padding.
    Returns: (B, the sum of C + 1, h, w, d); a batch of one if no image is present.
    Raises: ValueError for an image that the model does not know, and for latents with other channels or sides.
    """
    if unknown := sorted(set(given) - set(images)):
        raise ValueError(f"images {unknown} are not known; the images of this model are {sorted(images) or 'none'}")
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
    """Map clean latents of all channels (B, C, h, w, d) to the condition "image", with all of `images` present.

    Args:
        images: channels of the latents of each image; inside: as of `fold_images`.
    """
    given = {name: latents[:, own] for name, own in images.items()}
    return fold_images(given, {name: one.shape[1] for name, one in given.items()}, latents.shape[2:], inside)
