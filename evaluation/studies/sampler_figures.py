"""Score one way of sampling: volumes from real test masks, the time they take, and their distance from real volumes."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import nn

from diffusion.guidance import Interval, interval_in_effect
from diffusion.objectives import FLOW_MAP, RECTIFIED_FLOW, Scheduler
from evaluation.data.model_units import in_model_units, pipeline_of_boxes
from evaluation.data.pairs import LoadedPairs, unit_range
from evaluation.data.volume_sets import volume_shapes
from evaluation.metrics.features import Extractor, extract
from evaluation.metrics.histogram import band_edges_for, power, power_ratio_db
from evaluation.metrics.nearest import common_crop
from evaluation.metrics.set_distances import SetComparison, compare_sets, kernel_distance, standardize
from evaluation.metrics.spectrum import band_names
from evaluation.networks.segmenter import volume_dice
from evaluation.stats.bootstrap import Estimate
from evaluation.stats.intervals import PairedComparison, compare_paired
from pipelines import MedVolumePipeline
from volumes import Volume, VolumeDataset, pad_or_crop

from .realism import MIN_SPREAD

OWN = "own"  # the scheduler of the pipeline
SOLVERS = {"dpmsolver++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
OF_FLOWS = {"euler": FlowMatchEulerDiscreteScheduler, "heun": FlowMatchHeunDiscreteScheduler, **SOLVERS}
OF_MAPS = {"euler": FlowMatchEulerDiscreteScheduler}
OF_DIFFUSION = {"euler": EulerDiscreteScheduler, "ddim": DDIMScheduler, "ddpm": DDPMScheduler, **SOLVERS}


@dataclass(frozen=True)
class Combination:
    """A scheduler by name, its steps, the guidance scale, the noise levels (lo, hi] in which guidance acts (None: all,
    or no guidance), the scale of autoguidance (1: none), and whether the pipeline's `guidance_without` acts too."""

    scheduler: str
    steps: int
    guidance: float
    interval: Interval | None = None
    autoguidance: float = 1.0
    without: bool = False

    def __post_init__(self) -> None:
        guided = self.without or max(self.guidance, self.autoguidance) > 1
        object.__setattr__(self, "interval", interval_in_effect(self.interval) if guided else None)

    @property
    def guidance_in_words(self) -> str:
        """Such as "2 in (0.2, 0.8], weak 1.5"."""
        interval = "" if self.interval is None else f" in ({self.interval[0]:g}, {self.interval[1]:g}]"
        weak = "" if self.autoguidance == 1 else f", weak {self.autoguidance:g}"
        return f"{self.guidance:g}{interval}{weak}{', without labels' if self.without else ''}"


@dataclass(frozen=True)
class SamplingInputs:
    """Masks of label values in the boxes of their cases (`data.crop`), classes and numbers, and the names and subjects
    of the cases.
    """

    masks: Sequence[Volume]
    classes: Sequence[dict[str, str]]
    numbers: Sequence[dict[str, float]]
    names: Sequence[str]
    subjects: Sequence[str]


def make_named(name: str, pipe: MedVolumePipeline) -> Scheduler:
    """Make a new scheduler for the model's objective. Raises: ValueError for a name without one, listing those that
    have one."""
    objective = pipe.unet.config["objective"]
    if name == OWN:
        return pipe.unet.fitted(pipe.scheduler)
    classes = {RECTIFIED_FLOW: OF_FLOWS, FLOW_MAP: OF_MAPS}.get(objective, OF_DIFFUSION)
    if name not in classes:
        raise ValueError(f"--schedulers {name}: a model that predicts {objective} has {', '.join(classes)}")
    return pipe.unet.new_scheduler(classes[name].__name__, pipe.vae.latent_bound())


class Seconds(TypedDict):
    """Seconds per volume over the calls of the pipeline, decoding included."""

    median: float
    lowest: float
    highest: float


class Cost(TypedDict):
    """The cost of sampling; `evaluations_per_volume` counts calls of networks, all of guidance's."""

    scheduler_class: str
    evaluations_per_volume: float
    seconds_per_volume: Seconds


