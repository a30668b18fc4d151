"""Training and validation volumes of a run."""

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np
from nibabel.orientations import aff2axcodes
from torch import Tensor

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
    """Load the training volumes and the validation volumes, None if there are none. The test set is not read.

    Raises: ValueError if there is nothing to train on.
    """
    cases = load_cases(config)
    train = [case for case in cases if case.split == "train"]
    held_out = [case for case in cases if case.split == "validation"]
    if not train:
        raise ValueError("there is nothing to train on: no case of `data:` is in the training set")
    return VolumeDataset(train, config), VolumeDataset(held_out, config) if held_out else None


def digests(dataset: VolumeDataset) -> dict[str, str]:
    """Return a short digest of image, mask and conditions of each volume, by name."""
    found = {}
    for index, (case, facts) in enumerate(zip(dataset.cases, dataset.facts, strict=True)):
        crc = facts.digest
        for values in dataset.conditions(index).values():
            crc = zlib.crc32(values.numpy().data, crc)
        found[case.name] = f"{'x'.join(map(str, facts.shape))}-{crc:08x}"
    return found


def own_record(train: VolumeDataset, held_out: VolumeDataset | None) -> Mapping[str, object]:
    """Return the record of this training's subjects, see `volumes.data.subjects`."""
    return record_subjects({"train": train.marks, "validation": held_out.marks if held_out else []})


def refuse_seen(
    records: Sequence[Mapping[str, object]] | None,
    config: DataConfig,
    held_out: VolumeDataset | None,
    model: str,
    *,
    accepted: bool = False,
) -> None:
    """Check that the model that a training starts from was not trained on volumes that `config` holds out.

    Volumes of the test set are compared by name only, because training does not read them.
    Raises: ValueError naming them, unless `accepted`; then, and for a model without a record, there is a warning.
    """
    try:
        check_subjects(records)
    except ValueError as error:
        raise ValueError(f"{model}: config.json: {error}") from error
    records = records or []
    if not is_complete(records):
        logger.warning(
            "%s: its record of training subjects is not complete; make sure that none of them is held out here",
            model,
        )
    voxels = {c.name: f.voxels for c, f in zip(held_out.cases, held_out.facts, strict=True)} if held_out else {}
    overlap = find_overlap(records, load_cases(config), config, voxels)
    equal = [entry for entry in overlap if entry.kind == "voxels"]
    refuse_overlap(equal if accepted else overlap, model, "add --accept_overlap true")
    if overlap:
        logger.warning("accepted: %s", describe_overlap(overlap, model))


class WholeVolume(TypedDict):
    """A volume padded to a multiple of the autoencoder's stride."""

    image: Tensor  # float32 (C, X, Y, Z)
    fov: Tensor  # bool (1, X, Y, Z): true inside the volume
    name: str
    spacing: tuple[float, float, float]  # mm
    axes: tuple[str, str, str]  # where they point to, such as ("R", "A", "S")
    scale: tuple[tuple[float, float], ...]  # (low, high) of each channel in file units
    mask: NotRequired[Tensor]  # int16 (X, Y, Z)
    classes: NotRequired[Tensor]  # see `VolumeDataset.conditions`
    numbers: NotRequired[Tensor]


class PaddedVolumes:
    """Whole volumes, padded to a multiple of the autoencoder's stride."""

    def __init__(self, dataset: VolumeDataset, stride: tuple[int, int, int]):
        self.dataset, self.stride = dataset, stride

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> WholeVolume:
        item = pad_sample(self.dataset[index], self.stride)
        affine = item["affine"].numpy()
        volume = WholeVolume(
            image=item["image"],
            fov=item["fov"],
            name=item["name"],
            spacing=tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist()),
            axes=aff2axcodes(affine),
            scale=tuple(map(tuple, item["scale"].tolist())),
        )
        for key in ("mask", "classes", "numbers"):
            if (values := item.get(key)) is not None:
                volume[key] = values
        return volume

    def __iter__(self) -> Iterator[WholeVolume]:
        return (self[i] for i in range(len(self)))
