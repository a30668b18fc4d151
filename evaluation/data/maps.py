"""Volumes with the label maps that they follow: real ones with their own, and generated ones with those asked for.

Maps are (X, Y, Z) of tissue numbers: 0 is the background, then 1, 2, ... in the order of the label values; negative
where the label is unknown or outside the field of view.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from volumes import Case, DataConfig, VolumeDataset
from volumes.data.case_files import known_labels
from volumes.foreground import background_index

from .volume_sets import generated_with_owners, of_generated


def tissue_names(config: DataConfig) -> list[str]:
    """Name the labels of the masks but the background, in the order of their values."""
    labels = known_labels(config)
    names = [labels[value] for value in sorted(labels)]
    del names[background_index(labels)]
    return names


def mapped_volume(dataset: VolumeDataset, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Read one volume (X, Y, Z) float32 in [0, 1], of one channel, and its map (X, Y, Z)."""
    case = dataset.load(index)
    assert case.mask is not None
    return (case.image.array[0] + 1) / 2, tissue_numbers(case.mask.array[0], background_index(dataset.labels))


def tissue_numbers(indices: np.ndarray, background: int) -> np.ndarray:
    """Turn label indices, `background` among them, into tissue numbers; negative ones stay."""
    return np.where(indices == background, 0, indices + (indices >= 0) * (indices < background)).astype(np.int16)


def real_with_maps(cases: Sequence[Case], config: DataConfig, split: str) -> VolumeDataset:
    """Load the real volumes of a split that have a mask. Raises: ValueError if there are none."""
    chosen = [case for case in cases if case.split == split and (case.mask is not None or case.phantom is not None)]
    if not chosen:
        raise ValueError(f"no case of split {split!r} has a mask; choose another --split, or see data.masks")
    return VolumeDataset(chosen, _alone(config))


def generated_with_maps(
    folders: Sequence[Path], cases: Sequence[Case], config: DataConfig, split: str
) -> tuple[VolumeDataset, dict[str, str]]:
    """Load the generated volumes whose mask is that of a case of this split, each with that mask.

    Returns: them, and the name of that case by the volume's name.
    Raises: ValueError if there are none, and as `generated_with_owners`.
    """
    listed = generated_with_owners(folders, cases, config)
    chosen = [(case, owner) for case, owner in listed if owner is not None and owner.split == split]
    if not chosen:
        others = sorted({owner.split for _, owner in listed if owner is not None})
        remedy = (
            f"give --split {others[0]} (evaluate.py all: --set adherence.split={others[0]}), or generate"
            if others
            else "generate"
        )
        raise ValueError(
            f"{', '.join(map(str, folders))}: none of {len(listed)} volumes was generated from a mask of split "
            f"{split!r}, by the sidecars; {remedy} volumes from masks of that split"
        )
    # The files hold the model's own intensities, one volume each; the masks are the data's own files.
    config = dataclasses.replace(of_generated(_alone(config)), label_map=config.label_map)
    volumes = [dataclasses.replace(case, subject=owner.subject, mask=owner.mask) for case, owner in chosen]
    return VolumeDataset(volumes, config), {case.name: owner.name for case, owner in chosen}


def _alone(config: DataConfig) -> DataConfig:
    """The data section without conditions: empty or wrong cells of the table do not matter here."""
    return dataclasses.replace(config, classes={}, numbers=[])
