"""The one path of every volume, real or generated: read, common axes, voxel size and box, window, noise, uint8."""

import base64
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cli.settings import FiniteFloat, Share, checked
from volumes import IntensityScaling, Volume, read_volume, resample
from volumes.placement import pad_or_crop

from .design import REAL, StudyCase

LEVELS = 255
TOLERANCE = 1e-3  # in mm: voxel sizes that differ by less are one
SMALLEST = 8  # voxels along an axis of the common box
MOST_CUT = 0.5  # warn if the common box leaves out more of a volume
logger = logging.getLogger(__name__)


@checked
@dataclass(frozen=True)
class Look:
    """How volumes are shown.

    Args:
        spacing: of the voxels in mm, in the order right, anterior, superior. None: along each axis the coarsest of all
            volumes.
        window: "percentile" or "window", and its limits, see `IntensityScaling`.
        low: lower limit.
        high: upper limit.
        noise: standard deviation of the noise on every volume, as a share of the window. It hides that a volume was
            stored in few gray levels.
    """

    spacing: tuple[float, float, float] | None = None
    kind: str = "percentile"
    low: FiniteFloat = 0.5
    high: FiniteFloat = 99.5
    noise: Share = 0.01


@dataclass(frozen=True)
class Grid:
    """The grid of every volume of a study: voxels along right, anterior, superior, and their size in mm."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]


def common_grid(cases: Sequence[StudyCase], look: Look) -> Grid:
    """Return the largest box that every volume fills, at the study's voxel size, so that none needs padding.

    Warns if volumes of one source would be interpolated and those of another not, which a reader may see.

    Raises: ValueError if the box is smaller than 8 voxels along an axis.
    """
    spacings, shapes = [], []
    for case in cases:
        volume = _read(case)
        spacings.append(volume.spacing)
        shapes.append(volume.shape)
    x, y, z = look.spacing or np.max(spacings, axis=0).tolist()
    spacing = (float(x), float(y), float(z))
    sizes = np.array([np.maximum(1, np.rint(np.array(s) * m / spacing)) for s, m in zip(shapes, spacings, strict=True)])
    a, b, c = sizes.min(axis=0).astype(int).tolist()
    if min(a, b, c) < SMALLEST:
        narrow = cases[int(sizes.min(axis=1).argmin())]
        raise ValueError(f"{narrow.file}: the box that all volumes share is {a} x {b} x {c} voxels; leave this one out")
    _warn_of_cuts(cases, sizes, (a, b, c))
    _warn_of_interpolation(cases, spacings, spacing)
    return Grid((a, b, c), spacing)


def _warn_of_cuts(cases: Sequence[StudyCase], sizes: np.ndarray, shape: tuple[int, int, int]) -> None:
    cut = 1 - np.prod(shape) / np.prod(sizes, axis=1)
    worst = int(cut.argmax())
    if cut[worst] > MOST_CUT:
        logger.warning(
            "all volumes are shown in the box that they share, which leaves out %.0f %% of %s; leave out small volumes",
            100 * cut[worst],
            cases[worst].file,
        )


def _warn_of_interpolation(
    cases: Sequence[StudyCase], spacings: Sequence[Sequence[float]], spacing: Sequence[float]
) -> None:
    changed: Counter[str] = Counter()
    for case, own in zip(cases, spacings, strict=True):
        changed[case.source] += not np.allclose(own, spacing, atol=TOLERANCE, rtol=0)
    count = Counter(case.source for case in cases)
    shares = {source: changed[source] / count[source] for source in count}
    if max(shares.values()) - min(shares.values()) > 0.1:
        logger.warning(
            "at a voxel size of %s mm these shares of the volumes are interpolated: %s. Readers may see the difference;"
            " give --spacing, coarser than that of all volumes",
            " x ".join(f"{mm:.4g}" for mm in spacing),
            ", ".join(f"{source} {share:.0%}" for source, share in shares.items()),
        )


def shown_voxels(case: StudyCase, grid: Grid, look: Look, noise_seed: int) -> np.ndarray:
    """Return a volume as it is shown: uint8 (X, Y, Z) of the study's grid, from 0 to 255 over the window."""
    volume = resample(_read(case), grid.spacing)
    array = pad_or_crop(volume.shape, grid.shape).apply(volume.array[0], float(volume.array.min()))
    scaling = IntensityScaling("window" if look.kind == "window" else "percentile", look.low, look.high)
    shares = (scaling.fit(array).apply(array.astype(np.float64)) + 1) / 2
    noise = np.random.default_rng(noise_seed).standard_normal(shares.shape) * look.noise
    return np.rint((shares + noise).clip(0, 1) * LEVELS).astype(np.uint8)


def as_script(name: str, voxels: np.ndarray) -> str:
    """Return the script that hands a volume to the page: uint8, x runs fastest. All of a study are equally long."""
    data = base64.b64encode(voxels.tobytes(order="F")).decode("ascii")
    return f'receiveVolume("{name}","{data}");\n'


def _read(case: StudyCase) -> Volume:
    volume = read_volume(Path(case.file))
    if len(volume.array) != 1:
        raise ValueError(f"{case.file}: has {len(volume.array)} channels; give files of one channel")
    return volume


def sources_of(cases: Sequence[StudyCase]) -> list[str]:
    """Return the names of the models whose volumes are among the cases, in the order of appearance."""
    return [source for source in dict.fromkeys(case.source for case in cases) if source != REAL]
