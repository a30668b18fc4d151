"""The box of what is not background (`data.crop`): a case, or a volume that is generated, is cut to it, and put back.

Axes: (X, Y, Z) in RAS+ order.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from cli.settings import FiniteFloat, NonNegativeFloat, checked, faults

from .placement import Placement, pad_or_crop
from .volume import Volume

MIN_PIECE = 0.01  # of the largest piece: what is smaller is noise, and what is as large (a second leg) is not
MASK_LABELS = "mask"
MAX_SIDE = 2**31 - 1  # of a grid in a record


@dataclass(frozen=True)
@checked
class ForegroundCrop:
    """Cut each case to the box of what is not background.

    Args:
        above: background is what is not above this value, in the units of the file (CT: -500; PET: 0.1; MR whose
            background is 0: 0). Pieces of less than a hundredth of the largest are noise and left out. "mask" takes the
            box of the mask's labels in its place, all but the background.
        channel: image channel whose values are meant; null is the first.
        margin: mm that are added on each side, as far as the volume reaches.
    """

    above: FiniteFloat | Literal["mask"]
    channel: str | None = None
    margin: NonNegativeFloat = 10.0

    def __post_init__(self) -> None:
        if self.by_mask and self.channel is not None:
            raise ValueError(f"crop: above: mask takes the mask, not the channel {self.channel!r}; remove one of them")

    @property
    def by_mask(self) -> bool:
        """Whether the box is that of the mask's labels."""
        return self.above == MASK_LABELS

    def channel_of(self, channels: Sequence[str]) -> str:
        """The channel whose values are meant, of these."""
        return channels[0] if self.channel is None else self.channel

    def named(self, channels: Sequence[str]) -> "ForegroundCrop":
        """The same setting with its channel by name."""
        if self.by_mask:
            return self
        return ForegroundCrop(self.above, self.channel_of(channels), self.margin)

    def to_json(self) -> dict[str, object]:
        """Return the setting as it is stored."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> "ForegroundCrop":
        """Read what `to_json` wrote. Raises: ValueError naming what is wrong."""
        if not isinstance(value, Mapping):
            raise ValueError(f"crop is {str(value)[:80]!r}; expected {{above, channel, margin}}")
        entries: Mapping[str, Any] = {str(key): entry for key, entry in value.items()}
        if wrong := list(faults(cls, entries, "crop.")):
            raise ValueError(wrong[0])
        return cls(**entries)

    def __str__(self) -> str:
        what = "the mask's labels" if self.by_mask else f"what is above {self.above:g}"
        where = f" in {self.channel}" if self.channel else ""
        return f"the box of {what}{where}, and {self.margin:g} mm"


def above_value(array: np.ndarray, value: float) -> np.ndarray:
    """Return where an image (X, Y, Z) is above a value, without pieces smaller than `MIN_PIECE` of the largest; NaN is
    not above it. Voxels belong to one piece that share a face. Shape and type: bool (X, Y, Z).
    """
    inside = array > value
    from scipy import ndimage  # here: commands that only parse arguments import this module

    pieces, count = ndimage.label(inside)  # pyright: ignore[reportGeneralTypeIssues]
    if count < 2:
        return inside
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    sizes[0] = 0
    return (sizes >= MIN_PIECE * sizes.max())[pieces] & inside


def background_index(labels: Iterable[int]) -> int:
    """Return the label index of the background: of the label value 0, or without it of the lowest."""
    known = sorted(labels)
    return known.index(0) if 0 in known else 0


def labeled(indices: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """Return where a mask (X, Y, Z) of label indices shows a label other than the background (`background_index`).

    Args:
        labels: label values.
    """
    return (indices >= 0) & (indices != background_index(labels))


def box_around(inside: np.ndarray, spacing: Sequence[float], margin: float) -> Placement | None:
    """Return the box of the True voxels of (X, Y, Z), with a margin in mm (whole voxels, rounded up) as far as the
    volume reaches; None if there are none.
    """
    if not inside.any():
        return None
    low, high = [], []
    for axis, (size, mm) in enumerate(zip(inside.shape, spacing, strict=True)):
        along = np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis})))
        more = int(np.ceil(margin / mm - 1e-6))
        low.append(max(int(along[0]) - more, 0))
        high.append(min(int(along[-1]) + 1 + more, size))
    return pad_or_crop(inside.shape, tuple(np.subtract(high, low).tolist()), offset=tuple(low))


def image_box(image: Volume, crop: ForegroundCrop) -> Placement | None:
    """Return the box of an image's foreground, which is all above `crop.above` in its first channel; None if there is
    none.
    """
    assert not isinstance(crop.above, str)
    return box_around(above_value(image.array[0], crop.above), image.spacing, crop.margin)


def mask_box(mask: Volume, labels: Sequence[int], crop: ForegroundCrop) -> Placement | None:
    """Return the box of the labels of a mask (label indices); None if it is background alone."""
    return box_around(labeled(mask.array[0], labels), mask.spacing, crop.margin)


def cut(volume: Volume, box: Placement) -> Volume:
    """Cut a volume to a box that lies within it; its source stays that of the whole."""
    return Volume(box.apply(volume.array, 0), box.shift(volume.affine), volume.source)


def share_of(box: Placement) -> float:
    """The fraction of the whole volume's voxels that lie in its box."""
    return float(np.prod(box.target) / np.prod(box.shape))


def box_to_json(box: Placement) -> dict[str, list[int]]:
    """Return a box as records have it: voxels of the whole and of the box, and its first voxel, in RAS+ order."""
    return {"whole": [*box.shape], "shape": [*box.target], "start": [*box.start]}


def box_from_json(value: object) -> Placement:
    """Read what `box_to_json` wrote. Raises: ValueError for anything else, and for a box that leaves its volume."""
    entry = value if isinstance(value, Mapping) else {}
    sides = [entry.get(name) for name in ("whole", "shape", "start")]
    triples = [one for one in sides if isinstance(one, list | tuple) and len(one) == 3]
    fits = len(triples) == 3 and all(type(n) is int and 0 <= n <= MAX_SIDE for one in triples for n in one)
    if not fits or not all(n > 0 and low + n <= whole for whole, n, low in zip(*triples, strict=True)):
        raise ValueError(f"box is {str(value)[:80]!r}; expected {{whole, shape, start}} of a box within a volume")
    whole, shape, start = triples
    return pad_or_crop(tuple(whole), tuple(shape), offset=tuple(start))
