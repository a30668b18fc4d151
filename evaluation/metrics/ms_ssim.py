"""MS-SSIM between volumes, and how alike the volumes of a set are: a generator that collapses makes ever the same.

Volumes are (C, X, Y, Z) in [0, 1], of one shape.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.studies.class_adherence import RESAMPLES

from .set_distances import drawn_counts, spread

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of scales, finest first (Wang et al. 2003, section 3.2)
WINDOW, SIGMA = 7, 1.5  # voxels; Wang's window is 11, which small volumes hold at one scale or none
LUMINANCE, CONTRAST = 0.01**2, 0.03**2  # C1 and C2, of intensities that span 1


def scales_of(shape: Sequence[int]) -> int:
    """How many of the five scales volumes of these sides have: each has half the voxels a side, and the coarsest still
    holds a window. Raises: ValueError if not even one does."""
    scales = sum(min(shape) >> scale >= WINDOW for scale in range(len(WEIGHTS)))
    if not scales:
        raise ValueError(f"volumes of {tuple(shape)} voxels are too small for MS-SSIM; {WINDOW} a side are needed")
    return scales


def weights_of(scales: int) -> list[float]:
    """The weights of the finest `scales` scales, brought to a sum of 1: with fewer than five, figures do not compare
    with those of five."""
    return [weight / sum(WEIGHTS[:scales]) for weight in WEIGHTS[:scales]]


@torch.inference_mode()
def ms_ssim(first: Tensor, second: Tensor) -> Tensor:
    """Multi-scale structural similarity in 3-D (Wang et al. 2003, Eq. 7), of (B, C, X, Y, Z) in [0, 1]: (B,) in [0, 1].

    A Gaussian window of `WINDOW` voxels a side, as many scales as `scales_of` says, contrast and structure at each,
    luminance at the coarsest; negative means count as 0. Channels are averaged. 1 for equal volumes.

    Raises: ValueError for different shapes, and for volumes that are too small.
    """
    if first.shape != second.shape:
        raise ValueError(f"volumes of {tuple(first.shape)} and {tuple(second.shape)}: they must be of one shape")
    scales = scales_of(first.shape[2:])
    batch, channels = first.shape[:2]
    x, y = (volumes.float().reshape(-1, 1, *volumes.shape[2:]) for volumes in (first, second))
    result = torch.ones(len(x), device=x.device)
    for scale, weight in enumerate(weights_of(scales)):
        if scale:
            x, y = F.avg_pool3d(x, 2), F.avg_pool3d(y, 2)
        mean_x, mean_y, square_x, square_y, product = _blur(torch.cat([x, y, x * x, y * y, x * y])).chunk(5)
        variances = (square_x - mean_x**2).clamp_min(0) + (square_y - mean_y**2).clamp_min(0)
        similarity = (2 * (product - mean_x * mean_y) + CONTRAST) / (variances + CONTRAST)
        if scale == scales - 1:
            similarity = similarity * (2 * mean_x * mean_y + LUMINANCE) / (mean_x**2 + mean_y**2 + LUMINANCE)
        result = result * similarity.mean((1, 2, 3, 4)).clamp(0, 1) ** weight
    return result.reshape(batch, channels).mean(1)


def random_pairs(count: int, pairs: int, seed: int, subjects: Sequence[Any] | None = None) -> np.ndarray:
    """At most `pairs` different pairs of `count` volumes, (P, 2) indices; of one subject no two volumes are a pair.

    Raises: ValueError if there is no pair.
    """
    check_pairs(list(range(count)) if subjects is None else subjects)
    every = np.stack(np.triu_indices(count, 1), 1)
    if subjects is not None:
        _, whose = np.unique(np.asarray(subjects), return_inverse=True)
        every = every[whose[every[:, 0]] != whose[every[:, 1]]]
    chosen = np.random.default_rng(seed).permutation(len(every))[:pairs]
    return every[np.sort(chosen)]


def check_pairs(subjects: Sequence[Any], name: str = "") -> None:
    """Raises: ValueError for volumes of one subject, which make no pair."""
    if len(set(subjects)) < 2:
        raise ValueError(f"{len(subjects)} {name + ' ' if name else ''}volumes make no pair of different subjects")


def pair_similarity(
    volumes: Sequence[np.ndarray],
    pairs: np.ndarray,
    device: torch.device | str = "cpu",
    on_pair: Callable[[], None] | None = None,
) -> np.ndarray:
    """`ms_ssim` of each pair, (P,), of volumes (C, X, Y, Z) of one shape."""
    found = []
    for pair in pairs:
        first, second = (torch.from_numpy(np.asarray(volumes[i], np.float32))[None].to(device) for i in pair)
        found.append(ms_ssim(first, second).item())
        if on_pair is not None:
            on_pair()
    return np.array(found)


def compare_diversity(
    values: Mapping[str, np.ndarray],
    pairs: Mapping[str, np.ndarray],
    counts: Mapping[str, int],
    seed: int = 0,
    subjects: Mapping[str, Sequence[Any] | None] | None = None,
) -> dict[str, Any]:
    """How alike generated volumes are to each other, against real ones.

    Args:
        values: by set ("training", "test", "generated") what `pair_similarity` found of `pairs` (P, 2).
        counts: by set how many volumes it has.
        subjects: by set whose each volume is, if subjects have several.
    Returns: by set {"mean", "interval", "std" over pairs, "pairs"}; "generated_minus_test", positive when generated
        volumes are more alike than real ones, its floor "training_minus_test", and "generated_minus_training" (whose masks
        generated volumes mostly have), each {"mean", "interval"}. Intervals are of 95 %, by drawing subjects, not pairs,
        anew with replacement (Efron 1979).
    """
    random = np.random.default_rng(seed)
    report, drawn = {}, {}
    for name, found in values.items():
        often = drawn_counts(counts[name], (subjects or {}).get(name), RESAMPLES, random)
        weight = often[:, pairs[name][:, 0]] * often[:, pairs[name][:, 1]]
        kept = weight.sum(1) > 0  # of very few pairs, a draw may hold none
        drawn[name] = (weight @ found)[kept] / weight.sum(1)[kept]
        interval = spread(drawn[name])["interval"]
        report[name] = {
            "mean": float(found.mean()),
            "interval": interval,
            "std": float(found.std()),
            "pairs": len(found),
        }
    for one, other in (("generated", "test"), ("training", "test"), ("generated", "training")):
        least = min(len(drawn[one]), len(drawn[other]))
        interval = spread(drawn[one][:least] - drawn[other][:least])["interval"]
        mean = report[one]["mean"] - report[other]["mean"]
        report[f"{one}_minus_{other}"] = {"mean": mean, "interval": interval}
    return report


def _blur(volumes: Tensor) -> Tensor:
    """(N, 1, X, Y, Z), averaged under the window where it fits in whole."""
    offsets = torch.arange(WINDOW, device=volumes.device) - (WINDOW - 1) / 2
    window = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    window = window / window.sum()
    for axis in range(3):
        volumes = F.conv3d(volumes, window.reshape([1, 1, *(WINDOW if a == axis else 1 for a in range(3))]))
    return volumes
