"""Breast MR of Duke-Breast-Cancer-MRI, one breast a file, as Medical Diffusion learns them:

    python configs/medical_diffusion/duke/prepare.py --source Duke-nifti --output data/duke

Reads {patient}/Dyn_0.nii.gz (the series before contrast; DICOM series are converted first) and writes
breasts/{patient}_left.nii.gz and breasts/{patient}_right.nii.gz: the halves on both sides of the volume's middle plane,
by the file's own geometry, each where it was.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cli.command import ArgumentParser, run_command


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="folder of PATIENT/Dyn_0.nii.gz")
    parser.add_argument("--output", type=Path, default=Path("data/duke"), help="folder to write to")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from tqdm import tqdm

from volumes import Volume, read_volume, write_volume


def prepare(source: Path, output: Path) -> int:
    """Write the halves; returns how many. Raises: ValueError if there is no volume in `source`."""
    paths = sorted(source.glob("*/Dyn_0.nii.gz"))
    if not paths:
        raise ValueError(f"{source}: no PATIENT/Dyn_0.nii.gz there")
    for path in tqdm(paths, unit="patient"):
        volume = read_volume(path)
        middle = volume.shape[0] // 2  # of left to right: volumes are read in RAS+ order
        for side, first, last in (("left", 0, middle), ("right", middle, volume.shape[0])):
            affine = volume.affine.copy()
            affine[:3, 3] = volume.affine[:3] @ [first, 0, 0, 1]
            half = Volume(volume.array[:, first:last], affine)
            write_volume(half, output / f"breasts/{path.parent.name}_{side}.nii.gz")
    return 2 * len(paths)


def main(args: Sequence[str] | None = None) -> None:
    """Prepare the data set."""
    options = parse(args)
    print(f"{prepare(options.source, options.output)} breasts in {options.output}")
