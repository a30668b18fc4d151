"""Find oddities in a volume's geometry. The doctor, training and generation report them in the same words.

An impossible header is refused when it is read (`raw.check_grid`), an impossible resampling when it is requested.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np

from .volume import SourceGrid, affine_spacing

USUAL = (0.02, 20.0)  # mm between voxels
OBLIQUE = 30.0  # degrees
APART = 0.5  # voxels: two transforms of one grid differ by rounding, which is less
FEW = 8  # voxels along an axis
MANY = 64.0  # times as many voxels


@dataclass(frozen=True)
class Oddity:
    """An oddity: `check` is its subject, `what` and `remedy` are the same for all volumes that have it, `detail`
    differs between them.
    """

    check: str
    what: str
    remedy: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.what}{f' ({self.detail})' if self.detail else ''}; {self.remedy}"


def header_oddities(grid: SourceGrid) -> list[Oddity]:
    """Find oddities in a stored grid: its unit, the size of its voxels, its shape, and its transforms."""
    found, spacing = [], affine_spacing(grid.affine)
    size = f"{' x '.join(f'{mm:.4g}' for mm in spacing)} mm"
    if not grid.qform_code and not grid.sform_code:
        remedy = "write them with the scanner's orientation, or do not rely on left and right"
        found.append(Oddity("orientation", "no qform and no sform, so left and right are unknown", remedy))
    elif grid.sform_code and (detail := contradiction(grid)):
        remedy = (
            "the sform is used; see in a viewer which is right, and write it as both (nibabel: "
            "image.set_qform(image.affine, 1))"
        )
        found.append(Oddity("orientation", "sform and qform contradict each other", remedy, detail))
    if obliqueness(grid.affine) > OBLIQUE:
        what = f"axes more than {OBLIQUE:g} degrees from the patient's"
        found.append(Oddity("orientation", what, "resample them to a straight grid"))
    if grid.unit not in ("mm", "unknown"):
        remedy = (
            "make sure that the voxel sizes are right, they were converted to mm; if the numbers are in mm, set "
            "data.units: mm"
        )
        found.append(Oddity("units", "the header's unit is not mm", remedy, f"{grid.unit}, voxels of {size}"))
    if min(spacing) < USUAL[0] or max(spacing) > USUAL[1]:
        what = f"voxels below {USUAL[0]:g} mm or above {USUAL[1]:g} mm"
        remedy = "the unit is likely wrong; correct the header, or set data.units"
        found.append(Oddity("units", what, remedy, size))
    if min(grid.shape) == 1:
        remedy = "a model needs volumes: stack the planes; where an axis of channels comes first, set data.axes: CXYZ"
        found.append(Oddity("shape", "a single plane of voxels", remedy, " x ".join(map(str, grid.shape))))
    return found


def resampling_oddities(before: Sequence[int], after: Sequence[int]) -> list[Oddity]:
    """Find oddities in resampling (X, Y, Z) voxels to others: far fewer voxels, or far more."""
    found, detail = [], f"{' x '.join(map(str, before))} to {' x '.join(map(str, after))} voxels"
    remedy = "make sure that the header's unit and data.spacing are right, or set data.units"
    if any(new < FEW and 2 * new <= old for old, new in zip(before, after, strict=True)):
        found.append(Oddity("shape", f"resampling leaves fewer than {FEW} voxels along an axis", remedy, detail))
    if math.prod(after) > MANY * math.prod(before):
        what = f"resampling makes more than {MANY:g} times as many voxels"
        found.append(Oddity("shape", what, remedy, detail))
    return found


def gathered(found: Iterable[tuple[str, Oddity]]) -> list[tuple[Oddity, dict[str, str]]]:
    """List each oddity once, with the files that have it: {file: file and detail}."""
    by_kind: dict[tuple[str, str, str], tuple[Oddity, dict[str, str]]] = {}
    for file, oddity in found:
        _, files = by_kind.setdefault((oddity.check, oddity.what, oddity.remedy), (oddity, {}))
        files[file] = f"{file} ({oddity.detail})" if oddity.detail else file
    return list(by_kind.values())


def obliqueness(affine: np.ndarray) -> float:
    """Compute the largest angle, in degrees, between a voxel axis and the patient's nearest axis."""
    axes = np.asarray(affine, np.float64)[:3, :3]
    axes = np.abs(axes / np.linalg.norm(axes, axis=0))
    return float(np.degrees(np.arccos(np.clip(axes.max(axis=0).min(), 0, 1))))


def contradiction(grid: SourceGrid) -> str:
    """Describe how the qform differs from the sform (`grid.affine`) by more than rounding; "" if it does not."""
    if not grid.qform_code:
        return ""
    if grid.qform is None:
        return "the numbers of the qform do not make a transform"
    corners = np.array([(*one, 1) for one in itertools.product(*((0, n - 1) for n in grid.shape))]).T
    if np.abs(np.linalg.inv(grid.affine) @ (grid.qform @ corners) - corners).max() <= APART:
        return ""
    axes, others = ("".join(map(str, nib.orientations.aff2axcodes(one))) for one in (grid.affine, grid.qform))
    if axes != others:
        return f"axes {axes} by the sform, {others} by the qform"
    sizes, other_sizes = affine_spacing(grid.affine), affine_spacing(grid.qform)
    if not np.allclose(sizes, other_sizes, rtol=0.01, atol=0):
        texts = [" x ".join(f"{mm:.4g}" for mm in one) for one in (sizes, other_sizes)]
        return f"voxels of {texts[0]} mm by the sform, {texts[1]} by the qform"
    apart = np.linalg.norm(((grid.affine - grid.qform) @ corners)[:3], axis=0).max()
    return f"corners up to {apart:.3g} mm apart"
