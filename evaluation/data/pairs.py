"""Pairs of volume and mask, real or generated, at one size, to train and test the segmenter.

Volumes generated from a mask are found by the name of its case, or by its file name, as generate.py writes them:
`<name>_000.nii.gz`, or `<name>.nii.gz`, on the mask's grid; of several channels `<name>_000_<channel>.nii.gz` each.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from files.paths import path_inside
from pipelines import describe_mask, read_sidecar
from pipelines.storage.trained_on import MASKS
from volumes import (
    PADDING,
    PHANTOM_LABELS,
    UNKNOWN,
    Case,
    DataConfig,
    Placement,
    Volume,
    VolumeError,
    describe_grid,
    label_indices,
    pad_or_crop,
    read_mask,
    read_volume,
    resample,
    same_grid,
    volume_stem,
)
from volumes.data.case_files import StoredCase, foreground_box, one_grid, read_case
from volumes.foreground import box_from_json, cut

from .large_arrays import large_zeros
from .volume_sets import of_generated

PERCENTILES = (0.5, 99.5)
SUFFIXES = (".nii.gz", ".nii")
WHOLE_MASKS = (
    "map these values to a label (--data.label_map), or leave out the cases that have them (--data.on_error skip)"
)
NAMES = {"train": "training", "test": "test"}  # of the splits, in messages


@dataclass(frozen=True)
class Pair:
    """One volume to train or test on: the case whose mask it has, and its files, one per channel, if they are not the
    case's own; the box of `data.crop` in which these were generated, if it is recorded; and whether generate.py wrote
    the mask: a generated one, or one that training resampled.
    """

    case: Case
    generated: tuple[Path, ...] | None = None
    box: Placement | None = None
    written_mask: bool = False


def learning_cases(cases: Sequence[Case]) -> list[Case]:
    """Return the cases that a model may have learned from: all but the test split, sorted by name. Raises ValueError if
    there is none.
    """
    return _with_masks([case for case in cases if case.split != "test"], "train")


def test_cases(cases: Sequence[Case]) -> list[Case]:
    """Return the test cases, sorted by name. Raises ValueError if there is none."""
    return _with_masks([case for case in cases if case.split == "test"], "test")


def generated_pairs(cases: Sequence[Case], folder: Path, split: Literal["train", "test"] = "train") -> list[Pair]:
    """Return the volumes in `folder` that were generated from the masks of `learning_cases(cases)`, in the order of the
    cases. With `split="test"`, return those from the masks of `test_cases(cases)`, which are for testing and never for
    training.

    A volume generated from a mask of the other split, or from an unknown mask, is omitted: learning from it would be
    cheating. With `split="train"`, volumes whose mask was generated too follow, if the mask is in the folder's
    `masks/`, as `generate.py --masks generate:...` writes it; each counts as a subject. A condition channel is the
    case's own file, if the sidecar names that file. Raises ValueError for a missing folder, for one without a volume to
    learn from, and for a volume that lacks a channel.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; generate it with generate.py from the masks of the {NAMES[split]} split"
        )
    files = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES) and path.name[0] != ".")
    masks = _by_name(cases)
    channels = next((list(case.images) for case in cases if case.images), ["image"])
    made: dict[str, list[tuple[str, dict[str, Path]]]] = {}
    for volume, parts in _volumes(files, channels):
        owner = _mask_of(volume, masks)
        if owner is not None:
            made.setdefault(owner.name, []).append((volume, parts))
    pairs = []
    for case in (test_cases if split == "test" else learning_cases)(cases):
        for volume, parts in made.get(case.name, []):
            path = folder / f"{volume}.nii.gz"
            files_of = tuple(parts.get(channel) or _given(path, channel, case) for channel in channels)
            if mask := _resampled_mask(path, folder, case):
                pairs.append(Pair(replace(case, mask=mask), files_of, written_mask=True))
            else:
                pairs.append(Pair(case, files_of, _recorded_box(path)))
    if split == "train":
        pairs += _of_generated_masks(folder, files, channels, masks)
    if not pairs:
        raise ValueError(
            f"{folder}: none of its {len(files)} volumes is named after a mask of the {NAMES[split]} split "
            "(<mask>_000.nii.gz)"
        )
    return pairs


