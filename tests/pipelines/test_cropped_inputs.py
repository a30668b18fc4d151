"""What a model with `data.crop` says about its inputs: masks that reach beyond the box, images that do not set it."""

import dataclasses
import json
import warnings

import nibabel as nib
import numpy as np
import pytest
from structures import oblique
from tiny import editor_of, labels_of, seeded, tiny_data, tiny_pipeline

from evaluation.copies.anonymize import anonymized
from evaluation.copies.fingerprints import CopyCheck
from evaluation.studies.sampler_figures import OWN, Combination, SamplingInputs, sample
from pipelines import VolumeRequest
from pipelines.export.folder import mask_of
from pipelines.inputs.edit_files import EditRow, Lesion, edited_rows
from pipelines.inputs.masks import TimePoint
from pipelines.inputs.request_files import read_requests, refuse_inputs_in
from pipelines.sampling import SamplingConfig
from pipelines.storage.finished import FinishedVolume
from volumes import Volume

SHAPE = (14, 12, 10)
BODY = (slice(4, 9), slice(3, 7), slice(2, 9))
BOX = (slice(3, 10), slice(2, 8), slice(1, 10))  # with the margin
AFFINE = np.array([[1.0, 0, 0, 4], [0, 1, 0, 5], [0, 0, 1, 6], [0, 0, 0, 1]])
MR = {"above": 50.0, "channel": "MR", "margin": 1.0}
OF_MASK = {"above": "mask", "channel": None, "margin": 1.0}
RECORD = {"whole": [14, 12, 10], "shape": [7, 6, 9], "start": [3, 2, 1]}
ONE = SamplingConfig(1)


def mr_image(seed=0, affine=AFFINE):
    """Below 50 outside the body, 150 to 300 in it."""
    random = np.random.default_rng(seed)
    array = random.uniform(0, 40, SHAPE).astype(np.float32)
    array[BODY] = random.uniform(150, 300, array[BODY].shape)
    return nib.Nifti1Image(array, affine)


def mask_image(affine=AFFINE, corner=0):
    """Label 2 in the body, and `corner` in a corner outside the box."""
    array = np.zeros(SHAPE, np.int16)
    array[BODY] = 2
    array[12:, 10:, 8:] = corner
    return nib.Nifti1Image(array, affine)


def messages(work):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(one.message) for one in caught]


def test_labels_outside_the_box_are_counted():
    """What the whole mask has is not said to be missing."""
    pipe = tiny_pipeline(crop=MR, common_labels=[0, 2, 5])
    request = VolumeRequest(mask_image(corner=5), box_image=mr_image())
    [said] = [one for one in messages(lambda: pipe.prepare([request], ONE)) if "label" in one or "posterior" in one]
    assert said == (
        "the mask: 8 of its 148 voxels with a label, and all of posterior lie outside the box that this model sees of "
        "the image (data.crop); nothing is generated there"
    )
    [said] = messages(lambda: pipe.prepare([VolumeRequest(mask_image(), box_image=mr_image())], ONE))
    assert "has no posterior, which every training mask has" in said
    whole = tiny_pipeline(crop=OF_MASK, common_labels=[0, 2, 5])
    assert messages(lambda: whole.prepare([VolumeRequest(mask_image(corner=5))], ONE)) == []


@pytest.mark.parametrize("codes", ["RAS", "LPS"])
def test_exported_labels_end_at_the_box(codes, tmp_path):
    """Outside, a generated volume shows nothing; an edited one shows its image."""
    mask, pipe = mask_image(corner=5), tiny_pipeline(crop=MR)
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(codes))
    request = VolumeRequest(mask.as_reoriented(turn), box_image=mr_image())
    with pytest.warns(UserWarning, match="lie outside the box"):
        [volume] = pipe.prepare([request], ONE)
    exported = mask_of(FinishedVolume(tmp_path / "a.nii.gz", volume.record, request), pipe.data)
    np.testing.assert_array_equal(exported.array[0], mask_image().dataobj)
    edited = dataclasses.replace(volume.record, edit={"image": {}, "strength": 0.5})
    exported = mask_of(FinishedVolume(tmp_path / "a.nii.gz", edited, request), pipe.data)
    np.testing.assert_array_equal(exported.array[0], mask.dataobj)


@pytest.mark.parametrize("crop", [MR, OF_MASK], ids=["value", "mask"])
def test_a_lesion_outside_the_box_is_refused(crop, tmp_path):
    """Though the region around it reaches into the box; a new label moves a mask's box, and a removed one does."""
    nib.save(mr_image(), tmp_path / "a.nii.gz")
    nib.save(mask_image(corner=5), tmp_path / "mask.nii.gz")
    rows = [EditRow({"MR": tmp_path / "a.nii.gz"}, tmp_path / "mask.nii.gz", name="a")]
    data = tiny_data(crop=crop)
    lesion = Lesion("posterior", (12, 4, 4), (1.0,)) if crop is MR else Lesion("posterior", replacement="background")
    with pytest.raises(ValueError, match="a: the lesion lies outside the box that this model sees of the image"):
        edited_rows(rows, lesion, data, {})
    [(_, after, region)] = edited_rows(rows, lesion, tiny_data(), {})
    assert region.array[0][BOX].any() or crop is OF_MASK
    [(_, after, _)] = edited_rows(rows, Lesion("posterior", (9, 4, 4), (1.0,)), data, {})
    assert after.array[0, 9, 4, 4] == 5


