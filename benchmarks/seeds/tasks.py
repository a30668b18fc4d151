"""What the systems are trained on, and the volumes as they take them. Axes: (X, Y, Z) in RAS+ order."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from pipelines import describe_mask
from pipelines.storage.provenance import write_synthetic
from volumes import VolumeDataset, pad_or_crop


@dataclass(frozen=True)
class Task:
    """A data set and what is generated from it.

    Attributes:
        recipe: folder with data.yaml, vae.yaml and ldm.yaml.
        shape: voxels (X, Y, Z) to which the seeds' volumes are padded: their networks take X = Y = 64 or 128, and any
            multiple of 16 along Z.
        from_masks: whether volumes are generated from label maps, by systems that can.
        parts: of `evaluate.py`.
    """

    recipe: str
    shape: tuple[int, int, int]
    from_masks: bool
    parts: tuple[str, ...]


TASKS = {
    "hippocampus": Task("configs/hippocampus", (64, 64, 48), True, ("dice", "realism", "privacy")),
    "brains": Task("configs/brain_t1", (128, 128, 80), False, ("realism", "privacy")),
}


class TimeUp(Exception):
    """The minutes of a training are used."""


class PaddedSet:
    """Training volumes padded to one shape, with slices along the first axis: (1, Z, X, Y) in [-1, 1].

    Args:
        shape: (X, Y, Z) after padding. Volumes that are larger lose their border.
    """

    def __init__(self, dataset: VolumeDataset, shape: tuple[int, int, int]):
        self.dataset, self.shape = dataset, shape
        self.labels = len(dataset.labels)

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> Tensor:
        """Return the image (1, Z, X, Y); padding is -1."""
        image = self.dataset[index]["image"]
        return pad_or_crop(tuple(image.shape[1:]), self.shape).apply(image, -1.0).permute(0, 3, 1, 2).contiguous()

    def mask(self, index: int) -> Tensor:
        """Return a channel for each label but the background (labels - 1, Z, X, Y): 1 where it is, -1 elsewhere."""
        mask = self.dataset[index].get("mask")
        if mask is None:
            raise ValueError(f"{self.dataset.cases[index].name} has no mask")
        padded = pad_or_crop(tuple(mask.shape), self.shape).apply(mask, 0)
        channels = torch.stack([padded == label for label in range(1, self.labels)]).float()
        return (2 * channels - 1).permute(0, 3, 1, 2).contiguous()

    def restored(self, volume: Tensor, index: int) -> np.ndarray:
        """Return (Z, X, Y) on the grid of a training volume, (X, Y, Z) float32."""
        shape = tuple(self.dataset[index]["image"].shape[1:])
        whole = pad_or_crop(shape, self.shape).undo(volume.permute(1, 2, 0)[None].float().cpu())
        return whole[0].numpy()

    def order(self, seed: int = 0) -> Iterator[int]:
        """Yield the numbers of volumes endlessly, each once before any is repeated."""
        random = torch.Generator().manual_seed(seed)
        while True:
            yield from torch.randperm(len(self), generator=random).tolist()


def write_volume(
    volume: np.ndarray, dataset: VolumeDataset, index: int, path: Path, system: str, seed: int, from_mask: bool
) -> None:
    """Write (X, Y, Z) in [-1, 1] in the data's intensities, with the sidecar by which evaluations know its mask."""
    case, scaling = dataset.cases[index], dataset.config.intensity
    low, high = 0.0, 1000.0
    if not isinstance(scaling, dict) and scaling.kind == "window":
        low, high = float(scaling.low), float(scaling.high)
    values = low + (np.clip(volume, -1, 1) + 1) / 2 * (high - low)
    image = nib.Nifti1Image(values.astype(np.float32), dataset[index]["affine"].numpy())
    record = {
        "synthetic": True,
        "software": system,
        "model": system,
        "seed": seed,
        "mask": dict(describe_mask(case.mask)) if from_mask and case.mask is not None else None,
    }
    write_synthetic(image, record, path)
