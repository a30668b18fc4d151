r"""Measure what each stage costs per volume on this machine, and plan a cluster's job from it.

    python -m benchmarks.stages --recipe configs/hippocampus --data.root data/hippocampus \
        --pipeline weights/hippocampus --output docs/stages.json
    python -m benchmarks.stages --recipe recipe --pipeline output/ldm/pipeline --device cuda --output stages.json
    python -m tools.cluster_page --stages stages.json --output cluster.md    # docs/cluster.md with these figures

A recipe is a folder with `vae.yaml` and `ldm.yaml`. A few training volumes are prepared, encoded and generated, and a
few training steps are taken on batches of random values, in one process on one device. No training is needed: any
pipeline of these models will do. On a CPU the seconds are those of one core that worked for this process, so other
jobs on the machine hardly matter. The waiting of a training for its data is not part of a step here (`data_wait` in the
log of a training, docs/prepared_volumes.md).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveInt

ROOT = Path(__file__).resolve().parents[1]


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipe, pipeline = ROOT / "configs/hippocampus", ROOT / "weights/hippocampus"
    count = Number(PositiveInt)
    parser.add_argument("--recipe", type=Path, default=recipe, help="folder of a recipe (configs/hippocampus)")
    parser.add_argument("--pipeline", type=Path, default=pipeline, help="pipeline of it (weights/hippocampus)")
    parser.add_argument("--data.root", dest="root", metavar="DIR", help="folder of the data, if not the recipe's")
    parser.add_argument("--device", default="cpu", help="device that encodes, trains and generates (cpu)")
    parser.add_argument("--volumes", type=count, default=4, help="volumes to measure (4)")
    parser.add_argument("--steps", type=count, default=5, help="training steps to measure (5)")
    parser.add_argument("--planned_volumes", type=count, default=5000, help="volumes of the planned data set (5000)")
    parser.add_argument("--generated", type=count, default=100_000, help="volumes to generate in the plan (100000)")
    parser.add_argument("--gpus", type=count, nargs="+", default=[8, 64], help="GPUs of each plan (8 64)")
    parser.add_argument("--gpus_per_node", type=count, default=8, help="GPUs of a node (8)")
    parser.add_argument("--processes", type=count, default=8, help="processes that prepare, on each node (8)")
    parser.add_argument("--output", type=Path, required=True, help="report to write, a JSON file")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cli.settings import construct
from diffusion import build_latent_cache
from evaluation.doctor.memory import OneProcess, networks_of, training_work
from evaluation.doctor.models import AUTOCAST, build_models, config_from_sections, with_precision
from evaluation.metrics.features import EncoderStatistics, RandomStatistics, extract
from evaluation.report import Provenance, check_report, provenance, read_config, write_report
from pipelines import MedVolumePipeline, SamplingConfig
from pipelines.batch_generation import BatchConfig, generators_of
from training import LdmTrainingStep, TrainLdmConfig, TrainVaeConfig, VaeTrainingStep
from volumes import DataConfig, VolumeDataset, load_cases, volume_parts
from volumes.data.cases import Case
from volumes.description import NumberStats
from volumes.devices import find_device

from .cluster_plan import Costs, Job, Plan, StepCost, plan
from .generation import seconds_of as seconds_until_done

NOTE = "costs of the device below, in one process; the plans are arithmetic, and no cluster has run them"
Result = TypeVar("Result")
CONDITIONS = ("num_labels", "classes", "numbers", "images")


class JobPlan(Plan):
    """A plan, and the `Job` that it is for."""

    job: dict[str, int]


class Report(Provenance):
    """The JSON file."""

    benchmark: str
    note: str
    recipe: str
    pipeline: str
    device: str  # "cpu", or the name of the GPU
    volumes: int  # that were measured
    steps: int
    shape: list[int]  # (X, Y, Z) of the volume of median size
    costs: Costs
    plans: list[JobPlan]
    seconds: float
    load_before: float
    load_after: float


class OneTrainer(OneProcess):
    """`OneProcess`, with what an optimizer's step needs."""

    scaler = None

    def unscale_gradients(self, optimizer: object) -> None:
        """Do nothing: losses are not scaled."""


