"""Read cases as a training would, and reduce each to the few values that the doctor's checks use.

No volume is kept, so a set of any size fits in memory.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

from volumes import (
    PHANTOM_LABELS,
    Case,
    DataConfig,
    Placement,
    SourceGrid,
    Volume,
    VolumeError,
    load_cases,
    same_grid,
)
from volumes.data.alignment import Resampled
from volumes.data.case_files import read_case
from volumes.plausible import Oddity
from volumes.prepared.case import PreparedCase, prepare
from volumes.prepared.preparation import READERS

THUMBNAIL = 16  # elements per side
MIN_LEVELS = 16  # different intensities, below which the step between them means nothing
STEP_ERROR = 0.05  # of a step, by which an intensity may be off a multiple of it


@dataclass(frozen=True)
class Finding:
    """A line of the doctor's report. `level`: "OK", "WARN" or "FAIL"; `files`: the cases or files it is about."""

    level: str
    check: str
    message: str
    remedy: str = ""
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.level:4} {self.check}: {self.message}" + (f"\n     -> {self.remedy}" if self.remedy else "")


def ok(check: str, message: str, files: Sequence[str] = ()) -> Finding:
    return Finding("OK", check, message, files=tuple(files))


def warn(check: str, message: str, remedy: str, files: Sequence[str] = ()) -> Finding:
    return Finding("WARN", check, message, remedy, tuple(files))


def fail(check: str, message: str, remedy: str, files: Sequence[str] = ()) -> Finding:
    return Finding("FAIL", check, message, remedy, tuple(files))


def names(files: Sequence[str], most: int = 5) -> str:
    """List the first few files, and the number of the others."""
    return ", ".join(files[:most]) + (f" and {len(files) - most} more" if len(files) > most else "")


@dataclass(frozen=True)
class Examined:
    """The values kept from a case.

    `shape` and `spacing` (mm) are the file's, in RAS+ order; `model_shape` is what a model sees. By channel: `low` and
    `high`, the scale in file units; `highest`, the largest intensity; `clipped`, the fraction of voxels outside the
    scale, and `above`, the fraction above it; `covered`, the fraction of the scale that percentiles 1 to 99 span;
    `step`, see `quantization_step`. `labels` are volumes in ml by name (0 if the case lacks the label); `digest` is of
    the stored voxels; `voxels`, see `volumes.data.subjects`; `thumbnail`, see `thumbnail_of`; `resampled` and `share`,
    and `box`, see `volumes.data.alignment.Aligned`. `orientation` of phantoms is "".
    """

    case: Case
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    model_shape: tuple[int, int, int]
    low: tuple[float, ...]
    high: tuple[float, ...]
    highest: tuple[float, ...]
    clipped: tuple[float, ...]
    above: tuple[float, ...]
    covered: tuple[float, ...]
    step: tuple[float | None, ...]
    digest: str
    voxels: tuple[str, ...]
    thumbnail: np.ndarray
    labels: dict[str, float] = field(default_factory=dict)
    numbers: tuple[float, ...] = ()
    classes: tuple[int, ...] = ()
    orientation: str = ""
    unit: str = "mm"
    oddities: tuple[tuple[str, Oddity], ...] = ()
    resampled: tuple[Resampled, ...] = ()
    share: float = 1.0
    box: Placement | None = None

    @property
    def file(self) -> str:
        """The first image file, for messages; the name of a phantom."""
        return str(next(iter(self.case.images.values()), self.case.name))


