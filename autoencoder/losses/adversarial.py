"""Adversarial training: discriminators of slices and of volumes, and their losses. Axes: (B, C, X, Y, Z).

Medical Diffusion (Khader et al. 2023) and VQGAN (Esser et al. 2021) sharpen an autoencoder this way: a discriminator of
2-D slices sees fine texture; one of 3-D patches sees whether slices fit together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Features = list[Tensor]  # of one discriminator, layer by layer; the last are its logits, one per patch


@dataclass(frozen=True)
class Slices:
    """The planes that a discriminator of slices sees: `positions` (B, n) along `axis` 0, 1 or 2. They are the same for
    real and reconstructed volumes, so that their features can be compared."""

    axis: int
    positions: Tensor

    def of(self, volumes: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) to (B * n, C, ., .)."""
        planes = volumes.movedim(self.axis + 2, 1)  # (B, side, C, ., .)
        rows = torch.arange(len(planes), device=planes.device)[:, None]
        return planes[rows, self.positions].flatten(0, 1)


def draw_slices(fov: Tensor, count: int, generator: torch.Generator) -> Slices:
    """Sample an axis, and `count` planes of each volume along it, among the planes that the field of view (B, 1, X, Y,
    Z) touches."""
    axis = int(torch.randint(3, (), generator=generator, device=generator.device))
    touched = fov.movedim(axis + 2, 1).flatten(2).any(2).float()
    touched = touched + ~touched.any(1, keepdim=True)  # a volume without any: all its planes
    return Slices(axis, torch.multinomial(touched, count, replacement=True, generator=generator))


class VolumeDiscriminator(nn.Module):
    """A PatchGAN of slices and one of volumes (Isola et al. 2017). Instance norm makes logits independent of the rest
    of the batch.

    Args:
        in_channels: channels of the volume.
        channels: width of the first layer; each further layer doubles it.
        layers: layers after the first; each but the last halves the sides.
        slices, volume: use the discriminator of slices, and that of whole patches.
    Raises: ValueError if both are False.
    """

    def __init__(
        self, in_channels: int = 1, channels: int = 32, layers: int = 2, slices: bool = True, volume: bool = True
    ):
        super().__init__()
        if not slices and not volume:
            raise ValueError("a discriminator needs slices, volumes, or both; got neither")

        from monai.networks.nets.patchgan_discriminator import PatchDiscriminator  # takes seconds; few runs need it

        def patchgan(dims: int) -> PatchDiscriminator:
            return PatchDiscriminator(dims, channels, in_channels, num_layers_d=layers, norm="INSTANCE")

        self.slices = patchgan(2) if slices else None
        self.volume = patchgan(3) if volume else None

    def forward(self, volumes: Tensor, slices: Slices) -> list[Features]:
        """Return features and logits of each discriminator."""
        found = [] if self.slices is None else [self.slices(slices.of(volumes))]
        return found + ([] if self.volume is None else [self.volume(volumes)])


def discriminator_loss(real: Sequence[Features], fake: Sequence[Features]) -> Tensor:
    """Compute the hinge loss (Lim & Ye 2017), averaged over discriminators: 0 when real logits exceed 1 and fake ones
    are below -1.
    """
    losses = [0.5 * (F.relu(1 - r[-1]).mean() + F.relu(1 + f[-1]).mean()) for r, f in zip(real, fake, strict=True)]
    return torch.stack(losses).mean()


def generator_loss(fake: Sequence[Features]) -> Tensor:
    """Compute the adversarial loss of the autoencoder: minus the mean logit, averaged over discriminators."""
    return torch.stack([-f[-1].mean() for f in fake]).mean()


def feature_matching_loss(real: Sequence[Features], fake: Sequence[Features]) -> Tensor:
    """Compute the mean absolute difference of hidden features of real and reconstructed volumes (Wang et al. 2018, Eq.
    3), averaged over layers and discriminators. The real ones receive no gradients.
    """
    pairs = [(r, f) for a, b in zip(real, fake, strict=True) for r, f in zip(a[:-1], b[:-1], strict=True)]
    return torch.stack([(r.detach() - f).abs().mean() for r, f in pairs]).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_weight: Tensor, most: float = 1e4) -> Tensor:
    """Return the weight that gives `adversarial` the gradient norm of `reconstruction` at the decoder's last layer
    (Esser et al. 2021, Eq. 7).

    Both are losses whose graphs are kept. Zero if the reconstruction loss has no gradient there.
    """
    pulls = [
        torch.autograd.grad(loss, last_weight, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    ]
    return (pulls[0] / (pulls[1] + 1e-6)).clamp(0, most).detach()
