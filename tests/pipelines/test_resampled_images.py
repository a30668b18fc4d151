"""Images on other grids, given to a model whose training set was brought onto one: they are resampled alike, the
volume stays on the mask's grid, and the record says so."""

import nibabel as nib
import numpy as np
import pytest
import torch
from tiny import editor_of, mask_image, seeded, tiny_pipeline

from pipelines.storage.record import GenerationRecord
from volumes import IntensityScaling, Volume, read_volume, resample_to

CT = {"kind": "window", "low": -1000.0, "high": 1000.0}
PET = {"kind": "percentile", "low": 1.0, "high": 9.0, "percentiles": [5.0, 95.0]}
BOTH = {"images": {"ct": 4, "pet": 4}, "condition_dropout": {"ct": 0.5, "pet": 0.5, "mask": 0.1}}
SHAPE = (7, 6, 9)
AFFINE = np.array([[1.0, 0, 0, 4], [0, 1, 0, 5], [0, 0, 1, 6], [0, 0, 0, 1]])
WIDE = AFFINE @ np.array([[0.8, 0, 0, -2.2], [0, 0.9, 0.1, -3.1], [0, -0.1, 1.1, -2.3], [0, 0, 0, 1]])
WIDE_SHAPE = (15, 16, 14)
PART = AFFINE + np.array([[0, 0, 0, 3], *[[0] * 4] * 3])  # 3 mm along X: it shows 4 of 7 voxels


def pipeline_of(**changes):
    return tiny_pipeline(**{**BOTH, "channels": ["pet", "ct"], "intensity": [PET, CT], **changes})


def image_of(seed=0, shape=SHAPE, affine=AFFINE, low=-900.0, high=900.0):
    return nib.Nifti1Image(np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32), affine)


def mask_of():
    return mask_image(SHAPE, AFFINE)


@pytest.fixture(scope="module")
def pipe():
    return pipeline_of(resample_to="ct")


def wide(seed=0):
    return image_of(seed, WIDE_SHAPE, WIDE)


def onto_mask(image):
    """The image on the grid of `mask_of`, as if a user had resampled it."""
    return resample_to(read_volume(image), SHAPE, AFFINE)


@pytest.mark.parametrize("codes", ["RAS", "LPS"])
def test_an_image_is_resampled_onto_the_masks_grid(pipe, codes):
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(codes))
    mask = mask_of().as_reoriented(turn)
    with pytest.warns(
        UserWarning, match="the image 'ct': lies on another grid than the mask, and is resampled onto it"
    ):
        made = pipe(mask, image={"ct": wide()}, num_inference_steps=1, generator=seeded(3))
    by_hand = pipe(mask, image={"ct": onto_mask(wide())}, num_inference_steps=1, generator=seeded(3))
    volume, expected = made.volumes[0]["pet"], by_hand.volumes[0]["pet"]
    np.testing.assert_allclose(volume.affine, mask.affine)
    np.testing.assert_array_equal(np.asarray(volume.dataobj), np.asarray(expected.dataobj))
    assert made.provenance[0]["resampled"] == {"ct": 1.0} and "resampled" not in by_hand.provenance[0]
    record = GenerationRecord.from_json(made.provenance[0])
    assert record.to_json() == made.provenance[0]
    assert record.differences(GenerationRecord.from_json(by_hand.provenance[0])) == ["images", "resampled"]


def test_without_the_setting_the_refusal_says_what_to_do():
    with pytest.raises(ValueError, match="the image 'ct': lies on another grid than the mask .*data.resample_to"):
        pipeline_of()(mask_of(), image={"ct": wide()})


