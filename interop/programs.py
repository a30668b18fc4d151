"""Networks as programs that torch runs without any of our code (torch.export). Axes: (B, C, X, Y, Z).

A program takes any batch and any size of the grid: it is traced with symbolic sides, once.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from autoencoder import VolumeAutoencoder
from autoencoder.layers import Stride
from diffusion import LatentDenoiser, LatentUNet3D
from diffusion.folding import fold_mask

BATCH = Dim("batch")
SIDES = [Dim(name) for name in ("h", "w", "d")]  # of the latents
TRACED = (7, 6, 9)  # sides of the latents in the example that is traced; odd and even ones
POINT: Stride = (1, 1, 1)


class Decoder(nn.Module):
    """Standardized latents (B, C, h, w, d) to volumes (B, C, X, Y, Z), about [-1, 1], not clamped."""

    def __init__(self, vae: VolumeAutoencoder[Any]):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """Decode in one piece."""
        return self.vae._decode(latents)


class Encoder(nn.Module):
    """Volumes (B, C, X, Y, Z) in [-1, 1] to mean and standard deviation of the standardized latents (B, C, h, w, d)."""

    def __init__(self, vae: VolumeAutoencoder[Any]):
        super().__init__()
        self.vae = vae

    def forward(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        """Encode in one piece."""
        posterior = self.vae._distribution(self.vae._encode(volume))
        return posterior.mean, posterior.std


class Denoiser(nn.Module):
    """Noisy latents (B, C, h, w, d), timesteps (B,) and conditions to what the U-Net predicts, (B, C, h, w, d).

    The conditions are those of the U-Net's call, but for the mask: it is label indices (B, X, Y, Z), the ranks of the
    label values, and -1 outside the field of view. A mask of -1 alone is the absent one.
    """

    def __init__(self, unet: LatentDenoiser):
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        mask: Tensor | None = None,
        classes: Tensor | None = None,
        numbers: Tensor | None = None,
        image: Tensor | None = None,
        next_timestep: Tensor | None = None,
    ) -> Tensor:
        """Predict. Conditions that the U-Net does not have are None."""
        given = {"classes": classes, "numbers": numbers, "image": image, "next_timestep": next_timestep}
        if mask is not None:
            partial = self.unet.takes_partial_masks
            given["mask"] = fold_mask(mask, self.unet.mask_stride, self.unet.num_labels, partial=partial)
        present = {name: value for name, value in given.items() if value is not None}
        return self.unet(sample, timestep, **present, return_dict=False)[0]


def export_decoder(vae: VolumeAutoencoder[Any]) -> ExportedProgram:
    """Export the decoder: `program.module()(latents)`, see `Decoder`.

    Raises: RuntimeError of torch for a network that it cannot export.
    """
    latents = torch.zeros(2, vae.config["latent_channels"], *TRACED)
    return _exported(Decoder(vae), {"latents": latents}, {"latents": _grid()})


def export_encoder(vae: VolumeAutoencoder[Any]) -> ExportedProgram:
    """Export the encoder: `program.module()(volume)`, see `Encoder`. Raises: as `export_decoder`."""
    volume = torch.zeros(2, vae.config["in_channels"], *_voxels(vae.stride))
    return _exported(Encoder(vae), {"volume": volume}, {"volume": _grid(vae.stride)})


def export_denoiser(unet: LatentDenoiser) -> ExportedProgram:
    """Export the U-Net: `program.module()(sample, timestep, mask=...)`, see `Denoiser`. Raises: as `export_decoder`."""
    schema, batch = unet.condition_schema, {0: BATCH}
    given = {"sample": torch.zeros(2, unet.config["in_channels"], *TRACED), "timestep": torch.tensor([500.0, 20.0])}
    dims: dict[str, object] = {"sample": _grid(), "timestep": batch}
    if schema.mask:
        given["mask"] = torch.zeros(2, *_voxels(unet.mask_stride), dtype=torch.int64)
        dims["mask"] = batch | {axis - 1: side for axis, side in _grid(unet.mask_stride).items() if axis}
    if schema.classes:
        given["classes"], dims["classes"] = torch.zeros(2, len(schema.classes), dtype=torch.int64), batch
    if schema.numbers:
        given["numbers"], dims["numbers"] = torch.zeros(2, len(schema.numbers)), batch
    if schema.images:
        given["image"], dims["image"] = torch.zeros(2, len(schema.image_columns), *TRACED), _grid()
    if isinstance(unet, LatentUNet3D) and unet.takes_next_timestep:
        given["next_timestep"], dims["next_timestep"] = torch.tensor([400.0, 0.0]), batch
    return _exported(Denoiser(unet), given, dims)


def _exported(network: nn.Module, given: dict[str, Tensor], dims: dict[str, object]) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(network.eval(), (), given, dynamic_shapes=dims)


def _voxels(stride: Stride) -> list[int]:
    return [side * step for side, step in zip(TRACED, stride, strict=True)]


def _grid(stride: Stride = POINT) -> dict[int, Any]:
    """Return the symbolic sizes of (B, C, ...) on the grid of the latents, or on the one of their voxels."""
    sides = [side if step == 1 else step * side for side, step in zip(SIDES, stride, strict=True)]
    return {0: BATCH, **dict(enumerate(sides, start=2))}
