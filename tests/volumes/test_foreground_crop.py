"""`data.crop`: boxes that were counted by hand, in files of several grids, and what is recorded of them."""

import dataclasses
import json

import nibabel as nib
import numpy as np
import pytest
from structures import oblique, series_of

from volumes import (
    CropDataset,
    DataConfig,
    ForegroundCrop,
    IntensityScaling,
    PhantomConfig,
    Placement,
    Volume,
    VolumeDataset,
    VolumeError,
    describe,
    load_cases,
    make_phantom,
    resample,
)
from volumes.data.preprocessing import (
    check_preprocessing,
    described_preprocessing,
    differences,
    inherited,
    preprocessing,
)
from volumes.description import DataDescription
from volumes.foreground import box_from_json, box_to_json

SHAPE = (20, 16, 12)
BODY = (slice(6, 11), slice(4, 9), slice(5, 8))  # of 5 x 5 x 3 voxels
AFFINE = np.array([[2.0, 0, 0, -40], [0, 1, 0, 7], [0, 0, 3, 5], [0, 0, 0, 1]])
AIR, TISSUE = -1000.0, 40.0


def body(shape=SHAPE, where=BODY):
    """Air with a block of tissue, each voxel of another value."""
    array = np.full(shape, AIR, np.float32) + np.arange(np.prod(shape)).reshape(shape) / 1000
    array[where] += TISSUE - AIR
    return array


