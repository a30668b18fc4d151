"""Train 3-D latent diffusion models on CT, MR and PET scans, and generate volumes: the public API, and the command.

    import medvolume

    pipe = medvolume.MedVolumePipeline.from_pretrained("weights/hippocampus")

    medvolume init scans/        # in a shell; `medvolume --help` lists the commands

The command works from any folder. Each of its commands is one of the scripts or modules named in `COMMANDS`; the
scripts are for `accelerate launch` and torchrun.
"""

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NamedTuple

from cli.command import ArgumentParser, run_module
from cli.lazy import lazy_exports

if TYPE_CHECKING:
    from autoencoder import VQGAN3D, AutoencoderKL3D, SpaceToDepth3D
    from diffusion import LatentUNet3D, make_scheduler
    from pipelines import (
        MedVolumeEditPipeline,
        MedVolumePipeline,
        MedVolumePipelineOutput,
        SamplingConfig,
        read_sidecar,
        volume_files,
    )
    from volumes import (
        DataConfig,
        Volume,
        VolumeDataset,
        load_cases,
        read_mask,
        read_volume,
        write_dicom,
        write_volume,
    )
    from volumes.lesions import ellipsoid, insert_lesion, remove_lesion

__all__ = [
    "AutoencoderKL3D",
    "DataConfig",
    "LatentUNet3D",
    "MedVolumeEditPipeline",
    "MedVolumePipeline",
    "MedVolumePipelineOutput",
    "SamplingConfig",
    "SpaceToDepth3D",
    "VQGAN3D",
    "Volume",
    "VolumeDataset",
    "ellipsoid",
    "insert_lesion",
    "load_cases",
    "make_scheduler",
    "read_mask",
    "read_sidecar",
    "read_volume",
    "remove_lesion",
    "volume_files",
    "write_dicom",
    "write_volume",
]

__getattr__, __dir__ = lazy_exports(__name__, __file__)


class Command(NamedTuple):
    """A command: the module that it runs as `__main__`, and what it does."""

    module: str
    help: str


PACKAGES = ("torch", "diffusers", "accelerate", "monai", "nibabel", "safetensors", "peft", "xformers")
COMMANDS = {
    "init": Command("recipes", "look a folder of scans over, and write a recipe for training on it"),
    "doctor": Command("evaluation.doctor", "check the data and the memory before training, and the model after it"),
    "prepare": Command("prepare", "read, check and store the volumes before training, in several processes"),
    "train-vae": Command("train_vae", "train the autoencoder"),
    "train-ldm": Command("train_ldm", "train the diffusion model on the autoencoder's latents"),
    "generate": Command("generate", "generate volumes from masks, a table, or a seed"),
    "convert": Command("convert", "turn weights of MAISI, MONAI and Med-DDPM into a folder of ours, and back"),
    "edit": Command("edit", "generate a part of an image again, insert or remove lesions"),
    "evaluate": Command("evaluate", "measure realism, usefulness and privacy of generated volumes"),
    "reader-study": Command("reader_study", "let people tell generated volumes from real ones, and rate both"),
    "studio": Command("studio", "a page on which people paint a mask and see a volume"),
    "demo": Command("demo", "generate examples with the weights of the clone, with pictures"),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command that the command line (None: the program's) names. It ends the program."""
    words = list(sys.argv[1:] if args is None else args)
    listing = "\n".join(f"  {name:<12} {command.help}" for name, command in COMMANDS.items())
    parser = ArgumentParser(
        prog="medvolume",
        description=(__doc__ or "").partition(":")[0] + ".",
        epilog=f"commands:\n{listing}\n\n`medvolume COMMAND --help` explains one.",
    )
    parser.add_argument("--version", action=ShowVersions, nargs=0, help="print what a bug report should name, and end")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the command")
    options = parser.parse_args(words)
    run_module(f"medvolume {options.command}", COMMANDS[options.command].module, options.arguments)


class ShowVersions(argparse.Action):
    """Prints `versions` and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print them."""
        print(versions())
        parser.exit()


def versions() -> str:
    """Return the versions of this package and of those below it, and the machine, in four lines for a bug report.

    A fifth line says why torch cannot be imported, where it cannot.
    """
    import psutil  # here, as imports take time

    from evaluation.report import cores, git_commit, processor

    failure = []
    try:
        import torch

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    except Exception as error:  # a missing package or library, or one that does not fit: the report names it
        gpu = "GPU unknown"
        reason = str(error).partition("\n")[0] or type(error).__name__
        failure = [f"torch: cannot be imported ({reason})"]
    count = cores()
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB of memory"
    commit = git_commit()
    return "\n".join(
        [
            f"medvolume {installed('medvolume')}" + (f", commit {commit}" if commit else ""),
            f"Python {platform.python_version()}, {platform.platform()}",
            ", ".join(f"{name} {installed(name)}" for name in PACKAGES),
            ", ".join([processor(), f"{count} core{'s' * (count != 1)}", memory, gpu]),
            *failure,
        ]
    )


def installed(package: str) -> str:
    """Return the version of a package that pip installed; "(not installed)" for another."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    main()
