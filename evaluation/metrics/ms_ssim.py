"""MS-SSIM between volumes, and how alike the volumes of a set are: a generator that collapses repeats itself.

Volumes are (C, X, Y, Z) in [0, 1], of one shape.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.stats.bootstrap import Estimate, Units, interval_of, resample_subjects, subjects_or_volumes
from volumes.placement import center_crop

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of scales, finest first (Wang et al. 2003, section 3.2)
WINDOW, SIGMA = 7, 1.5  # voxels; Wang's window is 11, which small volumes hold at one scale or none
MOST_LISTED = 10_000_000  # pairs, of some 4,500 volumes; of more, pairs are chosen without a list of all
LUMINANCE, CONTRAST = 0.01**2, 0.03**2  # C1 and C2, of intensities that span 1


def scales_of(shape: Sequence[int]) -> int:
    """Count the scales (at most five) for volumes of this shape. Each scale halves the sides, and the coarsest still
    holds a window.

    Raises: ValueError if not even one does."""
    scales = sum(min(shape) >> scale >= WINDOW for scale in range(len(WEIGHTS)))
    if not scales:
        raise ValueError(f"volumes of {tuple(shape)} voxels are too small for MS-SSIM; give {WINDOW} or more per side")
    return scales


def weights_of(scales: int) -> list[float]:
    """Return the weights of the finest `scales` scales, scaled to a sum of 1. Figures of different numbers of scales
    are not comparable."""
    return [weight / sum(WEIGHTS[:scales]) for weight in WEIGHTS[:scales]]


@torch.inference_mode()
def ms_ssim(first: Tensor, second: Tensor) -> Tensor:
    """Compute the multi-scale structural similarity in 3-D (Wang et al. 2003, Eq. 7) of (B, C, X, Y, Z) in [0, 1]: (B,)
    in [0, 1].

    A Gaussian window of `WINDOW` voxels per side, `scales_of` scales, contrast and structure at each, luminance at the
    coarsest; negative means count as 0. Channels are averaged. 1 for equal volumes.

    Raises: ValueError for different shapes, and for volumes that are too small.
    """
    if first.shape != second.shape:
        raise ValueError(f"volumes of {tuple(first.shape)} and {tuple(second.shape)}: their shapes must be equal")
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


def random_pairs(count: int, pairs: int, seed: int, subjects: Units | None = None) -> np.ndarray:
    """Choose at most `pairs` different pairs of `count` volumes, (P, 2) indices, never two volumes of one subject.

    Raises: ValueError if there is no pair.
    """
    check_pairs(list(range(count)) if subjects is None else subjects)
    if count * (count - 1) // 2 > MOST_LISTED:
        return _few_pairs(count, pairs, seed, subjects)
    every = np.stack(np.triu_indices(count, 1), 1)
    if subjects is not None:
        _, whose = np.unique(np.asarray(subjects), return_inverse=True)
        every = every[whose[every[:, 0]] != whose[every[:, 1]]]
    chosen = np.random.default_rng(seed).permutation(len(every))[:pairs]
    return every[np.sort(chosen)]


def _few_pairs(count: int, pairs: int, seed: int, subjects: Units | None) -> np.ndarray:
    """Choose as `random_pairs` does, without a list of all pairs."""
    whose = np.arange(count) if subjects is None else np.unique(np.asarray(subjects), return_inverse=True)[1]
    sizes = np.bincount(whose)
    most = (count * (count - 1) - int((sizes * (sizes - 1)).sum())) // 2  # of different subjects
    random = np.random.default_rng(seed)
    chosen: dict[tuple[int, int], None] = {}  # in order
    while len(chosen) < min(pairs, most):
        for one, other in np.sort(random.integers(count, size=(pairs, 2)), axis=1).tolist():
            if whose[one] != whose[other]:
                chosen[one, other] = None
    return np.array(sorted([*chosen][:pairs]))


def check_pairs(subjects: Units, name: str = "") -> None:
    """Raise ValueError for volumes of a single subject, which give no pair."""
    if len(set(subjects)) < 2:
        raise ValueError(
            f"{len(subjects)} {name + ' ' if name else ''}volumes do not contain a pair of different subjects"
        )


def pair_similarity(
    volumes: Sequence[np.ndarray] | np.ndarray,
    pairs: np.ndarray,
    device: torch.device | str = "cpu",
    on_pair: Callable[[], None] | None = None,
    crop: tuple[int, int, int] | None = None,
) -> np.ndarray:
    """Compute `ms_ssim` of each pair, (P,), of volumes (C, X, Y, Z).

    Only the two volumes of a pair are held, of volumes that are read on access.

    Args:
        crop: voxels about the center to compare; by default all, of volumes of one shape.
    """

    def tensor(number: int) -> Tensor:
        volume = volumes[number] if crop is None else center_crop(volumes[number], crop)
        return torch.from_numpy(np.ascontiguousarray(volume, np.float32))[None].to(device)

    similarities = []
    for one, other in pairs.tolist():
        first, second = tensor(one), tensor(other)
        similarities.append(ms_ssim(first, second).item())
        if on_pair is not None:
            on_pair()
    return np.array(similarities)


class Similarity(TypedDict):
    """MS-SSIM over the pairs of one set."""

    mean: float
    interval: list[float]
    std: float
    pairs: int


class Diversity(TypedDict):
    """How alike the volumes of each set are, and differences between sets.

    `generated_minus_test` is positive when generated volumes are more alike than real ones, `training_minus_test` is
    its floor. The masks of generated volumes are mostly those of training volumes: hence `generated_minus_training`.
    """

    training: Similarity
    test: Similarity
    generated: Similarity
    generated_minus_test: Estimate[float]
    training_minus_test: Estimate[float]
    generated_minus_training: Estimate[float]
    scales: NotRequired[int]
    weights: NotRequired[list[float]]


def compare_diversity(
    values: Mapping[str, np.ndarray],
    pairs: Mapping[str, np.ndarray],
    counts: Mapping[str, int],
    seed: int = 0,
    subjects: Mapping[str, Units | None] | None = None,
) -> Diversity:
    """Compare how alike generated volumes are to each other with how alike real ones are. Intervals resample subjects,
    not pairs.

    Args:
        values: `pair_similarity` of the `pairs` (P, 2) of each set ("training", "test", "generated").
        counts: number of volumes of each set.
        subjects: of the volumes of each set, if subjects have several.
    """
    random = np.random.default_rng(seed)
    of_set: dict[str, Similarity] = {}
    resampled: dict[str, np.ndarray] = {}
    for name, similarity in values.items():
        often = resample_subjects(subjects_or_volumes(counts[name], (subjects or {}).get(name)), random)
        weight = often[:, pairs[name][:, 0]] * often[:, pairs[name][:, 1]]
        kept = weight.sum(1) > 0  # with very few pairs, a resample may contain none
        resampled[name] = (weight @ similarity)[kept] / weight.sum(1)[kept]
        of_set[name] = {
            "mean": float(similarity.mean()),
            "interval": interval_of(resampled[name]),
            "std": float(similarity.std()),
            "pairs": len(similarity),
        }

    def minus(first: str, second: str) -> Estimate[float]:
        count = min(len(resampled[first]), len(resampled[second]))
        interval = interval_of(resampled[first][:count] - resampled[second][:count])
        return {"mean": of_set[first]["mean"] - of_set[second]["mean"], "interval": interval}

    return {
        "training": of_set["training"],
        "test": of_set["test"],
        "generated": of_set["generated"],
        "generated_minus_test": minus("generated", "test"),
        "training_minus_test": minus("training", "test"),
        "generated_minus_training": minus("generated", "training"),
    }


def _blur(volumes: Tensor) -> Tensor:
    """Average (N, 1, X, Y, Z) under the window wherever all of it fits."""
    offsets = torch.arange(WINDOW, device=volumes.device) - (WINDOW - 1) / 2
    window = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    window = window / window.sum()
    for axis in range(3):
        volumes = F.conv3d(volumes, window.reshape([1, 1, *(WINDOW if a == axis else 1 for a in range(3))]))
    return volumes
