"""sampling.json in a pipeline's folder: how its volumes are sampled where a call does not say. It travels with the
weights, as the scheduler does; the model's hash does not depend on it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from cli.settings import NonNegativeFloat, Range, Share, checked, faults, refuse
from diffusion.denoise import MAX_STEPS
from diffusion.guidance import interval_in_effect
from files.documents import read_object

SAMPLING = "sampling.json"
REMEDY = "correct it, or remove the file: volumes are then sampled in 20 steps without guidance"


@dataclass(frozen=True)
@checked
class SamplingSettings:
    """How a pipeline samples, where a call does not say: `pipe.sampling_settings`. None leaves a setting at its default
    (`pipelines.sampling.DEFAULTS`).

    Args:
        num_inference_steps: denoising steps, with the scheduler of the pipeline's folder.
        guidance_scale: of classifier-free guidance, for all conditions; 0 to 1 means none.
        guidance_interval: noise levels (lo, hi] in which guidance acts, see `diffusion.guidance.interval_in_effect`.
        autoguidance_scale: of the guidance by the pipeline's weaker U-Net (`unet_weak`); 0 to 1 means none.
    Raises: ValueError naming the setting.
    """

    num_inference_steps: Annotated[int, Range(1, MAX_STEPS)] | None = None
    guidance_scale: NonNegativeFloat | None = None
    guidance_interval: tuple[Share, Share] | None = None
    autoguidance_scale: NonNegativeFloat | None = None

    def __post_init__(self) -> None:
        if self.guidance_interval is not None:
            interval_in_effect(self.guidance_interval)
            low, high = self.guidance_interval
            object.__setattr__(self, "guidance_interval", (float(low), float(high)))

    def to_json(self) -> dict[str, int | float | list[float]]:
        """The content of the file: what is set."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


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
