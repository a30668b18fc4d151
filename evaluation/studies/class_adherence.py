"""Whether generated volumes are of the class that was asked for, in the eyes of a classifier that learned from real ones."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.networks.classifier import classify, train_classifier
from pipelines.storage.provenance import read_sidecar, sidecars, volume_files
from volumes import Case, DataConfig, VolumeDataset, pad_or_crop

RESAMPLES = 2000  # of the bootstrap
INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class ClassVolumes:
    """Images (N, C, X, Y, Z) float32 in [0, 1], their classes (N,) as indices, the refused files as (name, reason), and
    of label maps the size of each label (N, C) in milliliters."""

    images: Tensor
    classes: Tensor
    skipped: list[tuple[str, str]]
    sizes: Tensor | None = None


def generated_cases(folder: Path, config: DataConfig) -> list[Case]:
    """The volumes in `folder`, found by their sidecars and sorted by name, with the labels and numbers that were asked
    for as their metadata.

    Raises: ValueError if there is none, and for one without a file for each channel of the data.
    """
    cases, channels = [], list(config.patterns)
    for sidecar in sidecars(folder):
        path = sidecar.with_suffix(".nii.gz")  # what generate.py writes
        record = read_sidecar(path) or {}
        images = dict(zip(record.get("channels") or channels[:1], volume_files(path, record), strict=True))
        if missing := [channel for channel in channels if channel not in images or not images[channel].is_file()]:
            raise ValueError(f"{sidecar}: its volume has no file of {missing}; generate all channels of the data")
        asked = {**(record.get("classes") or {}), **(record.get("numbers") or {})}
        cases.append(Case(sidecar.stem, subject=sidecar.stem, split="generated", images=images, metadata=asked))
    if not cases:
        raise ValueError(f"{folder}: holds no volume with a sidecar; make some with generate.py")
    return cases


def load_classes(cases: Sequence[Case], config: DataConfig, column: str, shape: tuple[int, int, int]) -> ClassVolumes:
    """Read the cases and bring them to `shape` about their centers, scaled as for a model and brought to [0, 1]; those of
    unknown class are left out.

    Raises: ValueError for a column that is no class of the data, and if no case has one.
    """
    if column not in config.classes:
        raise ValueError(f"{column!r} is no class of the data; those are {sorted(config.classes)}")
    known = [case for case in cases if case.metadata.get(column) not in (None, "")]
    if not known:
        raise ValueError(
            f"none of the {len(cases)} volumes has a {column}, such as {cases[0].name if cases else 'none'}"
        )
    alone = dataclasses.replace(
        config, masks=None, label_names={}, classes={column: config.classes[column]}, numbers=[]
    )
    if all(case.split == "generated" for case in known):  # files in the model's own terms, one volume each
        alone = dataclasses.replace(alone, label_map={}, time_point=None)
    known = [dataclasses.replace(case, mask=None) for case in known]
    dataset = VolumeDataset(known, alone)
    images = torch.empty(len(dataset), len(dataset.channels), *shape)
    sizes = torch.empty(len(dataset), len(dataset.channels))
    for index in range(len(dataset)):
        item = dataset[index]
        image = (item["image"] + 1) / 2
        images[index] = pad_or_crop(tuple(image.shape[1:]), shape).apply(image, 0.0)
        sizes[index] = image.sum((1, 2, 3)) * item["affine"][:3, :3].det().abs() / 1000
    classes = torch.stack([dataset.conditions(i)["classes"][0] for i in range(len(dataset))])
    return ClassVolumes(images, classes, dataset.skipped, sizes if config.image_labels else None)


def describe_sizes(volumes: ClassVolumes, names: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """{class: {label: {"p5", "median", "p95"}}} of label maps, in milliliters; {} of other volumes."""
    if volumes.sizes is None:
        return {}
    described: dict[str, Any] = {}
    for index, name in enumerate(names):
        if not (volumes.classes == index).any():
            continue
        low, middle, high = np.percentile(volumes.sizes[volumes.classes == index].numpy(), (5, 50, 95), axis=0).tolist()
        rows = (dict(zip(("p5", "median", "p95"), row, strict=True)) for row in zip(low, middle, high, strict=True))
        described[name] = dict(zip(labels, rows, strict=True))
    return described


def rates(right: np.ndarray, classes: np.ndarray, shares: np.ndarray) -> tuple[float, list[float]]:
    """How often the classifier is right: over all, each class counting by its share, and class by class (NaN without one).

    Args:
        right: (N,) in [0, 1], how often each volume was.
        classes: (N,) indices.
        shares: (num_classes,) that sum to 1; classes with a share of 0 need no volume.
    """
    of_class = [float(right[classes == i].mean()) if (classes == i).any() else float("nan") for i in range(len(shares))]
    return float(sum(rate * share for rate, share in zip(of_class, shares, strict=True) if share)), of_class


def bootstrap_rates(right: np.ndarray, classes: np.ndarray, shares: np.ndarray, seed: int) -> np.ndarray:
    """The first figure of `rates` for (RESAMPLES,) data sets, whose volumes are drawn anew within each class with
    replacement (Efron 1979)."""
    random = np.random.default_rng(seed)
    drawn = np.zeros(RESAMPLES)
    for index, share in enumerate(shares):
        if share:
            of_class = right[classes == index]
            chosen = random.integers(len(of_class), size=(RESAMPLES, len(of_class)))
            drawn += share * of_class[chosen].mean(axis=1)
    return drawn


def compare(
    real: np.ndarray, real_classes: np.ndarray, made: np.ndarray, made_classes: np.ndarray, names: Sequence[str]
) -> dict[str, Any]:
    """Real test volumes against generated ones, each (N,) of how often the classifiers were right, and (N,) classes.

    Returns: {"real", "generated": {"right", "interval", "balanced", "per_class": {name: right}}, "difference_points":
    {"right", "interval", "balanced"}} with generated minus real in points of per cent. `right` counts classes by
    their share of the real test volumes, `balanced` all alike. Intervals are of 95 %, over the volumes.
    """
    count = len(names)
    shares = np.bincount(real_classes, minlength=count) / len(real_classes)
    alike = (shares > 0) / (shares > 0).sum()
    report: dict[str, Any] = {}
    drawn = []
    for source, right, classes in (("real", real, real_classes), ("generated", made, made_classes)):
        overall, of_class = rates(right, classes, shares)
        drawn.append(bootstrap_rates(right, classes, shares, seed=len(drawn)))
        report[source] = {
            "right": overall,
            "interval": np.percentile(drawn[-1], INTERVAL).tolist(),
            "balanced": rates(right, classes, alike)[0],
            "per_class": {name: rate for name, rate in zip(names, of_class, strict=True) if rate == rate},
        }
    report["difference_points"] = {
        "right": 100 * (report["generated"]["right"] - report["real"]["right"]),
        "interval": (100 * np.percentile(drawn[1] - drawn[0], INTERVAL)).tolist(),
        "balanced": 100 * (report["generated"]["balanced"] - report["real"]["balanced"]),
    }
    return report


def measure_class_adherence(
    learn: ClassVolumes,
    real: ClassVolumes,
    made: ClassVolumes,
    names: Sequence[str],
    *,
    seeds: int,
    iterations: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    on_seed: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train `seeds` classifiers on `learn` and let them judge; what `compare` returns of their mean, and "seeds".

    `on_seed` is called with each seed's {"seed", "real", "generated", "seconds"}: how often it is right.

    Raises: ValueError for a class that has real test volumes but no generated ones.
    """
    if lost := [names[i] for i in sorted(set(real.classes.tolist()) - set(made.classes.tolist()))]:
        raise ValueError(f"no volume of {lost} was generated, though real ones are tested")
    shares = np.bincount(real.classes.numpy(), minlength=len(names)) / len(real.classes)
    right: dict[str, list[np.ndarray]] = {"real": [], "generated": []}
    rows = []
    for seed in range(seeds):
        start = time.perf_counter()
        classifier = train_classifier(
            learn.images, learn.classes, len(names), seed=seed, iterations=iterations, device=device, dtype=dtype
        )
        row: dict[str, Any] = {"seed": seed}
        for source, volumes in (("real", real), ("generated", made)):
            found = classify(classifier, volumes.images, dtype=dtype) == volumes.classes
            right[source].append(found.numpy().astype(np.float64))
            row[source] = rates(right[source][-1], volumes.classes.numpy(), shares)[0]
        rows.append({**row, "seconds": round(time.perf_counter() - start, 2)})
        if on_seed is not None:
            on_seed(rows[-1])
    means = {source: np.mean(found, axis=0) for source, found in right.items()}
    found = compare(means["real"], real.classes.numpy(), means["generated"], made.classes.numpy(), names)
    return {**found, "seeds": rows}
