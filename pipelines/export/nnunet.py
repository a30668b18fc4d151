"""Volumes and masks as a raw data set of nnU-Net (documentation/dataset_format.md of MIC-DKFZ/nnUNet)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipelines.inputs.request import VolumeRequest
from pipelines.storage.finished import FinishedVolume
from volumes.description import DataDescription

from .folder import REFERENCE, export_folder, mask_of, origin, sidecar_of

NAME = re.compile(r"Dataset([0-9]{3})_([A-Za-z0-9_-]+)")
FILE_ENDING = ".nii.gz"
BACKGROUND, IGNORE = "background", "ignore"  # names that nnU-Net gives a meaning


def check(folder: Path, data: DataDescription, requests: Sequence[VolumeRequest]) -> None:
    """Raises: ValueError for a folder that is not called as nnU-Net wants it, for volumes without a mask, and for
    volumes of different channels."""
    found = NAME.fullmatch(folder.absolute().name)
    if found is None or found[1] == "000":
        raise ValueError(
            f"--export nnunet {folder}: nnU-Net finds data sets by names such as Dataset501_Synthetic: three digits "
            "from 001, and letters, digits, _ or -; rename the folder"
        )
    if unmasked := [request.name for request in requests if request.mask is None]:
        raise ValueError(
            f"--export nnunet: {unmasked[0]} has no mask, and nnU-Net learns from pairs; use --export bids"
        )
    if len({frozenset(request.images) for request in requests}) > 1:
        raise ValueError("--export nnunet: rows with and without given channels have other channels; export them apart")


def label_values(labels: Mapping[int, str]) -> tuple[dict[str, int], dict[int, int]]:
    """Map labels to those that nnU-Net takes: 0 is the background (label 0, or else the one of that name), the others
    are consecutive from 1, in the order of their values. Values that are so already stay as they are.

    Returns: {name: value} and {value of the model: value}. A name that several labels have, or that means something
    else to nnU-Net ("background", "ignore"), is followed by the model's value.
    """
    called = next((value for value, name in sorted(labels.items()) if name == BACKGROUND), 0)
    background = 0 if 0 in labels else called
    others = [value for value in sorted(labels) if value != background]
    values = {value: number for number, value in enumerate(others, start=1)}
    names = [BACKGROUND, IGNORE, *labels.values()]
    unique = {value: name if names.count(name) == 1 else f"{name}_{value}" for value, name in labels.items()}
    return {BACKGROUND: 0} | {unique[value]: number for value, number in values.items()}, {background: 0} | values


def write(volumes: Sequence[FinishedVolume], data: DataDescription, folder: Path) -> None:
    """Write imagesTr, labelsTr, sidecars and dataset.json. Only generated channels are exported, not those that were
    given: these are a patient's.

    Raises: ValueError if a mask changed since its volume was generated.
    """
    names, values = label_values(data.labels)
    channels = list(volumes[0].record.channels or data.channels)
    with export_folder(folder, "nnunet", volumes) as export:
        for volume in volumes:
            record, digests = sidecar_of(volume)
            for number, (file, sha256) in enumerate(zip(volume.files, digests, strict=True)):
                export.add(file, f"imagesTr/{volume.name}_{number:04d}{FILE_ENDING}", sha256)
            mask = mask_of(volume, data)
            mapped = np.zeros_like(mask.array)  # and outside the field of view
            for value, number in values.items():
                mapped[mask.array == value] = number
            export.add_mask(mask.replace(mapped), f"labelsTr/{volume.name}{FILE_ENDING}")
            export.add_json(f"sidecars/{volume.name}.json", record)
        export.add_json(
            "dataset.json",
            {
                "name": folder.absolute().name,
                "description": f"Synthetic: {REFERENCE}",
                "reference": REFERENCE,
                "synthetic": True,
                **origin(volumes),
                "channel_names": {str(number): channel for number, channel in enumerate(channels)},
                "labels": names,
                "label_map": {str(value): number for value, number in values.items()},
                "numTraining": len(volumes),
                "file_ending": FILE_ENDING,
            },
        )
