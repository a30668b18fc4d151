"""The model of what an autoencoder leaves out. Known answers: noise that was taken away comes back alike."""

import tracemalloc
from dataclasses import asdict

import nibabel as nib
import numpy as np
import pytest
import torch
from noise_volumes import SIDES, volumes
from scipy import ndimage
from tiny import labels_of, tiny_data, tiny_pipeline

from autoencoder.residual_noise import (
    ResidualNoiseModel,
    fit_noise,
    measure_noise,
)
from pipelines import MedVolumePipeline
from volumes import DataConfig, PhantomConfig, VolumeDataset, load_cases
from volumes.description import NOISE_LEVELS, NOISE_RADIUS, ChannelNoise


@pytest.fixture(scope="module")
def fitted() -> ChannelNoise:
    return fit_noise(volumes(), SIDES)[0]


def noise_of(fitted: ChannelNoise, seed: int, value: float = 0.5, sides=(20, 20, 20)) -> np.ndarray:
    flat = torch.full((1, *sides), value)
    return next(ResidualNoiseModel([fitted]).add([flat], seed))[0].numpy() - value


def test_strength_follows_the_decoded_intensity(fitted):
    bright, dark, clipped = (
        np.sqrt(np.mean([noise_of(fitted, seed, value).var() for seed in range(40)])) for value in (0.5, -0.5, -1.0)
    )
    assert bright / dark == pytest.approx(2, rel=0.15)
    assert clipped < 0.05 * dark


def test_the_level_is_one_of_the_real_volumes(fitted):
    """Levels were spread evenly from 1 to 4."""
    drawn = np.array([noise_of(fitted, seed).std() for seed in range(60)])
    assert drawn.max() / drawn.min() == pytest.approx(4, rel=0.35)
    assert np.median(drawn) == pytest.approx(2 * 0.10, rel=0.2)
    assert fitted.levels == sorted(fitted.levels) and len(fitted.levels) == NOISE_LEVELS


def test_neighbors_are_correlated_as_they_were(fitted):
    real = ndimage.gaussian_filter(np.random.default_rng(1).standard_normal((40, 40, 40)), 0.7)

    def correlation(noise: np.ndarray, step: int) -> float:
        return float(np.corrcoef(noise[:-step].ravel(), noise[step:].ravel())[0, 1])

    made = noise_of(fitted, 0, sides=(40, 40, 40))
    for step in (1, 2):
        assert correlation(made, step) == pytest.approx(correlation(real, step), abs=0.1)


def test_strength_is_measured_in_the_body_not_in_the_air():
    """Spectra are those of a crop inside the body, residuals by intensity those of whole volumes, which are mostly
    air."""
    random, body = np.random.default_rng(0), np.zeros((1, 72, 72, 72), bool)
    body[:, 14:58, 14:58, 14:58] = True
    smooth = np.where(body, 0.5, -1.0)
    pairs = [(smooth + 0.1 * random.standard_normal(body.shape) * body, smooth) for _ in range(3)]
    fitted = fit_noise(pairs, (72, 72, 72))[0]
    assert np.mean([noise_of(fitted, seed).std() for seed in range(4)]) == pytest.approx(0.1, rel=0.1)


def test_what_a_decoder_exceeds_the_range_by_is_no_noise():
    """The pipeline clips it, so air stays air."""
    random, pairs = np.random.default_rng(0), volumes(6)
    exceeding = [(real, np.where(made == -1, -1 - 0.3 * random.random(made.shape), made)) for real, made in pairs]
    fitted = fit_noise(exceeding, SIDES)[0]
    assert noise_of(fitted, 0, -1.0).std() < 0.05 * noise_of(fitted, 0, -0.5).std()


def test_slabs_of_any_thickness_make_the_same_volume(fitted):
    volume = torch.from_numpy(volumes(1)[0][1]).float()
    model = ResidualNoiseModel([fitted])
    whole = next(model.add([volume], 5))
    parts = torch.cat(list(model.add(volume.split([1, 2 * NOISE_RADIUS + 3, 3, 3], dim=3), 5)), dim=3)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    assert torch.equal(whole, next(model.add([volume], 5))) and not torch.equal(whole, next(model.add([volume], 6)))


def test_nothing_is_added_where_nothing_is_missing():
    same = [(made, made) for _, made in volumes(3)]
    fitted = fit_noise(same, SIDES)[0]
    assert fitted.std == 0 and not noise_of(fitted, 0).any()


