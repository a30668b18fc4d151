"""Read the volumes of a case from its files, and bring them onto one grid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from volumes.formats.read import read_mask, read_volume
from volumes.labels import label_channels, label_indices
from volumes.phantom import PHANTOM_LABELS, make_phantom
from volumes.plausible import Oddity, header_oddities
from volumes.resampling import resample
from volumes.volume import Volume, VolumeError, describe_grid, same_grid

from .alignment import MASK, Aligned, align
from .cases import Case
from .config import DataConfig
from .subjects import voxel_digests


@dataclass(frozen=True)
class StoredCase:
    """The volumes of a case as its files hold them, each on its own grid.

    Attributes:
        images: (1, X, Y, Z) float32 in file units by channel; of label maps one entry, with a channel of 0 and 1 per
            label.
        mask: label values.
    """

    images: dict[str, Volume]
    mask: Volume | None

    @property
    def channels(self) -> list[np.ndarray]:
        """(X, Y, Z) of each channel."""
        return [channel for image in self.images.values() for channel in image.array]

    def digests(self, config: DataConfig) -> tuple[str, ...]:
        """Hash the voxels, see `voxel_digests`."""
        apart = not config.image_labels
        return tuple(one for image in self.images.values() for one in voxel_digests(image.array, apart=apart))


def read_case(case: Case, config: DataConfig, *, masks: bool = True) -> StoredCase:
    """Read the images of a case, and its mask if there is one and it is wanted.

    Raises: VolumeError naming the file.
    """
    if case.phantom is not None:
        assert config.phantom is not None
        image, mask, _ = make_phantom(case.phantom, config.phantom.shape)
        return StoredCase({"image": image}, mask if masks else None)
    images = {channel: _image(case, channel, config) for channel in config.patterns}
    mask = None
    if masks and case.mask is not None:
        like = images[config.resample_to or next(iter(images))]
        mask = read_mask(case.mask, like=like, **config.mask_reading)
    return StoredCase(images, mask)


def one_grid(case: Case, stored: StoredCase, config: DataConfig) -> Aligned:
    """Bring the volumes of a case onto one grid, at the config's spacing, with label indices as its mask.

    Raises: VolumeError naming the file: for volumes on other grids, unless `resample_to` is set, and see `align`.
    """
    names = {channel: str(path) for channel, path in case.images.items()} | {MASK: str(case.mask or case.name)}
    if config.resample_to is not None:
        mask = None if stored.mask is None else _indexed(stored.mask, names[MASK], config)
        return align(stored.images, mask, config.resample_to, config.spacing, names)
    first = next(iter(stored.images.values()))
    for channel, volume in stored.images.items():
        _check_grid(case, case.images.get(channel), volume, first)
    image, mask = first.replace(np.concatenate([volume.array for volume in stored.images.values()])), stored.mask
    if mask is not None:
        _check_grid(case, case.mask, mask, image)
    if config.spacing is not None:
        try:
            image = resample(image, config.spacing)
            mask = resample(mask, config.spacing, nearest=True) if mask is not None else None
        except VolumeError as error:
            raise VolumeError(f"{first_file(case)}: {error}") from error
    mask = None if mask is None else _indexed(mask, names[MASK], config)
    return Aligned(image, mask, shapes=(first.shape, image.shape))


def known_labels(config: DataConfig) -> dict[int, str]:
    """Return label values and names, {} if there are no masks."""
    if config.phantom is not None:
        return config.label_names or PHANTOM_LABELS
    if config.masks and not config.label_names:
        raise ValueError(
            "data: masks are given but label_names is not; name every label, e.g. {0: background, 1: tumor}"
        )
    return config.label_names if config.masks else {}


def first_file(case: Case) -> str:
    """Return the case's first image file, for messages; for a phantom its name."""
    return str(next(iter(case.images.values()), case.name))


def stored_oddities(case: Case, stored: StoredCase, config: DataConfig) -> list[tuple[str, Oddity]]:
    """Return the oddities in the headers of the first image file (of all, where their grids may differ) and of the
    mask, each once.
    """
    images = list(stored.images.items())[: None if config.resample_to else 1]
    volumes = [(str(case.images.get(channel, case.name)), volume) for channel, volume in images]
    volumes += [] if stored.mask is None else [(str(case.mask), stored.mask)]
    found: dict[str, tuple[str, Oddity]] = {}
    for file, volume in volumes:
        of_file = header_oddities(volume.source) if volume.source else []
        new = {one.what: (file, one) for one in of_file if one.what not in found}
        found |= new
    return list(found.values())


def _indexed(mask: Volume, name: str, config: DataConfig) -> Volume:
    return mask.replace(label_indices(mask.array, known_labels(config), config.label_map, name=name))


def _image(case: Case, channel: str, config: DataConfig) -> Volume:
    path = case.images[channel]
    if config.image_labels:
        return _label_map(path, config)
    volume = read_volume(path, time_point=config.volume_number(channel), **config.reading)
    if len(volume.array) != 1:
        raise VolumeError(
            f"{path}: holds {len(volume.array)} volumes, expected one for channel {channel!r}; choose it with "
            "time_point, one number or {channel: number}"
        )
    return volume


def _label_map(path: Path, config: DataConfig) -> Volume:
    """Read an image file that is a label map, as channels of 0 and 1."""
    image = read_mask(path, **config.mask_reading)
    indices = label_indices(image.array[0], config.image_labels, config.label_map, name=str(path))
    return image.replace(label_channels(indices, len(config.image_labels)))


def _check_grid(case: Case, path: Path | None, volume: Volume, first: Volume) -> None:
    if not same_grid(first, volume):
        channel = next(iter(case.images))
        raise VolumeError(
            f"{path}: is not on the grid of {case.images[channel]} ({describe_grid(volume)}, against "
            f"{describe_grid(first)}); set data.resample_to: {channel} (resamples the others onto {channel}'s grid)"
        )
