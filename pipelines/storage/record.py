"""The record of a generated volume: everything that decides its voxels, and which software and model made it. One per
volume; as JSON it is the sidecar beside the volume's files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import NoneType
from typing import Any, NotRequired, Self, TypedDict

from pipelines.inputs.arguments import plain
from volumes.foreground import box_from_json

INFORMATIVE = ("software", "settings_from", "network_calls")  # entries that do not tell volumes apart
LEFT_OUT = (
    "guidance_interval",
    "autoguidance_scale",
    "unet_weak",
    "network_calls",
    "guidance_without",
    "controlnet_conditioning_scale",
    "resampled",
    "box",
    "box_image",
    "settings_from",
    "residual_noise",
    "edit",
    "callback",
    "rejected",
    "license",
    "spacing",
)  # where they are None
TYPES: dict[str, type | tuple[type, ...]] = {  # of a sidecar's entries
    "software": str,
    "model": str,
    "seed": (int, NoneType),
    "num_inference_steps": int,
    "dtype": str,
    "scheduler": dict,
    **dict.fromkeys(("mask", "classes", "numbers", "images", "box_image", "settings_from"), (dict, NoneType)),
    "channels": (list, NoneType),
}
OPTIONAL = (
    "classes",
    "numbers",
    "channels",
    "box_image",
    "settings_from",
)  # a sidecar may lack those that its volume has not


class SourceRecord(TypedDict):
    """A file that a volume was generated from: its name (None for what was not read from a file) and sha256."""

    file: str | None
    sha256: str


class WithoutRecord(TypedDict):
    """Guidance away from masks in which other labels take the place of some: {label: label in its place}, by name or
    value, and its scale."""

    labels: dict[str, str | int]
    scale: float


class EditRecord(TypedDict):
    """An edit: the channels that are changed, and how. `region` and `blend_margin` (mm) only where there is a
    region."""

    image: dict[str, SourceRecord]
    strength: float
    region: NotRequired[SourceRecord]
    blend_margin: NotRequired[float]


@dataclass(frozen=True)
class GenerationRecord:
    """How one volume is generated.

    Attributes:
        software, model: name and version of this package; `model_hash` of the pipeline.
        seed: of the volume's own generator; None if its noise came from elsewhere.
        sigmas: noise levels, where they were given; `num_inference_steps` is then their number.
        guidance_scale: in effect; None for none.
        guidance_interval: noise levels (lo, hi] in which guidance acts; None for all, or for no guidance.
        autoguidance_scale: in effect; None for none.
        unet_weak: hash of the weaker U-Net of that guidance, as `unet_hash` is; None for none.
        guidance_without: labels without which the mask was what the volume was guided away from; None for none, and for
            a mask that has none of them.
        controlnet_conditioning_scale: factor of what the ControlNet adds; None for 1, and for volumes without it.
        settings_from: {"num_inference_steps", "guidance_scale", ...}: "call", "pipeline" (its sampling.json) or
            "default".
        network_calls: how often U-Nets were called for the volume; None before it is generated.
        scheduler: its class and its options.
        dtype: the types in which the weights are stored and computed.
        mask, images: the files (or arrays) that were read.
        resampled: the fraction of the grid that each image shows which lay on another grid and was resampled; the rest
            of the volume is left empty.
        box: the part of the grid that was generated, see `volumes.foreground.box_to_json`; None for all of it.
        box_image: the file (or array) that sets the box, where it conditions nothing.
        shape: voxels, where no file sets the grid.
        spacing: mm between them, where it was given.
        channels: those that have a file each; None where one file holds all.
        residual_noise: whether it is added; None for a model without it.
        callback: what a callback changed, see `call.StepCallback`: such a volume cannot be generated again from its
            seed.
        license: of the weights, where volumes that they generate must name it; None for weights without such terms.
        checks: {"copy_check": settings and findings} of each check that the volume passed, see `rejection`.
        rejected: attempts before this one that a check refused; None if nothing was checked.
    """

    software: str
    model: str
    seed: int | None
    num_inference_steps: int
    sigmas: Sequence[float] | None = None
    guidance_scale: float | Mapping[str, float] | None = None
    guidance_interval: Sequence[float] | None = None
    autoguidance_scale: float | None = None
    unet_weak: str | None = None
    guidance_without: WithoutRecord | None = None
    controlnet_conditioning_scale: float | None = None
    settings_from: Mapping[str, str] | None = None
    scheduler: Mapping[str, object] = field(default_factory=dict)
    dtype: str = ""
    mask: SourceRecord | None = None
    shape: Sequence[int] | None = None
    spacing: Sequence[float] | None = None
    label_map: Mapping[str, int | str] | None = None
    classes: Mapping[str, str] | None = None
    numbers: Mapping[str, float] | None = None
    images: Mapping[str, SourceRecord] | None = None
    resampled: Mapping[str, float] | None = None
    box: Mapping[str, Sequence[int]] | None = None
    box_image: SourceRecord | None = None
    channels: Sequence[str] | None = None
    residual_noise: bool | None = None
    edit: EditRecord | None = None
    network_calls: int | None = None
    callback: Mapping[str, object] | None = None
    license: str | None = None
    checks: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    rejected: Sequence[Mapping[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as JSON holds it. Raises: ValueError naming the entry for what JSON cannot hold, such as NaN."""
        entries = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("checks", "rejected")}
        entries = {"synthetic": True} | entries | dict(self.checks) | {"rejected": self.rejected}
        return plain({k: v for k, v in entries.items() if v is not None or k not in LEFT_OUT}, "the record")

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The record that a sidecar holds; entries of others in it are ignored.

        Raises: ValueError naming the first entry that `to_json` does not write.
        """
        if fault := _fault(content):
            raise ValueError(fault)
        entries = {one.name: content[one.name] for one in fields(cls) if one.name in content and one.name != "checks"}
        return cls(**entries, checks={name: content[name] for name in content if name.endswith("_check")})

    def differences(self, planned: "GenerationRecord") -> list[str]:
        """Names of the entries in which this record, of a finished volume, differs from that of a planned one. The
        software may differ, where equal settings came from, and what the checks found."""
        ours, theirs = self._as_planned(planned).to_json(), planned.to_json()
        return sorted(key for key in {*ours, *theirs} - {*INFORMATIVE} if ours.get(key) != theirs.get(key))

    def same_settings(self, planned: "GenerationRecord") -> bool:
        """Whether the finished volume of this record is the planned one."""
        return not self.differences(planned)

    def _as_planned(self, planned: "GenerationRecord") -> Self:
        """The record before its volume was generated: with the seed of the first attempt, and without findings."""
        if self.rejected is None:
            return self
        checks = {name: _settings(found, planned.checks.get(name)) for name, found in self.checks.items()}
        first = self.rejected[0]["seed"] if self.rejected else self.seed
        return replace(self, checks=checks, seed=first, rejected=[])


def _settings(entry: Mapping[str, object], planned: Mapping[str, object] | None) -> Mapping[str, object]:
    """A check's entry without its findings: the entries that a planned one has."""
    return entry if planned is None else {key: value for key, value in entry.items() if key in planned}


