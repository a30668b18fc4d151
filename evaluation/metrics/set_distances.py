"""How far apart two sets of volumes are, each volume a row of figures, and what that distance is between real and real.

Samples are (N, F) arrays, a row a volume, of different N where one likes. A distance is a function of two samples that gives a
figure or several; `compare_sets` gives any distance its interval and its real-against-real floor.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.studies.class_adherence import INTERVAL, RESAMPLES

DRAWS = 200  # of subsets
MIN_SIZE = 4  # volumes in a set: halves of two
Distance = Callable[[np.ndarray, np.ndarray], Any]
SETS = ("training", "test", "generated")


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians with the means and covariances of two samples (Heusel et al. 2017, Eq. 6).

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` in squared units of the features, covariances divided by N - 1. With
    C = A^T A, the trace of the root is the sum of the singular values of `A1 A2^T`, which needs no root of a singular
    matrix. It is biased upwards, the more so the fewer samples: compare at equal counts, and see `frechet_caveat`.

    Raises: ValueError for samples of different features, of fewer than 2, or that are not finite.
    """
    first, second = _checked(first, second)
    shift = first.mean(0) - second.mean(0)
    centerd = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (first, second)]
    factors = [np.asarray(np.linalg.qr(x, mode="r")) for x in centerd]
    root = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    return max(float(shift @ shift + (factors[0] ** 2).sum() + (factors[1] ** 2).sum() - 2 * root), 0.0)


def frechet_caveat(samples: int, features: int) -> str | None:
    """Why a Frechet distance of so few samples says little, or None if they determine the covariance."""
    if samples > features:
        return None
    return (
        f"{samples} volumes do not determine the covariance of {features} features: the Frechet distance is mostly bias "
        "and compares at equal counts alone; the kernel distance is unbiased"
    )


def kernel_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel `(x y / F + 1)^3` (Binkowski et al. 2018, section 4).

    It is 0 on average for samples of one distribution, whatever their counts, so it may be negative.

    Raises: ValueError for samples of different features, of fewer than 2, or that are not finite.
    """
    first, second = _checked(first, second)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        values = kernel(x, x)
        return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))

    return float(within(first) + within(second) - 2 * kernel(first, second).mean())


def wasserstein1(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Wasserstein-1 distance of two samples of numbers, column by column: the area between their distribution functions.

    (N, S) and (M, S) -> (S,), in the columns' units.

    Raises: ValueError for samples of different features, of fewer than 2, or that are not finite.
    """
    first, second = _checked(first, second)
    values = np.sort(np.concatenate([first, second]), axis=0)
    areas = []
    for ours, theirs, grid in zip(first.T, second.T, values.T, strict=True):
        below = [np.searchsorted(np.sort(x), grid[:-1], side="right") / len(x) for x in (ours, theirs)]
        areas.append(np.abs(below[0] - below[1]) @ np.diff(grid))
    return np.array(areas)


def standardize(sets: Mapping[str, np.ndarray], by: str, least: float = 0.0) -> dict[str, np.ndarray]:
    """Every column less its mean in set `by`, in units of its standard deviation there; a constant column keeps its units.

    No column counts as varying less than `least` times the root mean square of the standard deviations of all: else one
    that is nearly constant in `by`, such as a unit of a network that hardly ever fires, can outweigh all others.
    """
    mean, std = sets[by].mean(0), sets[by].std(0)
    std = np.maximum(std, least * np.sqrt((std**2).mean()))
    std = np.where(std == 0, 1.0, std)
    return {name: (rows - mean) / std for name, rows in sets.items()}


