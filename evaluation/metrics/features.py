"""Features of volumes for distances between sets of them. Nothing is downloaded.

An extractor is any function from volumes (B, C, X, Y, Z) in [0, 1] to (B, F). Features are averages over space, so
volumes of different shapes are comparable, each alone on its own grid. Figures of different extractors are not
comparable, and figures of the two defaults are not comparable with those of papers, which use Inception or networks
trained on medical images:
- `EncoderStatistics`: 3-D, of an autoencoder trained with this toolkit. It knows the data. But the decoder of a
  generator is not tested on details that its own encoder cannot see: report another extractor beside it.
- `RandomStatistics`: 3-D, of a small random network with fixed weights. It compares local structure at three scales,
  and is the same for everybody.
- `SliceStatistics`: 2.5-D, of slices of one plane by a 2-D network (VGG-16 in a local file), one sample per volume.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.losses.perceptual import VGG16Features
from training.encoder_distance import EncoderStatistics as EncoderStatistics
from training.encoder_distance import level_statistics

Extractor = Callable[[Tensor], Tensor]
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # of volumes in RAS+: the axis across the slices


class RandomStatistics(nn.Module):
    """Mean and standard deviation over space of every channel at each level of a random network, for each channel of
    the volume alone: three convolutions of stride 2, ReLU, weights initialized as in He et al. 2015.

    A set's distance in random features is as valid as in trained ones, though less like human judgment (Naeem et al.
    2020, section 4).

    Args:
        seed: another seed is another network; keep it to compare.
    """

    widths = (8, 16, 32)
    smallest = 8  # a side that is 1 after three halvings

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        before = 1
        self.weights = nn.ParameterList()
        for width in self.widths:
            weight = torch.randn(width, before, 3, 3, 3, generator=generator) * (2 / (27 * before)) ** 0.5
            self.weights.append(nn.Parameter(weight, requires_grad=False))
            before = width

    @torch.inference_mode()
    def forward(self, volumes: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) in [0, 1] to (B, C * 112). Raises: ValueError for a side below `smallest`."""
        _large_enough(volumes.shape[2:], self.smallest)
        x, levels = volumes.reshape(-1, 1, *volumes.shape[2:]), []
        for weight in self.weights:
            x = F.relu(F.conv3d(F.pad(x, (1,) * 6, mode="replicate"), weight, stride=2))
            levels.append(x)
        return level_statistics(levels, torch.ones_like(volumes[:1, :1]), len(volumes))


class SliceStatistics(nn.Module):
    """Features of the slices along one axis by the last block of a 2-D network, averaged over space and slices.

    A volume is one sample, for slices of one volume are not independent.

    Args:
        network: such as `VGG16Features(path)`; frozen there.
        axis: 0, 1 or 2, see `PLANES`.
        batch_size: slices at a time.
    """

    def __init__(self, network: VGG16Features, axis: int, batch_size: int = 32):
        super().__init__()
        self.network, self.axis, self.batch_size = network, axis, batch_size

    @torch.inference_mode()
    def forward(self, volumes: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) in [0, 1] to (B, C * features of the last block).

        Raises: ValueError for slices with a side that is too short for the network.
        """
        batch, channels = volumes.shape[:2]
        slices = (2 * volumes - 1).movedim(2 + self.axis, 1).flatten(0, 1)  # (B * slices, C, H, W)
        _large_enough(slices.shape[2:], self.network.smallest)
        pooled = [self.network(part)[-1].mean((2, 3)) for part in slices.split(self.batch_size)]
        return torch.cat(pooled).reshape(batch, -1, channels, pooled[0].shape[1]).mean(1).flatten(1)


def extract(
    extractor: Extractor,
    volumes: Iterable[np.ndarray],
    device: torch.device | str = "cpu",
    on_volume: Callable[[], None] | None = None,
) -> np.ndarray:
    """Extract features (N, F) float64 of volumes (C, X, Y, Z) in [0, 1], each alone on its own grid.

    Raises: ValueError for a volume whose features are not finite, by its number.
    """
    rows = []
    for index, volume in enumerate(volumes):
        features = extractor(torch.from_numpy(np.asarray(volume, np.float32))[None].to(device))[0]
        rows.append(features.double().cpu().numpy())
        if not np.isfinite(rows[-1]).all():
            raise ValueError(
                f"volume {index}: its features contain NaN or infinity; check that its voxels are in [0, 1]"
            )
        if on_volume is not None:
            on_volume()
    return np.stack(rows)


def _large_enough(shape: Iterable[int], smallest: int) -> None:
    if min(shape) < smallest:
        raise ValueError(f"{tuple(shape)} voxels are too small for this network; give {smallest} or more per side")
