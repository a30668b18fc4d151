"""Compute a training step and generate a volume with the recipes of configs/real_sizes, at full size, on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.full_size --output docs/full_size.json [--parts ct/vae_24gb/training,...]

Each part runs in its own process, one at a time, in float32, with one volume or patch in a batch: the recipes' batches
of 4 and 8 need a GPU's memory. Its peak resident memory stands beside the doctor's estimate. The report is written
after every part; parts that it has already are not run again, unless `--parts` names them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveFloat

SHAPES = {"ct": (256, 256, 256), "brats": (240, 240, 155)}
# in the order of their time
PARTS = (
    *("brats/vae_24gb/training", "ct/vae_24gb/training", "brats/ldm_24gb/training", "brats/ldm_24gb/generation"),
    *("ct/ldm_24gb/training", "ct/ldm_24gb/generation", "brats/vae_8x80gb/training", "ct/vae_8x80gb/training"),
    *("brats/ldm_8x80gb/training", "brats/ldm_8x80gb/generation"),
    *("ct/ldm_8x80gb/training", "ct/ldm_8x80gb/generation"),
)


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="report to write, a JSON file")
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), help=f"comma-separated parts to run, from {', '.join(PARTS)}"
    )
    parser.add_argument(
        "--memory", type=Number(PositiveFloat), default=15.0, help="GiB that a part may take; larger ones wait (15)"
    )
    parser.add_argument("--hours", type=Number(PositiveFloat), default=4.0, help="time limit of a part (4)")
    parser.add_argument("--shape", type=int, nargs=3, help="another size of volumes and patches, to test the script")
    options = parser.parse_args(args)
    if unknown := set(options.parts or ()) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}; there are {', '.join(PARTS)}")
    return options


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import tempfile
import time
from dataclasses import replace
from functools import partial
from typing import Any, Required, TypedDict, cast

import torch

from cli.settings import construct
from diffusion import make_scheduler
from evaluation.doctor.memory import GIB, generation_bytes, training_bytes
from evaluation.doctor.models import Models, build_models, config_from_sections
from evaluation.report import Machine, check_report, provenance, read_config, read_report, write_report
from pipelines import MedVolumePipeline
from training import TrainVaeConfig
from volumes import DataConfig, Volume, make_phantom
from volumes.description import DataDescription

from .speed.measure import OK, Work, available_memory, measure

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "real_sizes"
CPU = torch.device("cpu")


class Outcome(TypedDict, total=False):
    """Figures if `status` is "ok", else a `detail`."""

    status: Required[str]
    detail: str
    measured: int  # bytes beyond those of the program
    program: int  # bytes
    seconds: float


class Row(Outcome):
    """One part: what was run, the doctor's estimate in bytes, what it took, and where."""

    recipe: Required[str]
    stage: Required[str]
    shape: Required[list[int]]
    batch: Required[int]
    estimate: Required[dict[str, int]]
    date: Required[str]
    commit: Required[str | None]
    machine: Required[Machine]
    versions: Required[dict[str, str]]


class Report(TypedDict):
    """The JSON file; `parts` by their names."""

    benchmark: str
    parts: dict[str, Row]


def main(args: Sequence[str] | None = None) -> Path:
    """Measure the parts that the report lacks, and return its path."""
    options = parse(args)
    report: Report = {"benchmark": "full_size", "parts": {}}
    if options.output.is_file():
        report = read_report(options.output, Report, "benchmarks.full_size")
    check_report(options.output)
    done = {part for part, row in report["parts"].items() if row["status"] == OK}
    for part in options.parts or [part for part in PARTS if part not in done]:
        recipe, _, stage = part.rpartition("/")
        shape = tuple(options.shape or SHAPES[recipe.partition("/")[0]])
        planned = estimate(recipe, stage, shape, small=bool(options.shape))
        needed = planned["total"] / GIB
        outcome: Outcome
        if needed > options.memory or 1.25 * planned["total"] > available_memory():
            outcome = {"status": "not run", "detail": f"needs about {needed:.1f} GiB, more than is free for it"}
        else:
            outcome = measured(recipe, stage, shape, options)
        known = provenance()
        report["parts"][part] = {
            "recipe": recipe,
            "stage": stage,
            "shape": list(shape),
            "batch": 1,
            "estimate": planned,
            **outcome,
            "date": known["date"],
            "commit": known["commit"],
            "machine": known["machine"],
            "versions": known["versions"],
        }
        print(f"{part}: {line(report['parts'][part])}", flush=True)
        write_report(options.output, report)
    return options.output


