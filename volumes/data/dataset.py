"""Cases as tensors: read, checked and resampled once, then read from the cache of prepared volumes, whole or in part.

Axes: images (C, X, Y, Z) float32 in [-1, 1]; masks (X, Y, Z) int16 of label *indices* 0..num_labels-1, in the order
of the sorted label values; `PADDING` (-1) outside the field of view.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

from volumes.description import ChannelScale, DataDescription
from volumes.intensity import few_inside
from volumes.map_checks import LabelMapStats, describe_maps
from volumes.placement import Placement, pad_to_multiple
from volumes.plausible import gathered
from volumes.prepared.case import CaseFacts, PreparedCase
from volumes.prepared.entry import Arrays, Box, DamagedEntry, Part, unpack, whole_case
from volumes.prepared.preparation import Preparation, Ready
from volumes.prepared.store import PreparedStore
from volumes.volume import PADDING, Volume

from .alignment import describe_resampling
from .case_files import known_labels
from .cases import Case
from .config import DataConfig
from .preprocessing import PreprocessingFacts, common_spacing, preprocessing
from .subjects import marks_of
from .table_conditions import describe_numbers

logger = logging.getLogger(__name__)
NAMED = 5  # files in a message


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

    Each case is prepared once, and stored in the cache (`volumes.prepared`). Memory holds what is known without the
    voxels (`facts`); these are read from the disk, and only those that are asked for. A volume whose voxels were
    removed from the cache, or damaged, is prepared again. Where the cache cannot be written to, volumes are kept in
    memory up to half of it, and beyond that prepared at each read.

    A case that is refused raises VolumeError, or with `on_error: skip` is skipped and listed in `skipped` as (name,
    reason).
    """

    def __init__(self, cases: Sequence[Case], config: DataConfig) -> None:
        self.config = config
        self.labels = known_labels(config)
        self.cases: list[Case] = []
        self.skipped: list[tuple[str, str]] = []
        self.facts: list[CaseFacts] = []
        self.held: dict[int, Arrays] = {}  # voxels of volumes that are not stored
        self.keys: list[str] = []  # of the prepared volumes: digests of their files' content and of the settings
        self._store = PreparedStore(generated=bool(cases) and all(case.split == "generated" for case in cases))
        for case, outcome in zip(cases, Preparation(config, self._store).run(cases), strict=True):
            if isinstance(outcome, Ready):
                self._take(case, outcome)
            else:
                self.skipped.append((case.name, str(outcome)))
        if self.skipped:
            lines = "\n".join(f"  {name}: {reason}" for name, reason in self.skipped)
            logger.warning("%d of %d cases were skipped:\n%s", len(self.skipped), len(cases), lines)
        self._warn_of_windows()
        if said := self.resampling:
            logger.warning("data.resample_to: %s", said)
        for oddity, files in gathered(one for facts in self.facts for one in facts.oddities):
            named = ", ".join([*files.values()][:NAMED])
            named += f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
            logger.warning("%s: %s; %s", oddity.what, named, oddity.remedy)
        if not self.cases:
            raise ValueError(
                "the data set is empty: " + (f"all {len(cases)} cases were skipped" if cases else "it has no cases")
            )

    def _take(self, case: Case, ready: Ready) -> None:
        if ready.held is not None:
            self.held[len(self.cases)] = ready.held
        self.cases.append(case)
        self.facts.append(ready.facts)
        self.keys.append(ready.key)

    def _warn_of_windows(self) -> None:
        names = [str(next(iter(case.images.values()), case.name)) for case in self.cases]
        for index, channel in enumerate(self.channels):
            scaling = self.config.scaling(channel)
            if scaling.kind == "window" and not self.config.image_labels:
                shares = [facts.inside[index] for facts in self.facts]
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
        return [facts.shape for facts in self.facts]

    @property
    def marks(self) -> list[dict[str, frozenset[str]]]:
        """Digests that identify each volume and its subject, see `subjects.marks_of`."""
        return [marks_of(c, self.config, facts.voxels) for c, facts in zip(self.cases, self.facts, strict=True)]

    @property
    def preprocessing(self) -> PreprocessingFacts:
        """How the volumes were prepared, see `volumes.data.preprocessing`."""
        return preprocessing(self.config, [facts.spacing for facts in self.facts])

    @property
    def resampling(self) -> str | None:
        """What `resample_to` changed, in one sentence; None if nothing."""
        resampled, shares = [one.resampled for one in self.facts], [one.share for one in self.facts]
        return describe_resampling(resampled, shares, str(self.config.resample_to))

    def conditions(self, index: int) -> dict[str, torch.Tensor]:
        """Return "classes", int64 (n,) of indices, -1 where unknown, and "numbers", float32 (m,) in the table's units,
        NaN where unknown. Each is in alphabetical order of its columns, and absent if the config names none."""
        facts = self.facts[index]
        conditions = {}
        if facts.classes:
            conditions["classes"] = torch.tensor(facts.classes)
        if facts.numbers:
            conditions["numbers"] = torch.tensor(facts.numbers, dtype=torch.float32)
        return conditions

    def label_map(self, index: int) -> Volume | None:
        """Return the mask of a volume as label values, as files and pipelines have them; PADDING outside the field of
        view, UNKNOWN where they say so. None without a mask.
        """
        if self.facts[index].mask is None:
            return None
        mask, values = self.load(index).mask, np.array(sorted(self.labels), np.int16)
        assert mask is not None
        return Volume(np.where(mask.array < 0, mask.array, values[mask.array]).astype(np.int16), mask.affine)

    def load(self, index: int) -> PreparedCase:
        """Read a whole prepared case."""
        return whole_case(self.facts[index], self.part(index))

    def part(self, index: int, box: Box | None = None) -> Part:
        """Read the voxels of a box (slices along X, Y and Z) of a volume, or all of them."""
        facts, key = self.facts[index], self.keys[index]
        arrays = self.held.get(index)
        if arrays is None:
            try:
                return self._store.read(key, facts, box)
            except FileNotFoundError:  # removed when the cache was full
                pass
            except DamagedEntry as error:
                logger.warning("%s: damaged (%s); prepared again", self._store.voxels(key), error)
            arrays = Preparation(self.config, self._store).again(self.cases[index], key, facts)
        return unpack(facts, lambda name: arrays[name] if box is None else arrays[name][box])

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Sample:
        case, facts, voxels = self.cases[index], self.facts[index], self.part(index)
        item: Sample = {
            "image": torch.from_numpy(voxels.image),
            "name": case.name,
            "subject": case.subject,
            "index": index,
            "affine": torch.from_numpy(facts.affine.copy()),
            "scale": torch.tensor([[scale.low, scale.high] for scale in facts.scales], dtype=torch.float64),
            "metadata": case.metadata,
        }
        conditions = self.conditions(index)
        if "classes" in conditions:
            item["classes"] = conditions["classes"]
        if "numbers" in conditions:
            item["numbers"] = conditions["numbers"]
        if voxels.mask is not None:
            item["mask"] = torch.from_numpy(voxels.mask)
        if voxels.seen is not None:
            item["seen"] = torch.from_numpy(voxels.seen[None])
        return item


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


