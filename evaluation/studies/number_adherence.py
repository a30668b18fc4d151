"""Number adherence: whether a regressor trained on real volumes finds the number that generated ones were asked for."""

import time
from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import torch

from evaluation.data.volume_sets import NumberVolumes
from evaluation.networks.classifier import regress, train_regressor
from evaluation.stats.bootstrap import Estimate, interval_of, resample_subjects
from evaluation.stats.intervals import ROUNDING, correlations


class NumberErrors(TypedDict):
    """How near predictions come to the numbers of one set of volumes.

    `mae` is the mean absolute error in the number's unit, `constant_mae` that of always predicting the mean of the
    training set: a regressor that is not better has learned nothing. `r2` is 1 less the squared error over the variance
    of the numbers, `correlation` is Pearson's.
    """

    mae: Estimate[float]
    constant_mae: float
    r2: Estimate[float]
    correlation: Estimate[float]


class SeedErrors(TypedDict):
    """The mean absolute errors of the regressor of one seed, and its training time."""

    seed: int
    real: float
    generated: float
    seconds: float


class NumberAdherence(TypedDict):
    """Errors of the mean prediction over the seeds. Intervals are of 95 %, over subjects; each generated volume is its
    own.

    `difference` is the mean absolute error on generated less that on real volumes. It compares them fairly only where
    the numbers of both are spread alike.
    """

    real: NumberErrors
    generated: NumberErrors
    difference: Estimate[float]
    seeds: list[SeedErrors]


def measure_number_adherence(
    train_set: NumberVolumes,
    test_set: NumberVolumes,
    generated: NumberVolumes,
    *,
    seeds: int,
    iterations: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    on_seed: Callable[[SeedErrors], None] | None = None,
) -> NumberAdherence:
    """Train `seeds` regressors on real volumes, and predict the number of real test volumes and of generated ones.

    `on_seed` is called after each seed.

    Raises: ValueError for sets whose numbers do not vary.
    """
    for name, volumes in (("real test", test_set), ("generated", generated)):
        if len(volumes.numbers.unique()) < 2:
            raise ValueError(
                f"the number is the same for all {len(volumes.numbers)} {name} volumes; give some of other numbers"
            )
    predicted: list[tuple[np.ndarray, np.ndarray]] = []
    rows: list[SeedErrors] = []
    for seed in range(seeds):
        start = time.perf_counter()
        regressor = train_regressor(
            train_set.images, train_set.numbers, seed=seed, iterations=iterations, device=device, dtype=dtype
        )
        of_real, of_generated = (
            regress(regressor, volumes.images, dtype=dtype).numpy().astype(np.float64)
            for volumes in (test_set, generated)
        )
        predicted.append((of_real, of_generated))
        rows.append(
            {
                "seed": seed,
                "real": float(np.abs(of_real - test_set.numbers.numpy()).mean()),
                "generated": float(np.abs(of_generated - generated.numbers.numpy()).mean()),
                "seconds": round(time.perf_counter() - start, 2),
            }
        )
        if on_seed is not None:
            on_seed(rows[-1])
    mean_real, mean_generated = (np.mean(of_source, axis=0) for of_source in zip(*predicted, strict=True))
    constant = float(train_set.numbers.mean())
    real, real_mae = number_errors(mean_real, test_set.numbers.numpy(), constant, test_set.subjects, seed=0)
    asked, asked_mae = number_errors(mean_generated, generated.numbers.numpy(), constant, generated.subjects, seed=1)
    return {
        "real": real,
        "generated": asked,
        "difference": {
            "mean": asked["mae"]["mean"] - real["mae"]["mean"],
            "interval": interval_of(asked_mae - real_mae),
        },
        "seeds": rows,
    }


def number_errors(
    predicted: np.ndarray, numbers: np.ndarray, constant: float, subjects: Sequence[str], seed: int
) -> tuple[NumberErrors, np.ndarray]:
    """Compare predictions (N,) with numbers (N,). Returns the errors, and the resampled mean absolute error.

    Args:
        numbers: not all equal.
        constant: the prediction to which the regressor is compared.
        subjects: of the volumes, which are resampled.
        seed: of the bootstrap.
    """
    numbers = numbers.astype(np.float64)
    counts = resample_subjects(subjects, np.random.default_rng(seed))
    counts = np.concatenate([np.ones((1, len(numbers))), counts])  # the sample itself first
    shares = counts / counts.sum(1, keepdims=True)
    mae = shares @ np.abs(predicted - numbers)
    centered = numbers - (shares @ numbers)[:, None]
    variance = (shares * centered**2).sum(1)
    varies = variance > ROUNDING * (numbers**2).mean()  # not in a resample of one number alone
    r2 = 1 - (shares @ (predicted - numbers) ** 2)[varies] / variance[varies]
    found = {"mae": mae, "r2": r2, "correlation": correlations(predicted, numbers, counts)}
    estimates = {
        name: Estimate[float](mean=float(values[0]), interval=interval_of(values[1:])) for name, values in found.items()
    }
    errors: NumberErrors = {
        "mae": estimates["mae"],
        "constant_mae": float(np.abs(numbers - constant).mean()),
        "r2": estimates["r2"],
        "correlation": estimates["correlation"],
    }
    return errors, mae[1:]