def main(args: Sequence[str] | None = None) -> Report:
    """Measure, plan, write the report and return it."""
    options = parse(args)
    check_report(options.output)
    device = find_device(options.device)
    torch.set_num_threads(1 if device.type == "cpu" else torch.get_num_threads())
    load, start = os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, cache_in(Path(folder) / "cache"):
        costs, shape, measured = measure(options, device, Path(folder))
    jobs = [
        Job(options.planned_volumes, options.generated, gpus, options.gpus_per_node, options.processes)
        for gpus in options.gpus
    ]
    report: Report = {
        "benchmark": "stages",
        "note": NOTE + ("; no GPU has run any of it" if device.type == "cpu" else ""),
        "recipe": options.recipe.name,
        "pipeline": options.pipeline.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "volumes": measured,
        "steps": options.steps,
        "shape": shape,
        "costs": costs,
        "plans": [{"job": asdict(job), **plan(costs, job)} for job in jobs],
        "seconds": round(time.perf_counter() - start, 1),
        "load_before": load,
        "load_after": os.getloadavg()[0],
        **provenance(),
    }
    write_report(options.output, report)
    print(f"{options.output}; next: python -m tools.cluster_page --stages {options.output} --output cluster.md")
    return report


def seconds_of(device: torch.device, work: Callable[[], Result]) -> tuple[float, Result]:
    """Return the seconds that some work takes, and its result: on a CPU those of its core, else until it is done."""
    if device.type != "cpu":
        return seconds_until_done(device, work)
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


@contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """Store prepared volumes in an empty folder, so that they are prepared and measured."""
    before = os.environ.get("MEDVOLUME_CACHE")
    os.environ["MEDVOLUME_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("MEDVOLUME_CACHE")
        if before is not None:
            os.environ["MEDVOLUME_CACHE"] = before


def measure(options: argparse.Namespace, device: torch.device, folder: Path) -> tuple[Costs, list[int], int]:
    """Return the costs, the shape (X, Y, Z) of the volume of median size, and how many volumes were measured."""
    sections = {name: read_config(options.recipe / f"{name}.yaml") for name in ("vae", "ldm")}
    sections["ldm"]["vae"] = str(options.pipeline / "vae")
    root = {} if options.root is None else {"root": options.root}
    data = construct(DataConfig, {**sections["ldm"]["data"], **root})
    cases = [case for case in load_cases(data) if case.split == "train"]
    dataset, prepare = prepared(cases, options.volumes, data, device)
    shape = list(sorted(dataset.shapes, key=lambda sides: sides[0] * sides[1] * sides[2])[len(dataset) // 2])
    steps = {name: training_step(config, data, shape, device, options, len(cases)) for name, config in sections.items()}
    pipe = MedVolumePipeline.from_pretrained(options.pipeline).to(device)
    pipe.set_progress_bar_config(disable=True)
    config = config_from_sections(sections["ldm"], data)
    assert isinstance(config, TrainLdmConfig)
    costs: Costs = {
        "prepare": prepare,
        "latents": encoded(dataset, pipe, config, folder / "latents"),
        "versions": config.cache.versions,
        "vae_step": steps["vae"],
        "ldm_step": steps["ldm"],
        "generate": generated(pipe, data, shape, len(dataset), folder / "generated"),
        "evaluate": {"seconds": features(dataset, pipe)},
        "pipeline_bytes": sum(
            path.stat().st_size
            for path in [options.pipeline / "model_index.json", *options.pipeline.glob("*/*.safetensors")]
        ),
    }
    return costs, shape, len(dataset)


def prepared(
    cases: Sequence[Case], count: int, data: DataConfig, device: torch.device
) -> tuple[VolumeDataset, dict[str, float]]:
    """Prepare `count` cases in this process; one before them, untimed, unless there is no other."""
    VolumeDataset(cases[-1:], data)
    chosen = cases[: min(count, max(1, len(cases) - 1))]
    seconds, dataset = seconds_of(device, lambda: VolumeDataset(chosen, data))
    paths = {path for case in chosen for path in (*case.images.values(), case.mask) if path is not None}
    read = sum(part.stat().st_size for path in paths for part in volume_parts(path))
    stored = sum(facts.nbytes for facts in dataset.facts)
    return dataset, {
        "seconds": seconds / len(chosen),
        "read_bytes": read / len(chosen),
        "stored_bytes": stored / len(chosen),
    }


def encoded(dataset: VolumeDataset, pipe: MedVolumePipeline, config: TrainLdmConfig, folder: Path) -> dict[str, float]:
    """Encode the volumes as they are, and in up to two other versions, and return the seconds and bytes of each."""
    seconds, entries = [], []
    for versions in (1, 1, min(config.cache.versions, 3)):  # the first is untimed
        cache = replace(config.cache, versions=versions)
        place = folder / str(len(seconds))
        took, latents = seconds_of(
            pipe.device, lambda cache=cache, place=place: build_latent_cache(dataset, pipe.vae, place, cache)
        )
        seconds.append(took / len(dataset))
        entries = latents.files
    others = min(config.cache.versions, 3) - 1
    return {
        "seconds": seconds[1],
        "version_seconds": max(0.0, seconds[2] - seconds[1]) / others if others else 0.0,
        "bytes": sum(file.stat().st_size for file in entries) / len(entries),
    }


def training_step(
    sections: Mapping[str, object],
    data: DataConfig,
    shape: Sequence[int],
    device: torch.device,
    options: argparse.Namespace,
    volumes: int,
) -> StepCost:
    """Return the cost of a training step of a config, with those of the optimizer and the average.

    An autoencoder without parameters costs nothing.
    """
    config = with_precision(config_from_sections(sections, data))
    numbers = dict.fromkeys(data.numbers, NumberStats(mean=0.0, std=1.0, low=-1.0, high=1.0))
    models, _ = build_models(config, numbers, options.recipe)
    step, loop = models.step, config.loop
    if step is None:
        return {
            "seconds": 0.0,
            "batch": 1,
            "passes": 0.0,
            "gradient_bytes": 0,
            "checkpoint_bytes": 0,
            "precision": "no",
        }
    nn.Module.to(networks_of(step), device)
    patch = config.crops.shape if isinstance(config, TrainVaeConfig) else latent_shape(shape, models.vae.stride)
    work = training_work(step, patch, loop.batch_size, OneTrainer(device, AUTOCAST[loop.mixed_precision]))
    accumulated = config.optimizer.gradient_accumulation

    def update() -> None:
        for _ in range(accumulated):
            work()
        for learner in step.learners:
            learner.update(0)

    seconds = [seconds_of(device, update)[0] for _ in range(options.steps + 1)][1:]
    batch = loop.batch_size * accumulated
    learned = [weight for one in step.learners for weight in one.network.parameters() if weight.requires_grad]
    return {
        "seconds": statistics.median(seconds),
        "batch": batch,
        "passes": loop.max_steps * batch / volumes,
        "gradient_bytes": sum(weight.numel() * weight.element_size() for weight in learned),
        "checkpoint_bytes": checkpoint_bytes(step, bool(loop.validate_every)),
        "precision": loop.mixed_precision,
    }


def latent_shape(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Return the sides of the latents of a volume."""
    return [-(-n // s) for n, s in zip(shape, stride, strict=True)]


def checkpoint_bytes(step: VaeTrainingStep | LdmTrainingStep, validated: bool) -> int:
    """Return the size of the tensors in a checkpoint, once a step was taken.

    Args:
        validated: whether it holds the best weights of a validation, too.
    """
    tensors: list[Tensor] = []
    for learner in step.learners:
        tensors += [*learner.network.state_dict().values(), *learner.ema.module.state_dict().values()]
        states = learner.optimizer.state.values()
        tensors += [value for state in states for value in state.values() if isinstance(value, Tensor)]
    best = step.learners[0].ema.module.state_dict().values() if validated else []
    return sum(tensor.numel() * tensor.element_size() for tensor in [*tensors, *best])


def generated(
    pipe: MedVolumePipeline, data: DataConfig, shape: Sequence[int], count: int, folder: Path
) -> dict[str, float]:
    """Generate volumes as `generate.py` does, from the conditions of training cases, into files.

    One is generated before them, untimed.
    """
    conditional = any(pipe.unet.config.get(kind) for kind in CONDITIONS)
    batch = BatchConfig(pipeline="", output=folder, data=data if conditional else None, splits=["train"])
    requests = [*batch.requests(lambda: pipe)]
    if not conditional:
        requests = [replace(requests[0], shape=tuple(shape))] * count
    sampling = SamplingConfig()
    folder.mkdir()

    def generate(first: int, number: int) -> None:
        chosen = [requests[index % len(requests)] for index in range(number)]
        paths = [folder / f"{first + index}.nii.gz" for index in range(number)]
        pipe.generate(pipe.prepare(chosen, sampling), sampling, generators_of(range(number)), paths=paths)

    generate(0, 1)
    before = sum(path.stat().st_size for path in folder.iterdir())
    seconds, _ = seconds_of(pipe.device, lambda: generate(1, count))
    written = sum(path.stat().st_size for path in folder.iterdir()) - before
    return {"seconds": seconds / count, "bytes": written / count}


def features(dataset: VolumeDataset, pipe: MedVolumePipeline) -> float:
    """Return the seconds that the features of a volume take, by both extractors of `evaluate.py realism --vae`."""
    volumes = [(dataset[index]["image"].numpy() + 1) / 2 for index in range(len(dataset))]
    extractors = [RandomStatistics().to(pipe.device), EncoderStatistics(pipe.vae)]

    def run(some: Sequence[Any]) -> None:
        for extractor in extractors:
            extract(extractor, some, pipe.device)

    run(volumes[:1])  # untimed
    return seconds_of(pipe.device, lambda: run(volumes))[0] / len(volumes)
