"""Train one system and generate volumes with it, in a process of its own, whose largest memory is then its."""

import argparse
import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveFloat, PositiveInt

NAMES = ("med_ddpm", "medical_diffusion", "ours")
LIMITED = ("hippocampus", "brains")


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--system", choices=NAMES, required=True)
    parser.add_argument("--task", choices=LIMITED, required=True)
    parser.add_argument("--checkout", type=Path, help="the system's code")
    parser.add_argument("--output", type=Path, required=True, help="folder for volumes/ and figures.json")
    parser.add_argument("--data.root", dest="root", type=Path, help="folder of the data set; default: of the recipe")
    parser.add_argument("--minutes", type=Number(PositiveFloat), default=30.0, help="minutes of training (30)")
    parser.add_argument(
        "--volumes", type=Number(PositiveInt), help="volumes to generate; default: one per training one"
    )
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
    parser.add_argument("--width", type=Number(PositiveInt), help="of the diffusion's network; default: its authors'")
    parser.add_argument("--hidden", type=Number(PositiveInt), help="of the VQ-GAN; default: its authors'")
    parser.add_argument("--timesteps", type=Number(PositiveInt), help="of the diffusion; default: its authors'")
    parser.add_argument("--perceptual", action="store_true", help="Medical Diffusion's, which downloads VGG-16")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import torch

from files.atomic import atomic_file
from training import TrainVaeConfig, parse_config
from training.splits import load_split
from volumes import VolumeDataset

from .med_ddpm import MedDdpm
from .medical_diffusion import MedicalDiffusion
from .ours import Ours
from .system import Settings, System
from .tasks import TASKS, Task

SYSTEMS: dict[str, type[System]] = {"med_ddpm": MedDdpm, "medical_diffusion": MedicalDiffusion, "ours": Ours}


def measure(
    system: System, dataset: VolumeDataset, seconds: float, count: int, folder: Path, device: str = "cpu"
) -> dict[str, object]:
    """Train, generate `count` volumes into `folder`, from one training volume after another, and return the figures."""
    trained = system.train(seconds)
    of_training = peak_mib(device)
    folder.mkdir(parents=True, exist_ok=True)
    times = []
    for number in range(count):
        index = number % len(dataset)
        start = time.perf_counter()
        system.generate(index, number, folder / f"{dataset.cases[index].name}_{number:04d}.nii.gz")
        times.append(time.perf_counter() - start)
    return {
        **trained,
        "seconds_per_volume": sum(times) / len(times),
        "peak_training_mib": of_training,
        "peak_mib": peak_mib(device),
        "volumes": count,
        "device": device,
        "threads": torch.get_num_threads(),
    }


def peak_mib(device: str) -> float:
    """Return the largest memory of this process so far, of the GPU if there is one."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def load(task: Task, root: Path | None) -> VolumeDataset:
    """Load the training volumes of a task."""
    args = ["--config", f"{task.recipe}/vae.yaml", *([f"--data.root={root}"] if root else [])]
    return load_split(parse_config(TrainVaeConfig, args).data)[0]


def main(args: Sequence[str] | None = None) -> None:
    """Run one system and write its figures."""
    options = parse(args)
    task = TASKS[options.task]
    dataset = load(task, options.root)
    names = ("checkout", "device", "width", "hidden", "timesteps", "perceptual", "root")
    options.output.mkdir(parents=True, exist_ok=True)
    given = {name: getattr(options, name) for name in names}
    given |= {name: path.resolve() for name in ("checkout", "root") if (path := given[name])}
    settings = Settings(options.output.resolve(), **given)
    system = SYSTEMS[options.system](dataset, task, settings)
    count = options.volumes or len(dataset)
    figures = measure(system, dataset, 60 * options.minutes, count, options.output / "volumes", options.device)
    asked = {name: getattr(options, name) for name in ("minutes", "width", "hidden", "timesteps", "perceptual")}
    with atomic_file(options.output / "figures.json") as file:
        file.write_text(json.dumps({"system": options.system, "task": options.task, **asked, **figures}, indent=2))


if __name__ == "__main__":
    run_command(main)
