"""Which grid the volumes of a case are brought onto where they lie on several, by what their headers say."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from volumes.data.alignment import MIN_SHARE
from volumes.volume import VolumeError

from .contents import Grid, Reader
from .layouts.layout import Key, Layout
from .layouts.structures import ROLE as STRUCTURES

ALIKE = 1.05  # ratio of two fields of view, up to which neither shows less
COMPARED = 5  # cases


def paths_of(layout: Layout, role: str) -> dict[Key, str]:
    """Return the file of each case that shows a role's grid: for label maps that are made, one of the structures."""
    if role == STRUCTURES and layout.structures:
        return {key: next(iter(files.values())) for key, files in layout.structures.items()}
    return {key: file.path for key, file in layout.of_role(role).items()}


def same_grid(layout: Layout, reader: Reader, one: str, other: str) -> bool:
    """Return whether two roles share the grid in most of a few cases that have both."""
    ours, theirs = paths_of(layout, one), paths_of(layout, other)
    both = [key for key in layout.keys if key in ours and key in theirs][:COMPARED]
    fitting = [key for key in both if _fits(reader, ours[key], theirs[key])]
    return bool(both) and 2 * len(fitting) > len(both)


def on_one_grid(layout: Layout, reader: Reader, keys: Sequence[Key], roles: Sequence[str]) -> bool:
    """Return whether, in each of these cases, all of these roles lie on the same grid."""
    first, *others = (paths_of(layout, role) for role in roles)
    return all(_fits(reader, first[key], files[key]) for files in others for key in keys)


def _fits(reader: Reader, one: str, other: str) -> bool:
    try:
        return reader.grid(one).fits(reader.grid(other))
    except VolumeError:
        return False


def least_shown(layout: Layout, reader: Reader, roles: Sequence[str], mask: str | None) -> str:
    """Return the channel that shows the least, by the median of its boxes in mm^3.

    Among channels that show as little, it is one on the mask's grid; else the one with the smallest voxels.
    """
    boxes, voxels = {}, {}
    for role in roles:
        grids = [grid for path in list(paths_of(layout, role).values())[:COMPARED] if (grid := _read(reader, path))]
        sizes = [np.prod(grid.spacing) for grid in grids]
        boxes[role] = float(np.median([np.prod(g.shape) * s for g, s in zip(grids, sizes, strict=True)] or [np.inf]))
        voxels[role] = float(np.median(sizes or [np.inf]))
    least = min(boxes.values())
    alike = [role for role in roles if boxes[role] <= ALIKE * least]
    on_mask = [role for role in alike if mask is not None and same_grid(layout, reader, mask, role)]
    return min(on_mask or alike, key=lambda role: voxels[role])


def _read(reader: Reader, path: str) -> Grid | None:
    try:
        return reader.grid(path)
    except VolumeError:  # named when the cases are checked
        return None


def case_fault(reader: Reader, paths: Mapping[str, str], reference: str | None) -> str:
    """Return why the files of a case cannot be used together; "" if they can.

    Args:
        reader: of the folder.
        paths: {role: file}.
        reference: the role onto whose grid the others are resampled.
    """
    try:
        grids = {role: reader.grid(path) for role, path in paths.items()}
    except VolumeError as error:
        return str(error)
    first = reference or next(iter(paths))
    off = {role: grid for role, grid in grids.items() if not grids[first].fits(grid)}
    if off and reference is None:
        return f"{paths[first]} and {paths[next(iter(off))]} have different grids (--resample_to would resample them)"
    share = shown_box(grids[first], off)[1]
    if share < MIN_SHARE:
        return f"{', '.join(paths[role] for role in off)} shows {share:.1%} of the box of {paths[first]}, too little"
    return ""


def case_grids(
    layout: Layout, reader: Reader, keys: Sequence[Key], roles: Sequence[str], reference: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels and spacing, (n, 3) each, of the cases on the grid of a role, cut to what all roles show."""
    files = {role: paths_of(layout, role) for role in roles}
    shapes, spacings = [], []
    for key in keys:
        grids = {role: reader.grid(files[role][key]) for role in roles}
        first = grids[reference]
        shape, _ = shown_box(first, {role: grid for role, grid in grids.items() if not first.fits(grid)})
        shapes.append(shape)
        spacings.append(first.spacing)
    return np.array(shapes), np.array(spacings)


def remaining_share(layout: Layout, reader: Reader, roles: Sequence[str], reference: str) -> float:
    """Return how much of the box of a role all roles show: the median of a few cases that have all of them."""
    files = {role: paths_of(layout, role) for role in roles}
    shares = []
    for key in [key for key in layout.keys if all(key in files[role] for role in roles)][:COMPARED]:
        grids = {role: grid for role in roles if (grid := _read(reader, files[role][key])) is not None}
        if len(grids) == len(roles):
            shares.append(shown_box(grids[reference], grids)[1])
    return float(np.median(shares or [1.0]))


def shown_box(reference: Grid, others: Mapping[str, Grid]) -> tuple[tuple[int, ...], float]:
    """Return the size in voxels of the box of a grid that other grids show as well, and its share of the whole.

    Grids that are turned against the reference count with the box around them, so the true share may be smaller.
    """
    low, high = np.full(3, -0.5), np.array(reference.shape) - 0.5
    to_reference = np.linalg.inv(reference.affine)
    for other in others.values():
        ends = [(-0.5, size - 0.5) for size in other.shape]
        corners = np.array([[*corner, 1.0] for corner in itertools.product(*ends)])
        placed = (corners @ (to_reference @ other.affine).T)[:, :3]
        low, high = np.maximum(low, placed.min(axis=0)), np.minimum(high, placed.max(axis=0))
    size = np.maximum(high - low, 0)
    shape = tuple(int(n) for n in np.maximum(np.floor(size + 1e-6), 1))
    return shape, float(np.prod(size) / np.prod(reference.shape))