def test_the_patients_image_sets_the_box_of_anonymized_volumes():
    known = CopyCheck.of([np.random.default_rng(1).uniform(0, 1, (1, 7, 6, 9)).astype(np.float32)], (4, 4, 4), block=2)
    known = dataclasses.replace(known, threshold=0.999)
    pipe = tiny_pipeline(crop=MR)
    volume, record = anonymized(pipe, mask_image(), mr_image(), known, num_inference_steps=1)
    assert record["box"] == RECORD and (np.asarray(volume.dataobj)[10:] == 100).all()
    two = tiny_pipeline(
        channels=["pet", "MR"],
        intensity=[{"kind": "window", "low": 0.0, "high": 300.0}] * 2,
        crop=MR,
    )
    known = dataclasses.replace(known, fingerprints=known.fingerprints.repeat(1, 2, 1, 1, 1))
    images = {"pet": mr_image(1), "MR": mr_image()}
    assert anonymized(two, mask_image(), images, known, num_inference_steps=1)[1]["box"] == RECORD


def test_box_images_of_a_call():
    pipe = tiny_pipeline(crop=MR)
    moved = nib.Nifti1Image(np.roll(np.asarray(mr_image().dataobj), 1, 0), AFFINE)
    for given, starts in ((mr_image(), [3, 3]), ([mr_image(), moved], [3, 4])):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* lie outside the box")
            made = pipe([mask_image(), mask_image()], box_image=given, num_inference_steps=1)
        assert [one["box"]["start"][0] for one in made.provenance] == starts
    with pytest.raises(ValueError, match="box_image: 1 images for 2 masks"):
        pipe([mask_image(), mask_image()], box_image=[mr_image()])
    with pytest.raises(ValueError, match="box_image sets the box on a mask's grid: give a mask"):
        tiny_pipeline(crop=MR, num_labels=0)(shape=SHAPE, box_image=mr_image())


CT = {"kind": "window", "low": -1000.0, "high": 1000.0}
PET = {"kind": "percentile", "low": 1.0, "high": 9.0, "percentiles": [0.0, 100.0]}
TWO = {
    "images": {"ct": 4, "pet": 4},
    "condition_dropout": {"ct": 0.5, "pet": 0.5, "mask": 0.1},
    "channels": ["pet", "ct"],
    "intensity": [PET, CT],
}


def small_image(at):
    """6 x 6 x 6 voxels of a grid of 40 x 40 x 40: 0.3 %."""
    affine = np.eye(4)
    affine[:3, 3] = at
    return nib.Nifti1Image(np.random.default_rng(0).uniform(100, 200, (6, 6, 6)).astype(np.float32), affine)


def test_the_share_of_an_image_is_that_of_the_box():
    """As in training, where a case is cut before its volumes are compared."""
    array = np.zeros((40, 40, 40), np.int16)
    array[12:16, 14:18, 16:20] = 2
    mask = nib.Nifti1Image(array, np.eye(4))
    pipe = tiny_pipeline(**TWO, crop={"above": 50.0, "channel": "ct", "margin": 1.0}, resample_to="pet")
    with pytest.warns(UserWarning, match="is resampled onto it"):
        made = pipe(mask, image={"ct": small_image((11, 13, 15))}, num_inference_steps=1, generator=seeded(1))
    assert made.provenance[0]["box"]["start"] == [10, 12, 14] and made.provenance[0]["box"]["shape"] == [8, 8, 8]
    assert made.provenance[0]["resampled"] == {"ct": pytest.approx((6 / 8) ** 3)}
    [volume] = pipe.prepare([VolumeRequest(mask, box_image=small_image((11, 13, 15)))], ONE)
    assert volume.record.box == made.provenance[0]["box"]
    body = np.full((40, 40, 40), -1000, np.float32)
    body[10:30, 10:30, 10:30] = 60
    of_pet = tiny_pipeline(**TWO, crop={"above": 50.0, "channel": "ct", "margin": 0.0}, resample_to="ct")
    images = {"ct": nib.Nifti1Image(body, np.eye(4)), "pet": small_image((11, 13, 15))}
    request = VolumeRequest(mask, images={"pet": images["pet"]}, box_image=images["ct"])
    with (
        pytest.warns(UserWarning, match="is resampled onto it"),
        pytest.raises(ValueError, match="the image 'pet', with the other inputs: shows only 2.7% of the box"),
    ):
        of_pet.prepare([request], ONE)
    with pytest.raises(ValueError, match="'ct': shows nothing of the volume's grid"):
        pipe.prepare([VolumeRequest(mask, box_image=small_image((100, 100, 100)))], ONE)