class Spectrum(TypedDict):
    """Power of generated over test volumes; `difference_db` is the mean of its absolute values over the bands."""

    bands: list[str]
    ratio_db: Estimate[list[float]]
    difference_db: SetComparison[float]


class DiceScores(TypedDict):
    """Mean Dice on generated volumes and on the real volumes of their masks."""

    generated: float
    real: float
    difference: PairedComparison


class SamplerScores(TypedDict):
    """Scores of one way of sampling. Intervals are of 95 %.

    `kernel` is by extractor, of features in standard deviations of the training set's. `intensity_bias` is the mean
    intensity less that of the real volume of the mask.
    """

    kernel: dict[str, SetComparison[float]]
    spectrum: Spectrum
    dice: DiceScores
    intensity_bias: PairedComparison


def inputs_from_dataset(dataset: VolumeDataset, unet: nn.Module) -> SamplingInputs:
    """Collect the masks and conditions of real volumes. Raises: ValueError for a model, or data, without masks."""
    config: Any = unet.config
    if not config["num_labels"] or any(facts.mask is None for facts in dataset.facts):
        raise ValueError("samplers are compared on masks: the model or the data has none")
    class_names, number_names = sorted(dataset.config.classes), sorted(dataset.config.numbers)
    masks, classes, numbers = [], [], []
    for index, facts in enumerate(dataset.facts):
        mask = dataset.label_map(index)
        assert mask is not None
        masks.append(mask)
        of_case = {
            n: dataset.config.class_names[n][i] for n, i in zip(class_names, facts.classes, strict=True) if i >= 0
        }
        classes.append({name: value for name, value in of_case.items() if name in (config["classes"] or {})})
        pairs = zip(number_names, facts.numbers, strict=True)
        numbers.append({n: value for n, value in pairs if n in (config["numbers"] or {}) and not math.isnan(value)})
    names = [case.name for case in dataset.cases]
    return SamplingInputs(masks, classes, numbers, names, [case.subject for case in dataset.cases])


