"""The autoencoder without parameters: voxels folded into channels and back, and a whole run with it."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

import train_ldm
import train_vae
from autoencoder import VQGAN3D, AutoencoderKL3D, SpaceToDepth3D
from diffusion import LatentCacheConfig, build_latent_cache
from pipelines import MedVolumePipeline
from pipelines.storage.loading import load_autoencoder
from volumes import DataConfig, PhantomConfig, VolumeDataset, load_cases

FACTORS = [1, 2, (2, 3, 1)]
DATA = "{phantom: {count: 6, shape: [8, 12, 10]}, validation_fraction: 0.2}"


def volume(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("factor", FACTORS)
def test_what_is_encoded_is_decoded(factor):
    vae, x = SpaceToDepth3D(in_channels=2, patch_size=factor), volume(2, 2, 4, 6, 4)
    n = vae.config["latent_channels"]
    assert n == 2 * np.prod(vae.stride)
    posterior = vae.encode(x).latent_dist
    assert torch.equal(posterior.sample(), posterior.mean) and not posterior.std.any()
    assert torch.equal(vae.decode(posterior.mean).sample, x)
    vae.set_latent_statistics(torch.linspace(-0.5, 0.5, n).tolist(), torch.linspace(0.2, 1, n).tolist())
    torch.testing.assert_close(vae.decode(vae.encode(x).latent_dist.mean).sample, x)


def test_factor_one_is_the_identity():
    x = volume(1, 3, 5, 7, 3)
    assert torch.equal(SpaceToDepth3D(in_channels=3).encode(x).latent_dist.mean, x)


def test_a_cell_is_the_channels_of_a_latent():
    """Voxel (x, y, z) of channel c is channel c * 8 + 4 * (x % 2) + 2 * (y % 2) + z % 2 of cell (x, y, z) // 2."""
    vae, x = SpaceToDepth3D(in_channels=2, patch_size=2), volume(1, 2, 4, 6, 4)
    latents = vae.encode(x).latent_dist.mean
    assert latents[0, 8 + 4 + 1, 1, 2, 0] == x[0, 1, 3, 4, 1]
    assert vae.latents_of(1) == slice(8, 16)
    other = x.clone()
    other[:, 0] = 0
    assert torch.equal(vae.encode(other).latent_dist.mean[:, 8:], latents[:, 8:])  # each channel has its own


def test_in_slabs_as_in_one_piece():
    vae, x = SpaceToDepth3D(patch_size=(2, 2, 4)), volume(1, 1, 4, 4, 24)
    vae.set_latent_statistics([0.1] * 16, [0.5] * 16)
    whole = vae.encode(x).latent_dist.mean
    vae.enable_tiling(slab_bytes=1)
    parts = list(vae.encode_slabs(x.split(5, dim=4)))
    assert len(parts) > 1 and torch.equal(torch.cat([p.mean for p in parts], dim=4), whole)
    assert torch.equal(vae.encode(x).latent_dist.mean, whole)
    slabs = list(vae.decode_slabs(whole))
    assert len(slabs) == 6 and torch.equal(torch.cat(slabs, dim=4), vae.disable_tiling() or vae.decode(whole).sample)


def test_what_is_decided_is_not_asked_for():
    SpaceToDepth3D(in_channels=2, out_channels=2, latent_channels=16, patch_size=2)
    with pytest.raises(ValueError, match="omit latent_channels 4"):
        SpaceToDepth3D(patch_size=2, latent_channels=4)


def test_latents_are_bounded():
    vae = SpaceToDepth3D(in_channels=2)
    vae.set_latent_statistics([-0.8, 0.1], [0.3, 0.5])
    assert vae.latent_bound() == pytest.approx(6.0)  # white, 1.8 above a mean of -0.8
    book = VQGAN3D(channels=(4, 8), num_codes=4, latent_channels=2, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    book.codebook.codes.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0], [-3.0, 0.0], [0.0, 0.0]]))
    book.set_latent_statistics([1.0, 0.0], [2.0, 0.5])
    assert book.latent_bound() == pytest.approx(2.0)
    assert AutoencoderKL3D(channels=(4, 8)).latent_bound() is None


