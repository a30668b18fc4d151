"""Prepare a case: read it, check it, and bring it into the model's terms.

Axes: images (C, X, Y, Z), masks (1, X, Y, Z) int16 of label *indices* 0..num_labels-1, in the order of the sorted label
values; `PADDING` (-1) outside the field of view.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from volumes.data.alignment import Resampled
from volumes.data.case_files import first_file, one_grid, read_case, stored_oddities
from volumes.data.cases import Case
from volumes.data.config import DataConfig
from volumes.data.table_conditions import read_classes, read_numbers
from volumes.intensity import LinearScale
from volumes.map_checks import MapFacts
from volumes.placement import Placement
from volumes.plausible import Oddity, resampling_oddities
from volumes.volume import SourceGrid, Volume, VolumeError, affine_spacing

MAP_SCALE = LinearScale(0, 1)  # of label maps, where a label may be absent: such a channel is constant, and right


@dataclass(frozen=True, kw_only=True, eq=False)
class CaseDetails:
    """What is known of a prepared case beside its voxels and their grid.

    Attributes:
        scales: of each channel.
        classes: index of each class, -1 where unknown; numbers: NaN where unknown.
        voxels: digests of the image as it was read (`voxel_digests`).
        oddities: in the geometry of its files.
        inside: the fraction of each channel's voxels inside its window.
        resampled, share: what `resample_to` resampled, see `Aligned`.
        box: the part of the stored grid to which `crop` cut the case, before `spacing`.
    """

    scales: tuple[LinearScale, ...]
    classes: tuple[int, ...] = ()
    numbers: tuple[float, ...] = ()
    voxels: tuple[str, ...] = ()
    oddities: tuple[tuple[str, Oddity], ...] = ()
    inside: tuple[float, ...] = ()
    resampled: tuple[Resampled, ...] = ()
    share: float = 1.0
    box: Placement | None = None

    def details(self) -> dict[str, object]:
        """Return these attributes alone, by name."""
        return {field.name: getattr(self, field.name) for field in fields(CaseDetails)}


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedCase(CaseDetails):
    """A case in the model's terms.

    Attributes:
        image: float32 in [-1, 1], and -1 outside the field of view.
        mask: None without a mask.
        seen: where `resample_to` brought volumes onto one grid, their field of view, bool (X, Y, Z); None: all of it.
    """

    image: Volume
    mask: Volume | None = None
    seen: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class UnscaledCase(PreparedCase):
    """A case whose image is in the units of its files. Outside the field of view it has any value of the channel."""

    def scaled(self) -> PreparedCase:
        """Scale the image to [-1, 1]."""
        image = self.image.replace(scale_image(self.image.array, self.scales, self.seen))
        return PreparedCase(**self.details(), image=image, mask=self.mask, seen=self.seen)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskFacts:
    """What is known of a mask: its grid, and the voxels that each label index has."""

    affine: np.ndarray
    source: SourceGrid | None
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class CaseFacts(CaseDetails):
    """What is known of a prepared case without its voxels.

    Attributes:
        shape: (X, Y, Z); affine: (4, 4) float64 in mm; source: the grid of the first image file.
        mask: None without a mask.
        seen: whether a part of the box is outside the field of view.
        map: what was measured of an image that is a label map.
        digest: CRC-32 of image and mask as training sees them.
        checksum: CRC-32 of the stored voxels.
        nbytes: of the stored voxels.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    source: SourceGrid | None
    mask: MaskFacts | None
    seen: bool
    map: MapFacts | None
    digest: int
    checksum: int
    nbytes: int

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along X, Y and Z."""
        return affine_spacing(self.affine)

    @property
    def grid(self) -> Volume:
        """Shape and affine as a volume; its voxels, all 0, take no memory."""
        return Volume(np.broadcast_to(np.float32(0), (1, *self.shape)), self.affine, self.source)


def prepare(case: Case, config: DataConfig) -> PreparedCase:
    """Read one case and bring it into the model's terms. Raises VolumeError, which names the file (or case and
    column)."""
    return prepare_unscaled(case, config).scaled()


def prepare_unscaled(case: Case, config: DataConfig) -> UnscaledCase:
    """Do all of `prepare` except for the scaling."""
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
    for index, channel in enumerate(config.channels):
        shown = image.array[index] if seen is None else image.array[index][seen]
        try:
            scale = MAP_SCALE if config.image_labels else config.scaling(channel).fit(shown)
        except VolumeError as error:
            which = f"channel {channel}: " if len(config.channels) > 1 else ""
            raise VolumeError(f"{case.images.get(channel, case.name)}: {which}{error}") from error
        scales.append(scale)
        inside.append(config.scaling(channel).share_inside(shown))
        if seen is not None:
            image.array[index][~seen] = shown[0]  # it is NaN there, which no integer is
    return UnscaledCase(
        image=image,
        mask=aligned.mask,
        seen=seen,
        scales=tuple(scales),
        classes=tuple(classes),
        numbers=tuple(numbers),
        voxels=voxels,
        oddities=tuple(oddities),
        inside=tuple(inside),
        resampled=aligned.resampled,
        share=aligned.share,
        box=aligned.box,
    )


def scale_image(image: np.ndarray, scales: tuple[LinearScale, ...], seen: np.ndarray | None) -> np.ndarray:
    """Scale (C, X, Y, Z) float32 in file units to [-1, 1], and set it to -1 where `seen` (X, Y, Z) is False."""
    scaled = np.empty_like(image)
    for index, scale in enumerate(scales):
        scaled[index] = scale.apply(image[index])
    if seen is not None:
        scaled[:, ~seen] = -1
    return scaled