def test_a_grid_without_a_box_is_warned_of():
    pipe = tiny_pipeline(crop=MR)
    for mask in (mask_image(), mask_image(corner=5)):
        [said] = messages(lambda mask=mask: pipe.prepare([VolumeRequest(mask)], ONE))
        assert "found in an image of 'MR', and there is none: the whole grid is generated" in said
        assert "--config FILE --split test" in said
    [said] = messages(
        lambda: tiny_pipeline(**TWO, crop=MR | {"channel": "ct"})(image={"pet": mr_image()}, num_inference_steps=1)
    )
    assert "found in an image of 'ct', and there is none" in said
    editor = editor_of(tiny_pipeline(crop=OF_MASK, condition_dropout={"mask": 0.5}))
    [said] = messages(lambda: editor(image=mr_image(), strength=0.5, num_inference_steps=2))
    assert "found in the labels of a mask, and there is no mask" in said
    assert messages(lambda: tiny_pipeline().prepare([VolumeRequest(mask_image())], ONE)) == []


def test_a_table_names_box_images(tmp_path):
    nib.save(mask_image(), tmp_path / "mask.nii.gz")
    nib.save(mr_image(), tmp_path / "mr.nii.gz")
    (tmp_path / "t.csv").write_text("mask,box_image,name\nmask.nii.gz,mr.nii.gz,a\nmask.nii.gz,,b\n")
    pipe, out = tiny_pipeline(crop=MR), tmp_path / "out"
    first, second = read_requests(tmp_path / "t.csv", pipe, out)
    assert pipe.prepare([first], ONE)[0].record.box == RECORD and second.box_image is None
    with pytest.raises(ValueError, match="lies in --output"):
        read_requests(tmp_path / "t.csv", pipe, tmp_path)
    (tmp_path / "t.csv").write_text("box_image,name\nmr.nii.gz,a\n")
    with pytest.raises(ValueError, match="has a box_image without a mask, on whose grid it lies"):
        read_requests(tmp_path / "t.csv", pipe, out)
    told = []
    (tmp_path / "t.csv").write_text("mask,box_image\nmask.nii.gz,mr.nii.gz\n")
    [request] = read_requests(tmp_path / "t.csv", tiny_pipeline(crop=OF_MASK), out, told.append)
    assert request.box_image is None and "not read: box_image" in told[0]


def test_the_record_names_the_box_image(tmp_path):
    """A volume whose image changed is not finished, though the box is the same."""
    pipe, path = tiny_pipeline(crop=MR), tmp_path / "mr.nii.gz"
    nib.save(mr_image(), path)
    request = VolumeRequest(mask_image(), box_image=TimePoint(path, 0))
    [before] = pipe.prepare([request], ONE)
    assert before.record.box_image["file"] == "mr.nii.gz" and len(before.record.box_image["sha256"]) == 64
    entries = json.loads(json.dumps(before.record.to_json()))
    assert type(before.record).from_json(entries).to_json() == entries
    with pytest.raises(ValueError, match="its box_image does not name its file"):
        type(before.record).from_json(entries | {"box_image": {"file": 3}})
    nib.save(mr_image(1), path)
    [after] = pipe.prepare([request], ONE)
    assert before.record.differences(after.record) == ["box_image"]
    [bare] = tiny_pipeline().prepare([request], ONE)  # reads no such image
    assert "box_image" not in bare.record.to_json()


def test_a_volume_of_a_4d_file_in_the_output_is_refused(tmp_path):
    request = VolumeRequest(mask_image(), box_image=TimePoint(tmp_path / "out/mr.nii.gz", 1))
    with pytest.raises(ValueError, match="lies in --output"):
        refuse_inputs_in(tmp_path / "out", [request])
    refuse_inputs_in(tmp_path / "elsewhere", [request])


@pytest.mark.parametrize("affine", [np.eye(4), oblique((1.0, 1.0, 1.0))], ids=["straight", "oblique"])
def test_samplers_do_not_cut_again(affine):
    """Their masks are those of cases that were cut, with a margin, and resampled."""
    array = np.zeros((1, *SHAPE), np.int16)
    array[0][BODY] = np.maximum(labels_of(SHAPE)[BODY], 2)
    inputs = SamplingInputs([Volume(array, affine)], [{}], [{}], ["a"], ["a"])
    for crop in (OF_MASK, MR):
        pipe = tiny_pipeline(crop=crop)
        found = []
        said = messages(lambda pipe=pipe, found=found: found.extend(sample(pipe, inputs, Combination(OWN, 1, 1.0))[0]))
        [expected], _ = sample(tiny_pipeline(), inputs, Combination(OWN, 1, 1.0))
        np.testing.assert_array_equal(found[0], expected)
        assert not [one for one in said if "data.crop" in one]
        assert pipe.volume_processor.crop is not None
