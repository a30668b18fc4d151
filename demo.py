"""python demo.py: brain MR around the hippocampus from the example masks, into out/demo/."""

import time
from pathlib import Path

import numpy as np
import torch

from pipelines import MedVolumePipeline, write_synthetic
from volumes import read_mask, read_volume, slices_figure

ROOT = Path(__file__).resolve().parent
PIPELINE = ROOT / "weights" / "hippocampus"
OUTPUT = ROOT / "out" / "demo"
SEED = 0


def main(pipeline: Path = PIPELINE, output: Path = OUTPUT, num_inference_steps: int = 20) -> None:
    """One volume for each of `pipeline`/masks, and preview.png: the mask beside the volume, a column per case."""
    masks = sorted((pipeline / "masks").glob("*.nii.gz"))
    if not masks:
        raise ValueError(f"{pipeline / 'masks'}: no example masks (*.nii.gz) there; is the clone complete?")
    pipe = MedVolumePipeline.from_pretrained(pipeline)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"Generating {len(masks)} volumes from the masks in {pipeline / 'masks'} on {pipe.device.type} ...")

    start = time.perf_counter()
    generator = torch.Generator().manual_seed(SEED)
    out = pipe(mask=masks, num_inference_steps=num_inference_steps, generator=generator)
    seconds = (time.perf_counter() - start) / len(masks)

    columns = []
    for mask_path, image, record in zip(masks, out.volumes, out.provenance, strict=True):
        path = output / mask_path.name
        write_synthetic(image, record, path)
        volume, mask = read_volume(path), read_mask(mask_path)
        title = path.name.removesuffix(".nii.gz")
        columns.append(
            {"title": title, "images": {"generated": volume.array[0]}, "mask": mask.array, "spacing": volume.spacing}
        )
    slices_figure(columns).savefig(output / "preview.png", dpi=130)

    shapes = np.array([column["images"]["generated"].shape for column in columns])
    low, high = ("x".join(map(str, limit)) for limit in (shapes.min(axis=0), shapes.max(axis=0)))
    print(f"{seconds:.2f} s a volume ({low} to {high} voxels, {num_inference_steps} steps).")
    print(
        f"Look at {output / 'preview.png'}; the volumes are {output}/*.nii.gz, each with a .json that says how it was made."
    )


if __name__ == "__main__":
    main()
