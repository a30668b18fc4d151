"""What label maps of a training set have in common, and whether a generated one has it too: the labels, their pieces
and sizes, their voxels at the edge, and the shapes of the grids.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

TOUCHING = np.ones((3, 3, 3), bool)  # voxels that share a corner are of one piece
MAX_SHAPES = 512
MAX_SIDE = 32767  # voxels, of NIfTI-1
MAX_MM3 = 1e15
SHAPE = r"\d{1,5}x\d{1,5}x\d{1,5}"


def count_pieces(mask: np.ndarray) -> int:
    """Count the connected pieces (26 neighbors) of a boolean array (X, Y, Z)."""
    from scipy import ndimage  # here: a command line that only checks a description need not import it

    _, count = ndimage.label(mask, TOUCHING)  # pyright: ignore[reportGeneralTypeIssues]
    return count


def count_at_edge(mask: np.ndarray) -> int:
    """Count the voxels of a boolean array (X, Y, Z) that lie in one of its six outer planes."""
    return int(mask.sum() - mask[1:-1, 1:-1, 1:-1].sum())


@dataclass(frozen=True)
class LabelStats:
    """One label over all training maps.

    Attributes:
        mm3: smallest and largest volume in mm^3, of the maps that have the label.
        pieces: largest number of connected pieces in one map.
        edge: largest number of voxels in the outer planes of one map.
        always: whether every map has the label.
    """

    mm3: tuple[float, float]
    pieces: int
    edge: int
    always: bool


@dataclass(frozen=True)
class LabelMapStats:
    """What all label maps of a training set have in common, for `label_map_fault`.

    Attributes:
        labels: statistics by name; a label that no map has is absent.
        pieces: largest number of connected pieces of the foreground in one map.
        shapes: voxels (X, Y, Z) of the maps' grids: one if all are equal, else at most `MAX_SHAPES`, evenly chosen.
    """

    labels: dict[str, LabelStats]
    pieces: int
    shapes: tuple[tuple[int, int, int], ...]

    def to_json(self) -> dict[str, object]:
        """Return the object as it is stored; shapes as text, "37x51x33 35x51x35 ..."."""
        labels = {
            name: {"mm3": list(stats.mm3), "pieces": stats.pieces, "edge": stats.edge, "always": stats.always}
            for name, stats in self.labels.items()
        }
        return {"labels": labels, "pieces": self.pieces, "shapes": " ".join("x".join(map(str, s)) for s in self.shapes)}

    @classmethod
    def from_json(cls, value: Any, names: Sequence[str]) -> Self:
        """Read what `to_json` wrote, with labels among `names`. Raises: ValueError for anything else."""
        _expect(isinstance(value, Mapping) and bool(names), "", value)
        text: Any = value.get("shapes")
        labels: Any = value.get("labels")
        pieces: Any = value.get("pieces")
        written = isinstance(text, str) and re.fullmatch(rf"{SHAPE}( {SHAPE})*", text, re.ASCII)
        shapes = [_shape(shape) for shape in text.split()] if written else []
        fits = 0 < len(shapes) <= MAX_SHAPES and all(0 < side <= MAX_SIDE for shape in shapes for side in shape)
        _expect(fits, ", shapes", text)
        _expect(_is_count(pieces), ", pieces", pieces)
        _expect(isinstance(labels, Mapping) and set(labels) <= set(names), ", labels", labels)
        return cls({name: _label_stats(name, stats) for name, stats in labels.items()}, pieces, tuple(shapes))


@dataclass(frozen=True)
class MapFacts:
    """What is measured of one label map, for `describe_maps`.

    Attributes:
        shape: voxels (X, Y, Z).
        labels: name, volume in mm^3, connected pieces, and voxels in the outer planes of each label that it has.
        pieces: connected pieces of the foreground.
    """

    shape: tuple[int, int, int]
    labels: tuple[tuple[str, float, int, int], ...]
    pieces: int


def measure_map(array: np.ndarray, voxel: float, names: Mapping[int, str]) -> MapFacts:
    """Measure one map.

    Args:
        array: label values (X, Y, Z).
        voxel: mm^3.
        names: of all label values; the lowest is the background.
    """
    background, *values = sorted(names)
    x, y, z = array.shape
    masks = ((names[value], array == value) for value in values)
    present = ((name, float(m.sum() * voxel), count_pieces(m), count_at_edge(m)) for name, m in masks if m.any())
    return MapFacts((x, y, z), tuple(present), count_pieces(array != background))


def describe_maps(maps: Sequence[MapFacts], names: Mapping[int, str]) -> LabelMapStats:
    """Join what was measured of each of `maps`, with labels `names`, to what holds of all."""
    labels: dict[str, LabelStats] = {}
    for value in sorted(names)[1:]:
        present = [row for one in maps for row in one.labels if row[0] == names[value]]
        if present:
            _, sizes, pieces, edges = zip(*present, strict=True)
            mm3 = (round(min(sizes), 3), round(max(sizes), 3))
            labels[names[value]] = LabelStats(mm3, max(pieces), max(edges), always=len(present) == len(maps))
    shapes = sorted("x".join(map(str, one.shape)) for one in maps)
    shapes = shapes[:1] if len(set(shapes)) == 1 else shapes
    chosen = np.linspace(0, len(shapes) - 1, min(len(shapes), MAX_SHAPES)).round().astype(int)
    return LabelMapStats(labels, max(one.pieces for one in maps), tuple(_shape(shapes[i]) for i in chosen))


def _label_stats(name: str, value: Any) -> LabelStats:
    """Read what `LabelMapStats.to_json` wrote for a label. Raises: ValueError naming the label for anything else."""
    counts = isinstance(value, Mapping) and _is_count(value.get("pieces")) and _is_count(value.get("edge"))
    _expect(counts and isinstance(value.get("always"), bool), f", labels, {name}", value)
    sizes: Any = value.get("mm3")
    plain = isinstance(sizes, list | tuple) and len(sizes) == 2 and all(type(size) in (int, float) for size in sizes)
    _expect(plain and 0 <= sizes[0] <= sizes[1] <= MAX_MM3, f", labels, {name}", value)
    return LabelStats(tuple(sizes), value["pieces"], value["edge"], value["always"])


def _shape(text: str) -> tuple[int, int, int]:
    x, y, z = map(int, text.split("x"))
    return x, y, z


def _expect(fits: object, entry: str, value: object) -> None:
    if not fits:
        raise ValueError(f"maps{entry} is {str(value)[:80]!r}; that is not what describe_maps writes")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def label_map_fault(array: np.ndarray, voxel: float, names: Mapping[int, str], known: LabelMapStats) -> str | None:
    """Describe how a label map differs from all of the training set; None if it does not.

    A label must be present if it always was. It must not have more pieces or more voxels at the edge than in training.
    Its volume must be between half the smallest and twice the largest. Unusual sizes in between are accepted: maps
    unlike all real ones in size are wanted.

    Args:
        array: label values (X, Y, Z).
        voxel: volume of a voxel in mm^3.
        names, known: as `describe_maps` takes and returns them.
    """
    values = sorted(names)
    if unknown := sorted(set(np.unique(array).tolist()) - set(values)):
        return f"unknown labels {unknown}"
    for value in values[1:]:
        mask, limits = array == value, known.labels.get(names[value])
        if not mask.any():
            if limits is not None and limits.always:
                return f"no {names[value]}"
            continue
        if limits is None:
            return f"{names[value]}, which no training map has"
        size, (least, most) = float(mask.sum() * voxel), limits.mm3
        if not least / 2 <= size <= most * 2:
            return f"{size:.0f} mm3 of {names[value]}"
        if (pieces := count_pieces(mask)) > limits.pieces:
            return f"{pieces} pieces of {names[value]}"
        if (edge := count_at_edge(mask)) > limits.edge:
            return f"{edge} voxels of {names[value]} at the edge"
    if (pieces := count_pieces(array != values[0])) > known.pieces:
        return f"{pieces} pieces"
    return None


def draw_shape(known: LabelMapStats, seed: int) -> tuple[int, int, int]:
    """Choose the grid (X, Y, Z) of one of the training set's maps; the same seed gives the same grid."""
    return known.shapes[int(np.random.default_rng(seed).integers(len(known.shapes)))]