def test_what_an_image_does_not_show_is_left_empty(monkeypatch):
    """Its scale is of what it shows; the U-Net sees where it is not given; the volume has its lowest value there."""
    pipe, tensors = pipeline_of(resample_to="ct"), []
    forward = pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda *a, **k: tensors.append(k["image"]) or forward(*a, **k))
    shape, affine = (16, 8, 8), np.eye(4)
    near = affine.copy()
    near[0, 3] = 8
    mask, image = mask_image(shape, affine), image_of(2, (12, 8, 8), near, 0.0, 50.0)
    with pytest.warns(UserWarning, match="it shows 50% of it, and the rest is left empty"):
        made = pipe(mask, image={"pet": image}, num_inference_steps=1, generator=seeded(3))
    values = np.asarray(image.dataobj)[:8]
    padded = torch.full((1, 2, 16, 8, 8), -1.0)
    padded[0, 0, 8:] = torch.from_numpy(IntensityScaling("percentile", 5, 95).fit(values).apply(values))
    with torch.no_grad():
        latents = pipe.vae.encode(padded, return_dict=False)[0].mode()[:, :4]
    (tensor,) = tensors
    torch.testing.assert_close(tensor[:, 5:9], latents)
    assert tensor[0, 9, :, 0, 0].tolist() == [0, 0, 1, 1]
    ct = np.asarray(made.volumes[0]["ct"].dataobj)
    assert (ct[:8] == CT["low"]).all() and (ct[8:] > CT["low"]).any(axis=(1, 2)).all()
    assert made.provenance[0]["resampled"] == {"pet": 0.5}


def test_a_spacing_of_the_model_is_kept(pipe):
    """Both are resampled: the image onto the mask's grid, then both to the model's voxels."""
    fine = AFFINE @ np.diag([0.5, 0.5, 1, 1])
    with pytest.warns(UserWarning, match="resampled"):
        made = pipe(mask_image((14, 12, 9), fine), image={"ct": image_of(0, (9, 12, 9), fine)}, num_inference_steps=1)
    volume = made.volumes[0]["pet"]
    assert volume.shape == (14, 12, 9) and made.provenance[0]["resampled"] == {"ct": pytest.approx(9 / 14)}
    voxels = np.asarray(volume.dataobj)
    assert np.allclose(voxels[12:], 1) and (voxels[:8] > 1.01).any(axis=(1, 2)).all()  # PET's lowest is 1


def test_without_a_mask_the_reference_sets_the_grid():
    pipe = tiny_pipeline(
        **{**BOTH, "num_labels": 0, "images": {"ct": 4, "pet": 4}, "condition_dropout": {"ct": 0.5, "pet": 0.5}},
        channels=["pet", "ct", "mr"],
        intensity=[PET, CT, CT],
        labels={},
        resample_to="ct",
    )
    with pytest.warns(UserWarning, match="the image 'pet': lies on another grid than the image 'ct'"):
        made = pipe(image={"pet": image_of(1, SHAPE, PART), "ct": image_of(2)}, num_inference_steps=1)
    assert made.volumes[0]["mr"].shape == SHAPE and made.provenance[0]["resampled"] == {"pet": pytest.approx(4 / 7)}
    np.testing.assert_allclose(made.volumes[0]["mr"].affine, AFFINE)
    mr = np.asarray(made.volumes[0]["mr"].dataobj)
    assert (mr[:3] == CT["low"]).all() and (mr[3:] > CT["low"]).any(axis=(1, 2)).all()


def test_an_image_of_another_place_is_refused(pipe):
    far = AFFINE.copy()
    far[0, 3] += 100
    with pytest.raises(ValueError, match="the image 'ct': shows nothing of the box of the mask, and 5% are needed"):
        pipe(mask_of(), image={"ct": image_of(affine=far)})


def test_an_edit_keeps_each_files_voxels(pipe):
    images = {"ct": image_of(1), "pet": image_of(2, SHAPE, PART)}
    with pytest.raises(ValueError, match="the image 'pet': lies on another grid.*an edit keeps each file's voxels"):
        editor_of(pipe)(image=images, mask=mask_of(), strength=0.5, num_inference_steps=2)


def test_a_volume_of_no_file_is_resampled_too(pipe):
    volume = Volume(np.asarray(wide().dataobj)[None], WIDE)
    with pytest.warns(UserWarning, match="the image 'ct': lies on another grid"):
        first = pipe(mask_of(), image={"ct": volume}, num_inference_steps=1, generator=seeded(3), output_type="np")
    with pytest.warns(UserWarning, match="the image 'ct': lies on another grid"):
        other = pipe(mask_of(), image={"ct": wide()}, num_inference_steps=1, generator=seeded(3), output_type="np")
    np.testing.assert_array_equal(first.volumes[0], other.volumes[0])