def test_zeros_are_not_cached(tmp_path):
    config = DataConfig(phantom=PhantomConfig(count=1, shape=(16, 16, 16)), validation_fraction=0)
    dataset = VolumeDataset(load_cases(config), config)
    vae = SpaceToDepth3D()
    vae.set_latent_statistics([0.0], [0.5])
    cache = build_latent_cache(dataset, vae, tmp_path, LatentCacheConfig(), progress=False)
    entry = cache[0]
    assert torch.equal(entry["mean"], dataset[0]["image"] * 2) and not entry["std"].any()
    assert entry["std"].shape == entry["mean"].shape
    assert cache.files[0].stat().st_size < 16**3 * (4 + 2 + 1) + 2000  # image, mask, inside


def test_a_run_in_voxels(tmp_path):
    """The ordinary two steps; the first has nothing to train. The statistics are the training volumes'."""
    model = "--model={class: autoencoder.SpaceToDepth3D, patch_size: 2}"
    with pytest.raises(ValueError, match="SpaceToDepth3D has nothing to train: remove init_from, resume"):
        train_vae.main([f"--output={tmp_path}/vae", f"--data={DATA}", model, "--init_from=x", "--resume=latest"])
    made = train_vae.main([f"--output={tmp_path}/vae", f"--data={DATA}", model])
    assert made == {} and (tmp_path / "vae/config.yaml").is_file()
    vae = load_autoencoder(tmp_path / "vae")
    config = DataConfig(phantom=PhantomConfig(count=6, shape=(8, 12, 10)), validation_fraction=0.2)
    train = [case for case in load_cases(config) if case.split == "train"]
    images = torch.stack([item["image"] for item in (VolumeDataset(train, config)[i] for i in range(len(train)))])
    cells = SpaceToDepth3D(patch_size=2).encode(images).latent_dist.mean
    assert vae.config["latents_mean"] == pytest.approx(cells.mean((0, 2, 3, 4)).tolist(), abs=1e-5)
    assert vae.config["latents_std"] == pytest.approx(cells.std((0, 2, 3, 4), correction=0).tolist(), rel=1e-4)

    AcceleratorState._reset_state(reset_partial_state=True)
    unet = "{class: diffusion.LatentUNet3D, channels: [8, 8], blocks: [1, 1], attention: [false, false], mask_width: 4"
    asked = [
        f"--output={tmp_path}/ldm",
        f"--vae={tmp_path}/vae",
        f"--data={DATA}",
        f"--model={unet}, objective: epsilon, train_steps: 50}}",
        "--loss=l1",
        "--scheduler=DDPMScheduler",
        "--inference_steps=2",
        "--optimizer={warmup_steps: 0}",
        "--loop={max_steps: 2, batch_size: 2, trackers: [], previews: 1}",
    ]
    for wrong in ("--inference_steps=60", "--scheduler=PNDMScheduler"):  # before a volume is encoded
        with pytest.raises(ValueError, match="60 does not span the 50 steps|does not fit epsilon"):
            train_ldm.main([*asked, wrong])
        assert not (tmp_path / "ldm/latents").exists()
        AcceleratorState._reset_state(reset_partial_state=True)
    train_ldm.main(asked)
    pipe = MedVolumePipeline.from_pretrained(tmp_path / "ldm/pipeline")
    stored = json.loads((tmp_path / "ldm/pipeline/scheduler/scheduler_config.json").read_text())
    assert stored["_class_name"] == "DDPMScheduler" and stored["num_train_timesteps"] == 50
    assert stored["clip_sample"] and stored["clip_sample_range"] == pytest.approx(vae.latent_bound())
    mask = np.zeros((9, 12, 10), np.int16)
    mask[2:6, 3:8, 2:7] = 1
    pipe.set_progress_bar_config(disable=True)
    first, again, other = (
        pipe(
            mask=mask, num_inference_steps=50, generator=torch.Generator().manual_seed(seed), output_type="np"
        ).volumes[0]
        for seed in (0, 0, 1)
    )
    assert first.shape[-3:] == mask.shape and np.isfinite(first).all()
    assert np.array_equal(first, again) and not np.allclose(first, other)
