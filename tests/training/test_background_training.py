"""Trainings on volumes whose background is empty: what is refused, measured, judged and cached."""

import numpy as np
import pytest
import torch
from vae_steps import batch, generators, make_step

from autoencoder import SpaceToDepth3D
from autoencoder.cache_config import LatentCacheConfig
from autoencoder.residual_noise import measure_noise
from diffusion.latents.cache import build_latent_cache, cache_key
from training.background import check_background, measure_background
from training.vae import decibels
from volumes import DataConfig, IntensityScaling, Volume, VolumeDataset, load_cases, write_volume

SIDE = 16


def dataset_of(folder, outside: float = 0.0, **settings) -> VolumeDataset:
    """Two balls of noise from 100 to 200 in a background of 0, with `outside` in a corner of the second."""
    away = np.linalg.norm(np.indices((SIDE,) * 3) - (SIDE - 1) / 2, axis=0)
    for seed in range(2):
        image = np.where(away < 6, np.random.default_rng(seed).uniform(100, 200, away.shape), 0)
        image[:2, :2, :2] = outside * seed
        write_volume(Volume(image[None].astype(np.float32), np.eye(4)), folder / f"images/{seed}.nii.gz")
        write_volume(Volume((away < 6)[None].astype(np.int16), np.eye(4)), folder / f"masks/{seed}.nii.gz")
    config = DataConfig(
        **{
            "root": str(folder),
            "images": "images/{name}.nii.gz",
            "masks": "masks/{name}.nii.gz",
            "label_names": {0: "background", 1: "ball"},
            "intensity": IntensityScaling("window", 0, 255),
            "empty_background": True,
            "validation_fraction": 0,
            **settings,
        }
    )
    return VolumeDataset(load_cases(config), config)


@pytest.fixture
def folder(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_a_background_that_is_not_empty_is_refused(folder):
    check_background(dataset_of(folder))
    with pytest.raises(ValueError, match=r"empty_background: 1 has other intensities than the lowest in 0\.\d% "):
        check_background(dataset_of(folder, outside=5))
    check_background(dataset_of(folder, outside=5, empty_background=False))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"masks": None}, "needs masks"),
        ({"label_names": {1: "ball", 2: "other"}}, "needs the label 0"),
        ({"image_labels": {0: "none", 1: "ball"}, "intensity": IntensityScaling()}, "image_labels says otherwise"),
    ],
)
def test_settings_that_cannot_be(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        dataset_of(folder, **settings)


class Blurred(SpaceToDepth3D):
    """An autoencoder that leaves -0.9 to -0.7 in the background, and nothing below -0.21 elsewhere."""

    def _decode(self, z):
        volume = super()._decode(z)
        noise = torch.rand(volume.shape, generator=torch.Generator().manual_seed(0))
        return torch.where(volume == -1, -0.9 + 0.2 * noise, volume)


def test_the_threshold_lies_between_background_and_foreground(folder):
    found = measure_background(dataset_of(folder), Blurred(), progress=False)
    assert -0.7 <= found <= -0.2


def test_noise_is_not_measured_where_pipelines_empty_the_volume(folder):
    """All that this autoencoder errs by lies in the background."""
    [outside] = measure_noise(dataset_of(folder, empty_background=False), Blurred(), progress=False)
    [inside] = measure_noise(dataset_of(folder), Blurred(), progress=False)
    assert np.ptp(outside.levels) >= 0 and max(outside.curve) > 0
    assert inside.std == 0


def test_augmented_volumes_have_an_empty_background(folder, tmp_path):
    """Splines swing beside edges; the entries of the cache are others than without the setting."""
    config = LatentCacheConfig(versions=2, rotate=10, deform=1.0)
    entries = {}
    for empty in (True, False):
        dataset = dataset_of(folder, empty_background=empty)
        cache = build_latent_cache(dataset, SpaceToDepth3D(), tmp_path / "cache", config, progress=False)
        voxels = SpaceToDepth3D().decode(cache[1]["mean"][None]).sample[0, 0]
        entries[empty] = voxels[cache[1]["mask"] == 0]
    assert (entries[True] == -1).all() and (entries[False] > -1).any()
    keys = {cache_key(dataset_of(folder, empty_background=e), SpaceToDepth3D(), config) for e in (True, False)}
    assert len(keys) == 2


def test_a_step_judges_only_what_is_not_background():
    """The power of fine detail is compared outside of the background; validation has the PSNR there."""
    seen = {}
    for background in (None, 0):
        step = make_step()
        step.background = background
        step.weights.spectrum = 1.0
        item = batch()
        item["mask"] = torch.ones(2, 8, 8, 8, dtype=torch.int16)
        item["mask"][:, :4] = 0
        seen[background] = step(item, generators())
    assert seen[0]["l1"] == seen[None]["l1"] and seen[0]["spectrum"] < seen[None]["spectrum"]
    whole = {"image": item["image"][0], "fov": item["fov"][0], "mask": item["mask"][0], "name": "a"}
    found = step.validate(whole, torch.Generator())
    made = step._reconstruct(whole["image"][None])
    inside = whole["fov"][None] & (whole["mask"] == 1)
    assert found["psnr_foreground"] == pytest.approx(decibels(made, whole["image"][None], inside))
    assert found["psnr_foreground"] != found["psnr"]