def _resampled_mask(path: Path, folder: Path, case: Case) -> Path | None:
    """Return the mask of a volume in `folder`/masks, where generate.py writes masks that training resampled; None if it
    was generated from another file. Raises: ValueError if that mask changed since.
    """
    record, mask = (read_sidecar(path) or {}).get("mask"), folder / MASKS / f"{case.name}.nii.gz"
    if record is None or record.get("file") != mask.name or not mask.is_file():
        return None
    if describe_mask(mask)["sha256"] != record.get("sha256"):
        raise ValueError(f"{path}: was generated from another mask than {mask}; generate it again")
    return mask


def _of_generated_masks(
    folder: Path, files: Sequence[Path], channels: Sequence[str], known: dict[str, Case]
) -> list[Pair]:
    """Return the volumes whose mask, by their sidecar, is in `folder`/masks. Raises: ValueError if that is not the mask
    that they were generated from.
    """
    pairs = []
    for volume, parts in _volumes(files, channels):
        path = folder / f"{volume}.nii.gz"
        record = (read_sidecar(path) or {}).get("mask")
        if record is None or _mask_of(volume, known) is not None:
            continue
        try:
            mask = path_inside(folder / MASKS, record.get("file"), f"the sidecar of {path}: mask")
        except ValueError:  # not there, without a name, or elsewhere
            continue
        if read_sidecar(mask) is None:  # the user's own, of an unknown subject
            continue
        if describe_mask(mask)["sha256"] != record.get("sha256"):
            raise ValueError(f"{path}: was generated from another mask than {mask}; generate it again")
        if missing := [channel for channel in channels if channel not in parts]:
            raise ValueError(f"{path}: has no file of channel {', '.join(missing)}; generate all channels")
        case = Case(volume, f"generated {_stem(mask)}", "train", dict(parts), mask)
        pairs.append(Pair(case, tuple(parts[channel] for channel in channels), _recorded_box(path), written_mask=True))
    return pairs


@dataclass(frozen=True)
class LoadedPairs:
    """Images (N, C, X, Y, Z) float32 in [0, 1], label indices (N, X, Y, Z) uint8, the case of each, and the refused
    files: (name of the case, reason). Large tensors lie in files, see `large_zeros`."""

    images: Tensor
    labels: Tensor
    cases: list[Case]
    skipped: list[tuple[str, str]]

    def take(self, rows: Sequence[int]) -> "LoadedPairs":
        """Take these rows, in this order; a row may be taken more than once."""
        images, labels = (_rows([(tensor, rows)]) for tensor in (self.images, self.labels))
        return LoadedPairs(images, labels, [self.cases[i] for i in rows], self.skipped)

    def join(self, other: "LoadedPairs") -> "LoadedPairs":
        """Join these rows with those of `other`, in this order."""
        every = range(len(self.images)), range(len(other.images))
        images = _rows([(self.images, every[0]), (other.images, every[1])])
        labels = _rows([(self.labels, every[0]), (other.labels, every[1])])
        return LoadedPairs(images, labels, self.cases + other.cases, self.skipped + other.skipped)


def _rows(sources: Sequence[tuple[Tensor, Sequence[int]]]) -> Tensor:
    """Take rows of tensors, one after another, into one that may lie in a file (`large_zeros`)."""
    count = sum(len(rows) for _, rows in sources)
    taken = large_zeros((count, *sources[0][0].shape[1:]), sources[0][0].dtype)
    place = 0
    for tensor, rows in sources:
        for row in rows:
            taken[place], place = tensor[row], place + 1
    return taken


