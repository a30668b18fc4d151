"""Bring the channels and the mask of a case onto one grid: that of a reference channel (`data.resample_to`).

What a volume does not show of that grid is not background. It is outside the field of view, which is what all volumes
of the case show; the case is the box around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from volumes.placement import Placement, pad_or_crop
from volumes.resampling import resample, resample_to
from volumes.volume import PADDING, Volume, VolumeError, same_grid

MIN_SHARE = 0.05  # of the reference's voxels: volumes that share less are of another place, or misplaced
MASK = "the mask"  # a name that no channel has: channels name files


@dataclass(frozen=True)
class Resampled:
    """A volume that lay on another grid than the reference.

    Attributes:
        name: its channel, or `MASK`.
        share: the fraction of the reference's voxels that it shows.
        shift: mm between the centers of the two boxes.
        ratio: of the two voxel sizes, 1 or more: the largest of the three axes.
    """

    name: str
    share: float
    shift: float
    ratio: float


@dataclass(frozen=True)
class Aligned:
    """A case on one grid.

    Attributes:
        image: (C, X, Y, Z) float32 in file units; NaN outside the field of view.
        mask: label indices (1, X, Y, Z), `PADDING` outside the field of view.
        seen: bool (X, Y, Z), the field of view; None if it is the whole box.
        resampled: the volumes that lay on another grid.
        share: the fraction of the reference's voxels that all of them show.
        shapes: (X, Y, Z) of the reference before and after `spacing`.
        box: the box of the reference's grid, before `spacing`, to which `crop` cut the case.
    """

    image: Volume
    mask: Volume | None
    seen: np.ndarray | None = None
    resampled: tuple[Resampled, ...] = ()
    share: float = 1.0
    shapes: tuple[tuple[int, int, int], tuple[int, int, int]] = ((0, 0, 0), (0, 0, 0))
    box: Placement | None = None


def onto_grid(volume: Volume, grid: Volume, *, labels: bool = False) -> Volume:
    """Resample a volume onto the grid of another, linearly, or label indices by the nearest voxel. Voxels that it does
    not show are NaN, of labels `PADDING`.
    """
    fill = PADDING if labels else float("nan")
    return resample_to(volume, grid.shape, grid.affine, nearest=labels, fill=fill)


def shown(volume: Volume) -> np.ndarray:
    """Return where a result of `onto_grid` shows something: bool (X, Y, Z)."""
    if volume.array.dtype.kind == "f":
        return np.logical_and.reduce(np.isfinite(volume.array))
    return volume.array[0] != PADDING


def check_share(share: float, name: str, reference: str) -> None:
    """Raise VolumeError if `share` of the reference's voxels is too little for two volumes of one case."""
    if share < MIN_SHARE:
        part = f"only {share:.1%}" if share else "nothing"
        raise VolumeError(
            f"{name}: shows {part} of the box of {reference}, and {MIN_SHARE:.0%} are needed; do both show the same "
            "patient in the same position? Correct its geometry, or exclude the case"
        )


def align(
    images: Mapping[str, Volume],
    mask: Volume | None,
    reference: str,
    spacing: Sequence[float] | None = None,
    files: Mapping[str, str] | None = None,
) -> Aligned:
    """Resample the volumes of a case onto the grid of one of them, once each, and cut out the box that all of them
    show.

    Args:
        images: (C, X, Y, Z) float32 by channel.
        mask: label indices.
        reference: the channel whose grid is kept.
        spacing: mm; the grid has the reference's orientation and center, see `resample`. None keeps its voxels.
        files: of the channels and of `MASK`, for messages.

    Raises: VolumeError naming the file of a volume that shows less than `MIN_SHARE` of the reference's box.
    """
    first, names = images[reference], files or {}
    volumes = {**images, **({} if mask is None else {MASK: mask})}
    grid, found, parts = _spaced(first, spacing, names.get(reference, reference)), [], {}
    for name, volume in volumes.items():
        file, labels = names.get(name, name), name == MASK
        if name == reference:
            parts[name] = grid
        elif same_grid(first, volume):
            parts[name] = _spaced(volume, spacing, file, nearest=labels)
        else:
            try:
                parts[name] = onto_grid(volume, grid, labels=labels)
            except VolumeError as error:
                raise VolumeError(f"{file}: {error}") from error
            share = float(shown(parts[name]).mean())
            check_share(share, file, names.get(reference, reference))
            found.append(_compared(name, volume, first, share))
    shapes = (first.shape, grid.shape)
    if not found:
        return Aligned(_joined(parts, grid), parts.get(MASK), shapes=shapes)
    seen = np.logical_and.reduce([shown(parts[one.name]) for one in found])
    share = float(seen.mean())
    least = min(found, key=lambda one: one.share)
    check_share(share, f"{names.get(least.name, least.name)}, with the other volumes of its case", reference)
    return _cut(parts, grid, seen, tuple(found), share, shapes)


