"""Sets of volumes to compare: real ones of a split, and generated ones, on one intensity scale."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from pipelines import describe_mask, read_sidecar
from pipelines.storage.provenance import sidecars, volume_files
from volumes import Case, DataConfig, VolumeDataset, pad_or_crop
from volumes.foreground import box_from_json

from .large_arrays import large_zeros


@dataclass(frozen=True)
class VolumeSet:
    """Volumes (C, X, Y, Z), each on its own grid and without padding, and their subjects.

    Args:
        volumes: arrays, or a sequence that reads them on access.
        names: of the volumes; numbers by default.
        subjects: the independent units, which bootstraps resample: the patient, or for a generated volume the patient
            whose mask was used. By default every volume is its own subject.
        masks: for generated volumes, the name of the real volume whose mask each was generated from, or None.
        spacings: mm between voxels of each; 1 mm by default.
        metadata: of each, the row of the table, or for a generated volume the classes and numbers asked for; {} by
            default.
    Raises: ValueError for no volumes, and for another number of names, subjects, spacings, masks or metadata.
    """

    volumes: Sequence[Any] | np.ndarray
    names: Sequence[str] = ()
    subjects: Sequence[str] = ()
    masks: Sequence[str | None] | None = None
    spacings: Sequence[tuple[float, float, float]] = ()
    metadata: Sequence[Mapping[str, object]] = ()

    def __post_init__(self) -> None:
        count = len(self.volumes)
        if not len(self.names):
            object.__setattr__(self, "names", [f"{number:04d}" for number in range(count)])
        if not len(self.subjects):
            object.__setattr__(self, "subjects", list(self.names))
        if not len(self.spacings):
            object.__setattr__(self, "spacings", [(1.0, 1.0, 1.0)] * count)
        if not len(self.metadata):
            object.__setattr__(self, "metadata", [{}] * count)
        of_masks = count if self.masks is None else len(self.masks)
        lengths = {len(self.names), len(self.subjects), len(self.spacings), len(self.metadata), of_masks}
        if not count or lengths != {count}:
            raise ValueError(
                f"{count} volumes, {len(self.names)} names, {len(self.subjects)} subjects: give one of each per volume"
            )

    def __len__(self) -> int:
        return len(self.volumes)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each volume; volumes that are read on access are not read for it."""
        return volume_shapes(self.volumes)


class UnitVolumes(Sequence[np.ndarray]):
    """The volumes (C, X, Y, Z) of a data set in [0, 1], read on access: none is kept."""

    def __init__(self, dataset: VolumeDataset) -> None:
        self.dataset = dataset

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """(X, Y, Z) of each volume, which is known without reading it."""
        return [*self.dataset.shapes]

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return (self.dataset.load(index).image.array + 1) / 2


def volume_shapes(volumes: Sequence[Any] | np.ndarray) -> list[tuple[int, ...]]:
    """Return the shape of each volume; those of a data set are not read for it."""
    return volumes.shapes if isinstance(volumes, UnitVolumes) else [tuple(volume.shape) for volume in volumes]


def real_set(cases: Sequence[Case], config: DataConfig, splits: Sequence[str]) -> tuple[VolumeSet, dict[str, str]]:
    """Load the real volumes of some splits, (C, X, Y, Z) float32 in [0, 1]: scaled as for a model, at the data's
    spacing.

    Returns: the set, and the files that could not be read (with `on_error: skip`) with the reason.
    Raises: ValueError if no case is in these splits.
    """
    chosen = [case for case in cases if case.split in splits]
    if not chosen:
        raise ValueError(
            f"no case is in split {' or '.join(splits)}; see `split` and `test_fraction` in the data's config"
        )
    dataset = _images(chosen, config)
    names = [case.name for case in dataset.cases]
    subjects = [case.subject for case in dataset.cases]
    metadata = [case.metadata for case in dataset.cases]
    found = VolumeSet(UnitVolumes(dataset), names, subjects, spacings=_spacings(dataset), metadata=metadata)
    return found, dict(dataset.skipped)


