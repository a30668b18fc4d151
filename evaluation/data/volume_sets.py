"""Sets of volumes that are compared with each other: real ones of a split, and generated ones, on one scale of intensities."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.studies.class_adherence import generated_cases
from pipelines import describe_mask, read_sidecar
from volumes import Case, DataConfig, VolumeDataset


@dataclass(frozen=True)
class VolumeSet:
    """Volumes (C, X, Y, Z), each on its own grid and without padding, and whose they are.

    Args:
        volumes: arrays, or a sequence that reads them when they are asked for.
        names: of the volumes; numbers if they are not given.
        subjects: what was drawn independently, which bootstraps draw anew: the patient, or of generated volumes the patient
            whose mask was used. Every volume is a subject of its own if they are not given.
        masks: of generated volumes, the name of the real volume whose mask each was made from, or None.
        spacings: mm between voxels of each; 1 mm if they are not given.
    Raises: ValueError for no volumes, and unless there is one name, subject and spacing (and mask) for each.
    """

    volumes: Sequence[Any] | np.ndarray
    names: Sequence[str] = ()
    subjects: Sequence[str] = ()
    masks: Sequence[str | None] | None = None
    spacings: Sequence[tuple[float, float, float]] = ()

    def __post_init__(self) -> None:
        count = len(self.volumes)
        if not len(self.names):
            object.__setattr__(self, "names", [f"{number:04d}" for number in range(count)])
        if not len(self.subjects):
            object.__setattr__(self, "subjects", list(self.names))
        if not len(self.spacings):
            object.__setattr__(self, "spacings", [(1.0, 1.0, 1.0)] * count)
        of_masks = count if self.masks is None else len(self.masks)
        if not count or {len(self.names), len(self.subjects), len(self.spacings), of_masks} != {count}:
            raise ValueError(
                f"{count} volumes, {len(self.names)} names, {len(self.subjects)} subjects: give one of each"
            )

    def __len__(self) -> int:
        return len(self.volumes)


def real_set(cases: Sequence[Case], config: DataConfig, splits: Sequence[str]) -> tuple[VolumeSet, dict[str, str]]:
    """The real volumes of some splits, (C, X, Y, Z) float32 in [0, 1]: scaled as for a model, at the data's spacing.

    Returns: the set, and the files that were refused (with `on_error: skip`) with the reason.
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
    return VolumeSet(_unit(dataset), names, subjects, spacings=_spacings(dataset)), dict(dataset.skipped)


def generated_set(
    folders: Sequence[Path], cases: Sequence[Case], config: DataConfig
) -> tuple[VolumeSet, dict[str, str]]:
    """The volumes that generate.py wrote to `folders`, scaled exactly as `real_set` scales real ones.

    Whose mask a volume was made from is known by the mask file's sha256 in its sidecar, so files of real data may lie anywhere
    and have one name. A volume of a known mask has that patient as its subject, any other is a subject of its own. The names
    are those of the files, with the folder's before them if there are several folders.

    Returns: the set, and the refused files (with `on_error: skip`) with the reason.
    Raises: ValueError for a folder that is missing or has no volume, or one without all channels of the data.
    """
    owners = mask_owners(cases)
    found: list[Case] = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; make it with generate.py")
        for case in generated_cases(folder, config):
            record = read_sidecar(folder / f"{case.name}.nii.gz") or {}
            owner = owners.get((record.get("mask") or {}).get("sha256", ""))
            name = f"{folder.name}/{case.name}" if len(folders) > 1 else case.name
            subject = owner.subject if owner else f"generated {name}"
            found.append(dataclasses.replace(case, name=name, subject=subject, metadata={"mask": owner and owner.name}))
    if twice := sorted({case.name for case in found if sum(other.name == case.name for other in found) > 1}):
        raise ValueError(f"{twice[:3]} are in two folders of one name; give folders of different names")
    files = dataclasses.replace(
        config, label_map={}, time_point=None
    )  # they hold the model's own labels, one volume each
    dataset = _images(found, files)
    names, subjects = ([getattr(case, key) for case in dataset.cases] for key in ("name", "subject"))
    masks = [case.metadata["mask"] for case in dataset.cases]
    return VolumeSet(_unit(dataset), names, subjects, masks, _spacings(dataset)), dict(dataset.skipped)


def mask_owners(cases: Sequence[Case]) -> dict[str, Case]:
    """The case of each mask file, by the sha256 of its bytes. Files that several cases share are left out."""
    found: dict[str, Case] = {}
    shared = set()
    for case in cases:
        if case.mask is not None and case.mask.is_file():
            digest = describe_mask(case.mask)["sha256"]
            shared |= {digest} & set(found)
            found[digest] = case
    return {digest: case for digest, case in found.items() if digest not in shared}


def _images(cases: Sequence[Case], config: DataConfig) -> VolumeDataset:
    """The images of the cases alone, without mask, classes and numbers."""
    alone = dataclasses.replace(config, masks=None, label_names={}, classes={}, numbers=[])
    return VolumeDataset([dataclasses.replace(case, mask=None) for case in cases], alone)


def _unit(dataset: VolumeDataset) -> list[np.ndarray]:
    return [(prepared.image.array + 1) / 2 for prepared in dataset.prepared]


def _spacings(dataset: VolumeDataset) -> list[tuple[float, float, float]]:
    return [prepared.image.spacing for prepared in dataset.prepared]
