"""Record how volumes were prepared before training. An autoencoder stores this record, so that other volumes are
prepared in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from files.documents import read_object
from volumes.description import DataDescription
from volumes.foreground import MASK_LABELS, ForegroundCrop
from volumes.intensity import IntensityScaling

from .config import DataConfig

SAME_SPACING = 0.01  # relative
REMEDY = (
    "Set `data` as for the autoencoder (what the section omits is taken from it; with `data: data.yaml` both configs "
    "share one section), or train an autoencoder on these volumes (train_vae.py)"
)


class ScalingFacts(TypedDict):
    """Intensity scaling of one channel, as the config says it."""

    kind: str
    low: float
    high: float


class PreprocessingFacts(TypedDict):
    """How volumes were prepared, as JSON. Unknown facts are absent; without `crop` the volumes were whole.

    Attributes:
        channels: names of the image channels.
        intensity: one scaling per channel.
        spacing: mm; None where the volumes differ.
        resampled: whether the config asked for that spacing.
        image_labels: {value: name} of images that are label maps, {} otherwise.
        label_map: {value: value} of images that are label maps, {} otherwise.
        time_point: {channel: number} of 4-D files.
        resample_to: the channel onto whose grid the others were resampled; None: they lay on one grid.
        crop: see `ForegroundCrop`, with the channel's name; None: whole volumes.
    """

    channels: list[str]
    intensity: list[ScalingFacts]
    spacing: NotRequired[list[float] | None]
    resampled: NotRequired[bool]
    image_labels: NotRequired[dict[str, str]]
    label_map: NotRequired[dict[str, int]]
    time_point: NotRequired[dict[str, int]]
    resample_to: NotRequired[str | None]
    crop: NotRequired[Mapping[str, object] | None]


def _values(label_map: Mapping[int | str, int]) -> dict[str, int]:
    """The values that a label map leads from, as JSON; names of segments lead to labels that have the same names."""
    return {str(value): label_map[value] for value in sorted(one for one in label_map if isinstance(one, int))}


def common_spacing(spacings: Sequence[Sequence[float]]) -> tuple[float, float, float] | None:
    """Return the voxel size in mm if all of these agree on it within 1 %, else None."""
    middle = np.median(np.array(spacings), axis=0)
    if not np.allclose(spacings, middle, rtol=SAME_SPACING, atol=0):
        return None
    x, y, z = middle.round(6).tolist()
    return x, y, z


def preprocessing(config: DataConfig, spacings: Sequence[Sequence[float]] | None = None) -> PreprocessingFacts:
    """Return the preprocessing facts of a data section.

    Args:
        spacings: mm between voxels of each volume, once they are read.
    """
    facts: PreprocessingFacts = {
        "channels": list(config.channels),
        "intensity": [_scaling_facts(config.scaling(channel)) for channel in config.channels],
        "resampled": config.spacing is not None,
        "image_labels": {str(value): name for value, name in sorted(config.image_labels.items())},
        "label_map": _values(config.label_map) if config.image_labels else {},
        "time_point": {c: n for c in config.patterns if (n := config.volume_number(c)) is not None},
        "resample_to": config.resample_to,
        "crop": _crop_facts(config.crop and config.crop.named(config.channels)),
    }
    if config.spacing is not None:
        facts["spacing"] = list(config.spacing)
    elif spacings is not None:
        spacing = common_spacing(spacings)
        facts["spacing"] = None if spacing is None else list(spacing)
    return facts


def _scaling_facts(scaling: IntensityScaling) -> ScalingFacts:
    return {"kind": scaling.kind, "low": scaling.low, "high": scaling.high}


def _crop_facts(crop: ForegroundCrop | None) -> dict[str, object] | None:
    return None if crop is None else crop.to_json()


def described_preprocessing(data: DataDescription) -> PreprocessingFacts:
    """Return the facts in a pipeline's description of its training set (`volumes.describe`)."""
    return {
        "channels": list(data.channels),
        "intensity": [_scaling_facts(scale.scaling) for scale in data.intensity],
        "spacing": None if data.spacing is None else list(data.spacing),
        "image_labels": {str(value): name for value, name in data.image_labels.items()},
        "resample_to": data.resample_to,
        "crop": _crop_facts(data.crop),
    }


