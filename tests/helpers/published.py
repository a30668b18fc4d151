"""Fabricated data sets in the layouts that the recipes of docs/recipes.md expect, and the recipes at a size for
tests."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml

from evaluation.report import read_config
from volumes import make_phantom

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
SHAPE = (20, 20, 20)


def prepare_script(recipe: str) -> Callable[..., Any]:
    """The function `prepare` of a recipe's script."""
    return runpy.run_path(str(CONFIGS / recipe / "prepare.py"))["prepare"]


def save(array: np.ndarray, path: Path, spacing: float | tuple[float, ...] = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*np.broadcast_to(spacing, 3), 1.0])
    nib.save(nib.Nifti1Image(array, affine), path)


def drawn(number: int, shape: tuple[int, ...] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Intensities from 0 and labels 0 to 3 of a phantom, (X, Y, Z)."""
    image, mask, _ = make_phantom(number, shape)  # pyright: ignore[reportArgumentType]
    return image.array[0] - image.array.min(), mask.array[0]


def adni(folder: Path) -> Path:
    for n in range(4):
        scan = f"ADNI_00{n}_S_000{n}_MR_MPRAGE_Br_20070101_S1_I{n}"
        path = folder / f"ADNI/00{n}_S_000{n}/MPRAGE/2007-01-01_00_00_00.0/S1/{scan}.nii"
        save(drawn(n)[0][..., None], path, 2.5)
    return folder


def brats2020(folder: Path) -> Path:
    rows = ["Grade,BraTS_2019_subject_ID,BraTS_2020_subject_ID"]
    for n in range(4):
        name = f"BraTS20_Training_{n:03d}"
        save(drawn(n)[0], folder / f"{name}/{name}_flair.nii.gz", 2.5)
        rows.append(f"{('HGG', 'LGG')[n % 2]},NA,{name}")
    (folder / "name_mapping.csv").write_text("\n".join(rows) + "\n")
    return folder


def mrnet(folder: Path) -> Path:
    for split, numbers in (("train", range(10)), ("valid", range(10, 12))):
        (folder / f"source/{split}/sagittal").mkdir(parents=True)
        for n in numbers:
            knee = drawn(n, (12, 16, 16))[0]
            np.save(folder / f"source/{split}/sagittal/{n:04d}.npy", (255 * knee / knee.max()).astype(np.uint8))
    prepare_script("medical_diffusion/mrnet")(folder / "source", folder / "data")
    return folder / "data"


def duke(folder: Path) -> Path:
    for n in range(4):
        save(drawn(n, (32, 20, 16))[0], folder / f"source/Breast_MRI_00{n}/Dyn_0.nii.gz", (0.6, 0.6, 2.0))
    prepare_script("medical_diffusion/duke")(folder / "source", folder / "data")
    return folder / "data"


def lidc(folder: Path) -> Path:
    for n in range(4):
        save(drawn(n)[0] * 1.5 - 1000, folder / f"images/LIDC-IDRI-{n:04d}.nii.gz", 2.0)
    return folder


def whole_head(folder: Path) -> Path:
    for n in range(4):
        image, labels = drawn(n, (16, 16, 16))
        save(image, folder / f"image/sample_{n}.nii.gz")
        save(np.minimum(labels, 2).astype(np.uint8), folder / f"mask/sample_{n}.nii.gz")
    return folder


def brats2021(folder: Path) -> Path:
    for n in range(4):
        name = f"BraTS2021_0000{n}"
        image, labels = drawn(n)
        for modality, factor in (("t1", 1), ("t1ce", 2), ("t2", 3), ("flair", 4)):
            save((image * factor).astype(np.int16), folder / f"{name}/{name}_{modality}.nii.gz")
        save(np.array([0, 0, 2, 4], np.uint8)[labels], folder / f"{name}/{name}_seg.nii.gz")
    return folder


def brats2021_boxed(folder: Path) -> Path:
    prepare_script("med_ddpm/brats")(brats2021(folder / "source"), folder / "data", box=(16, 18, 20))
    return folder / "data"


def ct(folder: Path) -> Path:
    for n in range(4):
        save(drawn(n)[0] - 1000, folder / f"s000{n}/ct.nii.gz", 1.5)
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "medical_diffusion/adni": adni,
    "medical_diffusion/brats": brats2020,
    "medical_diffusion/mrnet": mrnet,
    "medical_diffusion/duke": duke,
    "medical_diffusion/lidc": lidc,
    "med_ddpm/whole_head": whole_head,
    "med_ddpm/brats": brats2021_boxed,
    "real_sizes/ct": ct,
    "real_sizes/brats": brats2021,
}


def reduced(path: Path, folder: Path, data: Path) -> tuple[list[str], dict[str, Any]]:
    """Arguments of a training script for the recipe in `path` on the fabricated `data`, and its sections: thin networks
    and two steps, with the recipe's own levels, losses, objective and preprocessing."""
    recipe = read_config(path)
    model, loop = recipe["model"], recipe.get("loop", {})
    recipe["output"] = str(folder / path.stem)
    recipe["data"]["root"] = str(data)
    recipe["data"]["test_fraction"] = 0.0 if "split" in recipe["data"] else 0.25
    recipe["data"]["validation_fraction"] = 0.0 if "split" in recipe["data"] else 0.25
    if "vae" in recipe:
        recipe["vae"] = str(folder / "vae/vae")
        model |= {"head_dim": 8, "mask_width": 4}
        recipe["cache"] = {**recipe.get("cache", {}), "versions": 2}
        recipe["inference_steps"] = 2
    if "channels" in model:
        model["channels"] = [8] * len(model["channels"])
    if "num_codes" in model:
        model["num_codes"] = 16
    if "crops" in recipe:
        recipe["crops"]["shape"] = [16, 16, 16]
    if recipe.get("perceptual"):
        recipe["perceptual"] = None  # VGG-16 has a file of its own; tests/autoencoder/test_perceptual.py
    if recipe.get("adversarial"):
        recipe["adversarial"] |= {"start_step": 1, "channels": 4, "layers": 2}
    if recipe.get("optimizer"):
        recipe["optimizer"] |= {"warmup_steps": 0}
    if loop:
        loop |= {"max_steps": 2, "batch_size": 2, "mixed_precision": "no", "workers": 0, "trackers": [], "previews": 1}
    written = folder / path.name
    written.write_text(yaml.safe_dump(recipe))
    return ["--config", str(written)], recipe
