"""What label maps of a training set have in common, and whether a generated one has it too: which labels, in how many pieces
of what size, how near the edge, on grids of which shapes."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

TOUCHING = np.ones((3, 3, 3), bool)  # voxels that share a corner are of one piece
MAX_SHAPES = 512
MOST_SIDE = 32767  # voxels, of NIfTI-1
MOST_MM3 = 1e15


def count_pieces(mask: np.ndarray) -> int:
    """Connected pieces (26 neighbors) of a boolean array (X, Y, Z)."""
    _, count = ndimage.label(mask, TOUCHING)  # pyright: ignore[reportGeneralTypeIssues]
    return count


def count_at_edge(mask: np.ndarray) -> int:
    """Voxels of a boolean array (X, Y, Z) that lie in one of its six outer planes."""
    return int(mask.sum() - mask[1:-1, 1:-1, 1:-1].sum())


def describe_maps(maps: Sequence[tuple[np.ndarray, float]], names: Mapping[int, str]) -> dict[str, Any]:
    """What holds of all `maps`, as plain JSON, for `label_map_fault`.

    Args:
        maps: label values (X, Y, Z) and the volume of a voxel in mm^3, of each.
        names: of all label values; the lowest is the background.
    Returns:
        {"labels": {name: {"mm3": [least, most], "pieces": most, "edge": most voxels in the outer planes, "always": whether every
        map has it}}, "pieces": most of the foreground, "shapes": the grids' voxels, "37x51x33 35x51x35 ...", each once if all are
        equal, and at most 512, evenly chosen}. A label that no map has is left out.
    """
    values = sorted(names)
    labels: dict[str, Any] = {}
    for value in values[1:]:
        found = [(array == value, voxel) for array, voxel in maps]
        present = [(mask, voxel) for mask, voxel in found if mask.any()]
        if present:
            sizes = [float(mask.sum() * voxel) for mask, voxel in present]
            labels[names[value]] = {
                "mm3": [round(min(sizes), 3), round(max(sizes), 3)],
                "pieces": max(count_pieces(mask) for mask, _ in present),
                "edge": max(count_at_edge(mask) for mask, _ in present),
                "always": len(present) == len(found),
            }
    shapes = sorted("x".join(map(str, array.shape)) for array, _ in maps)
    shapes = shapes[:1] if len(set(shapes)) == 1 else shapes
    chosen = np.linspace(0, len(shapes) - 1, min(len(shapes), MAX_SHAPES)).round().astype(int)
    pieces = max(count_pieces(array != values[0]) for array, _ in maps)
    return {"labels": labels, "pieces": pieces, "shapes": " ".join(shapes[i] for i in chosen)}


def check_maps(known: Any, names: Sequence[str]) -> None:
    """Raises: ValueError unless `known` is what `describe_maps` writes, of labels among `names`."""

    def expect(fit: bool, entry: str, value: Any) -> None:
        if not fit:
            raise ValueError(f"maps{entry} is {str(value)[:80]!r}; that is not what describe_maps writes")

    expect(isinstance(known, Mapping) and bool(names), "", known)
    shapes: Any = known.get("shapes")
    labels: Any = known.get("labels")
    fit = isinstance(shapes, str) and re.fullmatch(
        r"\d{1,5}x\d{1,5}x\d{1,5}( \d{1,5}x\d{1,5}x\d{1,5})*", shapes, re.ASCII
    )
    sides = [int(side) for side in re.findall(r"\d+", shapes)] if isinstance(shapes, str) and fit else [0]
    expect(min(sides) > 0 and max(sides) <= MOST_SIDE and len(sides) <= 3 * MAX_SHAPES, ", shapes", shapes)
    expect(_is_count(known.get("pieces")), ", pieces", known.get("pieces"))
    expect(isinstance(labels, Mapping) and set(labels) <= set(names), ", labels", labels)
    for name, limits in labels.items():
        whole = isinstance(limits, Mapping) and _is_count(limits.get("pieces")) and _is_count(limits.get("edge"))
        expect(whole and isinstance(limits.get("always"), bool), f", labels, {name}", limits)
        sizes: Any = limits.get("mm3")
        plain = isinstance(sizes, list | tuple) and len(sizes) == 2 and all(type(one) in (int, float) for one in sizes)
        expect(plain and 0 <= sizes[0] <= sizes[1] <= MOST_MM3, f", labels, {name}", limits)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def label_map_fault(array: np.ndarray, voxel: float, names: Mapping[int, str], known: Mapping[str, Any]) -> str | None:
    """How a label map differs from all of the training set; None if it does not.

    A label must be there if it always was, have no more pieces than it had, no more voxels at the edge, and a volume between
    half the least and twice the most. Sizes in between say nothing against it: maps unlike all real ones in size are wanted.

    Args:
        array: label values (X, Y, Z).
        voxel: volume of a voxel in mm^3.
        names, known: as `describe_maps` takes and returns them.
    """
    values = sorted(names)
    if unknown := sorted(set(np.unique(array).tolist()) - set(values)):
        return f"unknown labels {unknown}"
    for value in values[1:]:
        mask, limits = array == value, known["labels"].get(names[value])
        if not mask.any():
            if limits is not None and limits["always"]:
                return f"no {names[value]}"
            continue
        if limits is None:
            return f"{names[value]}, which no training map has"
        size, (least, most) = float(mask.sum() * voxel), limits["mm3"]
        if not least / 2 <= size <= most * 2:
            return f"{size:.0f} mm3 of {names[value]}"
        if (pieces := count_pieces(mask)) > limits["pieces"]:
            return f"{pieces} pieces of {names[value]}"
        if (edge := count_at_edge(mask)) > limits["edge"]:
            return f"{edge} voxels of {names[value]} at the edge"
    if (pieces := count_pieces(array != values[0])) > known["pieces"]:
        return f"{pieces} pieces"
    return None


def draw_shape(known: Mapping[str, Any], seed: int) -> tuple[int, int, int]:
    """The grid (X, Y, Z) of one of the training set's maps; the same seed draws the same."""
    shapes = known["shapes"].split()
    x, y, z = map(int, shapes[int(np.random.default_rng(seed).integers(len(shapes)))].split("x"))
    return x, y, z
