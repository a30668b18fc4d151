"""A small data set in every layout, here and at `memory://`."""

from pathlib import Path

import fsspec
import nibabel as nib
import numpy as np

from volumes import DataConfig, read_volume, write_dicom

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # to RAS
LABELS = {0: "background", 1: "left", 2: "right"}


def make_set(folder: Path) -> Path:
    """Three cases with masks, each also as a pair, and with its voxels beside the header; a table of them."""
    rng, rows = np.random.default_rng(0), ["name,sex"]
    for sub in ("images", "masks", "pairs", "meta"):
        (folder / sub).mkdir(parents=True)
    for name in ("a", "b", "c"):
        values = rng.integers(0, 900, (9, 10, 11)).astype(np.int16)
        nib.save(nib.Nifti1Image(values, LPS), folder / f"images/{name}.nii.gz")
        nib.save(nib.Nifti1Image((values % 3).astype(np.uint8), LPS), folder / f"masks/{name}.nii.gz")
        nib.save(nib.Nifti1Pair(values, LPS), folder / f"pairs/{name}.img")
        size, kind = "DimSize = 9 10 11\nElementSpacing = 1 1 1\nOffset = 0 0 0\n", "ElementType = MET_SHORT\n"
        head = f"ObjectType = Image\nNDims = 3\nBinaryData = True\n{size}{kind}ElementDataFile = {name}.raw\n"
        (folder / f"meta/{name}.mhd").write_text(head)
        (folder / f"meta/{name}.raw").write_bytes(values.tobytes(order="F"))
        rows.append(f"{name},F")
    (folder / "notes.txt").write_text("nothing that is read")
    (folder / "cases.csv").write_text("\n".join(rows))
    return folder


def add_series(folder: Path) -> None:
    for file in sorted((folder / "images").iterdir()):
        target = folder / "series" / file.name.removesuffix(".nii.gz")
        write_dicom(read_volume(file), target, modality="CT", software="a test", model="0" * 64)


def upload(folder: Path, url: str = "memory://bucket/set") -> str:
    fsspec.filesystem("memory").put(f"{folder}/", url.removeprefix("memory:/"), recursive=True)
    return url


def data(root: str | Path, **changes) -> DataConfig:
    """Images and masks below `root`."""
    given = {"images": "images/{name}.nii.gz", "masks": "masks/{name}.nii.gz", "label_names": LABELS} | changes
    return DataConfig(root=str(root), validation_fraction=0.0, **given)
