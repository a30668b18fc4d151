"""Training and validation volumes of a run."""

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from nibabel.orientations import aff2axcodes

from volumes import DataConfig, VolumeDataset, load_cases, pad_sample


def load_split(config: DataConfig) -> tuple[VolumeDataset, VolumeDataset | None]:
    """The training volumes, and those of the held-out training subjects or None. The test split is not touched.

    Raises: ValueError if there is nothing to train on.
    """
    cases = load_cases(config)
    train = [c for c in cases if c.split == "train"]
    held_out = [c for c in cases if c.split == "validation"]
    if not train:
        raise ValueError("there is nothing to train on: no case of `data:` is in the training split")
    return VolumeDataset(train, config), VolumeDataset(held_out, config) if held_out else None


def digests(dataset: VolumeDataset) -> dict[str, str]:
    """A short digest of image, mask and conditions of each volume, by name: what a training learns from it."""
    found = {}
    for index, (case, prepared) in enumerate(zip(dataset.cases, dataset.prepared, strict=True)):
        crc = zlib.crc32(np.ascontiguousarray(prepared.image.array).data)
        if prepared.mask is not None:
            crc = zlib.crc32(np.ascontiguousarray(prepared.mask.array).data, crc)
        for values in dataset.conditions(index).values():
            crc = zlib.crc32(values.numpy().data, crc)
        found[case.name] = f"{'x'.join(map(str, prepared.image.shape))}-{crc:08x}"
    return found


class PaddedVolumes:
    """Whole volumes, padded to a multiple of the autoencoder's stride.

    Item i is {"image": float32 (C, X, Y, Z), "fov": bool (1, X, Y, Z), "name", "spacing": (x, y, z) in mm, "axes": where they point
    to, such as ("R", "A", "S"), "scale": (low, high) of each channel in file units}, and "mask" int16 (X, Y, Z), "classes" and "numbers"
    if there are such (`VolumeDataset.conditions`).
    """

    def __init__(self, dataset: VolumeDataset, stride: tuple[int, int, int]):
        self.dataset, self.stride = dataset, stride

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = pad_sample(self.dataset[index], self.stride)
        spacing = tuple(np.linalg.norm(item["affine"].numpy()[:3, :3], axis=0).tolist())
        kept = ("image", "fov", "mask", "name", "classes", "numbers")
        axes, scale = aff2axcodes(item["affine"].numpy()), tuple(map(tuple, item["scale"].tolist()))
        return {"spacing": spacing, "axes": axes, "scale": scale, **{k: item[k] for k in kept if k in item}}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))