def test_what_cannot_be_is_refused(fitted):
    with pytest.raises(ValueError, match="too small for a noise model"):
        fit_noise(volumes(1), (5, 24, 24))
    with pytest.raises(ValueError, match="no volumes"):
        fit_noise([], SIDES)
    with pytest.raises(ValueError, match="2 channels, a noise model of 1"):
        list(ResidualNoiseModel([fitted]).add([torch.zeros(2, 8, 8, 8)], 0))


def noisy_pipeline(fitted: ChannelNoise) -> MedVolumePipeline:
    base = tiny_pipeline()
    pipe = MedVolumePipeline(base.vae, base.unet, base.scheduler, tiny_data(residual_noise=[asdict(fitted)]))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pipeline_adds_its_noise_and_says_so(fitted, tmp_path):
    pipe, plain = noisy_pipeline(fitted), tiny_pipeline()
    mask, how = labels_of((16, 16, 12)), {"num_inference_steps": 2, "output_type": "np"}

    def made(of: MedVolumePipeline, seed: int = 0, **more) -> np.ndarray:
        return of(mask, generator=[torch.Generator().manual_seed(seed)], **how, **more).volumes[0]

    with_noise = made(pipe)
    assert np.array_equal(with_noise, made(pipe)) and not np.array_equal(with_noise, made(plain))
    assert np.array_equal(made(pipe, residual_noise=False), made(plain))
    together = pipe([mask, mask], generator=[torch.Generator().manual_seed(s) for s in (1, 0)], **how).volumes
    np.testing.assert_allclose(together[1], with_noise, atol=1e-3)
    records = [pipe(mask, num_inference_steps=2, residual_noise=flag).provenance[0] for flag in (True, False)]
    assert [one["residual_noise"] for one in records] == [True, False]
    assert (
        "residual_noise" not in plain(mask, num_inference_steps=2).provenance[0] and pipe.model_hash != plain.model_hash
    )
    pipe.save_pretrained(tmp_path)
    assert np.array_equal(made(MedVolumePipeline.from_pretrained(tmp_path)), with_noise)


def test_a_file_written_in_slabs_has_the_same_noise(fitted, tmp_path):
    pipe, mask = noisy_pipeline(fitted), labels_of((16, 16, 48))
    whole = pipe(mask, generator=torch.Generator().manual_seed(0), num_inference_steps=2).volumes[0].get_fdata()
    pipe.vae.enable_tiling(8)
    path = tmp_path / "one.nii"
    pipe(mask, generator=torch.Generator().manual_seed(0), num_inference_steps=2, paths=path)
    np.testing.assert_allclose(nib.load(path).get_fdata(), whole, atol=1e-2)


def test_noise_is_measured_on_a_data_set():
    """On whole volumes, padded for the autoencoder as everywhere, against what the mean of their latents decodes to."""
    config = DataConfig(phantom=PhantomConfig(count=3, shape=(24, 22, 27)))
    dataset, vae = VolumeDataset(load_cases(config), config), tiny_pipeline().vae
    [found] = measure_noise(dataset, vae, progress=False)
    pairs = []
    for item in (dataset[index] for index in range(3)):
        padded = torch.full((1, 1, 24, 24, 28), -1.0)
        padded[..., 1:23, :27] = item["image"]  # two and one voxels are missing: the lower half of them in front
        with torch.no_grad():
            made = vae.decode(vae.encode(padded).latent_dist.mean).sample
        pairs.append((item["image"].numpy(), made[0, :, :, 1:23, :27].numpy()))
    [expected] = fit_noise(pairs, (24, 22, 27))
    assert found.std == pytest.approx(expected.std, rel=1e-4)
    for key in ("kernel", "curve", "levels"):
        np.testing.assert_allclose(getattr(found, key), getattr(expected, key), rtol=1e-3, atol=1e-4)


def test_memory_does_not_grow_with_the_pairs():
    """A power spectrum of these volumes takes 0.9 MB."""

    def peak(count):
        random = np.random.default_rng(0)
        real = random.uniform(-1, 1, (1, 48, 48, 48)).astype(np.float32)
        tracemalloc.start()
        fit_noise(((real, real * random.uniform(0.5, 0.9)) for _ in range(count)), (48, 48, 48))
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    assert peak(30) < peak(5) + 2e6
