"""An image that is changed: what stays, what is made, and what is refused."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny import editor_of, mask_image, seeded, tiny_pipeline

from pipelines import (
    MedVolumeEditPipeline,
    MedVolumePipeline,
    SamplingConfig,
    VolumeRequest,
    describe_mask,
    read_sidecar,
)
from pipelines.inputs.inpainting import DETAIL_CARRYOVER, EditRequest, harmonic_blend
from volumes import PADDING, Volume, read_volume

SHAPE = (10, 9, 12)
AFFINE = np.array([[1.0, 0, 0, 4], [0, 1, 0, 5], [0, 0, 1, 6], [0, 0, 0, 1]])
CT = {"kind": "window", "low": -1000.0, "high": 1000.0}
MR = {"kind": "percentile", "low": 100.0, "high": 300.0, "percentiles": [5.0, 95.0]}
TWO = {"channels": ["pet", "ct"], "intensity": [MR, CT]}
BOTH = {"images": {"ct": 4, "pet": 4}, "condition_dropout": {"ct": 0.5, "pet": 0.5, "mask": 0.1}}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(intensity=[MR])


@pytest.fixture(scope="module")
def two():
    return tiny_pipeline(**TWO, **BOTH)


def voxels_of(dtype: type = np.float32, seed: int = 0, shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 250, shape).astype(dtype)


def image_of(dtype: type = np.float32, seed: int = 0, shape=SHAPE, affine=AFFINE) -> nib.Nifti1Image:
    return nib.Nifti1Image(voxels_of(dtype, seed, shape), affine)


def region_of(shape=SHAPE) -> np.ndarray:
    """Of odd shape, at one side of the volume, crossing slabs and latent cells."""
    region = np.zeros(shape, bool)
    region[2:7, :5, 3:9] = True
    region[3, 5, 5] = True
    return region


def region_image(region: np.ndarray, affine=AFFINE) -> nib.Nifti1Image:
    return nib.Nifti1Image(region.astype(np.uint8), affine)


def reordered(image: nib.Nifti1Image, codes: str) -> nib.Nifti1Image:
    to = nib.orientations.axcodes2ornt(codes)
    return image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), to))


def edited(pipe, image, region=None, *, mask=None, seeds=(3,), **arguments):
    arguments = {"num_inference_steps": 2, "output_type": "np"} | arguments
    mask = mask_image(SHAPE, AFFINE) if mask is None else mask
    return editor_of(pipe)(mask, image=image, region=region, generator=seeded(*seeds), **arguments).volumes


def plain(pipe, mask=None, seeds=(3,), **arguments):
    arguments = {"num_inference_steps": 2, "output_type": "np"} | arguments
    return pipe(mask_image(SHAPE, AFFINE) if mask is None else mask, generator=seeded(*seeds), **arguments).volumes


# what stays


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64, ">i2"])
def test_outside_the_region_every_voxel_is_the_images_own(pipe, dtype, tmp_path):
    """In memory, as arrays, and in files written slab by slab."""
    region, voxels = region_of(), voxels_of(dtype)
    if np.dtype(dtype) in (np.int32, np.float64):
        voxels[0, 8, 11] += np.dtype(dtype).type(2**24 + 1)  # float32 cannot hold it
        voxels[8, 8, 11] += np.dtype(dtype).type(2**24 + 3)
    nib.save(nib.Nifti1Image(voxels, AFFINE), tmp_path / "own.nii.gz")
    own = nib.load(tmp_path / "own.nii.gz")
    nifti = edited(pipe, own, region, output_type="nifti")[0]
    made = np.asarray(nifti.dataobj)
    assert made.dtype == np.dtype(dtype).newbyteorder("=") and np.array_equal(made[~region], voxels[~region])
    assert (made != voxels)[region].mean() > 0.9
    (array,), (tensor,) = edited(pipe, own, region), edited(pipe, own, region, output_type="pt")
    assert array.dtype == np.float32 and np.array_equal(
        array[0], made.astype(np.float32) if made.dtype.kind == "f" else array[0]
    )
    assert np.array_equal(array[0][~region], voxels.astype(np.float32)[~region])
    assert torch.equal(torch.from_numpy(array), tensor)
    (path,) = edited(pipe, own, region, output_type="nifti", paths=tmp_path / "made.nii.gz")
    stored = nib.load(path)
    assert stored.get_data_dtype() == made.dtype and np.array_equal(np.asarray(stored.dataobj), made)


def test_values_of_a_file_with_a_slope_are_kept(pipe, tmp_path):
    image = nib.Nifti1Image(voxels_of(np.int16), AFFINE)
    image.header.set_slope_inter(0.1, -3)
    nib.save(image, tmp_path / "own.nii")
    own, region = nib.load(tmp_path / "own.nii"), region_of()
    made = edited(pipe, tmp_path / "own.nii", region, output_type="nifti")[0]
    assert np.array_equal(np.asarray(made.dataobj)[~region], np.asarray(own.dataobj)[~region])


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "IPL"])
def test_the_result_lies_on_the_grid_of_the_images_file(pipe, codes, tmp_path):
    """Whatever the orientation of mask and region: every voxel of it is where it was."""
    image, region = image_of(), region_of()
    own, files = reordered(image, codes), {}
    inside = np.asarray(reordered(region_image(region), codes).dataobj) > 0
    for name, one in {"mask": mask_image(SHAPE, AFFINE), "region": region_image(region)}.items():
        files[name] = tmp_path / f"{name}.nii"
        nib.save(reordered(one, "PIR"), files[name])
    made = edited(pipe, own, files["region"], mask=files["mask"], output_type="nifti")[0]
    np.testing.assert_allclose(made.affine, own.affine)
    assert np.array_equal(np.asarray(made.dataobj)[~inside], np.asarray(own.dataobj)[~inside])
    np.testing.assert_array_equal(
        read_volume(made).array, read_volume(edited(pipe, image, region_image(region), output_type="nifti")[0]).array
    )
    (path,) = edited(pipe, own, files["region"], mask=files["mask"], output_type="nifti", paths=tmp_path / "made.nii")
    assert np.array_equal(np.asarray(nib.load(path).dataobj), np.asarray(made.dataobj))
    (array,) = edited(pipe, own, inside, mask=files["mask"])  # an array is in the order of the image's file
    assert np.array_equal(array[0], np.asarray(made.dataobj))


@pytest.mark.parametrize("spacing", [(0.5, 0.7, 1.0), (2.0, 1.0, 3.0)])
def test_an_image_of_another_spacing_is_kept_outside_the_region(pipe, spacing, tmp_path):
    affine = AFFINE @ np.diag([*spacing, 1])
    image, region = reordered(image_of(np.int16, affine=affine), "LPS"), region_of()
    inside = np.asarray(reordered(region_image(region, affine), "LPS").dataobj) > 0
    settings = {"mask": mask_image(SHAPE, affine), "output_type": "nifti"}
    with pytest.warns(UserWarning, match="the model was trained at 1 x 1 x 1 mm"):
        made = edited(pipe, image, region_image(region, affine), **settings)[0]
        (path,) = edited(pipe, image, region_image(region, affine), paths=tmp_path / "a.nii.gz", **settings)
    assert made.get_data_dtype() == np.int16 and np.allclose(made.affine, image.affine)
    own = np.asarray(image.dataobj)
    assert np.array_equal(np.asarray(made.dataobj)[~inside], own[~inside])
    assert (np.asarray(made.dataobj) != own)[inside].mean() > 0.8
    assert np.array_equal(np.asarray(nib.load(path).dataobj), np.asarray(made.dataobj))


def test_slabs_that_are_decoded_one_by_one_give_the_same(pipe, tmp_path):
    region = region_of()
    whole = edited(pipe, image_of(), region)[0]
    tiled = tiny_pipeline(intensity=[MR])
    tiled.vae.enable_tiling(slab_bytes=1)
    (path,) = edited(tiled, image_of(), region, output_type="nifti", paths=tmp_path / "a.nii")
    stored = np.asarray(nib.load(path).dataobj)
    np.testing.assert_allclose(stored, whole[0], rtol=1e-4, atol=1e-2)
    assert np.array_equal(stored[~region], voxels_of()[~region])


def test_of_two_channels_both_are_edited_or_one_is_given(two, tmp_path):
    """Channels of different types; what is given conditions the other and comes back as it was."""
    images = {"ct": image_of(np.int16, 1), "pet": image_of(np.float64, 2)}
    region = region_of()
    both = edited(two, images, region, output_type="nifti")[0]
    assert list(both) == ["pet", "ct"]
    for channel, own in images.items():
        made, own = np.asarray(both[channel].dataobj), np.asarray(own.dataobj)
        assert made.dtype == own.dtype and np.array_equal(made[~region], own[~region])
        assert (made != own)[region].mean() > 0.9
    (files,) = edited(two, images, region, output_type="nifti", paths=tmp_path / "a.nii.gz")
    for channel, path in files.items():
        assert np.array_equal(np.asarray(nib.load(path).dataobj), np.asarray(both[channel].dataobj))
    out = editor_of(two)(
        mask_image(SHAPE, AFFINE),
        image=images,
        region=region,
        keep_channels=["ct"],
        num_inference_steps=2,
        generator=seeded(3),
    )
    assert list(out.volumes[0]) == ["pet"] and list(out.provenance[0]["images"]) == ["ct"]
    assert list(out.provenance[0]["edit"]["image"]) == ["pet"] and out.provenance[0]["channels"] == ["pet"]
    given = np.asarray(out.volumes[0]["pet"].dataobj)
    assert np.array_equal(given[~region], voxels_of(np.float64, 2)[~region])
    assert np.abs(given - np.asarray(both["pet"].dataobj))[region].max() > 1
    array = edited(two, images, region, keep_channels=["ct"])[0]
    assert np.array_equal(array[1], voxels_of(np.int16, 1)) and np.array_equal(array[0], given.astype(np.float32))


def test_what_the_mask_calls_missing_is_kept_too(pipe):
    labels, region = np.asarray(mask_image(SHAPE, AFFINE).dataobj).copy(), region_of()
    labels[:, 3:, 2:5] = PADDING
    made = edited(pipe, image_of(), region, mask=nib.Nifti1Image(labels, AFFINE), blend_margin=0)[0][0]
    assert np.array_equal(made[~region], voxels_of()[~region])
    np.testing.assert_allclose(made[region & (labels == PADDING)], np.percentile(voxels_of(), 5), rtol=1e-5)


def test_what_is_missing_is_not_continued_into_the_region():
    """Beyond a scanner's field of view files hold -2048 HU or the like: no darkness creeps in from there."""
    ct, region = tiny_pipeline(intensity=[CT]), region_of()
    labels = np.asarray(mask_image(SHAPE, AFFINE).dataobj).copy()
    labels[..., 8:] = PADDING
    made = []
    for beyond in (-2048, -1000):
        voxels = voxels_of(np.int16)
        voxels[..., 8:] = beyond
        made += edited(ct, nib.Nifti1Image(voxels, AFFINE), region, mask=nib.Nifti1Image(labels, AFFINE))
    inside = region & (labels != PADDING)
    np.testing.assert_allclose(made[0][0][inside], made[1][0][inside], atol=1)


