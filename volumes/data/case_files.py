"""Read the volumes of a case from its files, and bring them onto one grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from volumes.foreground import ForegroundCrop, cut, image_box, mask_box
from volumes.formats.read import read_mask, read_volume
from volumes.labels import label_channels, label_indices
from volumes.phantom import PHANTOM_LABELS, make_phantom
from volumes.placement import Placement
from volumes.plausible import Oddity, header_oddities
from volumes.resampling import resample
from volumes.volume import Volume, VolumeError, describe_grid, same_grid

from .alignment import MASK, Aligned, align, onto_grid
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

    def reference(self, config: DataConfig) -> Volume:
        """The volume whose grid the case is brought to."""
        return self.images[config.resample_to or next(iter(self.images))]

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
        drawn = config.phantom
        image, mask, _ = make_phantom(
            case.phantom, drawn.shape, lesion_voxels=drawn.lesion_voxels, lesions=drawn.lesions
        )
        return StoredCase({"image": image}, mask if masks else None)
    images = {channel: _image(case, channel, config) for channel in config.patterns}
    mask = None
    if masks and case.mask is not None:
        like = images[config.resample_to or next(iter(images))]
        mask = read_mask(case.mask, like=like, **config.mask_reading)
    return StoredCase(images, mask)


def one_grid(case: Case, stored: StoredCase, config: DataConfig) -> Aligned:
    """Cut a case to its box (`crop`) and bring its volumes onto one grid, at the config's spacing, with label indices
    as its mask.

    Raises: VolumeError naming the file: for volumes on other grids, unless `resample_to` is set, and see `align` and
    `foreground_box`.
    """
    if config.resample_to is None:
        _check_grids(case, stored)
    if (box := foreground_box(case, stored, config)) is None:
        return _one_grid(case, stored, config)
    grid = stored.reference(config)
    images = {name: cut(one, box) if same_grid(grid, one) else one for name, one in stored.images.items()}
    mask = stored.mask
    mask = cut(mask, box) if mask is not None and same_grid(grid, mask) else mask
    return replace(_one_grid(case, StoredCase(images, mask), config), box=box)


def foreground_box(case: Case, stored: StoredCase, config: DataConfig) -> Placement | None:
    """Return the box of `crop` on the grid that the case is brought to, before `spacing`; None without the setting. A
    channel or mask on another grid is resampled onto it first.

    Raises: VolumeError naming the file and what to type where all is background; for a known box of another volume.
    """
    grid = stored.reference(config)
    if case.box is not None:
        if case.box.shape != grid.shape:
            whole = " x ".join(map(str, case.box.shape))
            raise VolumeError(f"{first_file(case)}: its box is of {whole} voxels, the volume has {describe_grid(grid)}")
        return case.box
    crop = config.crop
    if crop is None:
        return None
    if crop.by_mask:
        file = str(case.mask or case.name)
        if stored.mask is None:
            raise VolumeError(f"{first_file(case)}: has no mask, and data.crop.above is mask; exclude the case")
        mask = _indexed(stored.mask, file, config)
        mask = mask if same_grid(grid, mask) else onto_grid(mask, grid, labels=True)
        box = mask_box(mask, sorted(known_labels(config)), crop)
    else:
        channel = crop.channel_of(config.channels)
        file, image = str(case.images.get(channel, case.name)), stored.images[channel]
        box = image_box(image if same_grid(grid, image) else onto_grid(image, grid), crop)
    if box is None:
        raise VolumeError(f"{file}: {nothing_found(crop, None if crop.by_mask else stored.images[channel])}")
    return box


def nothing_found(crop: ForegroundCrop, image: Volume | None) -> str:
    """The end of a message about a file that data.crop finds all background, with what to type.

    Args:
        image: the channel that was searched, None for a mask.
    """
    if image is None:
        return "is background alone, so data.crop (above: mask) finds no box; correct the mask, or exclude the case"
    highest, channel = float(np.nanmax(image.array)), f" in channel {crop.channel}" if crop.channel else ""
    return (
        f"data.crop finds nothing above {crop.above:g}{channel}, the highest value is {highest:g}; set data.crop.above "
        "lower, or exclude the case"
    )


def _one_grid(case: Case, stored: StoredCase, config: DataConfig) -> Aligned:
    names = {channel: str(path) for channel, path in case.images.items()} | {MASK: str(case.mask or case.name)}
    if config.resample_to is not None:
        mask = None if stored.mask is None else _indexed(stored.mask, names[MASK], config)
        return align(stored.images, mask, config.resample_to, config.spacing, names)
    first = next(iter(stored.images.values()))
    image, mask = first.replace(np.concatenate([volume.array for volume in stored.images.values()])), stored.mask
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
    return mask.replace(label_indices(mask.array, known_labels(config), config.label_map, name=name, partial=True))


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


def _check_grids(case: Case, stored: StoredCase) -> None:
    channel, first = next(iter(stored.images.items()))
    files = [(case.images.get(name), volume) for name, volume in stored.images.items()]
    files += [] if stored.mask is None else [(case.mask, stored.mask)]
    for path, volume in files:
        if not same_grid(first, volume):
            raise VolumeError(
                f"{path}: is not on the grid of {case.images[channel]} ({describe_grid(volume)}, against "
                f"{describe_grid(first)}); set data.resample_to: {channel} (resamples the others onto {channel}'s grid)"
            )