def _fault(content: Mapping[str, Any]) -> str | None:
    """Why the content of a sidecar is not a record; None if it is."""
    if missing := [name for name in TYPES if name not in content and name not in OPTIONAL]:
        return f"it has no {', '.join(missing)}"
    for name, kinds in TYPES.items():
        if not isinstance(content.get(name), kinds):
            return f"its {name} is {str(content.get(name))[:40]!r}"
    if not isinstance(content["scheduler"].get("class", ""), str | NoneType):
        return "its scheduler does not name its class"
    files = {name: [content.get(name) or {"file": None}] for name in ("mask", "box_image")}
    files |= {"images": list((content["images"] or {}).values())}
    for name, sources in files.items():
        if not all(isinstance(one, dict) and isinstance(one.get("file", 0), str | NoneType) for one in sources):
            return f"its {name} does not name its file"
    if content.get("box") is not None:
        try:
            box_from_json(content["box"])
        except ValueError as error:
            return f"its {error}"
    rejected = content.get("rejected", [])
    if not isinstance(rejected, list) or not all(
        isinstance(attempt, dict) and {"seed", "check"} <= attempt.keys() for attempt in rejected
    ):
        return f"its rejected is {str(rejected)[:40]!r}"
    if not all(isinstance(content[name], dict) for name in content if name.endswith("_check")):
        return "its checks are damaged"
    return None