def find_cases(config: DataConfig) -> tuple[list[Case], list[Finding]]:
    """List all cases, with findings if training would refuse the list. Rows of missing files stay: reading refuses
    them.

    All subjects in two splits are named; their cases keep the splits of the table.
    """
    if config.masks and not config.label_names:
        remedy = "name every label in data.label_names, such as {0: background, 1: tumor}"
        return [], [fail("labels", "masks are given without the names of their labels", remedy)]
    lenient = replace(config, on_error="skip")
    try:
        return load_cases(lenient), []
    except ValueError as error:
        refused = str(error)
    if not config.split:
        return [], [fail("files", refused, "training cannot start before this is fixed")]
    try:
        cases = load_cases(replace(lenient, split=None, test_fraction=0.0, validation_fraction=0.0))
    except ValueError as error:
        return [], [fail("files", str(error), "training cannot start before this is fixed")]
    cases = [replace(case, split=str(case.metadata.get(config.split, ""))) for case in cases]
    splits: dict[str, set[str]] = {}
    for case in cases:
        splits.setdefault(case.subject, set()).add(case.split)
    torn = {subject: sorted(names_) for subject, names_ in splits.items() if len(names_) > 1}
    if not torn:
        return cases, [fail("splits", refused, "training cannot start before this is fixed")]
    both = [case.name for case in cases if case.subject in torn]
    listed = names([f"{subject} ({', '.join(found)})" for subject, found in sorted(torn.items())])
    remedy = f"put all volumes of a subject into one split in column {config.split!r}: {names(both, 12)}"
    return cases, [fail("splits", f"{len(torn)} subjects are in two splits: {listed}", remedy, both)]


def examine_cases(
    cases: Sequence[Case],
    config: DataConfig,
    on_case: Callable[[str], object] = lambda name: None,
    *,
    at_once: int = READERS,
) -> tuple[list[Examined], list[tuple[Case, str]]]:
    """Examine all cases, `at_once` at a time. Returns them in order, and those that training would refuse with the
    reason. `on_case(name)` is called after each.
    """
    examined, refused = [], []
    with ThreadPoolExecutor(at_once) as readers:  # reading and sorting run outside the interpreter's lock
        jobs = [readers.submit(examine, case, config) for case in cases]
        try:
            for case, job in zip(cases, jobs, strict=True):
                try:
                    examined.append(job.result())
                except VolumeError as error:
                    refused.append((case, str(error)))
                on_case(case.name)
        except BaseException:  # Ctrl-C too: what was not begun is not read
            readers.shutdown(cancel_futures=True)
            raise
    return examined, refused


def examine(case: Case, config: DataConfig) -> Examined:
    """Read a case as training does, and its voxels as they are stored. Raises: VolumeError naming the file."""
    prepared = prepare(case, config)
    stored, grid = _stored(case, config, prepared)
    raw = [channel for volume in stored for channel in volume.array]
    count, digest = len(raw), _digest(raw)
    if prepared.box is not None and not config.image_labels:
        raw = [channel for volume in stored for channel in _in_box(volume, grid, prepared.box)]
    clipped, above, covered = [], [], []
    for channel, scale in zip(raw, prepared.scales, strict=True):
        above.append(float((channel > scale.high).mean()))
        clipped.append(above[-1] + float((channel < scale.low).mean()))
        low, high = np.clip(np.percentile(channel, (1, 99)), scale.low, scale.high)
        covered.append(float((high - low) / (scale.high - scale.low)))
    is_map = bool(config.image_labels)
    return Examined(
        case=case,
        shape=grid.shape,
        spacing=grid.spacing,
        model_shape=prepared.image.shape,
        low=tuple(float(scale.low) for scale in prepared.scales),
        high=tuple(float(scale.high) for scale in prepared.scales),
        highest=tuple(float(channel.max()) for channel in raw),
        clipped=tuple(clipped),
        above=tuple(above),
        covered=tuple(covered),
        step=(None,) * count if is_map else tuple(map(quantization_step, raw)),
        voxels=prepared.voxels,
        digest=digest,
        thumbnail=thumbnail_of(prepared.image.array),
        labels=_label_volumes(prepared, config),
        numbers=prepared.numbers,
        classes=prepared.classes,
        oddities=prepared.oddities,
        resampled=prepared.resampled,
        share=prepared.share,
        box=prepared.box,
        **_header(prepared.image.source),
    )


