"""The seeds' recipes and those of real sizes: they parse, and each trains and samples, at reduced size, on fabricated
volumes in the layout that it expects. Two of them in every run; all with `make test-slow`."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from published import CONFIGS, LAYOUTS, brats2021, drawn, prepare_script, reduced, save

import train_ldm
import train_vae
from autoencoder import VolumeAutoencoder
from diffusion import LatentUNet3D
from evaluation.report import read_config
from pipelines import MedVolumePipeline
from training import TrainLdmConfig, TrainVaeConfig, build_model, parse_config
from volumes import load_cases

ALL = sorted(path for recipe in LAYOUTS for path in (CONFIGS / recipe).glob("*.yaml") if path.stem != "data")
SMOKE = ("medical_diffusion/brats", "med_ddpm/whole_head")


def test_all_recipes_are_there():
    assert {path.relative_to(CONFIGS).parent.as_posix() for path in ALL} == set(LAYOUTS)
    for recipe in LAYOUTS:
        names = {path.stem.partition("_")[0] for path in (CONFIGS / recipe).glob("*.yaml")}
        assert names == {"vae", "ldm", "data"}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_a_recipe_parses_and_its_model_is_built(path):
    diffusion = path.stem.startswith("ldm")
    config = parse_config(TrainLdmConfig if diffusion else TrainVaeConfig, ["--config", str(path)])
    decided = {"num_labels": len(config.data.label_names), "classes": config.data.class_names} if diffusion else {}
    with torch.device("meta"):
        model = build_model({**decided, **config.model})
    assert isinstance(model, LatentUNet3D if diffusion else VolumeAutoencoder)
    if isinstance(config, TrainLdmConfig):
        before = [p for p in path.parent.glob("vae*.yaml") if read_config(p)["output"] + "/vae" == config.vae]
        assert len(before) == 1  # the recipe that makes its autoencoder
        assert yaml.safe_load(before[0].read_text())["data"] == yaml.safe_load(path.read_text())["data"] == "data.yaml"
        if path.is_relative_to(CONFIGS / "real_sizes"):
            assert config.model["objective"] == "rectified_flow"
        else:  # the seeds' objective: eps, the cosine schedule, its steps, L1, their average
            steps = 250 if path.is_relative_to(CONFIGS / "med_ddpm") else 300
            assert config.model["objective"] == "epsilon" and config.model["train_steps"] == steps
            assert config.loss == "l1" and config.scheduler == "DDPMScheduler" and config.loop.ema_decay == 0.995
    elif list(model.parameters()):
        assert not any(n % s for n, s in zip(config.crops.shape, model.stride, strict=True))
        if config.adversarial is not None:
            assert min(config.crops.shape) >= 3 * 2**config.adversarial.layers


def check_recipe(recipe: str, folder: Path, vae: str = "vae", ldm: str = "ldm") -> tuple[int, int]:
    """Train both models for two steps and sample: asserts the saved scheduler, and volumes of the right shape and
    channels. Returns the steps of the diffusion model, and how many of them were skipped."""
    data = LAYOUTS[recipe](folder / "files")
    arguments, _ = reduced(CONFIGS / recipe / f"{vae}.yaml", folder, data)
    train_vae.main(arguments)
    (folder / vae).rename(folder / "vae")  # where `reduced` lets the diffusion look for it
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments, sections = reduced(CONFIGS / recipe / f"{ldm}.yaml", folder, data)
    train_ldm.main(arguments)

    saved = folder / ldm / "pipeline"
    scheduler = json.loads((saved / "scheduler/scheduler_config.json").read_text())
    wanted = sections.get("scheduler", "FlowMatchEulerDiscreteScheduler")
    assert scheduler["_class_name"] == wanted
    assert scheduler["num_train_timesteps"] == sections["model"].get("train_steps", 1000)
    pipe = MedVolumePipeline.from_pretrained(saved)
    pipe.set_progress_bar_config(disable=True)
    config = parse_config(TrainLdmConfig, arguments).data
    case = load_cases(config)[0]
    given = {"mask": case.mask} if case.mask else {"shape": (16, 16, 12)}
    given |= {"classes": {name: values[0] for name, values in config.classes.items()}} if config.classes else {}
    made = pipe(**given, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").volumes[0]
    shape = nib.load(case.mask).shape if case.mask else (16, 16, 12)
    assert made.shape[-3:] == shape and np.isfinite(made).all() and made.std() > 0
    assert made.reshape(-1, *shape).shape[0] == len(config.channels)
    metrics = json.loads((folder / ldm / "metrics.json").read_text())
    return metrics["step"], metrics["skipped"]


@pytest.mark.parametrize("recipe", SMOKE)
def test_a_recipe_trains_and_samples(recipe, tmp_path):
    assert check_recipe(recipe, tmp_path) == (2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(name for name in set(LAYOUTS) - set(SMOKE) if not name.startswith("real")))
def test_every_recipe_trains_and_samples(recipe, tmp_path):
    assert check_recipe(recipe, tmp_path) == (2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["24gb", "8x80gb"])
@pytest.mark.parametrize("recipe", ["real_sizes/ct", "real_sizes/brats"])
def test_recipes_of_real_sizes_train_and_sample(recipe, size, tmp_path):
    assert check_recipe(recipe, tmp_path, f"vae_{size}", f"ldm_{size}") == (2, 0)


# What the recipes' scripts write


def test_mrnet_is_upright(tmp_path):
    exam = np.zeros((3, 4, 5), np.uint8)  # slices from the left, rows from the top, columns from the front
    exam[2, 0, 0] = 9  # right, top, front
    for split in ("train", "valid"):
        (tmp_path / f"{split}/sagittal").mkdir(parents=True)
        np.save(tmp_path / f"{split}/sagittal/000{len(split) % 5}.npy", exam)
    rows = prepare_script("medical_diffusion/mrnet")(tmp_path, tmp_path / "data", (3.0, 0.5, 0.6))
    assert [row["split"] for row in rows] == ["train", "test"]
    image = nib.load(tmp_path / f"data/images/{rows[0]['exam']}.nii.gz")
    voxels = np.asarray(image.dataobj)  # pyright: ignore[reportAttributeAccessIssue]
    assert nib.orientations.aff2axcodes(image.affine) == ("R", "A", "S")
    assert np.argwhere(voxels).tolist() == [[2, 4, 3]] and image.header.get_zooms() == pytest.approx((3, 0.5, 0.6))
    with pytest.raises(ValueError, match="MRNet-v1.0"):
        prepare_script("medical_diffusion/mrnet")(tmp_path / "elsewhere", tmp_path)


def test_breasts_stay_where_they_were(tmp_path):
    whole = np.arange(5 * 4 * 3, dtype=np.float32).reshape(5, 4, 3)
    save(whole, tmp_path / "source/P1/Dyn_0.nii.gz", (0.7, 0.8, 2.0))
    assert prepare_script("medical_diffusion/duke")(tmp_path / "source", tmp_path) == 2
    left, right = (nib.load(tmp_path / f"breasts/P1_{side}.nii.gz") for side in ("left", "right"))
    np.testing.assert_array_equal(np.concatenate([left.get_fdata(), right.get_fdata()]), whole)
    np.testing.assert_allclose(left.affine, np.diag([0.7, 0.8, 2.0, 1]), atol=1e-6)
    np.testing.assert_allclose(right.affine[:3, 3], [1.4, 0, 0], atol=1e-6)


def test_the_brain_is_in_the_mask_and_no_tumor_is_cut(tmp_path):
    source = brats2021(tmp_path / "source")
    image, labels = drawn(0)
    cut = labels.copy()
    cut[0] = 3  # tumor at the edge of one
    save(np.array([0, 0, 2, 4], np.uint8)[cut], source / "BraTS2021_00001/BraTS2021_00001_seg.nii.gz")
    count, left_out = prepare_script("med_ddpm/brats")(source, tmp_path, box=(16, 18, 20))
    assert count == 3 and left_out == ["BraTS2021_00001"]
    assert not (tmp_path / "t1/BraTS2021_00001_t1.nii.gz").exists()
    seg = nib.load(tmp_path / "seg/BraTS2021_00000_seg.nii.gz")
    expected = np.where(labels >= 2, labels, 4 * ((4 * image).astype(np.int16) != 0))[2:18, 1:19]
    np.testing.assert_array_equal(np.asarray(seg.dataobj), expected)
    np.testing.assert_allclose(seg.affine[:3, 3], [2, 1, 0])
    t2 = nib.load(tmp_path / "t2/BraTS2021_00000_t2.nii.gz")
    np.testing.assert_array_equal(t2.get_fdata(), (3 * image).astype(np.int16)[2:18, 1:19])
