"""Generate the examples of every pipeline in weights/, pairs of mask and volume, and one edited volume, with pictures.

    python demo.py [--output DIR]

Everything goes to out/demo/. Run the same command again to resume.
"""

import argparse
import itertools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli.command import ArgumentParser, run_command
from cli.settings import Number, PositiveInt

ROOT = Path(__file__).resolve().parent
WEIGHTS = ROOT / "weights"
OUTPUT = ROOT / "out" / "demo"
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

import numpy as np
import torch
from matplotlib.figure import Figure

import generate
from files.atomic import atomic_file
from files.paths import path_inside
from pipelines import MedVolumeEditPipeline, MedVolumePipeline, read_sidecar, sidecar_path
from pipelines.storage.finished import finished_volumes
from pipelines.storage.provenance import channel_files
from volumes import FigureCase, read_mask, read_volume, shapes_figure, slices_figure, write_volume
from volumes.data.tables import read_table
from volumes.description import DataDescription
from volumes.lesions import remove_lesion


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
        raise ValueError(f"{weights}: contains no pipeline with an {EXAMPLES}; is the clone complete?")
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
        save_figure(preview(folder, table.parent / "masks", data), folder / "preview.png")
        print(f"{seconds:.2f} s per volume, including loading. See {folder / 'preview.png'}\n")
    for maps, volumes in itertools.product(described, described):
        labels = described[maps].image_labels
        if labels and labels == described[volumes].labels:
            pairs(maps, volumes, described[volumes], output / f"{volumes.name}-pairs", steps)
            edit(volumes, described[volumes], output, num_inference_steps)


def pairs(maps: Path, volumes: Path, data: DataDescription, folder: Path, steps: Sequence[str], count: int = 6) -> None:
    """Generate masks that belong to no patient, and a volume for each, with these arguments of generate.py."""
    print(f"{volumes.name}: {count} masks from {maps.name}, and a volume for each ...")
    generate.main(
        [
            *("--pipeline", str(volumes), "--masks", f"{generate.GENERATE}{maps}", "--count", str(count)),
            *("--output", str(folder), *steps),
        ]
    )
    save_figure(preview(folder, folder / "masks", data), folder / "preview.png")
    print(f"See {folder / 'preview.png'}\n")


def edit(pipeline: Path, data: DataDescription, output: Path, num_inference_steps: int | None) -> None:
    """Remove the last label from the first generated volume; all other voxels stay the same."""
    pipe = MedVolumeEditPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    volume = sorted((output / pipeline.name).glob("*.nii.gz"))[0]
    record = read_sidecar(volume)
    assert record is not None and record["mask"] is not None
    mask = read_mask(path_inside(pipeline / "masks", record["mask"]["file"], f"the sidecar of {volume}: mask"))
    values = list(data.labels)
    organ = max(value for value in values if (mask.array == value).any())
    edited, region = remove_lesion(mask, organ, values[0])
    x, y, z = (int(side) for side in np.argwhere(mask.array[0] == organ).mean(0).round())
    folder = output / f"{pipeline.name}-edit"
    folder.mkdir(parents=True, exist_ok=True)
    write_volume(edited, folder / "mask.nii.gz")
    write_volume(region, folder / "region.nii.gz")
    print(f"{pipeline.name}: {volume.name} without its {data.labels[organ]} ...")
    after = folder / volume.name
    pipe(
        mask=folder / "mask.nii.gz",
        image=volume,
        region=folder / "region.nii.gz",
        num_inference_steps=num_inference_steps,
        generator=torch.Generator().manual_seed(0),
        paths=after,
    )
    images = {"before": read_volume(volume).array[0], "after": read_volume(after).array[0]}
    low, high = np.percentile(images["before"], [0.5, 99.5]).tolist()
    columns: list[FigureCase] = [
        {
            "title": title,
            "images": {"generated": images[title]},
            "mask": labels.array,
            "center": (x, y, z),
            "spacing": mask.spacing,
            "windows": {"generated": (low, high)},
        }
        for title, labels in (("before", mask), ("after", edited))
    ]
    save_figure(slices_figure(columns), folder / "preview.png")
    print(f"See {folder / 'preview.png'}")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture atomically."""
    with atomic_file(path) as unfinished:
        figure.savefig(unfinished, dpi=130)


def preview(folder: Path, masks: Path, data: DataDescription) -> Figure:
    """Draw the volumes of `folder`, with the masks in `masks`.

    Label maps are drawn as surfaces, one row per combination of classes; other volumes as slices beside the mask, one
    row per channel.
    """
    shapes: dict[str, list[Any]] = {}
    columns: dict[str, FigureCase] = {}  # by sidecar: one per volume, whatever the number of its files
    for volume, record in finished_volumes(folder):
        files, stem = channel_files(volume, record.channels), sidecar_path(volume).stem
        title = ", ".join(str(value) for value in {**(record.classes or {}), **(record.numbers or {})}.values())
        if data.image_labels:
            shapes.setdefault(title, []).append(read_volume(files[0]).array[0])
            continue
        volumes = [read_volume(path) for path in files]
        names = [path.name.removesuffix(".nii.gz").removeprefix(stem).lstrip("_") for path in files]
        images = {"generated": np.stack([volume.array[0] for volume in volumes])}
        column: FigureCase = {
            "title": f"{stem}\n{title}".strip(),
            "images": images,
            "spacing": volumes[0].spacing,
        }
        scales = dict(zip(data.channels, data.intensity, strict=True))
        column["channels"] = names
        column["windows"] = {name: (scales[name].low, scales[name].high) for name in names if name in scales}
        if record.mask is not None:
            file = path_inside(masks, str(record.mask["file"]), f"the sidecar of {volume}: mask")
            column["mask"] = read_mask(file).array
        columns[stem] = column
    return shapes_figure(shapes) if shapes else slices_figure(list(columns.values()))