def describe(dataset: VolumeDataset, description: str = "", constant: Collection[str] = ()) -> DataDescription:
    """Measure the description of the training data that a pipeline needs.

    Intensity scales are medians over the volumes, numbers are measured over the volumes that have them, and the affine
    is that of the volume of median size.

    Args:
        constant: numbers that may be the same for all volumes, see `describe_numbers`.
    Raises: ValueError naming an entry that cannot be stored.
    """
    config, shapes = dataset.config, np.array(dataset.shapes)
    median_case = int(np.argsort(shapes.prod(axis=1), kind="stable")[len(shapes) // 2])
    measured = DataDescription(
        channels=tuple(dataset.channels),
        labels=dict(sorted(dataset.labels.items())),
        image_labels=dict(sorted(config.image_labels.items())),
        spacing=common_spacing([facts.spacing for facts in dataset.facts]),
        intensity=tuple(_median_scale(dataset, index) for index in range(len(dataset.channels))),
        shape_range=(shapes.min(axis=0).tolist(), shapes.max(axis=0).tolist()),
        affine=dataset.facts[median_case].affine.tolist(),
        classes=dict(sorted(config.class_names.items())),
        numbers=describe_numbers(config.numbers, [facts.numbers for facts in dataset.facts], constant),
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
    limits = [[facts.scales[index].low, facts.scales[index].high] for facts in dataset.facts]
    low, high = np.median(limits, axis=0).tolist()
    return ChannelScale(scaling.kind, low, high, (scaling.low, scaling.high) if scaling.kind == "percentile" else None)


def _common_labels(dataset: VolumeDataset) -> tuple[int, ...]:
    """Return the values of the labels that every mask has."""
    counts = np.array([facts.mask.counts for facts in dataset.facts if facts.mask is not None])
    common = np.logical_and.reduce(counts > 0)
    return tuple(value for value, in_all in zip(sorted(dataset.labels), common.tolist(), strict=True) if in_all)


def _describe_maps(dataset: VolumeDataset) -> LabelMapStats:
    maps = [facts.map for facts in dataset.facts if facts.map is not None]
    return describe_maps(maps, dataset.config.image_labels)