def generated_set(
    folders: Sequence[Path], cases: Sequence[Case], config: DataConfig
) -> tuple[VolumeSet, dict[str, str]]:
    """Load the volumes that generate.py wrote to `folders`, scaled exactly as `real_set` scales real ones.

    The mask of a volume is recognized by the mask file's sha256 in its sidecar, so files of real data may be anywhere
    and have equal names. The subject of a volume is the patient of its mask, or the volume itself for an unknown mask.
    The names are those of the files, preceded by the folder's if there are several folders.

    Returns: the set, and the files that could not be read (with `on_error: skip`) with the reason.
    Raises: ValueError for a folder that is missing, has no volume, or lacks a channel of the data.
    """
    generated = generated_with_owners(folders, cases, config)
    owners = {case.name: owner for case, owner in generated}
    listed = [
        dataclasses.replace(case, subject=owner.subject if owner else f"generated {case.name}")
        for case, owner in generated
    ]
    dataset = _images(listed, of_generated(config))
    names, subjects = ([getattr(case, key) for case in dataset.cases] for key in ("name", "subject"))
    masks = [owner and owner.name for owner in map(owners.get, names)]
    metadata = [case.metadata for case in dataset.cases]
    return VolumeSet(UnitVolumes(dataset), names, subjects, masks, _spacings(dataset), metadata), dict(dataset.skipped)


def generated_with_owners(
    folders: Sequence[Path], cases: Sequence[Case], config: DataConfig
) -> list[tuple[Case, Case | None]]:
    """List the volumes of some folders (`generated_cases`), each with the case whose mask it was generated from, or
    None. Names are preceded by the folder's if there are several folders.

    Raises: ValueError for a folder that is missing or that `generated_cases` refuses, and for equal names.
    """
    owners = mask_owners(cases)
    generated: list[tuple[Case, Case | None]] = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; generate it with generate.py")
        for case in generated_cases(folder, config):
            record = read_sidecar(folder / f"{case.name}.nii.gz") or {}
            owner = owners.get((record.get("mask") or {}).get("sha256", ""))
            name = f"{folder.name}/{case.name}" if len(folders) > 1 else case.name
            generated.append((dataclasses.replace(case, name=name), owner))
    if twice := sorted(name for name, count in Counter(case.name for case, _ in generated).items() if count > 1):
        raise ValueError(f"{twice[:3]} are in two folders with the same name; rename one of the folders")
    return generated


def generated_cases(folder: Path, config: DataConfig) -> list[Case]:
    """List the volumes in `folder` by their sidecars, sorted by name, with the requested classes and numbers as
    metadata. With `data.crop`, a volume that was generated in a box is cut to it again; of others the box is found.

    Raises: ValueError for a folder without volumes, and for a volume without a file for each channel of the data.
    """
    cases, channels = [], list(config.patterns)
    for sidecar in sidecars(folder):
        path = sidecar.with_suffix(".nii.gz")  # what generate.py writes
        record = read_sidecar(path) or {}
        images = dict(zip(record.get("channels") or channels[:1], volume_files(path, record), strict=True))
        if missing := [channel for channel in channels if channel not in images or not images[channel].is_file()]:
            raise ValueError(f"{sidecar}: its volume has no file of {missing}; generate all channels of the data")
        box = None if config.crop is None or record.get("box") is None else box_from_json(record["box"])
        requested = {**(record.get("classes") or {}), **(record.get("numbers") or {})}
        cases.append(
            Case(sidecar.stem, subject=sidecar.stem, split="generated", images=images, metadata=requested, box=box)
        )
    if not cases:
        raise ValueError(f"{folder}: no volume with a sidecar; generate some with generate.py")
    return cases


def mask_owners(cases: Sequence[Case]) -> dict[str, Case]:
    """Return the case of each mask file by the sha256 of its bytes, without files that several cases share."""
    owners: dict[str, Case] = {}
    shared = set()
    for case in cases:
        if case.mask is not None and case.mask.is_file():
            digest = describe_mask(case.mask)["sha256"]
            shared |= {digest} & set(owners)
            owners[digest] = case
    return {digest: case for digest, case in owners.items() if digest not in shared}


@dataclass(frozen=True)
class ClassVolumes:
    """Volumes and their classes.

    Args:
        images: (N, C, X, Y, Z) float32 in [0, 1]; large ones lie in a file, see `large_zeros`.
        classes: (N,) indices.
        skipped: files that could not be read: (name, reason).
        sizes: for label maps, the size of each label (N, C) in milliliters.
    """

    images: Tensor
    classes: Tensor
    skipped: list[tuple[str, str]]
    sizes: Tensor | None = None


