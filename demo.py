"""Generate the examples of every pipeline in weights/, pairs of mask and volume, and one edited volume, with pictures.

    python demo.py [--output DIR]

Everything goes to out/demo/ of the working directory. Run the same command again to resume.
"""

import argparse
import itertools
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveInt

WEIGHTS = Path(__file__).resolve().parent / "weights"  # of the clone; an installed package has none
OUTPUT = Path("out/demo")  # in the working directory
EXAMPLES = "examples.csv"


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help=f"folder of pipelines with {EXAMPLES} (weights/)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write to (out/demo/)")
    parser.add_argument("--steps", type=Number(PositiveInt), help="denoising steps; default: each pipeline's own")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import edit
import generate
from files.paths import path_inside
from pipelines import MedVolumePipeline, read_sidecar
from volumes import read_mask
from volumes.data.tables import read_table
from volumes.description import DataDescription


def main(args: Sequence[str] | None = None) -> None:
    """Run the demo."""
    logging.captureWarnings(True)
    options = parse(args)
    run_demo(options.weights, options.output, options.steps)


def run_demo(weights: Path, output: Path, num_inference_steps: int | None = None) -> None:
    """Generate every row of every `weights`/*/examples.csv, with a preview.png beside the volumes.

    Args:
        num_inference_steps: denoising steps; None: each pipeline's own.
    """
    steps = [] if num_inference_steps is None else ["--steps", str(num_inference_steps)]
    tables = sorted(weights.glob(f"*/{EXAMPLES}"))
    if not tables:
        raise ValueError(
            f"{weights}: contains no pipeline with an {EXAMPLES}; the pipelines are in the clone, so type "
            "medvolume demo --weights CLONE/weights"
        )
    described = {table.parent: MedVolumePipeline.from_pretrained(table.parent).data for table in tables}
    for table in tables:
        rows, folder = read_table(table), output / table.parent.name
        print(f"{table.parent.name}: {len(rows)} volumes for {table} ...")
        data = described[table.parent]
        has_size = data.maps is not None or {"mask", *data.channels} & set(rows[0])
        shape = [] if has_size else ["--shape", *map(str, data.shape_range[1])]
        start = time.perf_counter()
        generate.main(
            [
                *("--pipeline", str(table.parent), "--conditions", str(table), "--output", str(folder), *shape),
                *steps,
            ]
        )
        seconds = (time.perf_counter() - start) / len(rows)
        print(f"{seconds:.2f} s per volume, including loading\n")
    for maps, volumes in itertools.product(described, described):
        labels = described[maps].image_labels
        if labels and labels == described[volumes].labels:
            pairs(maps, volumes, output / f"{volumes.name}-pairs", steps)
            edit_one(volumes, described[volumes], output, steps)


def pairs(maps: Path, volumes: Path, folder: Path, steps: Sequence[str], count: int = 6) -> None:
    """Generate masks that belong to no patient, and a volume for each, with these arguments of generate.py."""
    print(f"{volumes.name}: {count} masks from {maps.name}, and a volume for each ...")
    generate.main(
        [
            *("--pipeline", str(volumes), "--masks", f"{generate.GENERATE}{maps}", "--count", str(count)),
            *("--output", str(folder), *steps),
        ]
    )


def edit_one(pipeline: Path, data: DataDescription, output: Path, steps: Sequence[str]) -> None:
    """Remove the last label from the first generated volume; all other voxels stay the same."""
    volume = sorted((output / pipeline.name).glob("*.nii.gz"))[0]
    record = read_sidecar(volume)
    assert record is not None and record["mask"] is not None
    file = path_inside(pipeline / "masks", record["mask"]["file"], f"the sidecar of {volume}: mask")
    mask, values = read_mask(file), list(data.labels)
    organ = max(value for value in values if (mask.array == value).any())
    folder = output / f"{pipeline.name}-edit"
    print(f"{pipeline.name}: {volume.name} without its {data.labels[organ]} ...")
    edit.main(
        [
            *("--pipeline", str(pipeline), "--image", str(volume), "--mask", str(file), "--output", str(folder)),
            *("--remove", str(organ), "--replacement", str(values[0])),
            *steps,
        ]
    )
