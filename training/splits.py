"""Training and validation volumes of a run."""

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from nibabel.orientations import aff2axcodes

from volumes import DataConfig, VolumeDataset, load_cases, pad_sample
from volumes.data.subjects import (
    check_subjects,
    describe_overlap,
    find_overlap,
    is_complete,
    record_subjects,
    refuse_overlap,
)

logger = logging.getLogger("training")


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


def own_record(train: VolumeDataset, held_out: VolumeDataset | None) -> dict[str, Any]:
    """The record of a training's own subjects, see `volumes.data.subjects`."""
    return record_subjects({"train": train.marks, "validation": held_out.marks if held_out else []})


def refuse_seen(
    records: Sequence[Mapping[str, Any]] | None,
    config: DataConfig,
    held_out: VolumeDataset | None,
    model: str,
    *,
    accepted: bool = False,
) -> None:
    """Check that what `config` holds out was not learned by the model that a training starts from.

    Volumes of the test split are known by their names alone, for training does not read them.
    Raises: ValueError naming them, unless `accepted`; then, and for a model without a record, there is a warning.
    """
    try:
        check_subjects(records)
    except ValueError as error:
        raise ValueError(f"{model}: config.json: {error}") from error
    records = records or []
    if not is_complete(records):
        logger.warning(
            "%s: has no whole record of its training subjects (it is older); see for yourself that none of them is held out here",
            model,
        )
    voxels = {c.name: p.voxels for c, p in zip(held_out.cases, held_out.prepared, strict=True)} if held_out else {}
    found = find_overlap(records, load_cases(config), config, voxels)
    equal = [one for one in found if one.kind == "voxels"]
    refuse_overlap(equal if accepted else found, model, "add --accept_overlap true")
    if found:
        logger.warning("accepted: %s", describe_overlap(found, model))


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
