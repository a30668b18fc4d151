"""Cases as tensors: read, checked, resampled and scaled once, then kept in memory.

Axes: images (C, X, Y, Z) float32 in [-1, 1]; masks (X, Y, Z) int16 of label *indices* 0..num_labels-1, in the order
of the sorted label values; `PADDING` (-1) outside the field of view.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from volumes.description import ChannelScale, DataDescription
from volumes.formats.raw import memory_bytes
from volumes.intensity import LinearScale, few_inside
from volumes.labels import labels_present, merge_channels
from volumes.map_checks import LabelMapStats, describe_maps
from volumes.placement import Placement, pad_to_multiple
from volumes.plausible import (
    Oddity,
    gathered,
    resampling_oddities,
)
from volumes.volume import (
    PADDING,
    Volume,
    VolumeError,
    describe_grid,
)

from .alignment import Resampled, describe_resampling
from .case_files import first_file, known_labels, one_grid, read_case, stored_oddities
from .cases import Case
from .config import DataConfig
from .preprocessing import PreprocessingFacts, common_spacing, preprocessing
from .subjects import marks_of
from .table_conditions import describe_numbers, read_classes, read_numbers

logger = logging.getLogger(__name__)
MAP_SCALE = LinearScale(0, 1)  # of label maps, where a label may be absent: such a channel is constant, and right
NAMED = 5  # files in a message
READERS = 4  # threads: decompression runs outside the interpreter's lock


@dataclass(frozen=True)
class PreparedCase:
    """A case in the model's terms: image in [-1, 1]; label indices (1, X, Y, Z) if it has a mask; each channel's scale;
    its classes (-1 where unknown) and numbers (NaN where unknown); digests of the image as it was read
    (`voxel_digests`); oddities in the geometry of its files; the fraction of each channel's voxels inside its window;
    and, where `resample_to` brought volumes onto one grid, their field of view, bool (X, Y, Z) (None: all of the box),
    and what was resampled, see `Aligned`. Outside the field of view the image is -1 and the mask PADDING. `box` is the
    part of the stored grid to which `crop` cut the case, before `spacing`.
    """

    image: Volume
    mask: Volume | None
    scales: tuple[LinearScale, ...]
    classes: tuple[int, ...] = ()
    numbers: tuple[float, ...] = ()
    voxels: tuple[str, ...] = ()
    oddities: tuple[tuple[str, Oddity], ...] = ()
    inside: tuple[float, ...] = ()
    seen: np.ndarray | None = None
    resampled: tuple[Resampled, ...] = ()
    share: float = 1.0
    box: Placement | None = None


class Sample(TypedDict):
    """One prepared volume.

    Attributes:
        image: float32 (C, X, Y, Z).
        mask: int16 (X, Y, Z) of label indices; absent without masks.
        seen: bool (1, X, Y, Z), True inside the field of view; absent where that is the whole volume.
        affine: float64 (4, 4) in mm.
        scale: float64 (C, 2) of low and high in file units.
        metadata: the other columns of the table.
        classes, numbers: see `VolumeDataset.conditions`.
    """

    image: torch.Tensor
    mask: NotRequired[torch.Tensor]
    seen: NotRequired[torch.Tensor]
    name: str
    subject: str
    index: int
    affine: torch.Tensor
    scale: torch.Tensor
    metadata: Mapping[str, Any]
    classes: NotRequired[torch.Tensor]
    numbers: NotRequired[torch.Tensor]


class PaddedSample(Sample):
    """A padded volume: `fov` is bool (1, X, Y, Z), True inside the volume; `placement` undoes the padding."""

    fov: torch.Tensor
    placement: Placement


class VolumeDataset(Dataset[Sample]):
    """Cases, prepared as the config says. Item i is a `Sample`.

    A case that is refused raises VolumeError, or with `on_error: skip` is skipped and listed in `skipped` as (name,
    reason).
    """

    def __init__(self, cases: Sequence[Case], config: DataConfig) -> None:
        self.config = config
        self.labels = known_labels(config)
        self.cases: list[Case] = []
        self.skipped: list[tuple[str, str]] = []
        self.prepared: list[PreparedCase] = []
        with ThreadPoolExecutor(READERS) as readers:
            jobs = [readers.submit(prepare, case, config) for case in cases]
            progress = tqdm(jobs, desc="reading volumes", unit="volume", delay=2, leave=False, disable=None)
            try:
                self._take(zip(cases, progress, strict=True), len(cases))
            except BaseException:  # Ctrl-C too: what was not begun is not read
                readers.shutdown(cancel_futures=True)
                raise
        if self.skipped:
            lines = "\n".join(f"  {name}: {reason}" for name, reason in self.skipped)
            logger.warning("%d of %d cases were skipped:\n%s", len(self.skipped), len(cases), lines)
        self._warn_of_windows()
        if said := self.resampling:
            logger.warning("data.resample_to: %s", said)
        for oddity, files in gathered(one for prepared in self.prepared for one in prepared.oddities):
            named = ", ".join([*files.values()][:NAMED])
            named += f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
            logger.warning("%s: %s; %s", oddity.what, named, oddity.remedy)
        if not self.cases:
            raise ValueError(
                "the data set is empty: " + (f"all {len(cases)} cases were skipped" if cases else "it has no cases")
            )

    def _take(self, jobs: Iterable[tuple[Case, Future[PreparedCase]]], count: int) -> None:
        """Keep the cases that can be read. Raises: VolumeError for others unless they are skipped; ValueError where
        they are too many."""
        held = 0  # bytes
        for case, job in jobs:
            try:
                prepared = job.result()
            except VolumeError as error:
                if self.config.on_error == "raise":
                    raise
                self.skipped.append((case.name, str(error)))
                continue
            self.cases.append(case)
            self.prepared.append(prepared)
            held += prepared.image.array.nbytes + (prepared.mask.array.nbytes if prepared.mask is not None else 0)
            if held > memory_bytes():
                raise ValueError(
                    f"{len(self.cases)} of {count} volumes, such as {first_file(case)} with "
                    f"{describe_grid(prepared.image)}, take more than the memory of this process; set a coarser "
                    "data.spacing, or crop them (are their units right?)"
                )

    def _warn_of_windows(self) -> None:
        names = [str(next(iter(case.images.values()), case.name)) for case in self.cases]
        for index, channel in enumerate(self.channels):
            scaling = self.config.scaling(channel)
            if scaling.kind == "window" and not self.config.image_labels:
                shares = [prepared.inside[index] for prepared in self.prepared]
                if said := few_inside(shares, names, (scaling.low, scaling.high)):
                    logger.warning("channel %s: %s", channel, said)

    @property
    def channels(self) -> list[str]:
        """Names of the image channels."""
        return self.config.channels

    @property
    def num_labels(self) -> int:
        """How many labels masks may hold; 0 when there are no masks."""
        return len(self.labels)

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(X, Y, Z) of every volume."""
        return [prepared.image.shape for prepared in self.prepared]

    @property
    def marks(self) -> list[dict[str, frozenset[str]]]:
        """Digests that identify each volume and its subject, see `subjects.marks_of`."""
        return [marks_of(c, self.config, p.voxels) for c, p in zip(self.cases, self.prepared, strict=True)]

    @property
    def preprocessing(self) -> PreprocessingFacts:
        """How the volumes were prepared, see `volumes.data.preprocessing`."""
        return preprocessing(self.config, [prepared.image.spacing for prepared in self.prepared])

    @property
    def resampling(self) -> str | None:
        """What `resample_to` changed, in one sentence; None if nothing."""
        resampled, shares = [one.resampled for one in self.prepared], [one.share for one in self.prepared]
        return describe_resampling(resampled, shares, str(self.config.resample_to))

    def conditions(self, index: int) -> dict[str, torch.Tensor]:
        """Return "classes", int64 (n,) of indices, -1 where unknown, and "numbers", float32 (m,) in the table's units,
        NaN where unknown. Each is in alphabetical order of its columns, and absent if the config names none."""
        prepared = self.prepared[index]
        conditions = {}
        if prepared.classes:
            conditions["classes"] = torch.tensor(prepared.classes)
        if prepared.numbers:
            conditions["numbers"] = torch.tensor(prepared.numbers, dtype=torch.float32)
        return conditions

    def label_map(self, index: int) -> Volume | None:
        """Return the mask of a volume as label values, as files and pipelines have them; PADDING outside the field of
        view. None without a mask.
        """
        mask, values = self.prepared[index].mask, np.array(sorted(self.labels), np.int16)
        if mask is None:
            return None
        return Volume(np.where(mask.array == PADDING, np.int16(PADDING), values[mask.array]), mask.affine)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Sample:
        case, prepared = self.cases[index], self.prepared[index]
        item: Sample = {
            "image": torch.from_numpy(prepared.image.array),
            "name": case.name,
            "subject": case.subject,
            "index": index,
            "affine": torch.from_numpy(prepared.image.affine),
            "scale": torch.tensor([[scale.low, scale.high] for scale in prepared.scales], dtype=torch.float64),
            "metadata": case.metadata,
        }
        conditions = self.conditions(index)
        if "classes" in conditions:
            item["classes"] = conditions["classes"]
        if "numbers" in conditions:
            item["numbers"] = conditions["numbers"]
        if prepared.mask is not None:
            item["mask"] = torch.from_numpy(prepared.mask.array[0])
        if prepared.seen is not None:
            item["seen"] = torch.from_numpy(prepared.seen[None])
        return item


