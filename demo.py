"""python demo.py: what the pipelines in weights/ generate for their examples, into out/demo/, a picture each."""

import logging
import shutil
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import generate
from pipelines import MedVolumePipeline, read_sidecar, volume_files
from volumes import read_mask, read_volume, shapes_figure, slices_figure
from volumes.cases import read_table

ROOT = Path(__file__).resolve().parent
WEIGHTS = ROOT / "weights"
OUTPUT = ROOT / "out" / "demo"
EXAMPLES = "examples.csv"


def main(weights: Path = WEIGHTS, output: Path = OUTPUT, num_inference_steps: int = 20) -> None:
    """Generate every row of every `weights`/*/examples.csv, and draw preview.png beside the volumes."""
    tables = sorted(weights.glob(f"*/{EXAMPLES}"))
    if not tables:
        raise ValueError(f"{weights}: no pipeline with an {EXAMPLES} there; is the clone complete?")
    for table in tables:
        rows, folder = read_table(table), output / table.parent.name
        print(f"{table.parent.name}: {len(rows)} volumes for {table} ...")
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier demo, perhaps of other weights
        data = MedVolumePipeline.from_pretrained(table.parent).data
        shape = [] if {"mask", *data["channels"]} & set(rows[0]) else ["--shape", *map(str, data["shape_range"][1])]
        start = time.perf_counter()
        generate.main(
            [
                *("--pipeline", str(table.parent), "--conditions", str(table), "--output", str(folder), *shape),
                *("--steps", str(num_inference_steps)),
            ]
        )
        seconds = (time.perf_counter() - start) / len(rows)
        preview(folder, table.parent, data).savefig(folder / "preview.png", dpi=130)
        print(f"{seconds:.2f} s a volume, loading included. Look at {folder / 'preview.png'}\n")


def preview(folder: Path, pipeline: Path, data: dict[str, Any]) -> Figure:
    """Shapes as surfaces, a row for each combination of classes; other volumes as slices, a column each, below the mask."""
    shapes: dict[str, list[Any]] = {}
    columns: dict[str, dict[str, Any]] = {}  # by sidecar: one a volume, whatever the number of its files
    for sidecar in sorted(folder.glob("*.json")):
        volume = sidecar.with_suffix(".nii.gz")
        record = read_sidecar(volume)
        assert record is not None
        files = volume_files(volume, record)
        title = ", ".join(str(value) for value in {**(record["labels"] or {}), **(record["numbers"] or {})}.values())
        if data.get("image_labels"):
            shapes.setdefault(title, []).append(read_volume(files[0]).array[0])
            continue
        volumes = [read_volume(path) for path in files]
        names = [path.name.removesuffix(".nii.gz").removeprefix(sidecar.stem).lstrip("_") for path in files]
        images = {name or "generated": volume.array[0] for name, volume in zip(names, volumes, strict=True)}
        column = {"title": f"{sidecar.stem}\n{title}".strip(), "images": images, "spacing": volumes[0].spacing}
        scales = dict(zip(data["channels"], data["intensity"], strict=True))
        column["windows"] = {name: (scales[name]["low"], scales[name]["high"]) for name in images if name in scales}
        if record["mask"]:
            column["mask"] = read_mask(pipeline / "masks" / record["mask"]["file"]).array
        columns[sidecar.stem] = column
    return shapes_figure(shapes) if shapes else slices_figure(list(columns.values()))


if __name__ == "__main__":
    logging.captureWarnings(True)
    main()