def check_preprocessing(facts: Any) -> None:
    """Raise ValueError unless `facts` is None or facts as `preprocessing` returns them."""
    if facts is None:
        return
    try:
        names, scalings = facts["channels"], facts["intensity"]
        fit = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        fit = fit and len(scalings) == len(names) and all(_scaling(one) for one in scalings)
        spacing = facts.get("spacing")
        fit = fit and (spacing is None or (len(spacing) == 3 and all(0 < float(mm) < 1e6 for mm in spacing)))
        maps = [facts.get(key) or {} for key in ("image_labels", "label_map", "time_point")]
        fit = fit and all(isinstance(one, Mapping) for one in maps)
        fit = fit and all(isinstance(name, str) for name in maps[0].values())
        fit = fit and all(isinstance(value, int) for one in maps[1:] for value in one.values())
        fit = fit and isinstance(facts.get("resample_to"), str | None)
        fit = fit and (facts.get("crop") is None or bool(ForegroundCrop.from_json(facts["crop"])))
        fit = fit and all(key.removeprefix("-").isdecimal() for one in maps[:2] for key in one)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        fit = False
    if not fit:
        raise ValueError("data is not a description of preprocessing as train_vae.py writes it")


def _scaling(entry: Mapping[str, Any]) -> IntensityScaling:
    return IntensityScaling(entry["kind"], entry["low"], entry["high"])


