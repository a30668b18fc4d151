"""One way of sampling, judged: volumes from real test masks, how long they took, and what they are to real volumes."""

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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

from diffusion.objectives import RECTIFIED_FLOW, Scheduler, fit_scheduler, make_scheduler
from evaluation.data.model_units import in_model_units
from evaluation.data.pairs import LoadedPairs, unit_range
from evaluation.metrics.features import Extractor, extract
from evaluation.metrics.histogram import band_edges_for, power, power_ratio_db
from evaluation.metrics.set_distances import compare_sets, kernel_distance, standardize
from evaluation.metrics.spectrum import band_names
from evaluation.networks.segmenter import volume_dice
from evaluation.stats.intervals import compare_paired
from pipelines import MedVolumePipeline
from volumes import Volume, VolumeDataset, pad_or_crop

from .realism import MIN_SPREAD, common_shape

OWN = "own"  # the scheduler that the pipeline comes with, by its own default of steps
SOLVERS = {"dpmsolver++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
OF_FLOWS = {"euler": FlowMatchEulerDiscreteScheduler, "heun": FlowMatchHeunDiscreteScheduler, **SOLVERS}
OF_DIFFUSION = {"euler": EulerDiscreteScheduler, "ddim": DDIMScheduler, "ddpm": DDPMScheduler, **SOLVERS}
DEFAULT_STEPS = inspect.signature(MedVolumePipeline.__call__).parameters["num_inference_steps"].default


@dataclass(frozen=True)
class Combination:
    """A scheduler by name, its steps, and the scale of the guidance."""

    scheduler: str
    steps: int
    guidance: float


@dataclass(frozen=True)
class SamplingInputs:
    """What volumes are made of: masks of label values, classes and numbers, and whose they are."""

    masks: Sequence[Volume]
    classes: Sequence[dict[str, str]]
    numbers: Sequence[dict[str, float]]
    names: Sequence[str]
    subjects: Sequence[str]


def make_named(name: str, pipe: MedVolumePipeline) -> Scheduler:
    """A new scheduler that speaks the model's objective. Raises: ValueError for one that has no such, naming those that do."""
    objective, train_steps = pipe.unet.config["objective"], pipe.unet.train_steps
    if name == OWN:
        return fit_scheduler(pipe.scheduler, objective, train_steps)
    known = OF_FLOWS if objective == RECTIFIED_FLOW else OF_DIFFUSION
    if name not in known:
        raise ValueError(f"--schedulers {name}: a model that predicts {objective} has {', '.join(known)}")
    return make_scheduler(objective, train_steps, name=known[name].__name__, bound=pipe.vae.latent_bound())


def inputs_from_dataset(dataset: VolumeDataset, unet: nn.Module) -> SamplingInputs:
    """The masks and conditions of real volumes. Raises: ValueError for a model, or data, without masks."""
    config: Any = unet.config
    if not config["num_labels"] or any(prepared.mask is None for prepared in dataset.prepared):
        raise ValueError("samplers are compared on masks: the model or the data has none")
    values, asked = np.array(sorted(dataset.labels), np.int16), []
    for prepared in dataset.prepared:
        assert prepared.mask is not None
        classes = zip(sorted(dataset.config.classes), prepared.classes, strict=True)
        numbers = zip(sorted(dataset.config.numbers), prepared.numbers, strict=True)
        known = {name: dataset.config.classes[name][i] for name, i in classes if i >= 0}
        asked.append(
            (
                Volume(values[prepared.mask.array], prepared.image.affine),
                {name: value for name, value in known.items() if name in (config["classes"] or {})},
                {n: value for n, value in numbers if n in (config["numbers"] or {}) and not math.isnan(value)},
            )
        )
    masks, labels, numbers = zip(*asked, strict=True)
    return SamplingInputs(
        masks, labels, numbers, [case.name for case in dataset.cases], [c.subject for c in dataset.cases]
    )


def sample(
    pipe: MedVolumePipeline, asked: SamplingInputs, combination: Combination, *, seed: int = 0, batch_size: int = 8
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """A volume (C, X, Y, Z) in [0, 1] for each mask, volume i from seed + i whatever the combination, and their cost:
    {"scheduler_class", "evaluations_per_volume": of the network, both of guidance's counted, "seconds_per_volume":
    {"median", "lowest", "highest"} over the calls of `batch_size` volumes, decoding included}.
    """
    own, evaluations = pipe.scheduler, 0

    def count(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal evaluations
        evaluations += len(args[0])

    made, seconds = [], []
    handle = pipe.unet.register_forward_pre_hook(count)
    pipe.scheduler = make_named(combination.scheduler, pipe)
    try:
        for start in range(0, len(asked.masks), batch_size):
            part = slice(start, start + batch_size)
            generators = [torch.Generator().manual_seed(seed + i) for i in range(len(asked.masks))[part]]
            begun = time.perf_counter()
            output: Any = pipe(
                mask=list(asked.masks[part]),
                classes=list(asked.classes[part]),
                numbers=list(asked.numbers[part]),
                num_inference_steps=combination.steps,
                guidance_scale=combination.guidance,
                generator=generators,
                batch_size=batch_size,
            )
            seconds.append((time.perf_counter() - begun) / len(generators))
            made += [in_model_units(image, pipe.data) for image in output.volumes]
        name = type(pipe.scheduler).__name__
    finally:
        pipe.scheduler = own
        handle.remove()
    cost = {"median": float(np.median(seconds)), "lowest": min(seconds), "highest": max(seconds)}
    return made, {
        "scheduler_class": name,
        "evaluations_per_volume": evaluations / len(made),
        "seconds_per_volume": cost,
    }


class Judge:
    """Compares volumes that were made from the masks of `asked` with real ones; what is known of these is computed once.

    Args:
        training, test: real volumes (C, X, Y, Z) in [0, 1], and the subject of each: the floor is the distance between them.
        same: real volumes of the very masks, in the order of `asked`.
        extractors: by name, on `device`.
        segmenter: trained on real volumes; takes what `pairs` holds.
        pairs: the very real volumes and masks as the segmenter takes them.
    """

    def __init__(
        self,
        asked: SamplingInputs,
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
        self.asked, self.same, self.extractors, self.device = asked, same, extractors, device
        self.segmenter, self.pairs, self.num_labels = segmenter, pairs, num_labels
        self.subjects = {"training": training[1], "test": test[1], "generated": asked.subjects}
        real = {"training": training[0], "test": test[0]}
        self.shape = common_shape([volume for volumes in real.values() for volume in volumes])
        self.features = {
            name: {s: extract(extractor, volumes, device, on_volume) for s, volumes in real.items()}
            for name, extractor in extractors.items()
        }
        self.powers = {s: self._powers(volumes) for s, volumes in real.items()}
        self.dice = self._dice(pairs.images)

    def __call__(self, volumes: Sequence[np.ndarray]) -> dict[str, Any]:
        """{"kernel": by extractor `compare_sets`, features in standard deviations of the training set's; "spectrum": {"bands",
        "ratio_db": generated over test, band by band, "difference_db": `compare_sets` of the mean of its absolute values};
        "dice": {"generated", "real": means, "difference": `compare_paired`}; "intensity_bias": `compare_paired` of the mean
        intensity, less that of the real volume of the mask}. Intervals are of 95 %.

        Raises: ValueError for volumes of another grid than the real ones of their masks.
        """
        for name, ours, theirs in zip(self.asked.names, volumes, self.same, strict=True):
            if ours.shape != theirs.shape:
                raise ValueError(
                    f"{name}: the real volume is {theirs.shape}, the generated one {ours.shape} at the pipeline's spacing; "
                    "set data.spacing to what the pipeline was trained at"
                )
        options: dict[str, Any] = {"subjects": self.subjects}
        kernel = {}
        for name, extractor in self.extractors.items():
            rows = {**self.features[name], "generated": extract(extractor, volumes, self.device)}
            kernel[name] = compare_sets(kernel_distance, standardize(rows, "training", MIN_SPREAD), **options)
        powers = {**self.powers, "generated": self._powers(volumes)}
        images = torch.stack([self._as_seen(volume) for volume in volumes])
        dice, means = self._dice(images), [np.array([[v.mean() for v in s]]) for s in (volumes, self.same)]
        return {
            "kernel": kernel,
            "spectrum": {
                "bands": band_names(band_edges_for(self.shape)),
                "ratio_db": compare_sets(power_ratio_db, powers, **options)["generated_to_test"],
                "difference_db": compare_sets(_mean_difference_db, powers, **options),
            },
            "dice": {
                "generated": float(dice.mean()),
                "real": float(self.dice.mean()),
                "difference": compare_paired(dice, self.dice, self.asked.subjects, "difference"),
            },
            "intensity_bias": compare_paired(means[0], means[1], self.asked.subjects, "difference"),
        }

    def _powers(self, volumes: Sequence[np.ndarray]) -> np.ndarray:
        """(N, channels * bands)."""
        return np.stack([np.concatenate([power(channel, self.shape) for channel in volume]) for volume in volumes])

    def _as_seen(self, volume: np.ndarray) -> torch.Tensor:
        """As `load_pairs` brings real volumes to the segmenter."""
        x, y, z = self.pairs.images.shape[2:]
        scaled = np.stack([unit_range(channel) for channel in volume])
        return torch.from_numpy(pad_or_crop(volume.shape[1:], (x, y, z)).apply(scaled, 0))

    def _dice(self, images: torch.Tensor) -> np.ndarray:
        """(1, N): mean over the labels but the background, of volumes with the masks of `pairs`."""
        per_label = volume_dice(self.segmenter, images, self.pairs.labels, self.num_labels)
        return torch.stack(per_label).mean(0)[None].numpy()


def _mean_difference_db(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(power_ratio_db(first, second)).mean())