def describe_resampling(cases: Sequence[tuple[Resampled, ...]], shares: Sequence[float], reference: str) -> str | None:
    """Say in one sentence what was resampled in a data set; None if all volumes lay on the reference's grid.

    Args:
        cases: `Aligned.resampled` of each case; shares: `Aligned.share` of each.
    """
    if not (every := [one for case in cases for one in case]):
        return None
    counts = {name: sum(one.name == name for one in every) for name in dict.fromkeys(one.name for one in every)}
    which = ", ".join(f"{name} of {count}" for name, count in counts.items())
    moved = [share for case, share in zip(cases, shares, strict=True) if case]
    shift, ratio = (max(getattr(one, name) for one in every) for name in ("shift", "ratio"))
    sizes = f"voxel sizes up to {ratio:.3g} times different" if ratio > 1.01 else "voxels of one size"
    text = (
        f"{len(moved)} of {len(cases)} cases were resampled onto {reference}'s grid ({which}): centers up to "
        f"{shift:.3g} mm apart, {sizes}"
    )
    if min(moved) < 1:
        text += (
            f"; all volumes together show {min(moved):.0%} to {max(moved):.0%} of {reference}'s box (median "
            f"{float(np.median(moved)):.0%}), and the rest is left out"
        )
    return text


def _spaced(volume: Volume, spacing: Sequence[float] | None, file: str, *, nearest: bool = False) -> Volume:
    if spacing is None:
        return volume
    try:
        return resample(volume, list(spacing), nearest=nearest)
    except VolumeError as error:
        raise VolumeError(f"{file}: {error}") from error


def _compared(name: str, volume: Volume, reference: Volume, share: float) -> Resampled:
    centers = [one.affine[:3] @ [*((np.array(one.shape) - 1) / 2), 1] for one in (volume, reference)]
    ratios = np.log(volume.spacing) - np.log(reference.spacing)
    shift = float(np.linalg.norm(centers[0] - centers[1]))
    return Resampled(name, share, shift, float(np.exp(np.abs(ratios).max())))


def _joined(parts: Mapping[str, Volume], grid: Volume) -> Volume:
    return grid.replace(np.concatenate([part.array for name, part in parts.items() if name != MASK]))


def _cut(
    parts: Mapping[str, Volume],
    grid: Volume,
    seen: np.ndarray,
    found: tuple[Resampled, ...],
    share: float,
    shapes: tuple[tuple[int, int, int], tuple[int, int, int]],
) -> Aligned:
    """Cut all volumes to the box around `seen`, and mark what is outside it."""
    low, high = [], []
    for axis in range(3):
        along = np.flatnonzero(seen.any(axis=tuple({0, 1, 2} - {axis})))
        low.append(int(along[0]))
        high.append(int(along[-1]) + 1)
    placement = pad_or_crop(grid.shape, tuple(np.subtract(high, low).tolist()), offset=tuple(low))
    affine, seen = placement.shift(grid.affine), placement.apply(seen[None], 0)[0]
    image = np.where(seen, placement.apply(_joined(parts, grid).array, 0), np.float32("nan"))
    mask = None
    if MASK in parts:
        labels = np.where(seen, placement.apply(parts[MASK].array, 0), np.int16(PADDING))
        mask = Volume(labels, affine, parts[MASK].source)
    whole = bool(seen.all())
    return Aligned(Volume(image, affine, grid.source), mask, None if whole else seen, found, share, shapes)