def differences(learned: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """List how volumes with the facts `given` differ from those that a model `learned` from: one line per fact that
    both have, and for `crop`."""
    if len(learned["channels"]) != len(given["channels"]):
        return [f"channels: it learned {list(learned['channels'])}, the data has {list(given['channels'])}"]
    found = []
    if len(given["channels"]) > 1 and list(learned["channels"]) != list(given["channels"]):
        found.append(f"channels: it learned {list(learned['channels'])}, the data has {list(given['channels'])}")
    for name, old, new in zip(given["channels"], learned["intensity"], given["intensity"], strict=True):
        if old != new:
            found.append(f"intensity of {name}: it learned {_told(old)}, the data has {_told(new)}")
    if learned.get("spacing") is not None and "spacing" in given:
        old, new = learned["spacing"], given["spacing"]
        if new is None or not np.allclose(old, new, rtol=SAME_SPACING, atol=0):
            of = "voxels of several sizes" if new is None else _millimeters(new)
            remedy = f"data.spacing: {[float(f'{mm:g}') for mm in old]} resamples"
            found.append(f"spacing: it learned {_millimeters(old)}, the data has {of} ({remedy})")
    if "resample_to" in learned and "resample_to" in given and learned["resample_to"] != given["resample_to"]:
        old, new = (
            f"channels resampled onto {name}'s grid" if name else "channels on one grid"
            for name in (learned["resample_to"], given["resample_to"])
        )
        found.append(f"resample_to: it learned {old}, the data has {new}")
    found += _crop_difference(learned, given)
    old, new = learned.get("image_labels") or {}, given.get("image_labels") or {}
    if _in_order(old) != _in_order(new):
        found.append(f"image_labels: it learned {old or 'no label maps'}, the data has {new or 'no label maps'}")
    elif new and "label_map" in learned and "label_map" in given:
        maps = [_targets(facts["label_map"], labels) for facts, labels in ((learned, old), (given, new))]
        if odd := sorted(value for value in maps[0].keys() & maps[1].keys() if maps[0][value] != maps[1][value]):
            found.append(
                f"label_map: it learned {dict(learned['label_map'])}, the data has {dict(given['label_map'])}, which "
                f"differ on {', '.join(map(str, odd))}"
            )
    old, new = learned.get("time_point") or {}, given.get("time_point") or {}
    if odd := [channel for channel in old if channel in new and old[channel] != new[channel]]:
        found.append(
            f"time_point of {', '.join(odd)}: it learned {[old[c] for c in odd]}, the data has {[new[c] for c in odd]}"
        )
    return found


def _crop_difference(learned: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Channels have names only where there are several. Facts without the entry are of whole volumes."""
    settings = [dict(facts["crop"]) if facts.get("crop") else None for facts in (learned, given)]
    if len(given["channels"]) == 1:
        settings = [one and one | {"channel": None} for one in settings]
    if settings[0] == settings[1]:
        return []
    old, new = (f"{ForegroundCrop.from_json(one)}" if one else "whole volumes" for one in settings)
    return [f"crop: it learned {old}, the data has {new}"]


def refuse_differences(
    learned: Mapping[str, Any] | None, given: Mapping[str, Any], model: str, remedy: str = REMEDY
) -> None:
    """Raise ValueError naming the differences, on both sides. Without `learned`, nothing is compared."""
    if learned is not None and (found := differences(learned, given)):
        raise ValueError(
            f"{model}: learned from volumes that were prepared differently:\n  " + "\n  ".join(found) + f"\n{remedy}"
        )


def inherited(folder: str | Path | None, section: Mapping[str, Any]) -> dict[str, object]:
    """Return the entries that a data `section` lacks, as the autoencoder in `folder` (or its vae/) learned them:
    intensity, and spacing, resample_to and crop if it was trained on such volumes. {} if the folder holds no
    autoencoder, or one without facts or with other channels.

    Raises: ValueError for a damaged config.json.
    """
    facts = read_preprocessing(folder) if folder else None
    images = section.get("images")
    own = list(images) if isinstance(images, Mapping) else ["image"]
    if facts is None or facts.get("image_labels") or section.get("image_labels") or len(own) != len(facts["channels"]):
        return {}  # they do not fit, which the comparison reports
    scalings = [dict(entry) for entry in facts["intensity"]]
    alike = all(one == scalings[0] for one in scalings)
    entries: dict[str, object] = {}
    if alike or own == list(facts["channels"]):
        entries["intensity"] = scalings[0] if alike else dict(zip(own, scalings, strict=True))
    if facts.get("resampled") and (spacing := facts.get("spacing")):
        entries["spacing"] = list(spacing)
    if (reference := facts.get("resample_to")) in own:
        entries["resample_to"] = reference
    if crop := facts.get("crop"):
        entries |= _inherited_crop(crop, own, section)
    return {key: value for key, value in entries.items() if key not in section}


def _inherited_crop(
    crop: Mapping[str, object], channels: Sequence[str], section: Mapping[str, Any]
) -> dict[str, object]:
    """The entry `crop` of a section, if it has the channel or the masks that are meant."""
    if len(channels) == 1:
        crop = {**crop, "channel": None}
    known = ForegroundCrop.from_json(crop).channel in (None, *channels)
    has_masks = bool(section.get("masks") or section.get("phantom"))
    return {"crop": dict(crop)} if known and (has_masks or crop["above"] != MASK_LABELS) else {}


def read_preprocessing(folder: str | Path) -> PreprocessingFacts | None:
    """Read the facts in the config.json of an autoencoder's folder or its subfolder vae/; None if there are none."""
    for path in (Path(folder) / "config.json", Path(folder) / "vae" / "config.json"):
        if path.is_file():
            facts = read_object(path).get("data")
            try:
                check_preprocessing(facts)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            return facts
    return None


def _told(scaling: Mapping[str, Any]) -> str:
    return f"{scaling['kind']} {scaling['low']:g} to {scaling['high']:g}"


def _millimeters(spacing: Sequence[float]) -> str:
    return " x ".join(f"{mm:g}" for mm in spacing) + " mm"


def _in_order(labels: Mapping[str, str]) -> list[str]:
    return [labels[value] for value in sorted(labels, key=int)]


def _targets(label_map: Mapping[str, int], labels: Mapping[str, str]) -> dict[int, str]:
    """Return the name of the label that each value in a file becomes, for the known ones."""
    known = {int(value): name for value, name in labels.items()}
    values = {*known, *map(int, label_map)}
    targets = {value: label_map.get(str(value), value) for value in values}
    return {value: known[target] for value, target in targets.items() if target in known}
