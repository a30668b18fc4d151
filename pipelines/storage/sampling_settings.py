"""sampling.json in a pipeline's folder: how its volumes are sampled where a call does not say. It travels with the
weights, as the scheduler does; the model's hash does not depend on it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cli.settings import NonNegativeFloat, Range, Share, checked, faults, refuse
from diffusion.denoise import MAX_STEPS
from diffusion.guidance import interval_in_effect
from files.documents import read_object
from pipelines.inputs.arguments import real_number

SAMPLING = "sampling.json"
REMEDY = "correct it, or remove the file: volumes are then sampled in 20 steps without guidance"


@dataclass(frozen=True)
@checked
class SamplingSettings:
    """How a pipeline samples, where a call does not say: `pipe.sampling_settings`. None leaves a setting at its default
    (`pipelines.sampling.DEFAULTS`).

    Args:
        num_inference_steps: denoising steps, with the scheduler of the pipeline's folder.
        guidance_scale: of classifier-free guidance, for all conditions, or one per condition, such as
            {"modality": 10.0}; 0 to 1 means none.
        guidance_interval: noise levels (lo, hi] in which guidance acts, see `diffusion.guidance.interval_in_effect`.
        autoguidance_scale: of the guidance by the pipeline's weaker U-Net (`unet_weak`); 0 to 1 means none.
        guidance_without: {label: label in its place}, by name or value: volumes are guided away from their mask without
            these labels.
        without_scale: of that guidance; 1 means none.
        maisi_steps: whether Euler takes the steps of MAISI's own sampler, which are too long by about 1 %, so that
            volumes equal MAISI's; false takes the exact ones (`diffusion.monai.maisi_steps`).
        controlnet_conditioning_scale: factor of what the pipeline's ControlNet adds to the U-Net; 1 if absent.
    Raises: ValueError naming the setting.
    """

    num_inference_steps: Annotated[int, Range(1, MAX_STEPS)] | None = None
    guidance_scale: NonNegativeFloat | dict[str, NonNegativeFloat] | None = None
    guidance_interval: tuple[Share, Share] | None = None
    autoguidance_scale: NonNegativeFloat | None = None
    guidance_without: dict[str, str | int] | None = None
    without_scale: NonNegativeFloat | None = None
    maisi_steps: bool | None = None
    controlnet_conditioning_scale: NonNegativeFloat | None = None

    def __post_init__(self) -> None:
        if self.guidance_interval is not None:
            interval_in_effect(self.guidance_interval)
            low, high = self.guidance_interval
            object.__setattr__(self, "guidance_interval", (float(low), float(high)))

    def to_json(self) -> dict[str, object]:
        """The content of the file: what is set."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def replaced_names(value: Any) -> dict[str, str | int]:
    """Convert `guidance_without` of a call, {label: label in its place}, to what is recorded. Values are written like
    names. Raises: ValueError for anything else."""
    pairs = list(value.items()) if isinstance(value, Mapping) else [None]
    if not all(pair and all(isinstance(one, str) or type(one) is int for one in pair) for pair in pairs):
        raise ValueError(
            f"guidance_without maps labels to the labels in their place, by name or value, such as "
            f"{{'lesion': 'organ'}}; got {value!r:.120}"
        )
    names = {str(one): other for one, other in pairs}  # pyright: ignore[reportGeneralTypeIssues]
    if len(names) < len(pairs):
        raise ValueError(f"guidance_without {value!r:.120} names a label twice; remove one")
    return names


def scale_without(value: Any) -> float:
    """Convert `without_scale` of a call. Raises: ValueError unless it is a finite number of 0 or more."""
    scale = real_number("without_scale", value)
    if scale < 0:
        raise ValueError(f"without_scale is a number of 0 or more (1 is no guidance, 2 to 4 are usual); got {value!r}")
    return scale


def conditioning_scale(value: Any) -> float:
    """Convert `controlnet_conditioning_scale` of a call. Raises: ValueError unless it is a finite number of 0 or
    more."""
    scale = real_number("controlnet_conditioning_scale", value)
    if scale < 0:
        raise ValueError(f"controlnet_conditioning_scale is a number of 0 or more (1 is as trained); got {value!r}")
    return scale


def check_conditioning_scale(scale: float | None, controlnet: object) -> None:
    """Raise ValueError for a scale of a ControlNet that the pipeline does not have."""
    if scale is not None and controlnet is None:
        raise ValueError(
            f"controlnet_conditioning_scale {scale:g}: the pipeline has no ControlNet (`medvolume convert` reads those "
            "of MAISI); omit it"
        )


def read_sampling(folder: Path) -> SamplingSettings:
    """The settings in a pipeline's folder; none are set where it has no file.

    Raises: ValueError naming the file, the setting, its value and what is expected; FileError for what is not JSON.
    """
    path = folder / SAMPLING
    if not path.exists():
        return SamplingSettings()
    content = read_object(path)
    try:
        refuse(faults(SamplingSettings, content))
        return SamplingSettings(**content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {REMEDY}") from error


def write_sampling(settings: SamplingSettings, folder: Path) -> None:
    """Write the file into a folder that is being saved."""
    (folder / SAMPLING).write_text(json.dumps(settings.to_json(), indent=2) + "\n", encoding="utf-8")
