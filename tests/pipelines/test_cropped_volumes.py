"""A model whose training cut its cases (`data.crop`): volumes are generated in the box, as by a model without a crop on
a mask that was cut by hand, and written on the whole grid."""

import json
import warnings

import nibabel as nib
import numpy as np
import pytest
import yaml
from structures import oblique
from tiny import editor_of, labels_of, seeded, tiny_pipeline

import generate
from pipelines import VolumeRequest
from pipelines.inputs.masks import TimePoint
from pipelines.sampling import SamplingConfig
from pipelines.storage.record import GenerationRecord
from volumes import Volume, resample_to

SHAPE = (14, 12, 10)
BOX = (slice(3, 10), slice(2, 8), slice(1, 10))  # with the margin
BODY = (slice(4, 9), slice(3, 7), slice(2, 9))
AFFINE = np.array([[1.0, 0, 0, 4], [0, 1, 0, 5], [0, 0, 1, 6], [0, 0, 0, 1]])
MR = {"above": 50.0, "channel": "MR", "margin": 1.0}
RECORD = {"whole": [14, 12, 10], "shape": [7, 6, 9], "start": [3, 2, 1]}
ONE = SamplingConfig(1)


def mr_array(seed=0, shape=SHAPE, body=BODY):
    """Below 50 outside the body, 150 to 300 in it."""
    random = np.random.default_rng(seed)
    array = random.uniform(0, 40, shape).astype(np.float32)
    array[body] = random.uniform(150, 300, array[body].shape)
    return array


def image_of(array, affine=AFFINE):
    return nib.Nifti1Image(array, affine)


def mask_array():
    return labels_of(SHAPE)


def body_mask():
    """Labels in the body alone."""
    array = np.zeros(SHAPE, np.int16)
    array[BODY] = np.maximum(mask_array()[BODY], 2)
    return image_of(array)


def cut(image, box=BOX):
    """A part of an image in RAS+ order, by nibabel."""
    return image.slicer[box]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(crop=MR)


@pytest.fixture(scope="module")
def plain():
    return tiny_pipeline()


def made(pipe, request, seed=3, **options):
    [volume] = pipe.prepare([request], ONE)
    [sample] = pipe.generate([volume], ONE, seeded(seed), **options)
    return sample


def turned(image, codes):
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes))
    return image.as_reoriented(turn)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR"])
@pytest.mark.parametrize("affine", [AFFINE, oblique((1.0, 1.0, 1.0))], ids=["straight", "oblique"])
def test_the_box_is_generated_and_put_back(pipe, plain, codes, affine, tmp_path):
    mask, image = image_of(mask_array(), affine), image_of(mr_array(), affine)
    by_hand = plain(cut(mask), num_inference_steps=1, generator=seeded(3)).volumes[0]
    expected = np.full(SHAPE, 100, np.float32)  # the lowest
    expected[BOX] = by_hand.dataobj
    request = VolumeRequest(turned(mask, codes), box_image=image)
    sample = made(pipe, request)
    volume = sample.output
    np.testing.assert_allclose(volume.affine, request.mask.affine)
    assert volume.shape == request.mask.shape
    np.testing.assert_array_equal(turned(volume, "RAS").get_fdata(), expected)
    assert sample.record.box == RECORD
    record = sample.record.to_json()
    assert GenerationRecord.from_json(json.loads(json.dumps(record))).to_json() == record
    made(pipe, request, paths=[tmp_path / "slabs.nii.gz"])  # written slab by slab
    written = nib.load(tmp_path / "slabs.nii.gz")
    np.testing.assert_array_equal(written.get_fdata(), volume.get_fdata())
    np.testing.assert_allclose(written.affine, volume.affine)


