"""What the studio knows of a model once it was loaded, and which models can share a studio.

Nothing here holds the pipeline: sessions and routes keep a `StudioModel`, and the worker alone keeps the pipeline, so
that its memory is free when another one is loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion.conditioning import ConditionSchema
from pipelines.base import VolumePipeline
from pipelines.inputs.request import VolumeRequest
from pipelines.inputs.request_files import read_requests
from pipelines.sampling import DEFAULTS
from pipelines.storage.sampling_settings import SamplingSettings
from volumes import Volume
from volumes.description import DataDescription

from .labels import OUTSIDE_CODE, UNKNOWN_CODE, LabelCodes

EXAMPLES = "examples.csv"  # in the folder of a pipeline
MOST_LISTED = 5
# What masks and views of a session rest on, each as a list of texts. Spacing is not in it: a pipeline resamples a mask
# of another spacing, says so, and generates on the grid of the mask.
SHARED: Mapping[str, Callable[[DataDescription], list[str]]] = {
    "labels": lambda data: [f"{value} = {name}" for value, name in data.labels.items()],
    "generated labels": lambda data: [f"{value} = {name}" for value, name in data.image_labels.items()],
    "channels": lambda data: list(data.channels),
    "windows": lambda data: [f"{scale.low} to {scale.high}" for scale in data.intensity],
    "reading of headers": lambda data: [f"{key} = {value}" for key, value in data.reading.items()],
}


@dataclass(frozen=True)
class StudioModel:
    """What sessions and the page need to know of a pipeline.

    Attributes:
        name: its folder, or its repository.
        conditions: that it knows.
        partial: whether it takes masks with voxels of an unknown label.
        settings: the pipeline's own.
        codes: of its masks' labels.
        map_codes: of the labels that it generates; None for images.
        examples: the rows with a mask of the examples in the pipeline's folder.
    """

    name: str
    data: DataDescription
    conditions: ConditionSchema
    partial: bool
    settings: SamplingSettings
    codes: LabelCodes
    map_codes: LabelCodes | None
    examples: list[VolumeRequest]

    @classmethod
    def of(cls, name: str, pipe: VolumePipeline) -> "StudioModel":
        """Read it from a pipeline.

        Raises: ValueError for more labels than the studio can paint, and for a table of examples that cannot be read.
        """
        table, data = Path(name) / EXAMPLES, pipe.data
        rows = read_requests(table, pipe, Path("none"), say=lambda _: None) if table.is_file() else []
        return cls(
            name,
            data,
            pipe.denoiser.condition_schema,
            pipe.denoiser.takes_partial_masks,
            pipe.sampling_settings,
            LabelCodes.of(data.labels),
            LabelCodes.of(data.image_labels) if data.image_labels else None,
            [row for row in rows if row.mask is not None],
        )

    def example(self, number: object) -> Path:
        """Return the mask of an example. Raises: ValueError for one that is not there."""
        if type(number) is not int or not 0 <= number < len(self.examples):
            raise ValueError(f"there is no example {str(number)[:20]}; the pipeline has {len(self.examples)}")
        return Path(str(self.examples[number].mask))

    @property
    def usual_settings(self) -> Mapping[str, object]:
        """Steps and guidance of a call that names neither."""
        return {**DEFAULTS, **self.settings.to_json()}

    @property
    def usual_shape(self) -> tuple[int, int, int]:
        """The middle of the training set's shapes."""
        low, high = self.data.shape_range
        x, y, z = ((a + b) // 2 for a, b in zip(low, high, strict=True))
        return x, y, z

    def empty_grid(self, shape: tuple[int, int, int] | None) -> Volume:
        """Return a grid of this shape on the model's template."""
        grid = self.usual_shape if shape is None else shape
        return Volume(np.broadcast_to(np.int16(0), (1, *grid)), np.array(self.data.affine, dtype=np.float64))

    def to_json(self) -> dict[str, object]:
        """Return what the page needs to know of the model."""
        data, known = self.data, self.conditions
        labels = self.map_codes or self.codes
        return {
            "name": self.name,
            "description": data.description,
            "labels": [
                {"code": code, "value": value, "name": name}
                for code, (value, name) in enumerate(zip(labels.values, labels.names, strict=True))
            ],
            "partial": self.partial,
            "outside": OUTSIDE_CODE,
            "unknown": UNKNOWN_CODE,
            "mask": "none" if not known.mask else "optional" if known.dropout.get("mask") else "required",
            "classes": {name: list(values) for name, values in known.values.items()},
            "numbers": {
                name: {"low": stats.low, "high": stats.high, "mean": stats.mean}
                for name, stats in data.numbers.items()
                if name in known.numbers and name not in data.grid_numbers
            },
            "images": [name for name, _ in known.images],
            "optional": sorted(name for name, rate in known.dropout.items() if rate),
            "channels": list(data.channels),
            "windows": [[scale.low, scale.high] for scale in data.intensity],
            "steps": self.usual_settings["num_inference_steps"],
            "guidance": self.usual_settings["guidance_scale"],
            "guides": bool(known.dropout),
            "maps": self.map_codes is not None,
            "edits": known.mask and not known.images and data.crop is None,
            "shape": list(self.usual_shape),
            "draws_shape": data.maps is not None,
            "examples": [
                {"name": row.name, "classes": dict(row.classes), "numbers": dict(row.numbers)} for row in self.examples
            ],
        }


def check_together(first: StudioModel, other: StudioModel) -> None:
    """Check that masks and views mean the same to both. Raises: ValueError naming what differs."""
    differing = [
        f"{what} ({_listed(theirs, ours)}; there {_listed(ours, theirs)})"
        for what, of in SHARED.items()
        if (theirs := of(other.data)) != (ours := of(first.data))
    ]
    if differing:
        raise ValueError(
            f"{other.name} differs from {first.name}: {', '.join(differing)}; start a second studio for it"
        )


def _listed(entries: Sequence[str], others: Sequence[str]) -> str:
    """Return the entries that the others lack, or all where only the order differs."""
    own = [entry for entry in entries if entry not in others] or entries
    return ", ".join(own[:MOST_LISTED]) + (", ..." if len(own) > MOST_LISTED else "") or "none"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return for each name its last parts, as many as tell all of them apart.

    a/run1/final and a/run2/final are run1/final and run2/final.
    """
    for count in range(1, 100):
        shown = ["/".join(Path(name).parts[-count:]) for name in names]
        if len(set(shown)) == len(set(names)):
            return dict(zip(names, shown, strict=True))
    raise AssertionError("paths of more than 100 parts that are alike")
