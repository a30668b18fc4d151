"""Networks as programs that torch runs without any of our code (torch.export). Axes: (B, C, X, Y, Z).

A program takes any size of the grid, and any batch, but those of `ONE_AT_A_TIME` take one volume: it is traced with
symbolic sizes, once.
"""

import copy
import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from autoencoder import VolumeAutoencoder
from autoencoder.layers import Stride, as_stride
from diffusion import LatentDenoiser, MedDDPMUNet3D, MonaiUNet3D
from diffusion.folding import fold_mask

TRACED = (6, 5, 8)  # sides of the latents in the example that is traced, less the smallest; odd and even ones
POINT: Stride = (1, 1, 1)
ONE_AT_A_TIME = (MonaiUNet3D, MedDDPMUNet3D)  # torch fixes their batch when they are traced
DEFERRED = "prefer_deferred_runtime_asserts_over_guards"  # of torch.export: sides need not be proven to fit


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
    """Export the decoder: `program.module()(latents=...)`, see `Decoder`.

    Raises: ValueError for a torch that exports programs of one size only.
    """
    grid = _Grid()
    latents = torch.zeros(grid.batch, vae.config["latent_channels"], *grid.example())
    return _exported(Decoder(vae), {"latents": latents}, {"latents": grid.sizes()})


def export_encoder(vae: VolumeAutoencoder[Any]) -> ExportedProgram:
    """Export the encoder: `program.module()(volume=...)`, see `Encoder`. Raises: as `export_decoder`."""
    grid = _Grid()
    volume = torch.zeros(grid.batch, vae.config["in_channels"], *grid.example(vae.stride))
    return _exported(Encoder(vae), {"volume": volume}, {"volume": grid.sizes(vae.stride)})


def export_denoiser(unet: LatentDenoiser) -> ExportedProgram:
    """Export the U-Net: `program.module()(sample=..., timestep=..., mask=...)`, see `Denoiser`.

    Sides of the latents are `smallest_side` or more, which is two voxels on the coarsest level.

    Raises: as `export_decoder`.
    """
    schema, grid = unet.condition_schema, _Grid(smallest_side(unet), batch=1 if isinstance(unet, ONE_AT_A_TIME) else 2)
    batch, latents = grid.batches, grid.example()
    given = {
        "sample": torch.zeros(grid.batch, unet.config["in_channels"], *latents),
        "timestep": torch.full((grid.batch,), 500.0),
    }
    dims: dict[str, object] = {"sample": grid.sizes(), "timestep": batch}
    if schema.mask:
        given["mask"] = torch.zeros(grid.batch, *grid.example(unet.mask_stride), dtype=torch.int64)
        dims["mask"] = grid.sizes(unet.mask_stride, first=1)
    if schema.classes:
        given["classes"], dims["classes"] = torch.zeros(grid.batch, len(schema.classes), dtype=torch.int64), batch
    if schema.numbers:
        given["numbers"], dims["numbers"] = torch.zeros(grid.batch, len(schema.numbers)), batch
    if schema.images:
        given["image"], dims["image"] = torch.zeros(grid.batch, len(schema.image_columns), *latents), grid.sizes()
    if unet.takes_next_timestep:
        given["next_timestep"], dims["next_timestep"] = torch.full((grid.batch,), 400.0), batch
    return _exported(Denoiser(unet), given, dims)


def smallest_side(unet: LatentDenoiser) -> int:
    """Return the smallest side of latents that a U-Net's program takes."""
    steps = [as_stride(stride) for stride in unet.config.get("strides", [unet.stride])]
    return max((math.prod(axis) for axis in zip(*steps, strict=True)), default=0) + 1


class _Grid:
    """Symbolic sides of latents, and of their voxels. A batch of one stays one; another is symbolic, too."""

    def __init__(self, smallest: int = 1, batch: int = 2):
        self.smallest, self.batch = smallest, batch
        self.sides = [Dim(name, min=smallest) for name in ("h", "w", "d")]
        self.batches = {} if batch == 1 else {0: Dim("batch")}

    def example(self, stride: Stride = POINT) -> list[int]:
        """Return sides of the example, in voxels of which `stride` are one of the latents'."""
        return [(side + self.smallest) * step for side, step in zip(TRACED, stride, strict=True)]

    def sizes(self, stride: Stride = POINT, first: int = 2) -> dict[int, Any]:
        """Return the symbolic sizes of a tensor whose sides begin at axis `first`."""
        sides = [side if step == 1 else step * side for side, step in zip(self.sides, stride, strict=True)]
        return {**self.batches, **dict(enumerate(sides, start=first))}


def _exported(network: nn.Module, given: dict[str, Tensor], dims: dict[str, object]) -> ExportedProgram:
    if DEFERRED not in inspect.signature(torch.export.export).parameters:
        raise ValueError(f"torch {torch.__version__} exports programs of one size only; update it (2.13 exports any)")
    plain = copy.deepcopy(network).eval()
    plain.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]  # or loading warns
    with torch.no_grad():
        return torch.export.export(
            plain, (), given, dynamic_shapes=dims, prefer_deferred_runtime_asserts_over_guards=True
        )