def thumbnail_of(image: np.ndarray) -> np.ndarray:
    """Map (C, X, Y, Z) to (2, C * THUMBNAIL ** 3) float32: the volume and its mirror image along the first axis,
    averaged to `THUMBNAIL` per side, with mean 0 and length 1, so that products are correlations. A constant volume
    gives 0.
    """
    small = F.adaptive_avg_pool3d(torch.from_numpy(np.ascontiguousarray(image, np.float32))[None], THUMBNAIL)[0]
    rows = torch.stack([small.flatten(), small.flip(1).flatten()])
    rows = rows - rows.mean(1, keepdim=True)
    return (rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-6)).numpy()


def quantization_step(array: np.ndarray) -> float | None:
    """Find the step, in file units, whose multiples above the lowest intensity are all other intensities; None if there
    is none, or if there are fewer than `MIN_LEVELS` intensities.

    Integers that were multiplied by a factor have that step: a fingerprint of a scan, which volumes that were scaled
    together share. The step is fitted to more and more levels, because rounding errors of float32 add up.
    """
    levels = np.unique(np.asarray(array, np.float64))
    if len(levels) < MIN_LEVELS:
        return None
    heights = levels - levels[0]
    step = float(np.diff(levels).min())
    count = MIN_LEVELS
    while True:
        multiples = np.rint(heights[:count] / step)
        if np.abs(heights[:count] / step - multiples).max() > STEP_ERROR:
            return None
        step = float((heights[:count] @ multiples) / (multiples @ multiples))
        if count == len(levels):
            return step
        count = min(2 * count, len(levels))


def _stored(case: Case, config: DataConfig, prepared: PreparedCase) -> tuple[list[Volume], Volume]:
    """Read the images in the units of their files, before resampling, and the volume whose grid is kept."""
    if config.image_labels:
        return [prepared.image], prepared.image
    stored = read_case(case, config, masks=False)
    return list(stored.images.values()), stored.reference(config)


def _in_box(volume: Volume, grid: Volume, box: Placement) -> np.ndarray:
    """The voxels of a volume that lie in a box of a grid: (C, x, y, z), or (C, N) where it is another grid than the
    volume's own.
    """
    if same_grid(volume, grid):
        return box.apply(volume.array, 0)
    to_grid = np.linalg.inv(grid.affine) @ volume.affine
    inside = np.ones(volume.shape, bool)
    for row, low, size in zip(to_grid[:3], box.start, box.target, strict=True):
        i, j, k = (factor * np.arange(n) for factor, n in zip(row[:3], volume.shape, strict=True))
        place = i[:, None, None] + j[:, None] + k + row[3]
        inside &= (place > low - 0.5) & (place < low + size - 0.5)
    return volume.array[:, inside] if inside.any() else volume.array  # larger voxels than the box


def _digest(channels: Sequence[np.ndarray]) -> str:
    """Hash voxels as they are stored."""
    digest = hashlib.sha256()
    for channel in channels:
        digest.update(str(channel.shape).encode() + np.ascontiguousarray(channel).tobytes())
    return digest.hexdigest()


def _label_volumes(prepared: PreparedCase, config: DataConfig) -> dict[str, float]:
    """Return volumes in ml of the labels of a mask, or of a label map, without the background."""
    milliliters = float(np.prod(prepared.image.spacing)) / 1000
    if prepared.mask is not None:
        labels = sorted((config.label_names or PHANTOM_LABELS).items())
        counts = np.bincount(prepared.mask.array[prepared.mask.array >= 0], minlength=len(labels))
        return {name: float(counts[i] * milliliters) for i, (_, name) in enumerate(labels) if i}
    if config.image_labels:
        sizes = (prepared.image.array > 0).sum((1, 2, 3)) * milliliters
        return dict(zip(config.channels, map(float, sizes), strict=True))
    return {}


def _header(grid: SourceGrid | None) -> dict[str, str]:
    """Return orientation and unit of the first image file; {} for phantoms."""
    if grid is None:
        return {}
    return {
        "orientation": "".join(str(axis) for axis in nib.orientations.aff2axcodes(grid.affine)),
        "unit": grid.unit,
    }
