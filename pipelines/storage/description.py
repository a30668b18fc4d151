"""The description of a training set that a pipeline carries (`volumes.describe`), checked before anything believes it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from autoencoder.residual_noise import BINS, LEVELS, RADIUS
from files.paths import check_name
from volumes.formats.nifti import AXES
from volumes.formats.raw import SPACINGS, UNITS, check_grid
from volumes.map_checks import check_maps

KINDS = ("percentile", "window")  # of intensity scaling, see `volumes.IntensityScaling`
READING = {"units": tuple(UNITS), "axes": AXES}  # what may be known of wrong headers
MAX_VALUE = 1e30  # of a number in file units: float32, in which voxels are computed, holds its square root's products
NARROWEST = 1e-6  # of an intensity scale, beside its larger end: float32 tells no more apart
MOST_VOXELS_A_SIDE = 32767  # of NIfTI-1
KERNEL = (2 * RADIUS + 1,) * 3


def check_data(data: Mapping[str, Any]) -> None:
    """Raises: ValueError naming the first entry that is not as `volumes.describe` writes it."""
    if not isinstance(data, Mapping):
        raise ValueError(
            f"data is {type(data).__name__}; the description of a training set (volumes.describe) is needed"
        )
    if missing := sorted({"channels", "labels", "spacing", "intensity", "shape_range", "affine"} - data.keys()):
        raise ValueError(f"data has no {' and no '.join(missing)}; volumes.describe writes it")
    channels = data["channels"]
    _expect(_texts(channels) and len(set(channels)) == len(channels) > 0, "channels", channels, "names, each once")
    for channel in (
        () if data.get("image_labels") else channels
    ):  # of which files have their names; those of label maps are in one
        check_name(channel, "data: channels")
    for name in ("labels", "image_labels"):
        labels = data.get(name, {})
        _expect(_mapping(labels) and _texts(list(labels.values())), name, labels, "{value: name}")
        _expect(all(_whole(value) for value in labels), name, labels, "whole numbers as values")
    if data["spacing"] is not None:
        fit = (
            _numbers(data["spacing"], 3) and SPACINGS[0] <= min(data["spacing"]) <= max(data["spacing"]) <= SPACINGS[1]
        )
        _expect(fit, "spacing", data["spacing"], f"three lengths of {SPACINGS[0]:g} to {SPACINGS[1]:g} mm")
    intensity = data["intensity"]
    _expect(isinstance(intensity, list | tuple) and len(intensity) > 0, "intensity", intensity, "an entry a channel")
    for entry in intensity:
        known = _mapping(entry) and entry.get("kind") in KINDS and _numbers([entry.get("low"), entry.get("high")], 2)
        _expect(known and entry["low"] < entry["high"], "intensity", entry, "kind, and low below high")
        span, largest = entry["high"] - entry["low"], max(abs(entry["low"]), abs(entry["high"]))
        fit = largest <= MAX_VALUE and span >= max(NARROWEST * largest, 1 / MAX_VALUE)
        expected = f"low and high within -{MAX_VALUE:g} to {MAX_VALUE:g}, and further apart than float32 rounds"
        _expect(fit, "intensity", entry, expected)
        percentiles = entry.get("percentiles", [0, 100])
        _expect(
            _numbers(percentiles, 2) and 0 <= percentiles[0] < percentiles[1] <= 100, "percentiles", percentiles, "two"
        )
    shapes = data["shape_range"]
    _expect(isinstance(shapes, list | tuple) and len(shapes) == 2, "shape_range", shapes, "two shapes")
    for shape in shapes:
        fit = _numbers(shape, 3) and all(isinstance(n, int) and 0 < n <= MOST_VOXELS_A_SIDE for n in shape)
        _expect(fit, "shape_range", shape, f"a shape, its sides of 1 to {MOST_VOXELS_A_SIDE} voxels")
    affine = data["affine"]
    rows = isinstance(affine, list | tuple) and len(affine) == 4 and all(_numbers(row, 4) for row in affine)
    _expect(rows, "affine", affine, "4 x 4 numbers")
    try:
        check_grid(np.array(affine, dtype=np.float64))
        if "maps" in data:
            check_maps(data["maps"], list((data.get("image_labels") or {}).values()))
    except ValueError as error:
        raise ValueError(f"data: {error}") from error
    reading = data.get("reading", {})
    fit = _mapping(reading) and all(value in READING.get(name, ()) for name, value in reading.items())
    _expect(fit, "reading", reading, f"some of {READING}")
    classes, ranges = data.get("classes", {}), data.get("numbers", {})
    _expect(
        _mapping(classes) and all(_texts(values) for values in classes.values()), "classes", classes, "{name: [values]}"
    )
    _expect(_mapping(ranges), "numbers", ranges, "{name: mean, std, low, high}")
    for name, found in ranges.items():
        fit = _mapping(found) and _numbers([found.get(key) for key in ("mean", "std", "low", "high")], 4)
        _expect(fit, f"numbers.{name}", found, "mean, std, low and high")
        _expect(
            found["std"] > 0 and found["low"] <= found["high"],
            f"numbers.{name}",
            found,
            "a std above 0, and low below high",
        )
    _expect(_texts(data.get("grid_numbers", [])), "grid_numbers", data.get("grid_numbers"), "names")
    _check_noise(data.get("residual_noise"), len(channels))


def _check_noise(noise: Any, channels: int) -> None:
    if not noise:
        return
    _expect(isinstance(noise, list | tuple) and len(noise) == channels, "residual_noise", noise, "an entry a channel")
    for entry in noise:
        _expect(
            _mapping(entry) and {"kernel", "std", "curve", "levels"} <= entry.keys(),
            "residual_noise",
            entry,
            "what fit_noise writes",
        )
        for key, shape in (("kernel", KERNEL), ("std", ()), ("curve", (BINS,)), ("levels", (LEVELS,))):
            try:
                values = np.array(entry[key], dtype=np.float64)
                fit = values.shape == shape and bool(np.isfinite(values).all())
            except (TypeError, ValueError):  # no numbers, or ragged
                fit = False
            _expect(fit, f"residual_noise.{key}", entry[key], f"finite numbers of shape {shape}")


def _expect(fit: bool, name: str, value: Any, expected: str) -> None:
    if not fit:
        raise ValueError(f"data: {name} is {str(value)[:80]!r}; expected {expected}, as volumes.describe writes it")


def _mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and _texts(list(value))


def _texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)


def _numbers(value: Any, count: int) -> bool:
    if not isinstance(value, list | tuple) or len(value) != count:
        return False
    return all(isinstance(one, int | float) and not isinstance(one, bool) and abs(one) <= MAX_VALUE for one in value)


def _whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and len(text) < 10
