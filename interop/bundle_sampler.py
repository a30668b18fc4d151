"""A volume from a mask, with torch and MONAI alone. medvolume writes this file into its MONAI bundles.

Axes: masks (1, X, Y, Z), volumes (C, X, Y, Z), latents (1, C, h, w, d), in RAS+ order.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor
from torch.export import passes

PADDING = -1  # in a mask: outside the field of view
UNKNOWN = -2  # in a mask: the label is not known
SPACING_TOLERANCE = 0.01  # relative


def load_program(path: str, device: str = "cpu") -> Any:
    """Load a program of torch.export: a function of tensors on `device`."""
    program = torch.export.load(path)
    return (program if device == "cpu" else passes.move_to_device_pass(program, device)).module()


class MaskToVolume:
    """Generates volumes from masks.

    Args:
        unet, decoder: what `load_program` returns.
        settings: file of labels, intensities, padding and the table of the U-Net's calls (configs/sampling.json).
        seed: of the noise.
        device: of the programs.
    """

    def __init__(self, unet: Any, decoder: Any, settings: str, seed: int = 0, device: str = "cpu"):
        self.unet, self.decoder, self.seed, self.device = unet, decoder, seed, device
        self.settings = json.loads(Path(settings).read_text(encoding="utf-8"))

    @torch.no_grad()
    def __call__(self, mask: MetaTensor) -> MetaTensor:
        """Generate a volume on the grid of a mask of label values, in the units of the training files.

        Raises: ValueError for labels that the model does not know, and for another spacing than the model's.
        """
        indices = self._indices(mask)
        padding = self._padding(indices.shape[1:])
        padded = F.pad(indices, padding, value=PADDING).to(self.device)
        volume = self.decoder(latents=self.denoise(padded))[0].cpu().clamp(-1, 1)
        (x, y, z), (nx, ny, nz) = padding[4::-2], indices.shape[1:]
        volume = volume[:, x : x + nx, y : y + ny, z : z + nz]
        volume = torch.where(indices == PADDING, -1.0, volume)
        low, high = (torch.tensor(ends).view(-1, 1, 1, 1) for ends in zip(*self.settings["intensity"], strict=True))
        volume = (volume + 1) / 2 * (high - low) + low
        return MetaTensor(volume, meta=mask.meta, applied_operations=mask.applied_operations)

    def denoise(self, mask: Tensor) -> Tensor:
        """Turn noise into latents (1, C, h, w, d), by the table of calls.

        Args:
            mask: label indices (1, X, Y, Z), whose sides are multiples of the stride.
        """
        sides = [n // step for n, step in zip(mask.shape[1:], self.settings["latent_stride"], strict=True)]
        shape = (1, self.settings["latent_channels"], *sides)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed)).to(self.device)
        known, absent = [noise], torch.full_like(mask, PADDING)
        for call in self.settings["calls"]:
            given = {"mask": mask if call["mask"] else absent, "timestep": noise.new_tensor([call["timestep"]])}
            if call["next_timestep"] is not None:
                given["next_timestep"] = noise.new_tensor([call["next_timestep"]])
            known.append(self.unet(sample=_sum(call["coefficients"], known), **given))
        return _sum(self.settings["final"], known)

    def _indices(self, mask: MetaTensor) -> Tensor:
        """Return label values (1, X, Y, Z) as the model's label indices, int64."""
        spacing = self.settings["spacing"]
        own = [float(size) for size in mask.pixdim]
        if spacing and any(abs(a - b) > SPACING_TOLERANCE * b for a, b in zip(own, spacing, strict=True)):
            raise ValueError(f"the mask's voxels are {own} mm, the model's {spacing}; resample the mask first")
        values, unknown = mask.as_tensor(), PADDING - 2
        indices = torch.full(values.shape, unknown, dtype=torch.int64)
        for code in (PADDING, UNKNOWN) if self.settings["partial_masks"] else (PADDING,):
            indices[values == code] = code
        for index, label in enumerate(self.settings["labels"]):
            indices[values == label] = index
        if (indices == unknown).any():
            wrong = values[indices == unknown].unique().tolist()
            raise ValueError(f"the mask holds {wrong}; the model knows the labels {self.settings['labels']}")
        return indices

    def _padding(self, sides: Sequence[int]) -> list[int]:
        """Return voxels before and after each axis, the last one first, up to multiples of the stride."""
        missing = [-n % step for n, step in zip(sides, self.settings["stride"], strict=True)]
        return [n for more in reversed(missing) for n in (more // 2, more - more // 2)]


def _sum(coefficients: Sequence[float], latents: Sequence[Tensor]) -> Tensor:
    terms = [number * one for number, one in zip(coefficients, latents, strict=True) if number]
    return torch.stack(terms).sum(0)