def load_pairs(pairs: Sequence[Pair], config: DataConfig, shape: tuple[int, int, int]) -> LoadedPairs:
    """Read the pairs and bring them to `shape`.

    Each channel of each volume is scaled by its own percentiles 0.5 and 99.5, whatever scaling the config names for the
    models, and each volume is center-cropped or zero-padded. A volume that cannot be read, is not on its mask's grid or
    has a mask with `UNKNOWN` voxels raises VolumeError, which names the file, or with `on_error: skip` is omitted and
    listed; if no volume is left, ValueError is raised.
    """
    images = large_zeros((len(pairs), len(config.patterns), *shape))
    labels = large_zeros((len(pairs), *shape), torch.uint8)
    used, skipped = [], []
    for pair in pairs:
        try:
            image, mask = _read(pair, config)
            _check_whole(mask, pair.case)
        except VolumeError as error:
            if config.on_error == "raise":
                raise
            skipped.append((pair.case.name, str(error)))
            continue
        placement = pad_or_crop(image.shape, shape)
        scaled = np.stack([unit_range(channel) for channel in image.array])
        images[len(used)] = torch.from_numpy(placement.apply(scaled, 0))
        labels[len(used)] = torch.from_numpy(placement.apply(mask.array[0], 0).astype(np.uint8))
        used.append(pair.case)
    if not used:
        raise ValueError(f"all {len(pairs)} volumes were refused, the first because {skipped[0][1]}")
    return LoadedPairs(images[: len(used)], labels[: len(used)], used, skipped)


def label_values(config: DataConfig) -> list[int]:
    """Return label values of the data in the order of their indices; the first is the background. Raises ValueError
    unless there are two.
    """
    values = sorted(config.label_names or (PHANTOM_LABELS if config.phantom else {}))
    if len(values) < 2:
        raise ValueError(f"data: label_names has {len(values)} labels; a segmenter needs the background and one more")
    return values


