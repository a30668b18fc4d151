"""The description of a training set: what a pipeline needs to prepare masks and to restore volumes.

`volumes.describe` measures it. It is stored as JSON in a pipeline's model_index.json, and checked strictly when it is
read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

import numpy as np

from files.paths import check_name

from .foreground import ForegroundCrop
from .formats.raw import AXES, SPACINGS, UNITS, Reading, check_grid
from .intensity import IntensityScaling, LinearScale
from .map_checks import MAX_SIDE, LabelMapStats

KINDS = ("percentile", "window")  # of intensity scaling, see `volumes.IntensityScaling`
READING = {"units": tuple(UNITS), "axes": AXES}  # keywords that correct wrong headers
MAX_VALUE = 1e30  # of a number in file units: float32, in which voxels are computed, holds its square root's products
MIN_RELATIVE_SPAN = 1e-6  # of an intensity scale, beside its larger end: float32 cannot separate smaller differences
NOISE_RADIUS = 3  # voxels: residual noise is white noise filtered by a kernel of 2 NOISE_RADIUS + 1 voxels a side
NOISE_BINS = 16  # of decoded intensity
NOISE_LEVELS = 65  # quantiles of the noise level, from the lowest to the highest

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class ChannelScale:
    """The intensity scale of one channel: the median over the training volumes.

    Attributes:
        kind: as in `IntensityScaling`.
        low, high: in file units; -1 and 1 inside the model.
        percentiles: for kind "percentile", the percentiles that are fitted to each volume; None for a window.
    Raises: ValueError for kind "percentile" without percentiles.
    """

    kind: Literal["percentile", "window"]
    low: float
    high: float
    percentiles: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.kind == "percentile" and self.percentiles is None:
            raise ValueError("intensity: kind percentile needs percentiles, such as (0.5, 99.5), by which it is scaled")

    @property
    def linear(self) -> LinearScale:
        """The scale between file units and [-1, 1]."""
        return LinearScale(self.low, self.high)

    @property
    def scaling(self) -> IntensityScaling:
        """How each volume was scaled in training."""
        low, high = (self.low, self.high) if self.percentiles is None else self.percentiles
        return IntensityScaling(self.kind, low, high)

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read what `to_json` wrote. Raises: ValueError for anything else."""
        entry = _entries("intensity", value, ("kind", "low", "high"), ("percentiles",))
        low, high, kind = entry["low"], entry["high"], entry["kind"]
        _expect(
            kind in KINDS and _numbers([low, high], 2) and low < high, "intensity", entry, "kind, and low below high"
        )
        largest = max(abs(low), abs(high))
        fits = largest <= MAX_VALUE and high - low >= max(MIN_RELATIVE_SPAN * largest, 1 / MAX_VALUE)
        expected = f"low and high within -{MAX_VALUE:g} to {MAX_VALUE:g}, and further apart than float32 rounds"
        _expect(fits, "intensity", entry, expected)
        ends = entry.get("percentiles", [0, 100])
        _expect(_numbers(ends, 2) and 0 <= ends[0] < ends[1] <= 100, "percentiles", ends, "two")
        _expect(kind == "window" or "percentiles" in entry, "intensity", entry, "percentiles, by which it is scaled")
        return cls(kind, low, high, tuple(ends) if "percentiles" in entry else None)

    def to_json(self) -> dict[str, object]:
        """Return the object as it is stored."""
        percentiles = {} if self.percentiles is None else {"percentiles": list(self.percentiles)}
        return {"kind": self.kind, "low": self.low, "high": self.high, **percentiles}


@dataclass(frozen=True)
class NumberStats:
    """Mean, standard deviation and range of a number over the training volumes that have it."""

    mean: float
    std: float
    low: float
    high: float

    @classmethod
    def from_json(cls, value: object, name: str) -> Self:
        """Read what `dataclasses.asdict` wrote. Raises: ValueError naming the number for anything else."""
        keys = [field.name for field in fields(cls)]
        entry = _entries(name, value, keys)
        _expect(_numbers(list(entry.values()), len(keys)), name, entry, "mean, std, low and high")
        stats = cls(**entry)
        _expect(stats.std > 0 and stats.low <= stats.high, name, entry, "a std above 0, and low below high")
        return stats