@dataclass(frozen=True)
class NumberVolumes:
    """Volumes and a number of each, such as the age.

    Args:
        images: (N, C, X, Y, Z) float32 in [0, 1]; large ones lie in a file, see `large_zeros`.
        numbers: (N,) float32, in the table's units.
        subjects: of each.
        skipped: files that could not be read: (name, reason).
    """

    images: Tensor
    numbers: Tensor
    subjects: list[str]
    skipped: list[tuple[str, str]]


def load_classes(cases: Sequence[Case], config: DataConfig, column: str, shape: tuple[int, int, int]) -> ClassVolumes:
    """Load the cases of known class at `shape` about their centers, scaled as for a model and then to [0, 1].

    Raises: ValueError for a column that is not a class of the data, and if no case has a class.
    """
    if column not in config.classes:
        raise ValueError(f"{column!r} is not a class of the data; choose one of {sorted(config.classes)}")
    dataset, images, sizes = _at_shape(cases, config, column, shape)
    classes = torch.stack([dataset.conditions(i)["classes"][0] for i in range(len(dataset))])
    return ClassVolumes(images, classes, dataset.skipped, sizes if config.image_labels else None)


def load_numbers(cases: Sequence[Case], config: DataConfig, column: str, shape: tuple[int, int, int]) -> NumberVolumes:
    """Load the cases whose number is known, as `load_classes`. Raises: ValueError as it does."""
    if column not in config.numbers:
        raise ValueError(f"{column!r} is not a number of the data; choose one of {sorted(config.numbers)}")
    dataset, images, _ = _at_shape(cases, config, column, shape)
    numbers = torch.stack([dataset.conditions(i)["numbers"][0] for i in range(len(dataset))])
    return NumberVolumes(images, numbers, [case.subject for case in dataset.cases], dataset.skipped)


def _at_shape(
    cases: Sequence[Case], config: DataConfig, column: str, shape: tuple[int, int, int]
) -> tuple[VolumeDataset, Tensor, Tensor]:
    """Load the cases with a value of `column`. Returns the data set, the images (N, C, *shape), and the sums of their
    channels (N, C) in milliliters."""
    known = [case for case in cases if case.metadata.get(column) not in (None, "")]
    if not known:
        raise ValueError(
            f"none of the {len(cases)} volumes has a {column}, such as {cases[0].name if cases else 'none'}"
        )
    if all(case.split == "generated" for case in known):
        config = of_generated(config)
    classes = {name: values for name, values in config.classes.items() if name == column}
    dataset = _images(known, config, classes, [name for name in config.numbers if name == column])
    images = large_zeros((len(dataset), len(dataset.channels), *shape))
    sizes = torch.empty(len(dataset), len(dataset.channels))
    for index in range(len(dataset)):
        item = dataset[index]
        image = (item["image"] + 1) / 2
        images[index] = pad_or_crop(tuple(image.shape[1:]), shape).apply(image, 0.0)
        sizes[index] = image.sum((1, 2, 3)) * item["affine"][:3, :3].det().abs() / 1000
    return dataset, images, sizes


def of_generated(config: DataConfig) -> DataConfig:
    """The data section for files of generate.py: they hold the model's own labels, one volume each. Where the box is
    that of a mask, it is known wherever there was a mask.
    """
    crop = None if config.crop is not None and config.crop.by_mask else config.crop
    return dataclasses.replace(config, label_map={}, time_point=None, crop=crop)


def _images(
    cases: Sequence[Case],
    config: DataConfig,
    classes: Mapping[str, list[str] | dict[str, str]] | None = None,
    numbers: Sequence[str] = (),
) -> VolumeDataset:
    """Load only the images of the cases, with these classes and numbers, and without masks, unless they set the box
    (`crop`) or a part of it (`resample_to`: what all volumes of a case show).
    """
    alone = dataclasses.replace(config, classes=dict(classes or {}), numbers=list(numbers))
    by_mask = config.crop is not None and config.crop.by_mask
    if not by_mask and (config.resample_to is None or all(case.mask is None for case in cases)):
        alone = dataclasses.replace(alone, masks=None, label_names={}, empty_background=False)
        cases = [dataclasses.replace(case, mask=None) for case in cases]
    return VolumeDataset(cases, alone)


def _spacings(dataset: VolumeDataset) -> list[tuple[float, float, float]]:
    return [facts.spacing for facts in dataset.facts]
