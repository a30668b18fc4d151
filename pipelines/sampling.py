"""How volumes are sampled: the settings of a call, and each volume's own noise, from its own generator, so that its
result depends on no other volume of the call."""

import json
from argparse import Namespace
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from diffusion import LatentDenoiser
from diffusion.denoise import set_timesteps
from diffusion.guidance import (
    Guidance,
    Interval,
    autoguidance_in_effect,
    guidance_in_effect,
    interval_in_effect,
)
from diffusion.monai.maisi_steps import with_maisi_steps
from diffusion.scheduler_options import MIN_NOISE, Scheduler
from pipelines.inputs.arguments import flag, listed, noise_levels, whole_number
from pipelines.inputs.prepared import PreparedVolume
from pipelines.storage.record import GenerationRecord, WithoutRecord
from pipelines.storage.sampling_settings import SamplingSettings, conditioning_scale, replaced_names, scale_without
from volumes.formats.carriers import as_array

DEFAULTS: Mapping[str, int | float] = {"num_inference_steps": 20, "guidance_scale": 1.0}  # of pipelines that have none
OF_PIPELINE = (  # in sampling.json
    *("num_inference_steps", "guidance_scale", "guidance_interval", "autoguidance_scale"),
    *("guidance_without", "without_scale", "maisi_steps", "controlnet_conditioning_scale"),
)
WITHOUT_SCALE = 2.0  # of `guidance_without`
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class SamplingConfig:
    """How volumes are sampled. All of it is recorded, but for the batch size, which changes no volume beyond rounding.

    Args:
        num_inference_steps: denoising steps; None for the pipeline's own, see `filled`.
        sigmas: noise levels of the steps in place of evenly spaced ones, for Euler and UniPC of flows.
        guidance_scale: of classifier-free guidance, one for all conditions or {name: scale}, 0 to 1 for none; None for
            the pipeline's own.
        residual_noise: whether the residual noise of the autoencoder is added, for a model that measured it.
        batch_size: volumes of one shape that are denoised together.
        guidance_interval: noise levels (lo, hi] in which guidance acts, (0, 1) for all; None for the pipeline's own.
        autoguidance_scale: of the guidance by the pipeline's weaker U-Net, 0 to 1 for none; None for the pipeline's
            own.
        settings_from: where steps and guidance came from, which `filled` notes.
        guidance_without: {label: label in its place} of the masks that volumes are guided away from, by value or name,
            such as {"lesion": "organ"}; empty for none, None for the pipeline's own.
        without_scale: of that guidance, 1 for none; None for the pipeline's own.
        maisi_steps: whether steps are those of MAISI's sampler, see `diffusion.monai.maisi_steps`; None for the
            pipeline's own.
        controlnet_conditioning_scale: factor of what the pipeline's ControlNet adds to the U-Net, 1 as trained; None
            for the pipeline's own.
    Raises: ValueError naming the argument.
    """

    num_inference_steps: int | None = None
    sigmas: Sequence[float] | None = None
    guidance_scale: Guidance = None
    residual_noise: bool = True
    batch_size: int = 8
    guidance_interval: Interval | None = None
    autoguidance_scale: float | None = None
    settings_from: Mapping[str, str] | None = None
    guidance_without: Mapping[str | int, str | int] | None = None
    without_scale: float | None = None
    maisi_steps: bool | None = None
    controlnet_conditioning_scale: float | None = None

    def __post_init__(self) -> None:
        steps = self.num_inference_steps
        checked = {
            "num_inference_steps": None if steps is None else whole_number("num_inference_steps", steps),
            "sigmas": None if self.sigmas is None else noise_levels(self.sigmas),
            "residual_noise": flag("residual_noise", self.residual_noise),
            "batch_size": whole_number("batch_size", self.batch_size),
            "guidance_without": None if self.guidance_without is None else replaced_names(self.guidance_without),
            "without_scale": None if self.without_scale is None else scale_without(self.without_scale),
            "controlnet_conditioning_scale": None
            if self.controlnet_conditioning_scale is None
            else conditioning_scale(self.controlnet_conditioning_scale),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        guidance_in_effect(self.guidance_scale)  # its names are checked where the conditions are known
        autoguidance_in_effect(self.autoguidance_scale)
        if self.guidance_interval is not None:
            interval = interval_in_effect(self.guidance_interval) or (0.0, 1.0)
            object.__setattr__(self, "guidance_interval", interval)

    def filled(self, own: SamplingSettings) -> "SamplingConfig":
        """The same with the pipeline's `own` settings, or else the defaults, where it has none; and where they came
        from: {"num_inference_steps": "call", "guidance_scale": "pipeline" or "default"}, and the same for the interval
        and autoguidance where either has them."""
        if self.settings_from is not None:
            return self
        asked: dict[str, Any] = {name: getattr(self, name) for name in OF_PIPELINE}
        if self.sigmas is not None:
            asked["num_inference_steps"] = len(self.sigmas)
        values = {name: value for name, value in asked.items() if value is not None}
        of_pipeline = own.to_json()
        places = {
            name: "call" if name in values else "pipeline" if name in of_pipeline else "default"
            for name in asked
            if name in {**DEFAULTS, **of_pipeline, **values}
        }
        return replace(self, **{**DEFAULTS, **of_pipeline, **values}, settings_from=places)

    @property
    def steps(self) -> int:
        """Denoising steps. Raises: ValueError before it is `filled`."""
        if self.sigmas is not None:
            return len(self.sigmas)
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is the pipeline's: use sampling.filled(pipe.sampling_settings)")
        return self.num_inference_steps

    @property
    def recorded(self) -> tuple[object, ...]:
        """All settings that a volume depends on."""
        guidance = self.guidance_scale, self.interval, autoguidance_in_effect(self.autoguidance_scale)
        others = self.residual_noise, bool(self.maisi_steps), self.control_scale
        return self.steps, self.sigmas, *guidance, self.without, *others

    @property
    def control_scale(self) -> float | None:
        """The factor of what a ControlNet adds, as it is recorded; None for 1."""
        return None if self.controlnet_conditioning_scale == 1 else self.controlnet_conditioning_scale

    @property
    def interval(self) -> Interval | None:
        """The noise levels in which guidance acts; None for all, and where there is no guidance."""
        unguided = guidance_in_effect(self.guidance_scale) in (1.0, {})
        if unguided and autoguidance_in_effect(self.autoguidance_scale) == 1 and self.without is None:
            return None
        return interval_in_effect(self.guidance_interval)

    @property
    def without(self) -> WithoutRecord | None:
        """The guidance away from masks without some labels, as it is recorded; None for none."""
        scale = WITHOUT_SCALE if self.without_scale is None else self.without_scale
        if not self.guidance_without or scale == 1:
            return None
        return {"labels": {str(one): other for one, other in self.guidance_without.items()}, "scale": scale}

    @property
    def without_effect(self) -> list[str]:
        """Settings of the call that nothing reads, each with what it needs."""
        given = {name for name, place in (self.settings_from or {}).items() if place == "call"}
        unread = []
        everywhere = interval_in_effect(self.guidance_interval) is None
        if "guidance_interval" in given and not everywhere and self.interval is None:
            unread.append("guidance_interval acts on guidance, and there is none (guidance_scale, autoguidance_scale)")
        if "without_scale" in given and not self.guidance_without and self.without_scale != 1:
            unread.append("without_scale is of guidance_without, and there is none")
        return unread

    def check_start(self) -> None:
        """Raises: ValueError if the steps begin at less noise than the pure noise from which a volume is generated."""
        if self.sigmas and self.sigmas[0] < MIN_NOISE:
            raise ValueError(
                f"sigmas begin at {self.sigmas[0]:g}, which treats pure noise as an image; begin at 1, or give the "
                "`latents` (or an image and strength) that have so little noise"
            )


def sampling_of(options: Namespace) -> SamplingConfig:
    """The settings of a command line, see `cli.generation`. Raises: ValueError for an interval that is none."""
    return SamplingConfig(
        options.steps,
        guidance_scale=options.guidance_scale,
        batch_size=options.batch_size,
        guidance_interval=None if options.guidance_interval is None else tuple(options.guidance_interval),
        autoguidance_scale=options.autoguidance_scale,
        guidance_without=None if options.guidance_without is None else dict(options.guidance_without),
        without_scale=options.without_scale,
    )


@dataclass(eq=False)
class Sample:
    """One volume on its way from noise to the output of a call.

    Attributes:
        noise: latents (C, h, w, d) to begin with; None: from the generator.
        path: file to write to; None: the volume is returned.
        output: the volume, as `output_type` says, or the files that were written; None if it was not finished.
        fault: why its voxels cannot be written.
    """

    prepared: PreparedVolume
    generator: torch.Generator
    noise: torch.Tensor | None
    record: GenerationRecord
    path: Path | None = None
    output: Any = None
    fault: str | None = None


def sample_generators(generator: Generators, count: int) -> list[torch.Generator]:
    """One generator per volume, in the order of the output (all volumes of the first mask, then of the second, ...).

    A list is used as it is, and so is a single generator for a single volume: `generator=G` and `generator=[G]` are the
    same. From a single one for several volumes (None: torch's global one, for one volume too) one seed per volume is
    taken, in that order, by `torch.randint(2**63 - 1, (1,))`, and each volume gets a fresh CPU generator with its seed:
    volume i is the same however many follow it (from two on). Noise is sampled on the CPU, so a generator of another
    device gives a seed likewise. In every case `torch.Generator().manual_seed(seed)`, with the seed of a volume's
    record, generates it again.

    Raises: ValueError if a list has another length, or one generator twice: the second volume's noise would depend on
    the order of the batches, and no seed would reproduce it.
    """
    if generator is None or isinstance(generator, torch.Generator):
        if count != 1 or generator is None:
            return [torch.Generator().manual_seed(_seed_from(generator)) for _ in range(count)]
        generator = [generator]
    if not isinstance(generator, Sequence) or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError(f"generator is a torch.Generator or a list of them, got {generator!r}")
    if len(generator) != count:
        raise ValueError(
            f"{len(generator)} generators for {count} volumes (num_volumes_per_mask of each mask); give one per "
            "volume, or a single one"
        )
    if len({id(one) for one in generator}) < count:
        raise ValueError("the list holds one generator twice; give each volume its own, or a single one for all")
    on_cpu = [one.device.type == "cpu" for one in generator]
    return [
        one if here else torch.Generator().manual_seed(_seed_from(one))
        for one, here in zip(generator, on_cpu, strict=True)
    ]


def _seed_from(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (1,), generator=generator, device=device))