# what is made


@pytest.mark.parametrize("objective", ["rectified_flow", "v_prediction", "epsilon"])
def test_strength_1_is_generating_anew(objective):
    pipe = tiny_pipeline(intensity=[MR], objective=objective)
    for seed in (0, 1):  # whatever the image
        assert np.array_equal(edited(pipe, image_of(seed=seed), strength=1.0)[0], plain(pipe)[0])
    whole = np.ones(SHAPE, bool)
    (made,), (again,) = edited(pipe, image_of(), whole), plain(pipe)
    scale = np.percentile(voxels_of(), [5, 95])  # a region is in the image's own units
    np.testing.assert_allclose((made - scale[0]) / (scale[1] - scale[0]), (again - 100) / 200, atol=1e-4)


def test_the_pipeline_is_as_before_after_an_edit(pipe):
    before = plain(pipe)[0]
    edited(pipe, image_of(), region_of(), strength=0.5)
    assert np.array_equal(plain(pipe)[0], before)


def test_the_weaker_the_nearer(pipe):
    """To what the autoencoder makes of the image: very little strength leads there."""
    image = image_of()
    distances = []
    reference = edited(pipe, image, strength=0.01, num_inference_steps=100)[0]
    for strength in (0.05, 0.3, 0.7):
        made = edited(pipe, image, strength=strength, num_inference_steps=20)[0]
        distances.append(float(np.abs(made - reference).mean()))
    assert distances[0] < distances[1] < distances[2] and distances[0] < 0.3 * distances[2]