def compare_sets(
    distance: Distance,
    sets: Mapping[str, np.ndarray],
    *,
    subjects: Mapping[str, Sequence[Any]] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """A distance of generated from real test volumes, beside that of real training from real test volumes.

    All are taken between `count` volumes, half of the smallest set, drawn anew `draws` times without replacement: a
    distance that depends on counts is then compared at equal ones. (A mean over half a sample, drawn so, spreads as the
    mean over the whole does from sample to sample: McCarthy 1969. Of the larger sets the intervals are too wide.)

    Args:
        sets: rows (N, F) of "training", "test" and "generated".
        subjects: for some of the sets, whose each volume is: volumes of one subject are drawn together.
    Returns:
        {"count", "whole": generated to test with all volumes, and at `count` volumes each {"mean", "interval"} of
        "generated_to_test", "training_to_test" (the floor), "test_halves" (another floor), and "excess", the first less
        the second, draw by draw}; lists where the distance gives several figures. Intervals are of 95 %.
    Raises: ValueError for a set of fewer than `MIN_SIZE` volumes.
    """
    random = np.random.default_rng(seed)
    check_counts({name: len(sets[name]) for name in SETS})
    groups = {name: _groups(len(sets[name]), (subjects or {}).get(name)) for name in SETS}
    count = min(len(sets[name]) for name in SETS) // 2
    found: dict[str, list[Any]] = {"generated_to_test": [], "training_to_test": [], "test_halves": []}
    for _ in range(draws):
        drawn = {name: sets[name][_shuffled(groups[name], random)] for name in SETS}
        half = drawn["test"][:count]
        found["generated_to_test"].append(distance(drawn["generated"][:count], half))
        found["training_to_test"].append(distance(drawn["training"][:count], half))
        found["test_halves"].append(distance(drawn["test"][count : 2 * count], half))
    excess = np.subtract(found["generated_to_test"], found["training_to_test"])
    report: dict[str, Any] = {"count": count, "whole": _plain(distance(sets["generated"], sets["test"]))}
    return report | {name: spread(values) for name, values in {**found, "excess": excess}.items()}


def check_counts(counts: Mapping[str, int]) -> None:
    """Raises: ValueError for sets of too few volumes to compare, by name."""
    if few := [f"{count} {name} volumes" for name, count in counts.items() if count < MIN_SIZE]:
        raise ValueError(f"{' and '.join(few)} are too few to compare; give {MIN_SIZE} or more")


def compare_columns(sets: Mapping[str, np.ndarray], names: Sequence[str], **options: Any) -> dict[str, dict[str, Any]]:
    """Statistics of volumes, one a column, against real ones; `options` are those of `compare_sets`.

    Returns: by name {"training", "test", "generated": {"mean", "std"} over the volumes, "shift": how far the generated
    mean is from that of the test set, "wasserstein": `compare_sets`}, the last two in standard deviations of the test
    volumes.
    """
    scaled = standardize(sets, "test")
    compared = compare_sets(wasserstein1, scaled, **options)
    report = {}
    for column, name in enumerate(names):
        of_set = {s: {"mean": float(r[:, column].mean()), "std": float(r[:, column].std())} for s, r in sets.items()}
        distances = {key: _column(value, column) for key, value in compared.items()}
        report[name] = {**of_set, "shift": float(scaled["generated"][:, column].mean()), "wasserstein": distances}
    return report


def closer_than_test(
    sets: Mapping[str, np.ndarray], *, subjects: Mapping[str, Sequence[Any]] | None = None, seed: int = 0
) -> dict[str, Any]:
    """How often a generated volume is nearer to its nearest training volume than an unseen real one is to its own.

    The area under the ROC curve of the Euclidean distance to the nearest row of "training": 0.5 for volumes drawn as real
    ones are, 1 for copies, 0 for volumes far from all real ones. It sees what Frechet and kernel distances cannot, which
    are best for copies.

    Args:
        subjects: for some of the sets, whose each volume is.
    Returns: {"auc", "interval"}, of 95 %, by drawing both sets' subjects anew with replacement (Efron 1979).
    """
    made, unseen = (nearest(sets[name], sets["training"]) for name in ("generated", "test"))
    wins = (made[:, None] < unseen) + 0.5 * (made[:, None] == unseen)
    random = np.random.default_rng(seed)
    weights = [
        drawn_counts(len(sets[name]), (subjects or {}).get(name), RESAMPLES, random) for name in ("generated", "test")
    ]
    shares = [one / one.sum(1, keepdims=True) for one in weights]
    drawn = ((shares[0] @ wins) * shares[1]).sum(1)
    return {"auc": float(wins.mean()), "interval": np.percentile(drawn, INTERVAL).tolist()}


def nearest(queries: np.ndarray, reference: np.ndarray, chunk: int = 256) -> np.ndarray:
    """Euclidean distance of each row of `queries` (N, F) to the nearest of `reference` (M, F): (N,)."""
    found = []
    for start in range(0, len(queries), chunk):
        rows = queries[start : start + chunk]
        squared = (rows**2).sum(1)[:, None] + (reference**2).sum(1) - 2 * rows @ reference.T
        best = squared.argmin(1)
        found.append(np.linalg.norm(rows - reference[best], axis=1))  # exact, where the squares above are rounded
    return np.concatenate(found)


def spread(values: Any) -> dict[str, Any]:
    """{"mean", "interval"} of figures, or of rows of figures (lists then), over the first axis."""
    values = np.asarray(values)
    return {"mean": values.mean(0).tolist(), "interval": np.percentile(values, INTERVAL, axis=0).tolist()}


def _column(compared: Any, column: int) -> Any:
    """One column of what `compare_sets` found of several."""
    if isinstance(compared, dict):
        return {"mean": compared["mean"][column], "interval": [end[column] for end in compared["interval"]]}
    return compared[column] if isinstance(compared, list) else compared


def _plain(value: Any) -> Any:
    return np.asarray(value).tolist()


def drawn_counts(count: int, subjects: Sequence[Any] | None, resamples: int, random: np.random.Generator) -> np.ndarray:
    """(resamples, count): how often each volume is there when as many subjects as there are get drawn with replacement,
    each with all its volumes; volumes are their own subjects where these are not given."""
    groups = _groups(count, subjects)
    number = groups.max() + 1
    return random.multinomial(number, np.full(number, 1 / number), resamples)[:, groups]


def _groups(count: int, subjects: Sequence[Any] | None) -> np.ndarray:
    """Number of each volume's subject, (count,); every volume a subject of its own where they are not given."""
    if subjects is None:
        return np.arange(count)
    if len(subjects) != count:
        raise ValueError(f"{len(subjects)} subjects for {count} volumes; give one a volume")
    return np.unique(np.asarray(subjects), return_inverse=True)[1]


def _shuffled(groups: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """An order of the volumes, those of one group together."""
    order = random.permutation(len(groups))
    return order[np.argsort(random.permutation(groups.max() + 1)[groups[order]], kind="stable")]


def _checked(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"samples of {first.shape} and {second.shape}: both must be (volumes, features)")
    if min(len(first), len(second)) < 2:
        raise ValueError(f"samples of {len(first)} and {len(second)} volumes: two of each are needed")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("samples hold NaN or infinity: a volume or its features are broken")
    return first, second