def unit_range(array: np.ndarray) -> np.ndarray:
    """Scale an array of any shape so that its percentiles 0.5 and 99.5 are 0 and 1, clipped there, as float32."""
    low, high = np.percentile(array, PERCENTILES).astype(np.float32)
    return np.clip((array - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)


def _read(pair: Pair, config: DataConfig) -> tuple[Volume, Volume]:
    """Read image, in the units of its file, and label indices, `UNKNOWN` where these are, both in the config's box and
    at its spacing."""
    case = pair.case
    if pair.written_mask:
        # There is a mask for a box of labels, and all lies on its grid.
        config = replace(of_generated(config), crop=config.crop, resample_to=None)
    if config.resample_to is not None and pair.generated is None:
        return _read_resampled(case, config)
    if case.phantom is not None:
        drawn = read_case(case, config)
        assert drawn.mask is not None
        name, parts, mask = case.name, [*drawn.images.values()], drawn.mask
        [image] = parts
    else:
        assert case.mask is not None
        if pair.generated is not None:
            files, numbers = list(pair.generated), [None] * len(pair.generated)
        else:
            files = [case.images[channel] for channel in config.patterns]
            numbers = [config.volume_number(channel) for channel in config.patterns]
        parts = [
            read_volume(path, time_point=number, **config.reading) for path, number in zip(files, numbers, strict=True)
        ]
        name, mask = str(files[0]), read_mask(case.mask, like=parts[0], **config.mask_reading)
        for path, part in zip(files, parts, strict=True):
            if not same_grid(part, mask):
                raise VolumeError(
                    f"{path}: is not on the grid of {case.mask} ({describe_grid(part)} against {describe_grid(mask)})"
                )
        image = parts[0].replace(np.concatenate([part.array for part in parts]))
    if len(image.array) != len(config.patterns):
        raise VolumeError(f"{name}: holds {len(image.array)} channels, the data has {list(config.patterns)}")
    box = _box(pair, StoredCase(dict(zip(config.patterns, parts, strict=True)), mask), config)
    indices = label_indices(
        mask.array, label_values(config), config.label_map, name=str(case.mask or name), partial=True
    )
    mask = mask.replace(indices)
    if box is not None:
        image, mask = cut(image, box), cut(mask, box)
    if config.spacing is not None:
        image, mask = resample(image, config.spacing), resample(mask, config.spacing, nearest=True)
    return image, mask


def _box(pair: Pair, read: StoredCase, config: DataConfig) -> Placement | None:
    """The box of `data.crop`: that in which a volume was generated, or else that of its case. Raises: VolumeError for a
    box of another grid.
    """
    if config.crop is None:
        return None
    if pair.generated is None:
        return foreground_box(pair.case, read, config)
    box = pair.box or foreground_box(pair.case, read_case(pair.case, config), config)
    grid = next(iter(read.images.values()))
    if box is not None and box.shape != grid.shape:
        whole = " x ".join(map(str, box.shape))
        raise VolumeError(
            f"{pair.generated[0]}: the box of its case (data.crop) is of {whole} voxels, the volume has "
            f"{describe_grid(grid)}; generate it from the mask on the grid of the case's image"
        )
    return box


def _recorded_box(path: Path) -> Placement | None:
    """The box in which the volume at `path` was generated, by its sidecar."""
    box = (read_sidecar(path) or {}).get("box")
    return None if box is None else box_from_json(box)


def _read_resampled(case: Case, config: DataConfig) -> tuple[Volume, Volume]:
    """Read a real pair whose volumes lie on other grids. Outside the field of view each channel has its lowest value,
    and the mask the first label, as in the padding.
    """
    aligned = one_grid(case, read_case(case, config), config)
    assert aligned.mask is not None
    lowest = np.nanmin(aligned.image.array, axis=(1, 2, 3), keepdims=True)
    image = aligned.image.replace(np.where(np.isnan(aligned.image.array), lowest, aligned.image.array))
    return image, aligned.mask.replace(np.where(aligned.mask.array == PADDING, 0, aligned.mask.array))


def _check_whole(mask: Volume, case: Case) -> None:
    """Raises: VolumeError if the label of some voxels of a mask (label indices) is unknown."""
    if count := int((mask.array == UNKNOWN).sum()):
        raise VolumeError(
            f"{case.mask or case.name}: the label of {count} voxels is unknown ({UNKNOWN}, see data.label_map), and "
            f"segmenters are trained and tested on whole masks; {WHOLE_MASKS}"
        )


def _with_masks(cases: list[Case], split: str) -> list[Case]:
    if not cases:
        raise ValueError(f"the data has no case in split {split!r}; see `split` and `test_fraction` in its config")
    for case in cases:
        if case.mask is None and case.phantom is None:
            raise ValueError(f"{case.name}: has no mask, and a segmenter needs one; give `masks` in the data's config")
    return sorted(cases, key=lambda case: case.name)


def _by_name(cases: Sequence[Case]) -> dict[str, Case]:
    """Return the cases that have a mask, by the name of the case, and by that of the mask's file unless that is another
    case's.
    """
    masked = [case for case in cases if case.mask is not None]
    stems = Counter(_stem(case.mask) for case in masked if case.mask is not None)
    own = {_stem(case.mask): case for case in masked if case.mask is not None and stems[_stem(case.mask)] == 1}
    return own | {case.name: case for case in masked}


def _mask_of(stem: str, masks: dict[str, Case]) -> Case | None:
    """Return the case with the longest mask name that equals `stem` or begins it, followed by an underscore."""
    while stem not in masks and "_" in stem:
        stem = stem.rpartition("_")[0]
    return masks.get(stem)


def _volumes(files: Sequence[Path], channels: Sequence[str]) -> list[tuple[str, dict[str, Path]]]:
    """Return the names of the volumes that the files hold, each with its files by channel: one, or `<name>_<channel>`
    each.
    """
    if len(channels) == 1:
        return [(_stem(path), {channels[0]: path}) for path in files]
    found: dict[str, dict[str, Path]] = {}
    for path in files:
        channel = max((name for name in channels if _stem(path).endswith(f"_{name}")), key=len, default="")
        if channel:
            found.setdefault(_stem(path).removesuffix(f"_{channel}"), {})[channel] = path
    return list(found.items())


def _given(path: Path, channel: str, case: Case) -> Path:
    """Return the case's own file of a channel that conditioned the volume at `path`. Raises: ValueError if its sidecar
    does not say so.
    """
    record = read_sidecar(path) or {}
    given = (record.get("images") or {}).get(channel)
    if given is None or given.get("sha256") != describe_mask(case.images[channel])["sha256"]:
        raise ValueError(
            f"{path}: has no file of channel {channel!r}, and was not conditioned on that of {case.name}; "
            "generate all channels, or give the case's own"
        )
    return case.images[channel]


def _stem(path: Path | None) -> str:
    """Return a file name without its suffix, see `volume_stem`."""
    return "" if path is None else volume_stem(path)