def test_the_result_depends_on_mask_seed_and_strength(pipe):
    region, image = region_of(), image_of()
    first = edited(pipe, image, region)[0]
    assert np.array_equal(first, edited(pipe, image, region)[0])
    others = {
        "seed": edited(pipe, image, region, seeds=(4,))[0],
        "mask": edited(pipe, image, region, mask=mask_image(SHAPE, AFFINE, seed=5))[0],
        "strength": edited(pipe, image, region, strength=0.5)[0],
        "margin": edited(pipe, image, region, blend_margin=0)[0],
    }
    for name, other in others.items():
        assert np.abs(first - other)[0][region].max() > 0.1, name
        assert np.array_equal(first[0][~region], other[0][~region]), name


def test_a_batch_is_its_volumes_one_by_one(pipe):
    images, regions = [image_of(seed=1), image_of(seed=2)], [region_of(), region_of()[::-1]]
    masks = [mask_image(SHAPE, AFFINE, seed) for seed in (1, 2)]
    together = edited(pipe, images, regions, mask=masks, seeds=(1, 2, 3, 4), num_volumes_per_mask=2)
    for i, volume in enumerate(together):
        alone = edited(pipe, images[i // 2], regions[i // 2], mask=masks[i // 2], seeds=(i + 1,))[0]
        np.testing.assert_allclose(volume, alone, rtol=1e-4, atol=1e-2)
    one_region = edited(pipe, images, regions[0], mask=masks, seeds=(1, 2))
    np.testing.assert_array_equal(one_region[1][0][~regions[0]], voxels_of(seed=2)[~regions[0]])


def test_without_a_mask_the_image_sets_the_grid():
    free = tiny_pipeline(num_labels=0, labels={}, intensity=[MR])
    image, region = reordered(image_of(), "LPS"), region_of()
    free = editor_of(free)
    made = free(image=image, region=reordered(region_image(region), "LPS"), num_inference_steps=2).volumes[0]
    assert np.array_equal(read_volume(made).array[0][~region], voxels_of()[~region])
    (again,) = free(image=image, strength=1.0, num_inference_steps=2, generator=seeded(1)).volumes
    np.testing.assert_allclose(again.affine, image.affine)
    array = free(image=voxels_of(), strength=0.5, num_inference_steps=2, output_type="np").volumes[0]
    assert array.shape == (1, *SHAPE)


def test_noise_is_added_in_the_region_alone():
    kernel = np.zeros((7, 7, 7))
    kernel[3, 3, 3] = 1
    model = {"kernel": kernel.tolist(), "std": 0.2, "curve": [1.0] * 16, "levels": [1.0] * 65}
    noisy, region = tiny_pipeline(intensity=[MR], residual_noise=[model]), region_of()
    settings = {"mask": mask_image(SHAPE, AFFINE)}
    with_noise, without = (
        edited(noisy, image_of(), region, residual_noise=noise, **settings)[0][0] for noise in (True, False)
    )
    assert np.array_equal(with_noise[~region], without[~region]) and (with_noise != without)[region].mean() > 0.9


# how it is joined


def test_a_membrane_joins_its_surroundings_and_ends_at_margin():
    """A constant step across the border goes down to 0 in a straight line, and is the same whatever is inside."""
    region = np.zeros((5, 5, 12), bool)
    region[..., 3:] = True  # one border; elsewhere the region ends with the volume
    missing = np.where(region, np.nan, 7.0)[None].astype(np.float32)
    added = harmonic_blend(missing, region, (1, 1, 1), 4.0)
    np.testing.assert_allclose(added[0, 2, 2], [0, 0, 0, 5.6, 4.2, 2.8, 1.4, 0, 0, 0, 0, 0], atol=0.02)
    np.testing.assert_allclose(harmonic_blend(missing, region, (1, 1, 2), 8.0), added, atol=0.2)  # margins are of mm
    for margin, inside in ((0.5, region), (4.0, np.ones_like(region))):
        assert not harmonic_blend(np.nan_to_num(missing), inside, (1, 1, 1), margin).any()


def test_smoothness_of_a_membrane_is_measured_in_millimeters():
    """A wave along the border, voxels of 2 mm along it and 1 mm across: Laplace's equation on that grid has the
    solution sinh(q (n - j)) / sinh(q n), j voxels inside, with (cosh q - 1) = (1 - cos k) / 4; of the straight line
    less that, `DETAIL_CARRYOVER` is added in the first voxel and a factor of e less in each that follows."""
    region = np.zeros((3, 6, 12), bool)
    region[..., 3:] = True
    k, n = np.pi / 6, 5
    wave = 7 * np.cos(k * (np.arange(6) + 0.5))
    missing = np.where(region, np.nan, wave[None, :, None])[None].astype(np.float32)
    added = harmonic_blend(missing, region, (1, 2, 1), 4.0)[0, 1]
    j, q = np.arange(1, 5), np.arccosh(1 + (1 - np.cos(k)) / 4)
    smooth, straight = np.sinh(q * (n - j)) / np.sinh(q * n), 1 - j / n
    expected = smooth + DETAIL_CARRYOVER * (straight - smooth) * np.exp(1.0 - j)
    np.testing.assert_allclose(added[:, 3:7], wave[:, None] * expected, atol=0.05)
    assert not added[:, 7:].any()


def test_a_membrane_carries_some_of_what_is_fine_one_voxel_far():
    """Of a checkerboard across the border, which Laplace's equation loses, about half."""
    region = np.zeros((16, 16, 12), bool)
    region[..., 2:] = True
    board = np.indices((16, 16)).sum(0) % 2 * 2.0 - 1
    missing = np.repeat(board[..., None], 12, axis=2)[None]
    added = harmonic_blend(missing, region, (1, 1, 1), 4.0)[0, 4:-4, 4:-4]
    carried = (added * board[4:-4, 4:-4, None]).mean((0, 1))
    assert 0.4 < carried[2] < 0.7 and abs(carried[4]) < 0.1 and not carried[6:].any()


def test_values_stay_within_the_image_and_its_scale(pipe):
    (made,) = edited(pipe, image_of(np.uint8), region_of(), output_type="nifti")
    low, high = np.percentile(voxels_of(np.uint8), [5, 95])
    values = np.asarray(made.dataobj)
    assert values.min() >= min(low, voxels_of(np.uint8).min()) and values.max() <= max(high, voxels_of(np.uint8).max())
    shifted = tiny_pipeline(intensity=[CT])  # makes -1000 to 1000, in a file that has no numbers below 0
    for arguments in ({"region": np.ones(SHAPE, bool)}, {"strength": 0.9}):
        (made,) = edited(shifted, image_of(np.uint8), output_type="nifti", num_inference_steps=10, **arguments)
        assert made.get_data_dtype() == np.uint8 and (np.asarray(made.dataobj) == 0).any()


# what is recorded and what is refused


def test_the_sidecar_describes_an_edit_and_only_an_edit(pipe, tmp_path):
    """A volume that was not edited has no such entry."""
    nib.save(image_of(), tmp_path / "own.nii.gz")
    region = region_image(region_of())
    edited(
        pipe,
        tmp_path / "own.nii.gz",
        region,
        strength=0.5,
        blend_margin=3,
        output_type="nifti",
        paths=tmp_path / "a.nii",
    )
    assert read_sidecar(tmp_path / "a.nii")["edit"] == {
        "image": {"MR": describe_mask(tmp_path / "own.nii.gz")},
        "strength": 0.5,
        "region": describe_mask(region),
        "blend_margin": 3.0,
    }
    edited(pipe, tmp_path / "own.nii.gz", strength=0.5, output_type="nifti", paths=tmp_path / "b.nii")
    assert set(read_sidecar(tmp_path / "b.nii")["edit"]) == {"image", "strength"}
    plain(pipe, output_type="nifti", paths=tmp_path / "c.nii")
    assert "edit" not in read_sidecar(tmp_path / "c.nii")
    for lost in ("own.nii.gz", "region.nii"):
        nib.save(region, tmp_path / "region.nii")
        with pytest.raises(ValueError, match=f"{lost} is a mask or an image of this call"):
            edited(pipe, tmp_path / "own.nii.gz", tmp_path / "region.nii", output_type="nifti", paths=tmp_path / lost)


def test_what_cannot_be_edited_is_named(pipe, two):
    image, region, shifted = image_of(), region_of(), AFFINE.copy()
    shifted[0, 3] += 1
    resampled = read_volume(image)
    resampled = Volume(resampled.array[:, :-1], resampled.affine, resampled.source)
    nan = voxels_of()
    nan[0, 0, 0] = np.nan
    refused = [
        ({"strength": 0.0}, "strength is above 0 and at most 1 .* got 0.0"),
        ({"strength": 1.5}, "strength is above 0 and at most 1 .* got 1.5"),
        ({"strength": 0.2}, "strength 0.2 of 2 steps is less than one step; raise either"),
        ({"image": None, "strength": 0.5}, "there is no image to edit: give image"),
        ({"image": None, "region": region}, "there is no image to edit: give image"),
        ({}, "give strength .*, region .*, or both"),
        ({"region": np.zeros(SHAPE)}, "the region: is 0 everywhere, so nothing is to be generated"),
        ({"region": region[1:]}, r"the region: is an array of \(9, 9, 12\) voxels, the image's grid has \(10, 9, 12\)"),
        ({"region": region_image(region, shifted)}, "lies on another grid than the image .*resample one"),
        ({"region": [region, region]}, "2 regions for 1 images; give one per image, or one for all"),
        ({"region": region, "blend_margin": -1}, "blend_margin is a length in mm, 0 or more, got -1"),
        ({"image": image_of(affine=shifted), "strength": 0.5}, "the image 'MR': lies on another grid than the mask"),
        ({"image": {"ct": image}, "strength": 0.5}, "it must hold every channel that the model generates: MR"),
        ({"image": resampled, "strength": 0.5}, "was resampled from its file's grid; give the file, or a new Volume"),
        ({"image": nan, "strength": 0.5}, "the image 'MR': 1 of 1080 values are not finite"),
        ({"image": np.ones(SHAPE), "strength": 0.5}, "the image 'MR': every voxel is 1: it is constant"),
        ({"strength": 0.5, "keep_channels": ["MR"]}, "nothing is left to change; omit one"),
        (
            {"strength": 0.5, "keep_channels": ["ct"]},
            r"keep_channels is \['ct'\]; it lists channels that are kept, of MR",
        ),
    ]
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            editor_of(pipe)(mask_image(SHAPE, AFFINE), **{"image": image, "num_inference_steps": 2} | arguments)
    with pytest.raises(
        ValueError, match="image holds ct; to be edited .* every channel that the model generates: pet, ct"
    ):
        editor_of(two)(mask_image(SHAPE, AFFINE), image={"ct": image}, strength=0.5)
    with pytest.raises(ValueError, match="are dicts such as"):
        editor_of(two)(mask_image(SHAPE, AFFINE), image=image, strength=0.5)
    always = tiny_pipeline(**TWO, images={"ct": 4}, condition_dropout={"mask": 0.1})
    with pytest.raises(ValueError, match="image must give ct, as training never dropped it"):
        editor_of(always)(mask_image(SHAPE, AFFINE), image={"ct": image, "pet": image}, strength=0.5)
    maps = tiny_pipeline(image_labels={"0": "background", "1": "organ"})
    with pytest.raises(ValueError, match="this model generates label maps, which cannot be edited"):
        editor_of(maps)(mask_image(SHAPE, AFFINE), image=image, strength=0.5)
    with pytest.raises(ValueError, match="not trained with image conditions.*or edit that image"):
        pipe(mask_image(SHAPE, AFFINE), image={"MR": image})
    with pytest.raises(ValueError, match='are dicts such as .*"ct": "ct.nii.gz"'):
        pipe(mask_image(SHAPE, AFFINE), image=image)


# one set of components, two pipelines


def test_both_pipelines_load_a_folder_that_either_saved(pipe, tmp_path):
    """model_index.json names the class that saved it; diffusers' own loader returns that class."""
    editor_of(pipe).save_pretrained(tmp_path / "editor")
    pipe.save_pretrained(tmp_path / "pipe")
    for name, saved in (("editor", MedVolumeEditPipeline), ("pipe", MedVolumePipeline)):
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert index["_class_name"] == saved.__name__
        for cls in (MedVolumeEditPipeline, MedVolumePipeline, DiffusionPipeline):
            loaded = cls.from_pretrained(tmp_path / name)
            assert type(loaded) is (saved if cls is DiffusionPipeline else cls) and loaded.model_hash == pipe.model_hash
    loaded = MedVolumeEditPipeline.from_pretrained(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)
    settings = {"image": image_of(), "strength": 0.5, "num_inference_steps": 2, "output_type": "np"}
    mask = mask_image(SHAPE, AFFINE)
    first, second = (one(mask, generator=seeded(3), **settings).volumes[0] for one in (loaded, editor_of(pipe)))
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-2)


def test_from_pipe_shares_the_components(pipe):
    editor = MedVolumeEditPipeline.from_pipe(pipe)
    assert editor.unet is pipe.unet and editor.vae is pipe.vae and editor.data == pipe.data
    again = MedVolumePipeline.from_pipe(editor)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(plain(again)[0], plain(pipe)[0])


# requests


def test_images_swapped_between_channels_are_another_edit(two):
    one, other = image_of(seed=1), image_of(np.int16, seed=2)
    images = [{"ct": one, "pet": other}, {"pet": one, "ct": other}]
    together = edited(two, images, region_of(), mask=[mask_image(SHAPE, AFFINE)] * 2, seeds=(3, 4))
    (alone,) = edited(two, images[1], region_of(), seeds=(4,))
    assert np.allclose(together[1], alone, atol=1e-3) and not np.allclose(together[0], together[1], atol=1)


def requests_of(**settings) -> VolumeRequest:
    return VolumeRequest(MASK, edit=EditRequest({"MR": IMAGE}, **settings))


MASK = mask_image(SHAPE, AFFINE)
IMAGE = image_of()


def test_edits_of_one_image_with_other_settings_are_apart(pipe):
    region = region_image(region_of())
    margins = [requests_of(region=region, blend_margin=margin) for margin in (1.0, 3.0)]
    prepared = editor_of(pipe).prepare(margins, SamplingConfig(2))
    assert [one.record.edit["blend_margin"] for one in prepared] == [1.0, 3.0]


def test_requests_of_the_other_class_are_refused(pipe):
    edit, plain_request = requests_of(strength=0.5), VolumeRequest(mask_image(SHAPE, AFFINE))
    with pytest.raises(ValueError, match="use MedVolumeEditPipeline.from_pipe"):
        pipe.prepare([edit], SamplingConfig(2))
    with pytest.raises(ValueError, match="use MedVolumePipeline.from_pipe"):
        editor_of(pipe).prepare([plain_request], SamplingConfig(2))
    with pytest.raises(ValueError, match="have one strength"):
        editor_of(pipe).prepare([edit, requests_of(strength=0.75)], SamplingConfig(2))


def test_volumes_are_sampled_as_they_were_prepared(pipe):
    prepared = pipe.prepare([VolumeRequest(mask_image(SHAPE, AFFINE))], SamplingConfig(2))
    with pytest.raises(ValueError, match="prepared for other sampling settings"):
        pipe.generate(prepared, SamplingConfig(5), seeded(1))
    with pytest.raises(ValueError, match="1 volumes and 2 generators"):
        pipe.generate(prepared, SamplingConfig(2), seeded(1, 2))
    (sample,) = pipe.generate(prepared, SamplingConfig(2, batch_size=1), seeded(1), output_type="latent")
    assert sample.record.num_inference_steps == 2