def save(array, path, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


@pytest.fixture
def folder(tmp_path):
    """One patient: CT, PET with its highest uptake elsewhere, and a mask of a part of the body."""
    save(body(), tmp_path / "a_ct.nii")
    save(body(where=(slice(0, 3), slice(12, 16), slice(11, 12))) + 1000, tmp_path / "a_pet.nii")
    mask = np.zeros(SHAPE, np.uint8)
    mask[7:9, 5:6, 6:8] = 2
    mask[19, 15, 0] = 1
    save(mask, tmp_path / "a_mask.nii")
    return tmp_path


def dataset_of(folder, **changes):
    arguments = {
        "root": str(folder),
        "images": "{name}_ct.nii",
        "intensity": IntensityScaling("window", -1000, 200),
        "validation_fraction": 0,
    }
    config = DataConfig(**(arguments | changes))
    return VolumeDataset(load_cases(config), config)


def box_of(dataset, number=0):
    box = dataset.facts[number].box
    return None if box is None else (box.start, box.target)


def in_file_units(dataset, number=0):
    [scale] = dataset.facts[number].scales
    return scale.invert(dataset[number]["image"].numpy()[0])


MASKED = {"masks": "{name}_mask.nii", "label_names": {0: "background", 1: "dot", 2: "tumor"}}
BOTH = {"images": {"ct": "{name}_ct.nii", "pet": "{name}_pet.nii"}}


def test_a_box_with_a_margin_in_mm_of_each_axis(folder):
    """4 mm are 2, 4 and 2 voxels of 2 x 1 x 3 mm: a part of a voxel is a whole one."""
    dataset = dataset_of(folder, crop=ForegroundCrop(-500, margin=4))
    assert box_of(dataset) == ((4, 0, 3), (9, 13, 7)) and dataset.facts[0].box.shape == SHAPE
    np.testing.assert_allclose(in_file_units(dataset), body()[4:13, 0:13, 3:10].clip(-1000, 200), atol=1e-3)
    affine = AFFINE.copy()
    affine[:3, 3] += AFFINE[:3, :3] @ [4, 0, 3]
    np.testing.assert_array_equal(dataset[0]["affine"], affine)
    assert box_of(dataset_of(folder, crop=ForegroundCrop(-500, margin=0))) == ((6, 4, 5), (5, 5, 3))
    assert box_of(dataset_of(folder)) is None and dataset_of(folder).shapes == [SHAPE]


@pytest.mark.parametrize("margin", [30.0, 1e9])
def test_a_margin_stays_within_the_volume(folder, margin):
    assert box_of(dataset_of(folder, crop=ForegroundCrop(-500, margin=margin))) == ((0, 0, 0), SHAPE)


def test_an_oblique_box_lies_where_the_body_is(tmp_path):
    """Stored in another order of axes, and turned: the same voxels at the same places."""
    affine = oblique()
    turned = nib.Nifti1Image(body(), affine).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    nib.save(turned, tmp_path / "a_ct.nii")
    dataset = dataset_of(tmp_path, crop=ForegroundCrop(-500, margin=2))
    assert box_of(dataset) == ((4, 3, 4), (9, 7, 5))  # of 1 x 2 x 3 mm
    expected = affine @ [4, 3, 4, 1]
    np.testing.assert_allclose(dataset[0]["affine"].numpy()[:3, 3], expected[:3], atol=1e-4)
    np.testing.assert_allclose(in_file_units(dataset), body()[4:13, 3:10, 4:9].clip(-1000, 200), atol=1e-3)


def test_noise_outside_does_not_widen_the_box(folder):
    """Hot voxels alone and in pairs, in the corners; but a second leg, or what is a fiftieth of the body, counts."""
    shape = (40, 30, 30)
    legs = body(shape, (slice(4, 14), slice(8, 18), slice(5, 25)))
    legs[25:35, 9:19, 5:25] = TISSUE
    box = ((4, 8, 5), (31, 11, 20))
    for x, y, z in [*np.argwhere(np.random.default_rng(0).random(shape) < 0.02).tolist(), [0, 0, 0], [39, 29, 29]]:
        outside = not (3 <= x <= 35 and 7 <= y <= 19 and 4 <= z <= 25)
        legs[x, y, z] = 900.0 if outside else legs[x, y, z]
    save(legs, folder / "a_ct.nii")
    assert box_of(dataset_of(folder, crop=ForegroundCrop(-500, margin=0))) == box
    legs[37:40, 0:4, 0:4] = TISSUE  # 48 voxels of 2,000
    save(legs, folder / "a_ct.nii")
    assert box_of(dataset_of(folder, crop=ForegroundCrop(-500, margin=0))) == ((4, 0, 0), (36, 19, 25))


def test_a_channel_is_chosen_and_all_are_cut(folder):
    wide = IntensityScaling("window", -1000, 2000)
    dataset = dataset_of(folder, crop=ForegroundCrop(500, "pet", 0), intensity=wide, **BOTH, **MASKED)
    assert box_of(dataset) == ((0, 12, 11), (3, 4, 1)) and dataset[0]["image"].shape == (2, 3, 4, 1)
    assert dataset[0]["mask"].shape == (3, 4, 1)
    assert box_of(dataset_of(folder, crop=ForegroundCrop(-500, margin=0), **BOTH)) == ((6, 4, 5), (5, 5, 3))


def test_the_box_of_the_masks_labels(folder):
    """Each labeled voxel counts, however few."""
    dataset = dataset_of(folder, crop=ForegroundCrop("mask", margin=0), **MASKED)
    assert box_of(dataset) == ((7, 5, 0), (13, 11, 8)) and (dataset[0]["mask"] > 0).sum() == 5
    one = MASKED | {"label_map": {1: 0}}
    assert box_of(dataset_of(folder, crop=ForegroundCrop("mask", margin=0), **one)) == ((7, 5, 6), (2, 1, 2))
    other = {"label_names": {3: "background", 4: "tumor"}, "label_map": {0: 3, 1: 3, 2: 4}, "masks": MASKED["masks"]}
    assert box_of(dataset_of(folder, crop=ForegroundCrop("mask", margin=0), **other)) == ((7, 5, 6), (2, 1, 2))


def test_an_empty_foreground_is_refused_by_name(folder):
    with pytest.raises(VolumeError, match=r"a_ct.nii: data.crop finds nothing above 5000, the highest value is 4\d"):
        dataset_of(folder, crop=ForegroundCrop(5000))
    with pytest.raises(VolumeError, match=r"a_pet.nii: data.crop finds nothing above 5000 in channel pet.*lower, or"):
        dataset_of(folder, crop=ForegroundCrop(5000, "pet"), **BOTH)
    save(np.zeros(SHAPE, np.uint8), folder / "a_mask.nii")
    with pytest.raises(VolumeError, match=r"a_mask.nii: is background alone, so data.crop \(above: mask\) finds"):
        dataset_of(folder, crop=ForegroundCrop("mask"), **MASKED)


def test_settings_that_cannot_work_are_refused():
    for message, crop, more in (
        ("crop.channel is 'mr', the image channels are ct, pet", ForegroundCrop(0, "mr"), BOTH),
        ("crop.above is mask, and there are no masks", ForegroundCrop("mask"), BOTH),
        ("image_labels says that they are label maps", ForegroundCrop(0), {"image_labels": {0: "b", 1: "c"}}),
    ):
        with pytest.raises(ValueError, match=message):
            DataConfig(**{"images": "x"} | more, crop=crop)
    with pytest.raises(ValueError, match="above: mask takes the mask, not the channel 'ct'"):
        ForegroundCrop("mask", "ct")


def test_the_box_is_cut_before_spacing(folder):
    dataset = dataset_of(folder, crop=ForegroundCrop(-500, margin=4), spacing=(1.5, 1.5, 1.5), **MASKED)
    assert box_of(dataset) == ((4, 0, 3), (9, 13, 7))
    affine = AFFINE.copy()
    affine[:3, 3] += AFFINE[:3, :3] @ [4, 0, 3]
    expected = resample(Volume(body()[None, 4:13, 0:13, 3:10], affine), (1.5, 1.5, 1.5))
    np.testing.assert_array_equal(dataset[0]["affine"], expected.affine)
    np.testing.assert_allclose(in_file_units(dataset), expected.array[0].clip(-1000, 200), atol=1e-3)


@pytest.mark.parametrize("channel", ["ct", "pet"])
def test_the_box_is_of_the_grid_that_others_are_resampled_onto(folder, channel):
    """PET has voxels of 4 x 2 x 6 mm, and shows the same body."""
    pet, affine = body((10, 8, 6), (slice(3, 5), slice(2, 4), slice(3, 4))), AFFINE @ np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = (AFFINE @ [0.5, 0.5, 0.5, 1])[:3]  # PET's voxel (i, j, k) covers CT's (2i..2i + 1, ...)
    save(pet, folder / "a_pet.nii", affine)
    dataset = dataset_of(folder, resample_to="ct", crop=ForegroundCrop(-500, channel, 0), **BOTH, **MASKED)
    # of CT's voxels; a linear ramp from 40 to -1,000 crosses -500 between the first and the second voxel outside
    box = {"ct": ((6, 4, 5), (5, 5, 3)), "pet": ((6, 4, 6), (4, 4, 2))}[channel]
    assert box_of(dataset) == box
    start = np.array(box[0])
    np.testing.assert_allclose(dataset[0]["affine"].numpy()[:3, 3], (AFFINE @ [*start, 1])[:3])
    ct = dataset.facts[0].scales[0].invert(dataset[0]["image"].numpy()[0])
    part = tuple(slice(a, a + n) for a, n in zip(*box, strict=True))
    np.testing.assert_allclose(ct, body()[part].clip(-1000, 200), atol=1e-3)
    assert dataset[0]["mask"].shape == box[1]


def test_a_dicom_series_is_cut_alike(tmp_path):
    series_of(Volume(np.rint(body())[None], AFFINE), tmp_path / "a_ct.nii")
    dataset = dataset_of(tmp_path, crop=ForegroundCrop(-500, margin=4))
    assert box_of(dataset) == ((4, 0, 3), (9, 13, 7))
    np.testing.assert_allclose(in_file_units(dataset), np.rint(body()[4:13, 0:13, 3:10]).clip(-1000, 200), atol=1e-3)


def test_percentiles_numbers_and_digests(folder):
    """Scales and sizes are those of the box; digests those of the whole file, by which a subject is known again."""
    scaling = IntensityScaling("percentile", 0, 100)
    crop = ForegroundCrop(-500, margin=0)
    dataset = dataset_of(folder, crop=crop, intensity=scaling, numbers=["size_x"])
    [scale] = dataset.facts[0].scales
    assert scale.low == pytest.approx(body()[BODY].min()) and scale.low > 0
    assert dataset.facts[0].numbers == pytest.approx((10.0,))
    assert dataset.facts[0].voxels == dataset_of(folder).facts[0].voxels


def test_phantoms_are_cut_and_give_patches():
    config = DataConfig(phantom=PhantomConfig(2), crop=ForegroundCrop(200, margin=1))
    dataset = VolumeDataset(load_cases(config), config)
    for item, case, prepared in zip(dataset, dataset.cases, dataset.facts, strict=False):
        _, mask, _ = make_phantom(case.phantom)
        sides = [np.flatnonzero((mask.array[0] > 0).any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
        assert prepared.box.start == tuple(max(int(side[0]) - 1, 0) for side in sides)
        assert item["image"].shape[1:] == item["mask"].shape == prepared.box.target
    assert CropDataset(dataset, (16, 16, 16), seed=0)[0]["image"].shape == (1, 16, 16, 16)


def test_the_setting_is_recorded_and_compared(folder):
    dataset = dataset_of(folder, crop=ForegroundCrop(-500, margin=4), **BOTH)
    described, facts = describe(dataset), dataset.preprocessing
    assert described.crop == ForegroundCrop(-500, "ct", 4) and described.shape_range == ((9, 13, 7), (9, 13, 7))
    assert DataDescription.from_json(json.loads(json.dumps(described.to_json()))) == described
    check_preprocessing(json.loads(json.dumps(facts)))
    assert differences(described_preprocessing(described), facts) == []
    other = preprocessing(dataset_of(folder, crop=ForegroundCrop(-500, "pet", 4), **BOTH).config)
    assert differences(facts, other) == [
        "crop: it learned the box of what is above -500 in ct, and 4 mm, the data has the box of what is above -500 in "
        "pet, and 4 mm"
    ]
    assert "the data has whole volumes" in differences(facts, preprocessing(dataset_of(folder, **BOTH).config))[0]
    older = {key: value for key, value in facts.items() if key != "crop"}  # of whole volumes
    assert "crop: it learned whole volumes, the data has the box" in differences(older, facts)[0]
    assert differences(older, older | {"crop": None}) == [] == differences(older, older)
    plain = dataclasses.replace(described, crop=None)
    assert "crop" not in plain.to_json() and DataDescription.from_json(plain.to_json()) == plain
    for wrong in (3, {"above": 1}, {"above": 1, "channel": "mr", "margin": 1}, {"above": "mask"}):
        with pytest.raises(ValueError, match="data: crop"):
            DataDescription.from_json(described.to_json() | {"crop": wrong})
    with pytest.raises(ValueError, match="data is not a description of preprocessing"):
        check_preprocessing(facts | {"crop": {"above": "x"}})


def test_a_diffusion_model_takes_the_setting_of_its_autoencoder(folder, tmp_path):
    facts = dataset_of(folder, crop=ForegroundCrop(-500, margin=4), **BOTH).preprocessing
    (tmp_path / "config.json").write_text(json.dumps({"data": facts}))
    crop = {"above": -500, "channel": "ct", "margin": 4}
    assert inherited(tmp_path, BOTH)["crop"] == crop
    assert "crop" not in inherited(tmp_path, {**BOTH, "crop": None})
    one = dataset_of(folder, crop=ForegroundCrop("mask", margin=4), **MASKED).preprocessing
    (tmp_path / "config.json").write_text(json.dumps({"data": one}))
    assert "crop" not in inherited(tmp_path, {"images": "x"})
    assert inherited(tmp_path, {"images": "x", "masks": "y"})["crop"] == {"above": "mask", "channel": None, "margin": 4}


def test_a_box_in_a_record():
    box = Placement((20, 16, 12), (9, 13, 7), (4, 0, 3))
    assert box_from_json(json.loads(json.dumps(box_to_json(box)))) == box
    for wrong in (None, 3, {}, {"whole": [4, 4, 4], "shape": [3, 3, 3], "start": [2, 0, 0]}, {"whole": [4, 4]}):
        with pytest.raises(ValueError, match="box is"):
            box_from_json(wrong)
