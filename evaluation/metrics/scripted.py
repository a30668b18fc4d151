"""Features by any network in a local TorchScript file, such as RadImageNet's (2-D) or MedicalNet's (3-D).

import torch
network.eval()                                     # maps (B, 3, H, W), or (B, 1, X, Y, Z), to (B, F, ...)
torch.jit.trace(network, torch.rand(1, 3, 64, 64)).save("radimagenet.ts")
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .features import PLANES

SUFFIXES = (".ts", ".pt")
MEAN = (0.406, 0.456, 0.485)  # of the channels B, G, R, which RadImageNet's networks expect subtracted


class ScriptedVolumes(nn.Module):
    """Features of volumes by a 3-D network that takes one channel, averaged over space.

    Args:
        network: maps (B, 1, X, Y, Z) to (B, F) or (B, F, ...).
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    @torch.inference_mode()
    def forward(self, volumes: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) in [0, 1] to (B, C * F)."""
        found = self.network(volumes.flatten(0, 1)[:, None])
        return _pooled(found).reshape(len(volumes), -1)


class ScriptedSlices(nn.Module):
    """Features of slices along one axis by a 2-D network, as MAISI's 2.5-D FID takes them (MONAI tutorials,
    generation/maisi/scripts/compute_fid_2-5d_ct.py): the volume scaled to [0, 1] by its own extremes, each gray slice
    three times, less RadImageNet's means, features averaged over space.

    Args:
        network: maps (B, 3, H, W) to (B, F) or (B, F, ...).
        axis: 0, 1 or 2, see `PLANES`.
        batch_size: slices at a time.
    """

    def __init__(self, network: nn.Module, axis: int, batch_size: int = 32):
        super().__init__()
        self.network, self.axis, self.batch_size = network, axis, batch_size

    @torch.inference_mode()
    def rows(self, volume: Tensor) -> Tensor:
        """Map one volume (C, X, Y, Z) in [0, 1] to the features (slices, C * F) of its slices."""
        low, high = volume.amin(), volume.amax()
        slices = ((volume - low) / (high - low + 1e-10)).movedim(1 + self.axis, 0)  # (slices, C, H, W)
        color = slices.flatten(0, 1)[:, None] - slices.new_tensor(MEAN)[:, None, None]
        pooled = torch.cat([_pooled(self.network(part)) for part in color.split(self.batch_size)])
        return pooled.reshape(len(slices), -1)

    def forward(self, volumes: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) in [0, 1] to (B, C * F), averaged over slices."""
        return torch.stack([self.rows(volume).mean(0) for volume in volumes])


def load_scripted(path: Path) -> dict[str, nn.Module]:
    """Load the extractors of a TorchScript file: {"": ...} for a 3-D network, one per plane for a 2-D one.

    Raises: ValueError for a file that is not TorchScript, and for a network without convolutions.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"{path}: is not a TorchScript file ({str(error).splitlines()[0][:80]}); make it with torch.jit.trace"
        ) from error
    kernels = [parameter.ndim - 2 for parameter in network.parameters() if parameter.ndim in (4, 5)]
    if not kernels:
        raise ValueError(f"{path}: its network has no convolution; give one that was not frozen")
    if kernels[0] == 3:
        return {"": ScriptedVolumes(network)}
    return {f" {plane}": ScriptedSlices(network, axis) for plane, axis in PLANES.items()}


def slice_rows(
    extractor: ScriptedSlices, volumes: Sequence[np.ndarray] | np.ndarray, device: torch.device | str = "cpu"
) -> list[np.ndarray]:
    """Return the features (slices, F) float64 of each volume (C, X, Y, Z) in [0, 1]."""
    tensors = (torch.from_numpy(np.asarray(volume, np.float32)).to(device) for volume in volumes)
    return [extractor.rows(tensor).double().cpu().numpy() for tensor in tensors]


def _pooled(features: Tensor) -> Tensor:
    """Average (B, F, ...) over space."""
    return features.flatten(2).mean(2) if features.ndim > 2 else features