def sample(
    pipe: MedVolumePipeline, inputs: SamplingInputs, combination: Combination, *, seed: int = 0, batch_size: int = 8
) -> tuple[list[np.ndarray], Cost]:
    """Generate a volume (C, X, Y, Z) in [0, 1] for each mask, volume i from seed + i whatever the combination, and
    measure the cost."""
    boxes, evaluations = pipeline_of_boxes(pipe), 0
    boxes.scheduler = make_named(combination.scheduler, pipe)

    def count(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal evaluations
        evaluations += len(args[0])

    volumes, seconds = [], []
    networks = [pipe.unet, *([] if pipe.unet_weak is None else [pipe.unet_weak])]
    handles = [network.register_forward_pre_hook(count) for network in networks]
    try:
        for start in range(0, len(inputs.masks), batch_size):
            batch = slice(start, start + batch_size)
            generators = [torch.Generator().manual_seed(seed + i) for i in range(len(inputs.masks))[batch]]
            start_time = time.perf_counter()
            output: Any = boxes(
                mask=list(inputs.masks[batch]),
                classes=list(inputs.classes[batch]),
                numbers=list(inputs.numbers[batch]),
                num_inference_steps=combination.steps,
                guidance_scale=combination.guidance,
                guidance_interval=combination.interval or (0.0, 1.0),
                autoguidance_scale=combination.autoguidance,
                generator=generators,
                batch_size=batch_size,
            )
            seconds.append((time.perf_counter() - start_time) / len(generators))
            volumes += [in_model_units(image, pipe.data) for image in output.volumes]
    finally:
        for handle in handles:
            handle.remove()
    return volumes, {
        "scheduler_class": type(boxes.scheduler).__name__,
        "evaluations_per_volume": evaluations / len(volumes),
        "seconds_per_volume": {"median": float(np.median(seconds)), "lowest": min(seconds), "highest": max(seconds)},
    }


class SamplerScorer:
    """Compare generated volumes with real ones, whose features, powers and Dice are computed once.

    Args:
        inputs: of the generated volumes.
        training, test: real volumes (C, X, Y, Z) in [0, 1], and the subject of each. The distance between the two is
            the floor.
        same: real volumes of the same masks, in the order of `inputs`.
        extractors: by name, on `device`.
        segmenter: trained on real volumes, for images as in `pairs`.
        pairs: the real volumes `same` and their masks, as the segmenter takes them.
    """

    def __init__(
        self,
        inputs: SamplingInputs,
        training: tuple[Sequence[np.ndarray], Sequence[str]],
        test: tuple[Sequence[np.ndarray], Sequence[str]],
        same: Sequence[np.ndarray],
        extractors: dict[str, Extractor],
        segmenter: nn.Module,
        pairs: LoadedPairs,
        num_labels: int,
        device: torch.device | str = "cpu",
        on_volume: Callable[[], None] | None = None,
    ):
        self.inputs = inputs
        self.same = same
        self.extractors = extractors
        self.device = device
        self.segmenter = segmenter
        self.pairs = pairs
        self.num_labels = num_labels
        self.subjects = {"training": training[1], "test": test[1], "generated": inputs.subjects}
        real = {"training": training[0], "test": test[0]}
        self.shape = common_crop([shape for volumes in real.values() for shape in volume_shapes(volumes)])
        self.features = {
            name: {s: extract(extractor, volumes, device, on_volume) for s, volumes in real.items()}
            for name, extractor in extractors.items()
        }
        self.powers = {s: self._powers(volumes) for s, volumes in real.items()}
        self.dice = self._dice(pairs.images)

    def __call__(self, volumes: Sequence[np.ndarray]) -> SamplerScores:
        """Score volumes of `inputs`. Raises: ValueError for another grid than that of the real volume of the mask."""
        for name, generated, real in zip(self.inputs.names, volumes, self.same, strict=True):
            if generated.shape != real.shape:
                raise ValueError(
                    f"{name}: the real volume is {real.shape}, the generated one {generated.shape} at the pipeline's "
                    "spacing; set data.spacing to that of the pipeline's training"
                )
        kernel = {}
        for name, extractor in self.extractors.items():
            rows = {**self.features[name], "generated": extract(extractor, volumes, self.device)}
            kernel[name] = compare_sets(
                kernel_distance, standardize(rows, "training", MIN_SPREAD), subjects=self.subjects
            )
        powers = {**self.powers, "generated": self._powers(volumes)}
        images = torch.stack([self._prepared(volume) for volume in volumes])
        dice = self._dice(images)
        means = [np.array([[volume.mean() for volume in of_source]]) for of_source in (volumes, self.same)]
        return {
            "kernel": kernel,
            "spectrum": {
                "bands": band_names(band_edges_for(self.shape)),
                "ratio_db": compare_sets(power_ratio_db, powers, subjects=self.subjects)["generated_to_test"],
                "difference_db": compare_sets(_mean_difference_db, powers, subjects=self.subjects),
            },
            "dice": {
                "generated": float(dice.mean()),
                "real": float(self.dice.mean()),
                "difference": compare_paired(dice, self.dice, self.inputs.subjects, "difference"),
            },
            "intensity_bias": compare_paired(means[0], means[1], self.inputs.subjects, "difference"),
        }

    def _powers(self, volumes: Sequence[np.ndarray]) -> np.ndarray:
        """Compute band powers, (N, channels * bands)."""
        return np.stack([np.concatenate([power(channel, self.shape) for channel in volume]) for volume in volumes])

    def _prepared(self, volume: np.ndarray) -> torch.Tensor:
        """Prepare a volume for the segmenter as `load_pairs` does."""
        x, y, z = self.pairs.images.shape[2:]
        scaled = np.stack([unit_range(channel) for channel in volume])
        return torch.from_numpy(pad_or_crop(volume.shape[1:], (x, y, z)).apply(scaled, 0))

    def _dice(self, images: torch.Tensor) -> np.ndarray:
        """Compute the mean Dice over the labels except the background, (1, N), of volumes with the masks of `pairs`."""
        per_label = volume_dice(self.segmenter, images, self.pairs.labels, self.num_labels)
        return torch.stack(per_label).mean(0)[None].numpy()


def _mean_difference_db(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(power_ratio_db(first, second)).mean())