@dataclass(frozen=True)
class ChannelNoise:
    """The residual noise of one channel, see `autoencoder.residual_noise`.

    Attributes:
        kernel: filter of white noise, a nested list with sides of 2 `NOISE_RADIUS` + 1, whose squares sum to 1.
        std: standard deviation of the noise at level 1, in the model's units; 0 if no power is missing.
        curve: factor of the noise by decoded intensity, `NOISE_BINS` values over [-1, 1].
        levels: `NOISE_LEVELS` quantiles of the level over the training volumes.
    """

    kernel: list[list[list[float]]]
    std: float
    curve: list[float]
    levels: list[float]

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read what `dataclasses.asdict` wrote. Raises: ValueError naming the entry for anything else."""
        side = 2 * NOISE_RADIUS + 1
        shapes = {"kernel": (side,) * 3, "std": (), "curve": (NOISE_BINS,), "levels": (NOISE_LEVELS,)}
        entry, arrays = _entries("residual_noise", value, shapes), {}
        for key, shape in shapes.items():
            try:
                arrays[key] = np.array(entry[key], dtype=np.float64)
                fits = arrays[key].shape == shape and bool(np.isfinite(arrays[key]).all())
            except (TypeError, ValueError):  # not numbers, or ragged
                fits = False
            _expect(fits, f"residual_noise.{key}", entry[key], f"finite numbers of shape {shape}")
        return cls(**{key: array.tolist() for key, array in arrays.items()})


@dataclass(frozen=True)
class DataDescription:
    """What a pipeline knows of its training set.

    Attributes:
        channels: names, in the order of the model's channels.
        labels: value in the masks' files: name, in the order of the values; empty for a model without masks.
        spacing: voxel size in mm; None if the volumes differ.
        intensity: a scale per channel.
        shape_range: the smallest and the largest number of voxels along each axis.
        affine: 4 x 4, of the volume of median size.
        image_labels: the same as `labels`, for images that are label maps: the background, then one label per channel.
        classes: {name: values} of the classes that condition a model.
        numbers: {name: statistics} of the numbers that condition a model.
        grid_numbers: those of the numbers that were taken from the volumes' grids.
        reading: how wrong headers are read, see `DataConfig.reading`.
        resample_to: the channel onto whose grid the others were resampled, see `DataConfig`; None if they were not.
        crop: how cases were cut to a box, see `DataConfig`, with the channel's name; None if they were not.
        common_labels: values of the labels that every training mask has; None if they were not recorded.
        maps: what the training set's label maps have in common; None for images that are not label maps.
        residual_noise: a model of the residual noise per channel; None if it was not measured.
        background_threshold: for volumes whose background is empty (`DataConfig.empty_background`): where no mask says
            what is background, it is where every decoded channel, in [-1, 1], is below this; -1, below which nothing
            is, leaves it to masks. None for other volumes.
        description: free text.
    """

    channels: tuple[str, ...]
    labels: dict[int, str]
    spacing: tuple[float, float, float] | None
    intensity: tuple[ChannelScale, ...]
    shape_range: tuple[Shape, Shape]
    affine: tuple[tuple[float, ...], ...]
    image_labels: dict[int, str] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    numbers: dict[str, NumberStats] = field(default_factory=dict)
    grid_numbers: tuple[str, ...] = ()
    reading: Reading = field(default_factory=Reading)
    resample_to: str | None = None
    crop: ForegroundCrop | None = None
    common_labels: tuple[int, ...] | None = None
    maps: LabelMapStats | None = None
    residual_noise: tuple[ChannelNoise, ...] | None = None
    background_threshold: float | None = None
    description: str = ""

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read what `to_json` wrote. Raises: ValueError naming the first entry that is anything else."""
        if not isinstance(value, Mapping):
            raise ValueError(
                f"data is {type(value).__name__}; the description of a training set (volumes.describe) is needed"
            )
        required = {"channels", "labels", "spacing", "intensity", "shape_range", "affine"}
        if missing := sorted(required - value.keys()):
            raise ValueError(f"data has no {' and no '.join(missing)}; volumes.describe writes it")
        data = dict(value)
        image_labels = _labels("image_labels", data.pop("image_labels", {}))
        channels = _channels(data.pop("channels"), are_files=not image_labels)
        labels = _labels("labels", data.pop("labels"))
        description = cls(
            channels=channels,
            labels=labels,
            spacing=_spacing(data.pop("spacing")),
            intensity=tuple(map(ChannelScale.from_json, _list("intensity", data.pop("intensity")))),
            shape_range=_shape_range(data.pop("shape_range")),
            affine=_affine(data.pop("affine")),
            image_labels=image_labels,
            classes=_classes(data.pop("classes", {})),
            numbers=_number_stats(data.pop("numbers", {})),
            grid_numbers=_names("grid_numbers", data.pop("grid_numbers", [])),
            reading=_reading(data.pop("reading", {})),
            resample_to=data.pop("resample_to", None),
            crop=_crop(data.pop("crop"), channels, labels) if "crop" in data else None,
            common_labels=_common(data.pop("common_labels"), labels) if "common_labels" in data else None,
            maps=_maps(data.pop("maps"), image_labels) if "maps" in data else None,
            residual_noise=_noise(data.pop("residual_noise", None), len(channels)),
            background_threshold=_threshold(data.pop("background_threshold", None), labels),
            description=data.pop("description", ""),
        )
        _expect(isinstance(description.description, str), "description", description.description, "text")
        reference = description.resample_to
        known = reference is None or isinstance(reference, str)
        _expect(known, "resample_to", reference, "the name of a channel")
        _expect(not data, "unknown entries", sorted(map(str, data)), "none")
        return description

    def to_json(self) -> dict[str, object]:
        """Return the description as it is stored: `from_json` returns an equal one."""
        stored: dict[str, object] = {
            "channels": list(self.channels),
            "labels": {str(value): name for value, name in self.labels.items()},
            "image_labels": {str(value): name for value, name in self.image_labels.items()},
            "spacing": None if self.spacing is None else list(self.spacing),
            "intensity": [scale.to_json() for scale in self.intensity],
            "shape_range": [list(shape) for shape in self.shape_range],
            "affine": [list(row) for row in self.affine],
            "classes": {name: list(values) for name, values in self.classes.items()},
            "numbers": {name: asdict(stats) for name, stats in self.numbers.items()},
            "grid_numbers": list(self.grid_numbers),
            "description": self.description,
        }
        if self.reading:
            stored["reading"] = dict(self.reading)
        if self.resample_to is not None:
            stored["resample_to"] = self.resample_to
        if self.crop is not None:
            stored["crop"] = self.crop.to_json()
        if self.common_labels is not None:
            stored["common_labels"] = list(self.common_labels)
        if self.maps is not None:
            stored["maps"] = self.maps.to_json()
        if self.residual_noise is not None:
            stored["residual_noise"] = [asdict(channel) for channel in self.residual_noise]
        if self.background_threshold is not None:
            stored["background_threshold"] = self.background_threshold
        return stored