def test_a_bare_mask_is_taken_whole(pipe, plain):
    """With the warning where it is larger than the boxes in training."""
    mask = image_of(mask_array())
    first, other = (one(mask, num_inference_steps=1, generator=seeded(3)) for one in (pipe, plain))
    np.testing.assert_array_equal(first.volumes[0].dataobj, other.volumes[0].dataobj)
    assert "box" not in first.provenance[0]
    small = tiny_pipeline(crop=MR, shape_range=[[5, 5, 5], [8, 8, 8]])
    with pytest.warns(UserWarning, match="16 x 12 x 12 voxels .padded. is outside of what the model was trained on"):
        small(mask, num_inference_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(
            tiny_pipeline(crop=MR, shape_range=[[5, 5, 5], [8, 8, 10]]),
            VolumeRequest(body_mask(), box_image=image_of(mr_array())),
        )


def test_the_box_of_the_masks_labels(plain):
    pipe = tiny_pipeline(crop={"above": "mask", "channel": None, "margin": 1.0})
    mask = body_mask()
    first = pipe(mask, num_inference_steps=1, generator=seeded(3))
    by_hand = plain(cut(mask), num_inference_steps=1, generator=seeded(3))
    np.testing.assert_array_equal(cut(first.volumes[0]).dataobj, by_hand.volumes[0].dataobj)
    assert first.provenance[0]["box"] == RECORD and (np.asarray(first.volumes[0].dataobj) == 100).sum() >= 14 * 12 * 3
    with (
        pytest.warns(UserWarning, match="background"),
        pytest.raises(ValueError, match="is background alone, and this model generates"),
    ):
        pipe(image_of(np.zeros(SHAPE, np.int16)))


def test_an_image_of_air_is_refused(pipe):
    with pytest.raises(ValueError, match=r"'MR': nothing is above 50, .*highest value is 3\d.*units of the training"):
        pipe.prepare([VolumeRequest(image_of(mask_array()), box_image=image_of(mr_array() % 40))], ONE)


def test_voxels_of_another_size_are_resampled_within_the_box(pipe, plain):
    fine = AFFINE @ np.diag([0.5, 1, 1, 1])
    mask, image = image_of(mask_array(), fine), image_of(mr_array(), fine)
    box = (slice(2, 11), *BOX[1:])  # 1 mm are 2 voxels
    with pytest.warns(UserWarning, match="has a spacing of"):
        whole = made(pipe, VolumeRequest(mask, box_image=image)).output
        by_hand = plain(cut(mask, box), num_inference_steps=1, generator=seeded(3)).volumes[0]
    np.testing.assert_allclose(whole.affine, fine)
    expected = np.full(SHAPE, 100, np.float32)
    expected[box] = by_hand.dataobj
    np.testing.assert_allclose(whole.get_fdata(), expected, atol=1e-4)


# Condition channels

CT = {"kind": "window", "low": -1000.0, "high": 1000.0}
PET = {"kind": "percentile", "low": 1.0, "high": 9.0, "percentiles": [0.0, 100.0]}
TWO = {
    "images": {"ct": 4, "pet": 4},
    "condition_dropout": {"ct": 0.5, "pet": 0.5, "mask": 0.1},
    "channels": ["pet", "ct"],
    "intensity": [PET, CT],
}
OF_CT = {"above": 50.0, "channel": "ct", "margin": 1.0}


@pytest.mark.parametrize("with_mask", [True, False])
def test_a_condition_image_sets_the_box(with_mask):
    """It is scaled by what the box shows, and returned whole."""
    pipe, plain = tiny_pipeline(**TWO, crop=OF_CT | {"channel": "pet"}), tiny_pipeline(**TWO)
    image, mask = image_of(mr_array(5)), image_of(mask_array()) if with_mask else None
    whole = pipe(mask, image={"pet": image}, num_inference_steps=1, generator=seeded(3))
    by_hand = plain(mask and cut(mask), image={"pet": cut(image)}, num_inference_steps=1, generator=seeded(3))
    np.testing.assert_array_equal(cut(whole.volumes[0]["ct"]).dataobj, by_hand.volumes[0]["ct"].dataobj)
    outside = np.asarray(whole.volumes[0]["ct"].dataobj).copy()
    outside[BOX] = -1000
    assert (outside == -1000).all() and whole.provenance[0]["box"] == RECORD
    arrays = pipe(mask, image={"pet": image}, num_inference_steps=1, generator=seeded(3), output_type="np")
    np.testing.assert_array_equal(arrays.volumes[0][0], image.dataobj)
    np.testing.assert_array_equal(np.rint(arrays.volumes[0][1]), whole.volumes[0]["ct"].dataobj)


def test_a_resampled_image_sets_the_box_of_the_masks_grid():
    pipe, plain = tiny_pipeline(**TWO, crop=OF_CT, resample_to="ct"), tiny_pipeline(**TWO)
    wide = AFFINE @ np.array([[2.0, 0, 0, -2], [0, 2, 0, -2], [0, 0, 2, -2], [0, 0, 0, 1]])
    image = image_of(mr_array(5, (10, 9, 8), (slice(3, 6), slice(3, 5), slice(2, 5))), wide)
    mask = image_of(mask_array())
    on_mask = resample_to(Volume(np.asarray(image.dataobj)[None], wide), SHAPE, AFFINE)
    where = np.argwhere(on_mask.array[0] > 50)
    box = tuple(slice(max(a - 1, 0), min(b + 2, n)) for a, b, n in zip(where.min(0), where.max(0), SHAPE, strict=True))
    with pytest.warns(UserWarning, match="is resampled onto it"):
        whole = pipe(mask, image={"ct": image}, num_inference_steps=1, generator=seeded(3))
    part = image_of(on_mask.array[0])
    by_hand = plain(cut(mask, box), image={"ct": cut(part, box)}, num_inference_steps=1, generator=seeded(3))
    assert whole.provenance[0]["box"]["start"] == [one.start for one in box]
    assert whole.provenance[0]["resampled"] == {"ct": 1.0}
    np.testing.assert_allclose(
        cut(whole.volumes[0]["pet"], box).dataobj, by_hand.volumes[0]["pet"].dataobj, atol=1e-3, rtol=1e-4
    )


def test_files_of_several_channels(tmp_path):
    pipe = tiny_pipeline(**TWO, crop=OF_CT)
    request = VolumeRequest(image_of(mask_array()), box_image=image_of(mr_array()))
    images = made(pipe, request).output
    made(pipe, request, paths=[tmp_path / "two.nii.gz"])
    for channel, low in (("pet", 1), ("ct", -1000)):
        written = nib.load(tmp_path / f"two_{channel}.nii.gz")
        np.testing.assert_array_equal(written.dataobj, images[channel].dataobj)
        assert (np.asarray(written.dataobj)[:3] == low).all() and written.shape == SHAPE


# Edits


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
@pytest.mark.parametrize("with_mask", [True, False])
def test_an_edit_keeps_what_is_outside_the_box(dtype, with_mask):
    changes = {} if with_mask else {"condition_dropout": {"mask": 0.5}}
    data = {"intensity": [{"kind": "percentile", "low": 100.0, "high": 300.0, "percentiles": [1.0, 99.0]}]}
    editor, plain = (editor_of(tiny_pipeline(**data, **changes, **more)) for more in ({"crop": MR}, {}))
    image, mask = image_of(mr_array().astype(dtype)), image_of(mask_array()) if with_mask else None
    region = np.zeros(SHAPE, np.uint8)
    region[5:8, 4:6, 4:7] = 1
    for strength, marked in ((0.5, None), (1.0, image_of(region))):
        options = {"strength": strength, "num_inference_steps": 2, "generator": seeded(3)}
        edited = editor(image=image, mask=mask, region=marked, **options).volumes[0]
        options["generator"] = seeded(3)
        by_hand = plain(image=cut(image), mask=mask and cut(mask), region=marked and cut(marked), **options).volumes[0]
        expected = np.asarray(image.dataobj).copy()
        expected[BOX] = by_hand.dataobj
        assert edited.get_data_dtype() == dtype and (np.asarray(edited.dataobj) != image.dataobj).any()
        np.testing.assert_array_equal(edited.dataobj, expected)
        np.testing.assert_allclose(edited.affine, AFFINE)


def test_a_region_outside_the_box():
    data = {"intensity": [{"kind": "percentile", "low": 100.0, "high": 300.0, "percentiles": [1.0, 99.0]}]}
    editor = editor_of(tiny_pipeline(**data, crop=MR))
    region = np.zeros(SHAPE, np.uint8)
    region[12:, 10:] = 1
    given = {"image": image_of(mr_array()), "mask": image_of(mask_array()), "num_inference_steps": 1}
    with pytest.raises(ValueError, match="the region: lies outside the box that this model sees of the image"):
        editor(region=image_of(region), **given)
    region[9, 7, 8] = 1
    with pytest.warns(UserWarning, match="the region: 40 of its 41 voxels lie outside the box"):
        edited = editor(region=image_of(region), **given).volumes[0]
    changed = np.asarray(edited.dataobj) != mr_array()
    assert changed[9, 7, 8] and changed.sum() == 1


# Data sets


def test_a_split_is_generated_in_the_boxes_of_its_images(pipe, plain, tmp_path):
    """The second volume of a 4-D file; the same command finds its volumes again, and another image does not."""
    for name, body in (("a", BODY), ("b", (slice(2, 7), slice(3, 7), slice(2, 9)))):
        nib.save(image_of(mask_array()), tmp_path / f"{name}_mask.nii.gz")
        nib.save(image_of(np.stack([mr_array() * 0, mr_array(body=body)], axis=-1)), tmp_path / f"{name}_mr.nii.gz")
    data = {
        "images": "{name}_mr.nii.gz",
        "time_point": 1,
        "masks": "{name}_mask.nii.gz",
        "label_names": {0: "background", 2: "anterior", 5: "posterior"},
        "crop": {"above": 50, "margin": 1},
        "test_fraction": 0.99,
        "validation_fraction": 0,
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
    (tmp_path / "ldm.yaml").write_text(yaml.safe_dump({"output": "run", "vae": "v", "data": "data.yaml", "model": {}}))
    pipe.save_pretrained(tmp_path / "run/pipeline")
    words = ["--config", str(tmp_path / "ldm.yaml"), "--output", str(tmp_path / "out"), "--steps", "1"]
    generate.main([*words, "--split", "test"])
    generate.main([*words, "--split", "train"])
    records = {name: json.loads((tmp_path / f"out/{name}_000.json").read_text()) for name in "ab"}
    assert records["a"]["box"] == RECORD and records["b"]["box"] == RECORD | {"start": [1, 2, 1]}
    before = (tmp_path / "out/a_000.nii.gz").stat().st_mtime_ns
    volume = nib.load(tmp_path / "out/a_000.nii.gz")
    assert (np.asarray(volume.dataobj)[10:] == 100).all() and (np.asarray(volume.dataobj)[BOX] > 100).any()
    generate.main([*words, "--split", "test"])
    assert (tmp_path / "out/a_000.nii.gz").stat().st_mtime_ns == before


def test_a_volume_of_a_4d_file_is_an_image(pipe, tmp_path):
    nib.save(image_of(np.stack([mr_array() * 0, mr_array()], axis=-1)), tmp_path / "two.nii.gz")
    for number, found in ((1, RECORD), (0, None)):
        request = VolumeRequest(image_of(mask_array()), box_image=TimePoint(tmp_path / "two.nii.gz", number))
        if found:
            assert pipe.prepare([request], ONE)[0].record.box == found
        else:
            with pytest.raises(ValueError, match="nothing is above 50"):
                pipe.prepare([request], ONE)
