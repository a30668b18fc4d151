"""An autoencoder that errs by a known shift."""

from types import SimpleNamespace

import torch


class ShiftedCoder:
    """An autoencoder that gives every voxel back, darker by `shift`; `padding` is what it gives back for -1, which
    stands in the padding alone where volumes are brighter."""

    stride, device, dtype = (4, 4, 4), torch.device("cpu"), torch.float32

    def __init__(self, shift: float, padding: float | None = None):
        self.shift, self.padding = shift, padding

    def encode(self, image):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: image))

    def decode(self, latents):
        decoded = latents - self.shift
        return SimpleNamespace(
            sample=decoded if self.padding is None else torch.where(latents == -1, self.padding, decoded)
        )