def _channels(value: Any, *, are_files: bool) -> tuple[str, ...]:
    _expect(_texts(value) and len(set(value)) == len(value) > 0, "channels", value, "names, each once")
    for channel in value if are_files else ():  # files are named after them; the channels of a label map share one file
        check_name(channel, "data: channels")
    return tuple(value)


def _labels(name: str, value: Any) -> dict[int, str]:
    _expect(_mapping(value) and _texts(list(value.values())), name, value, "{value: name}")
    _expect(all(_whole(label) for label in value), name, value, "whole numbers as values")
    return {int(label): value[label] for label in sorted(value, key=int)}


def _common(value: Any, labels: Mapping[int, str]) -> tuple[int, ...]:
    fits = isinstance(value, list | tuple) and all(type(label) is int and label in labels for label in value)
    _expect(fits and list(value) == sorted(set(value)), "common_labels", value, "values among the labels, in order")
    return tuple(value)


def _spacing(value: Any) -> tuple[float, float, float] | None:
    if value is None:
        return None
    fits = _numbers(value, 3) and SPACINGS[0] <= min(value) <= max(value) <= SPACINGS[1]
    _expect(fits, "spacing", value, f"three lengths of {SPACINGS[0]:g} to {SPACINGS[1]:g} mm")
    x, y, z = value
    return x, y, z


