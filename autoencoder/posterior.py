"""The encoder's output: a distribution of latents, in standardized units."""

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class LatentDistribution:
    """Latents (B, C, h, w, d) as their encoder gives them, standardized by the training set's statistics.

    `mean`, `std`, `sample()` and `mode()` are in standardized units: unit variance per channel over the training set,
    which is what the diffusion model sees. `raw_mean` is in the encoder's own.

    Args:
        raw_mean: (B, C, h, w, d).
        raw_std: the same shape; zeros where the encoder is certain.
        latents_mean, latents_std: (C,) statistics of the raw mean; they are the only place where latents are
            standardized.
    """

    def __init__(self, raw_mean: Tensor, raw_std: Tensor, latents_mean: Tensor, latents_std: Tensor):
        self.raw_mean = raw_mean
        shift, scale = (v.to(raw_mean).view(1, -1, 1, 1, 1) for v in (latents_mean, latents_std))
        self.mean = (raw_mean - shift) / scale
        self.std = raw_std / scale

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """Sample once: (B, C, h, w, d), standardized."""
        noise = randn_tensor(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """Return the mean, (B, C, h, w, d), standardized."""
        return self.mean


class DiagonalGaussian3D(LatentDistribution):
    """q(z|x), a Gaussian of its own for every latent.

    `kl()` is of the raw posterior against N(0, 1), which is what the encoder is trained with. (diffusers' own class
    sums its KL over three axes only, which is silently wrong for volumes.)

    Args:
        moments: (B, 2C, h, w, d), raw mean and raw log-variance.
    """

    def __init__(self, moments: Tensor, latents_mean: Tensor, latents_std: Tensor):
        raw_mean, raw_logvar = moments.chunk(2, dim=1)
        self.raw_logvar = raw_logvar.clamp(-30.0, 20.0)
        super().__init__(raw_mean, torch.exp(0.5 * self.raw_logvar), latents_mean, latents_std)

    def kl_map(self) -> Tensor:
        """Compute KL(q || N(0, 1)) of the raw posterior in nats for every element, (B, C, h, w, d) (Kingma & Welling
        2014, appendix B).
        """
        mean, logvar = self.raw_mean.float(), self.raw_logvar.float()  # autocast may have left them in bfloat16
        return 0.5 * (mean**2 + logvar.exp() - 1.0 - logvar)

    def kl(self) -> Tensor:
        """Compute the KL of the raw posterior in nats, summed over channels and space: (B,)."""
        return self.kl_map().sum(dim=(1, 2, 3, 4))