def sample_seed(generator: torch.Generator) -> int | None:
    """The seed that reproduces this generator as it is now; None if it has produced numbers already."""
    seed = generator.initial_seed()
    fresh = torch.Generator(generator.device).manual_seed(seed)
    return seed if torch.equal(fresh.get_state(), generator.get_state()) else None


def equal_batches(shapes: Sequence[Hashable], batch_size: int) -> Iterator[list[int]]:
    """Indices in groups of at most `batch_size` whose shapes (or other keys) are equal, in order of first
    appearance."""
    batch_size = whole_number("batch_size", batch_size)
    groups: dict[Hashable, list[int]] = {}
    for index, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(index)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def initial_latents(
    samples: Sequence[Sample], shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Standard normal noise (B, C, h, w, d), one row per generator, sampled in float32; or the latents that the call
    gave."""
    rows = [
        randn_tensor((1, *shape), generator=sample.generator, device=device, dtype=torch.float32).to(dtype)
        if sample.noise is None
        else sample.noise[None].to(device=device, dtype=dtype)
        for sample in samples
    ]
    return torch.cat(rows)


def check_latents(latents: Any, shapes: Sequence[tuple[int, int, int, int]]) -> Sequence[torch.Tensor | None]:
    """`latents` of a call, tensors or arrays (B, C, h, w, d) or a list of (C, h, w, d), as one tensor per volume; None
    per volume if the call has none.

    Raises: ValueError unless there is one of its shape for each volume, of finite real numbers.
    """
    if latents is None:
        return [None] * len(shapes)
    rows = listed("latents", latents)
    if len(rows) != len(shapes):
        raise ValueError(f"{len(rows)} latents for {len(shapes)} volumes; give one per volume")
    tensors = []
    for row, shape in zip(rows, shapes, strict=True):
        if not isinstance(row, torch.Tensor | np.ndarray):
            raise ValueError(f"latents are tensors or arrays (C, h, w, d), got {type(row).__name__}")
        if tuple(row.shape) != shape:
            raise ValueError(f"latents of shape {tuple(row.shape)} for a mask that needs {shape} (C, h, w, d)")
        array = as_array(row, "latents")
        with np.errstate(over="ignore"):
            finite = np.isfinite(array.astype(np.float32)).all()
        if array.dtype == bool or not finite:
            raise ValueError(f"latents are finite real numbers, got {row.dtype} with others; replace them first")
        wide = np.float64 if array.dtype.itemsize > 4 else np.float32
        tensors.append(
            torch.from_numpy(np.ascontiguousarray(array, dtype=wide))
        )  # in the machine's order of bytes, too
    return tensors


def scheduler_of_call(
    scheduler: SchedulerMixin, unet: LatentDenoiser, sampling: SamplingConfig, sides: tuple[int, int, int] | None
) -> Scheduler:
    """A copy of the scheduler that speaks the model's objective, with the model's shift for latents of these sides
    (None for no shift). Sigmas that the call gives are used unchanged, so they have no shift."""
    shift = 1.0 if sides is None or sampling.sigmas is not None else unet.timestep_shift(sides)
    fitted = unet.fitted(scheduler, shift)
    return with_maisi_steps(fitted) if sampling.maisi_steps else fitted


def recorded_scheduler(fitted: Scheduler) -> dict[str, object]:
    """The class and the options of the scheduler of a call, as JSON."""
    options = json.loads(fitted.to_json_string(), parse_constant=str)  # -Infinity, which JSON lacks, as text
    return {"class": options["_class_name"]} | {k: v for k, v in options.items() if k[0] != "_"}


def timed(fitted: Scheduler, sampling: SamplingConfig, device: torch.device) -> Scheduler:
    """The scheduler of a call, with its timesteps. Raises: ValueError for steps or sigmas that it does not take."""
    set_timesteps(fitted, sampling.steps, sampling.sigmas, device)
    return fitted
