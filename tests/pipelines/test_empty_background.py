"""Generated volumes whose background is empty: exactly so where the mask says it, by a threshold where none does."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from noise_volumes import SIDES, volumes
from tiny import labels_of, mask_image, seeded, tiny_data, tiny_pipeline

from autoencoder.residual_noise import fit_noise
from pipelines import MedVolumePipeline, VolumeProcessor
from volumes import UNKNOWN
from volumes.description import DataDescription

LOW = 100.0  # of the tiny data's intensities
SHAPE = (13, 12, 11)


@pytest.fixture(scope="module")
def noise() -> list[dict]:
    return [vars(channel) for channel in fit_noise(volumes(), SIDES)]


def made_by(pipe: MedVolumePipeline, **request) -> np.ndarray:
    return pipe(num_inference_steps=2, generator=seeded(7), output_type="np", **request).volumes[0][0]


def test_the_background_of_the_mask_is_exactly_the_lowest(noise):
    """Also under residual noise; all other voxels are those of a pipeline without the setting."""
    labels = labels_of(SHAPE)
    settings = {"residual_noise": noise}
    plain = made_by(tiny_pipeline(**settings), mask=mask_image(SHAPE))
    empty = made_by(tiny_pipeline(**settings, background_threshold=-0.5), mask=mask_image(SHAPE))
    assert (empty[labels == 0] == LOW).all() and (plain[labels == 0] != LOW).mean() > 0.5
    np.testing.assert_array_equal(empty[labels != 0], plain[labels != 0])


def test_without_a_mask_what_was_decoded_says_it(noise):
    """The threshold is met before the noise: the voxels below it are the lowest, the others have their noise."""
    dropout = {"condition_dropout": {"mask": 0.1}}
    decoded = made_by(tiny_pipeline(**dropout), shape=SHAPE)
    threshold = float(np.median(decoded)) / 100 - 2  # the tiny data's 100 to 300 are -1 to 1
    settings = {**dropout, "residual_noise": noise}
    noisy = made_by(tiny_pipeline(**settings), shape=SHAPE)
    empty = made_by(tiny_pipeline(**settings, background_threshold=threshold), shape=SHAPE)
    below = decoded < 200 + 100 * threshold
    assert 0.3 < below.mean() < 0.7
    np.testing.assert_array_equal(empty, np.where(below, LOW, noisy))


def test_slabs_of_any_thickness_are_emptied_alike(noise, tmp_path):
    pipe = tiny_pipeline(residual_noise=noise, background_threshold=-0.5)
    whole = made_by(pipe, mask=mask_image(SHAPE))
    pipe.vae.enable_tiling(slab_bytes=1)
    path = tmp_path / "made.nii.gz"
    pipe(mask=mask_image(SHAPE), num_inference_steps=2, generator=seeded(7), paths=path)
    streamed = nib.load(path).get_fdata()  # pyright: ignore[reportAttributeAccessIssue]
    assert (streamed[labels_of(SHAPE) == 0] == LOW).all()
    np.testing.assert_allclose(streamed, whole, atol=1e-2)


def test_a_mask_of_another_spacing_is_empty_on_its_own_grid():
    pipe = tiny_pipeline(background_threshold=-0.5)
    mask = nib.Nifti1Image(labels_of((9, 8, 7)), np.diag([1.4, 1.4, 1.4, 1]))
    with pytest.warns(UserWarning, match="is resampled"):
        made = made_by(pipe, mask=mask)
    assert (made[labels_of((9, 8, 7)) == 0] == LOW).all() and (made > LOW).any()


def test_where_the_label_is_unknown_what_was_decoded_says_it():
    processor = VolumeProcessor(tiny_data(background_threshold=0.0), (4, 4, 4))
    prepared = processor.preprocess(mask_image((8, 8, 8)))
    labels = np.ones((8, 8, 8), np.int16)
    labels[:2], labels[2:4] = UNKNOWN, 0
    slab = torch.full((1, 8, 8, 8), 0.5)
    slab[:, 1], slab[:, 6] = -0.5, -0.5
    [made] = processor.emptied([slab], replace(prepared, labels=labels))
    assert torch.isinf(made[0, :, 0, 0]).tolist() == [False, True, True, True, False, False, False, False]


def test_other_models_are_as_before():
    processor, slabs = VolumeProcessor(tiny_data(), (4, 4, 4)), [torch.zeros(1, 8, 8, 8)]
    [slab] = processor.emptied(slabs, processor.preprocess(mask_image((8, 8, 8))))
    assert slab is slabs[0]
    assert "background_threshold" not in tiny_data().to_json()


@pytest.mark.parametrize("wrong", [-1.5, 1, "0", True])
def test_a_threshold_outside_the_range_is_refused(wrong):
    with pytest.raises(ValueError, match="background_threshold"):
        tiny_data(background_threshold=wrong)
    with pytest.raises(ValueError, match="labels have no 0"):
        tiny_data(background_threshold=0.0, labels={"1": "organ", "2": "lesion"})
    for threshold in (-0.9, -1):  # -1: masks alone say what is background
        known = tiny_data(background_threshold=threshold)
        assert DataDescription.from_json(known.to_json()) == known