def prepare(case: Case, config: DataConfig) -> PreparedCase:
    """Read one case and bring it into the model's terms. Raises VolumeError, which names the file (or case and
    column)."""
    classes = read_classes(case, config)
    stored = read_case(case, config)
    oddities = stored_oddities(case, stored, config)
    voxels = stored.digests(config)
    aligned = one_grid(case, stored, config)
    del stored
    image, seen = aligned.image, aligned.seen
    oddities += [(first_file(case), oddity) for oddity in resampling_oddities(*aligned.shapes)]
    numbers = read_numbers(case, config.numbers, image)
    scales, inside = [], []
    scaled = np.full_like(image.array, -1)
    for index, channel in enumerate(config.channels):
        shown = image.array[index] if seen is None else image.array[index][seen]
        try:
            scale = MAP_SCALE if config.image_labels else config.scaling(channel).fit(shown)
        except VolumeError as error:
            which = f"channel {channel}: " if len(config.channels) > 1 else ""
            raise VolumeError(f"{case.images.get(channel, case.name)}: {which}{error}") from error
        scaled[index][... if seen is None else seen] = scale.apply(shown)
        scales.append(scale)
        inside.append(config.scaling(channel).share_inside(shown))
    return PreparedCase(
        image.replace(scaled),
        aligned.mask,
        tuple(scales),
        tuple(classes),
        tuple(numbers),
        voxels,
        tuple(oddities),
        tuple(inside),
        seen,
        aligned.resampled,
        aligned.share,
        aligned.box,
    )