def measured(recipe: str, stage: str, shape: Sequence[int], options: argparse.Namespace) -> Outcome:
    """Run a part in a process of its own: status, bytes beyond those of the program, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"recipe": recipe, "shape": shape, "small": bool(options.shape)}
        limit = int(2 * options.memory * GIB)  # of addresses, which are more than memory
        run = partial(measure, repeats=0, timeout=3600 * options.hours, memory=limit)
        if stage == "training":
            result = run(training, arguments)
        else:  # saved by a process of its own, so that the measured one holds the weights once
            arguments |= {"folder": folder}
            result = run(saving, arguments)
            result = result if "detail" in result else run(generation, arguments)
    if "detail" in result:
        return {"status": result["status"], "detail": result["detail"]}
    assert "memory" in result and "seconds" in result
    memory, seconds = result["memory"], result["seconds"]["median"]
    return {"status": OK, "measured": memory["above"], "program": memory["baseline"], "seconds": seconds}


def built(recipe: str, shape: Sequence[int], small: bool) -> Models:
    """Build the models of a recipe as the trainer does, in float32 and with a batch of one.

    Args:
        recipe: such as "ct/vae_24gb".
        shape: of the volumes.
        small: whether patches take this shape, too.
    """
    path = CONFIGS / f"{recipe}.yaml"
    sections = read_config(path)
    data = construct(DataConfig, sections["data"])
    config = config_from_sections(sections, data)
    config.loop = replace(config.loop, batch_size=1, mixed_precision="no")
    if small and isinstance(config, TrainVaeConfig):
        config.crops = replace(config.crops, shape=list(shape))
    return build_models(config, {}, path.parent)[0]


def latent_shape(models: Models, shape: Sequence[int]) -> list[int]:
    """Return the sides of a volume's latents."""
    return [-(-n // s) for n, s in zip(shape, models.vae.stride, strict=True)]


def estimate(recipe: str, stage: str, shape: Sequence[int], small: bool) -> dict[str, int]:
    """Return the doctor's estimate of a part, in bytes."""
    torch.set_num_threads(1)
    models = built(recipe, shape, small)
    cells = latent_shape(models, shape)
    if stage == "generation":
        padded = [n * s for n, s in zip(cells, models.vae.stride, strict=True)]
        return generation_bytes(models.vae, models.unet, padded, 1, cpu=True)
    assert models.step is not None
    parts = training_bytes(models.step, models.work(cells, CPU), cpu=True)
    # The first step ends before the optimizer has any state.
    return {**parts, "total": parts["total"] - parts["optimizer"]}


def training(recipe: str, shape: Sequence[int], small: bool) -> Work:
    """Build the models of a recipe and compute the losses and gradients of one batch, of random values."""

    def run() -> None:
        models = built(recipe, shape, small)
        models.work(latent_shape(models, shape), CPU)()

    return Work(single_thread(run))


def saving(recipe: str, shape: Sequence[int], small: bool, folder: str) -> Work:
    """Save a recipe's pipeline, of random weights."""

    def run() -> None:
        models = built(recipe, shape, small)
        assert models.unet is not None
        channels = models.vae.config["latent_channels"]
        models.vae.set_latent_statistics([0.0] * channels, [1.0] * channels)
        vae, unet = cast(Any, models.vae), cast(Any, models.unet)
        pipe = MedVolumePipeline(vae, unet, make_scheduler("rectified_flow"), description(models, shape))
        pipe.save_pretrained(Path(folder) / "pipeline")

    return Work(run)


def generation(recipe: str, shape: Sequence[int], small: bool, folder: str) -> Work:
    """Load the pipeline that `saving` saved, and generate a volume in one step, decoded in slabs to a file."""
    mask = None
    if recipe.startswith("brats"):
        body = make_phantom(0, tuple(shape))[1]  # pyright: ignore[reportArgumentType]
        labels = body.array.copy()
        labels[labels == 3] = 4  # those of BraTS are 0, 1, 2 and 4
        mask = Volume(labels, body.affine)

    def run() -> dict[str, object]:
        pipe: Any = MedVolumePipeline.from_pretrained(str(Path(folder) / "pipeline"))
        conditions: Any = {"shape": tuple(shape)} if mask is None else {"mask": mask}
        start = time.perf_counter()
        pipe(**conditions, num_inference_steps=1, batch_size=1, paths=str(Path(folder) / "volume.nii.gz"))
        return {"seconds": time.perf_counter() - start}

    return Work(single_thread(run))


def description(models: Models, shape: Sequence[int]) -> DataDescription:
    """Describe a data set of one volume of the recipe's data section."""
    data = models.config.data
    return DataDescription.from_json(
        {
            "channels": data.channels,
            "labels": {str(value): name for value, name in data.label_names.items()},
            "spacing": [1.0, 1.0, 1.0],
            "intensity": [{"kind": "percentile", "low": 0.0, "high": 1000.0, "percentiles": [0.5, 99.5]}]
            * len(data.channels),
            "shape_range": [list(shape), list(shape)],
            "affine": [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]],
            "description": "fabricated",
        }
    )


def single_thread(run: Any) -> Any:
    """Return a function that runs `run` on one thread: PyTorch then chooses the kernels that were estimated."""

    def on_one() -> Any:
        torch.set_num_threads(1)
        return run()

    return on_one


def line(row: Row) -> str:
    """Format a row for the terminal."""
    planned = f"{row['estimate']['total'] / GIB:.2f} GiB estimated"
    if "detail" in row:
        return f"{planned}; {row['status']}: {row['detail']}"
    assert "measured" in row and "seconds" in row
    ratio = row["measured"] / row["estimate"]["total"]
    return f"{planned}, {row['measured'] / GIB:.2f} GiB measured (x {ratio:.2f}), {row['seconds']:.0f} s"