def _shape_range(value: Any) -> tuple[Shape, Shape]:
    _expect(isinstance(value, list | tuple) and len(value) == 2, "shape_range", value, "two shapes")
    for shape in value:
        fits = _numbers(shape, 3) and all(isinstance(n, int) and 0 < n <= MAX_SIDE for n in shape)
        _expect(fits, "shape_range", shape, f"a shape with sides of 1 to {MAX_SIDE} voxels")
    (x, y, z), (largest_x, largest_y, largest_z) = value
    return (x, y, z), (largest_x, largest_y, largest_z)


def _affine(value: Any) -> tuple[tuple[float, ...], ...]:
    rows = isinstance(value, list | tuple) and len(value) == 4 and all(_numbers(row, 4) for row in value)
    _expect(rows, "affine", value, "4 x 4 numbers")
    try:
        check_grid(np.array(value, dtype=np.float64))
    except ValueError as error:
        raise ValueError(f"data: {error}") from error
    return tuple(map(tuple, value))


def _classes(value: Any) -> dict[str, list[str]]:
    fits = _mapping(value) and all(_texts(values) for values in value.values())
    _expect(fits, "classes", value, "{name: [values]}")
    return {name: list(values) for name, values in value.items()}


def _number_stats(value: Any) -> dict[str, NumberStats]:
    _expect(_mapping(value), "numbers", value, "{name: mean, std, low, high}")
    return {name: NumberStats.from_json(stats, f"numbers.{name}") for name, stats in value.items()}


def _names(name: str, value: Any) -> tuple[str, ...]:
    _expect(_texts(value), name, value, "names")
    return tuple(value)


def _reading(value: Any) -> Reading:
    fits = _mapping(value) and all(setting in READING.get(name, ()) for name, setting in value.items())
    _expect(fits, "reading", value, f"some of {READING}")
    return Reading(**value)


def _crop(value: Any, channels: Sequence[str], labels: Mapping[int, str]) -> ForegroundCrop:
    try:
        crop = ForegroundCrop.from_json(value)
    except ValueError as error:
        raise ValueError(f"data: {error}") from error
    known = bool(labels) if crop.by_mask else crop.channel in channels
    _expect(known, "crop", value, "a channel of the data, or a mask")
    return crop


def _maps(value: Any, image_labels: Mapping[int, str]) -> LabelMapStats:
    try:
        return LabelMapStats.from_json(value, list(image_labels.values()))
    except ValueError as error:
        raise ValueError(f"data: {error}") from error


def _noise(value: Any, channels: int) -> tuple[ChannelNoise, ...] | None:
    if not value:
        return None
    _expect(
        isinstance(value, list | tuple) and len(value) == channels, "residual_noise", value, "one entry per channel"
    )
    return tuple(map(ChannelNoise.from_json, value))


def _threshold(value: Any, labels: Mapping[int, str]) -> float | None:
    if value is None:
        return None
    _expect(_numbers([value], 1) and -1 <= value < 1, "background_threshold", value, "a number from -1 to below 1")
    _expect(0 in labels, "background_threshold", value, "none, for the labels have no 0, the background")
    return float(value)


def _list(name: str, value: Any) -> Sequence[object]:
    _expect(isinstance(value, list | tuple) and len(value) > 0, name, value, "one entry per channel")
    return value


def _entries(name: str, value: Any, required: Collection[str], optional: Collection[str] = ()) -> dict[str, Any]:
    expected = f"the entries {', '.join(required)}"
    _expect(_mapping(value) and set(required) <= set(value) <= {*required, *optional}, name, value, expected)
    return dict(value)


def _expect(fits: bool, name: str, value: object, expected: str) -> None:
    if not fits:
        raise ValueError(f"data: {name} is {str(value)[:80]!r}; expected {expected}, as volumes.describe writes it")


def _mapping(value: object) -> bool:
    return isinstance(value, Mapping) and _texts(list(value))


def _texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def _numbers(value: object, count: int) -> bool:
    if not isinstance(value, list | tuple) or len(value) != count:
        return False
    return all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) <= MAX_VALUE for n in value)


def _whole(text: str) -> bool:
    """Return whether a text is an integer as Python writes it."""
    return text.removeprefix("-").isdecimal() and len(text) < 10 and str(int(text)) == text
