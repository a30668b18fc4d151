"""Random crops of whole volumes, for training.

Axes: images (C, X, Y, Z), masks (X, Y, Z), fields of view (1, X, Y, Z).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

from volumes.placement import pad_or_crop
from volumes.volume import PADDING

from .dataset import VolumeDataset


class Crop(TypedDict):
    """A crop of one volume.

    Attributes:
        image: float32 (C, *shape) in [-1, 1].
        fov: bool (1, *shape), True inside the volume.
        mask: int16 (*shape); absent without masks.
        name, index: those of the volume.
    """

    image: torch.Tensor
    fov: torch.Tensor
    mask: NotRequired[torch.Tensor]
    name: str
    index: int


class CropDataset(Dataset[Crop]):
    """Crops of one shape, at random places, from a `VolumeDataset`.

    Item i is a `Crop`. A volume smaller than the crop lies at a random position in it, with image -1, mask PADDING and
    fov False around it.

    All random numbers depend only on (seed, epoch, i), so a resumed run sees the same crops. Call `set_epoch` before
    creating each epoch's iterator; DataLoader workers that do not persist then see it.

    Args:
        dataset: whole volumes.
        shape: voxels along X, Y and Z of a crop.
        seed: seed of all random numbers.
        flip_axes: spatial axes (0, 1, 2) that are each flipped half of the time.
        samples_per_volume: crops of each volume in an epoch; items i * n to i * n + n - 1 are of volume i.
    """

    def __init__(
        self,
        dataset: VolumeDataset,
        shape: Sequence[int],
        *,
        seed: int,
        flip_axes: Sequence[int] = (),
        samples_per_volume: int = 1,
    ) -> None:
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"a crop's shape is three positive numbers, got {tuple(shape)}")
        if not set(flip_axes) <= {0, 1, 2}:
            raise ValueError(f"flip_axes are among 0, 1 and 2, got {tuple(flip_axes)}")
        if samples_per_volume < 1:
            raise ValueError(f"samples_per_volume is 1 or more, got {samples_per_volume}")
        self.dataset = dataset
        self.shape = tuple(shape)
        self.seed = seed
        self.flip_axes = tuple(flip_axes)
        self.samples_per_volume = samples_per_volume
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Change the crops to those of another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset) * self.samples_per_volume

    @property
    def names(self) -> list[str]:
        """The name of the volume of each item."""
        return [case.name for case in self.dataset.cases for _ in range(self.samples_per_volume)]

    def __getitem__(self, index: int) -> Crop:
        if not 0 <= index < len(self):
            raise IndexError(index)
        random = np.random.default_rng((self.seed, self.epoch, index))
        volume = index // self.samples_per_volume
        size = self.dataset.shapes[volume]
        room = [
            n - width for n, width in zip(size, self.shape, strict=True)
        ]  # negative: the volume is smaller than the crop
        offset = tuple(int(random.integers(min(0, r), max(0, r), endpoint=True)) for r in room)
        flipped = [axis - 3 for axis in self.flip_axes if random.random() < 0.5]
        box, placement = pad_or_crop(size, self.shape, offset=offset).inside()
        part = self.dataset.part(volume, box)
        fov = part.seen[None] if part.seen is not None else np.ones((1, *placement.shape), bool)
        item: Crop = {
            "image": placement.apply(torch.from_numpy(part.image), -1.0).flip(flipped),
            "fov": placement.apply(torch.from_numpy(fov), False).flip(flipped),
            "name": self.dataset.cases[volume].name,
            "index": volume,
        }
        if part.mask is not None:
            item["mask"] = placement.apply(torch.from_numpy(part.mask), PADDING).flip(flipped)
        return item