def pad_sample(item: Sample, stride: int | Sequence[int]) -> PaddedSample:
    """Pad a whole volume of a `VolumeDataset` on both sides to a multiple of `stride` (one, or one for each axis).

    Adds "fov" bool (1, X, Y, Z), True inside the volume, and "placement", which undoes the padding. In the padding the
    image is -1 and the mask PADDING. "affine" is that of the padded grid.
    """
    placement = pad_to_multiple(tuple(item["image"].shape[1:]), stride if isinstance(stride, int) else tuple(stride))
    padded: PaddedSample = {
        **item,
        "image": placement.apply(item["image"], -1.0),
        "fov": field_of_view(item, placement),
        "affine": torch.from_numpy(placement.shift(item["affine"].numpy())),
        "placement": placement,
    }
    if "mask" in item:
        padded["mask"] = placement.apply(item["mask"], PADDING)
    return padded


def field_of_view(item: Sample, placement: Placement) -> torch.Tensor:
    """Return the field of view of a placed sample, bool (1, *placement.target)."""
    if "seen" in item:
        return placement.apply(item["seen"], False)
    return torch.from_numpy(placement.field_of_view)[None]


def describe(dataset: VolumeDataset, description: str = "") -> DataDescription:
    """Measure the description of the training data that a pipeline needs.

    Intensity scales are medians over the volumes, numbers are measured over the volumes that have them, and the affine
    is that of the volume of median size.

    Raises: ValueError naming an entry that cannot be stored.
    """
    config, shapes = dataset.config, np.array(dataset.shapes)
    median_case = int(np.argsort(shapes.prod(axis=1), kind="stable")[len(shapes) // 2])
    measured = DataDescription(
        channels=tuple(dataset.channels),
        labels=dict(sorted(dataset.labels.items())),
        image_labels=dict(sorted(config.image_labels.items())),
        spacing=common_spacing([prepared.image.spacing for prepared in dataset.prepared]),
        intensity=tuple(_median_scale(dataset, index) for index in range(len(dataset.channels))),
        shape_range=(shapes.min(axis=0).tolist(), shapes.max(axis=0).tolist()),
        affine=dataset.prepared[median_case].image.affine.tolist(),
        classes=dict(sorted(config.class_names.items())),
        numbers=describe_numbers(config.numbers, [prepared.numbers for prepared in dataset.prepared]),
        grid_numbers=tuple(n for n in sorted(config.numbers) if not any(n in case.metadata for case in dataset.cases)),
        reading=config.reading,
        resample_to=config.resample_to,
        crop=None if config.crop is None else config.crop.named(config.channels),
        common_labels=_common_labels(dataset) if dataset.labels else None,
        maps=_describe_maps(dataset) if config.image_labels else None,
        description=description,
    )
    return DataDescription.from_json(measured.to_json())  # checked now, and not when the pipeline is saved


def _median_scale(dataset: VolumeDataset, index: int) -> ChannelScale:
    scaling = dataset.config.scaling(dataset.channels[index])
    limits = [[prepared.scales[index].low, prepared.scales[index].high] for prepared in dataset.prepared]
    low, high = np.median(limits, axis=0).tolist()
    return ChannelScale(scaling.kind, low, high, (scaling.low, scaling.high) if scaling.kind == "percentile" else None)


def _common_labels(dataset: VolumeDataset) -> tuple[int, ...]:
    """Return the values of the labels that every mask has."""
    values = sorted(dataset.labels)
    masks = [prepared.mask for prepared in dataset.prepared if prepared.mask is not None]
    common = np.logical_and.reduce([labels_present(mask.array, len(values)) for mask in masks])
    return tuple(value for value, in_all in zip(values, common.tolist(), strict=True) if in_all)


def _describe_maps(dataset: VolumeDataset) -> LabelMapStats:
    names = dataset.config.image_labels
    images = [prepared.image for prepared in dataset.prepared]
    maps = [(merge_channels(image.array, sorted(names))[0], float(np.prod(image.spacing))) for image in images]
    return describe_maps(maps, names)
