"""Evaluation of a model whose training cut its cases (`data.crop`): real and generated volumes are compared in the same
boxes, though generated ones were written on the whole grid."""

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tiny import tiny_data

from evaluation.copies.anonymize import copy_check_with
from evaluation.copies.fingerprints import CopyCheck, copy_check
from evaluation.data.model_units import in_model_units
from evaluation.data.pairs import Pair, generated_pairs, learning_cases, load_pairs
from evaluation.data.volume_sets import generated_cases, generated_set, load_classes, real_set
from evaluation.doctor.cases import examine
from evaluation.doctor.data_checks import check_geometry
from pipelines import describe_mask
from pipelines.rejection import Attempt, Rejection
from pipelines.storage.provenance import sidecar_path
from pipelines.storage.record import GenerationRecord
from volumes import (
    DataConfig,
    ForegroundCrop,
    IntensityScaling,
    Volume,
    VolumeError,
    load_cases,
    to_nibabel,
    write_volume,
)
from volumes.foreground import box_to_json, image_box

SHAPE = (16, 14, 12)
BODIES = {"a": (slice(4, 12), slice(3, 9), slice(2, 10)), "b": (slice(2, 9), slice(5, 12), slice(3, 9))}
CROP = ForegroundCrop(50, margin=1)
RULES = [CROP, ForegroundCrop("mask", margin=1)]


def scan(name, seed=0):
    """Noise below 10 and a body of 100 to 300."""
    random = np.random.default_rng([seed, ord(name)])
    array = random.uniform(0, 10, (1, *SHAPE)).astype(np.float32)
    array[0][BODIES[name]] = random.uniform(100, 300, array[0][BODIES[name]].shape)
    return Volume(array, np.eye(4))


def box(name):
    return image_box(scan(name), CROP)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two cases, and a volume of each mask: lowest outside its box, of other values inside, and without its record."""
    for name in BODIES:
        write_volume(scan(name), tmp_path / f"images/{name}.nii.gz")
        mask = np.zeros((1, *SHAPE), np.int16)
        mask[0][BODIES[name]] = 1
        write_volume(Volume(mask, np.eye(4)), tmp_path / f"labels/{name}.nii.gz")
        for kind, record in (("boxed", {"box": box_to_json(box(name))}), ("bare", {})):
            array = np.zeros((1, *SHAPE), np.float32)
            part = tuple(slice(s, s + n) for s, n in zip(box(name).start, box(name).target, strict=True))
            array[0][part] = scan(name, 1).array[0][part]
            path = tmp_path / kind / f"{name}_000.nii.gz"
            write_volume(Volume(array, np.eye(4)), path)
            source = describe_mask(tmp_path / f"labels/{name}.nii.gz")
            sidecar_path(path).write_text(
                json.dumps({"synthetic": True, "mask": source, "classes": {"sex": "F"}, **record})
            )
    (tmp_path / "t.csv").write_text("case,sex\na,F\nb,M\n")
    return tmp_path


def config_of(folder, **changes):
    arguments = {
        "root": str(folder),
        "table": "t.csv",
        "images": "images/{case}.nii.gz",
        "masks": "labels/{case}.nii.gz",
        "label_names": {0: "background", 1: "body"},
        "intensity": IntensityScaling("window", 0, 300),
        "validation_fraction": 0,
        "classes": {"sex": ["F", "M"]},
    }
    return DataConfig(**(arguments | changes))


@pytest.mark.parametrize("rule", RULES, ids=["value", "mask"])
def test_sets_hold_the_same_boxes(folder, rule):
    """By the record; without it, by the rule on the volume itself, which a mask's box does not have."""
    config = config_of(folder, crop=rule)
    cases = load_cases(config)
    real, _ = real_set(cases, config, ["train"])
    made, _ = generated_set([folder / "boxed"], cases, config)
    for name, one, other in zip("ab", real.volumes, made.volumes, strict=True):
        part = tuple(slice(s, s + n) for s, n in zip(box(name).start, box(name).target, strict=True))
        np.testing.assert_allclose(one, scan(name).array[:, *part] / 300, atol=1e-6)
        np.testing.assert_allclose(other, scan(name, 1).array[:, *part] / 300, atol=1e-6)
    bare, _ = generated_set([folder / "bare"], cases, config)
    shapes = [volume.shape[1:] for volume in bare.volumes]
    assert shapes == ([SHAPE] * 2 if rule.by_mask else [box(name).target for name in "ab"])
    for given in (cases, generated_cases(folder / "boxed", config)):
        classes = load_classes(given, config, "sex", (4, 4, 4))
        assert (classes.images > 0.3).all()  # the middle of the body, not of the volume
    plain, _ = generated_set([folder / "boxed"], cases, config_of(folder))
    assert [volume.shape[1:] for volume in plain.volumes] == [SHAPE] * 2


@pytest.mark.parametrize("rule", RULES, ids=["value", "mask"])
@pytest.mark.parametrize("kind", ["boxed", "bare"])
def test_pairs_are_cut_alike(folder, rule, kind):
    config = config_of(folder, crop=rule)
    cases = load_cases(config)
    real = load_pairs([Pair(case) for case in learning_cases(cases)], config, (10, 10, 10))
    made = load_pairs(generated_pairs(cases, folder / kind), config, (10, 10, 10))
    assert (real.labels == made.labels).all() and int(real.labels[0].sum()) == 8 * 6 * 8
    for pairs in (real, made):  # the body is where its label is
        assert pairs.images[:, 0][pairs.labels == 1].min() > pairs.images[:, 0][pairs.labels == 0].max()


def test_a_generated_volume_of_another_grid_is_refused(folder):
    config = config_of(folder, crop=CROP)
    path = folder / "boxed/a_000.nii.gz"
    record = json.loads(sidecar_path(path).read_text())
    record["box"]["whole"] = [20, 20, 20]
    sidecar_path(path).write_text(json.dumps(record))
    cases = load_cases(config)
    with pytest.raises(VolumeError, match=r"a_000.nii.gz: the box of its case \(data.crop\) is of 20 x 20 x 20 voxels"):
        load_pairs(generated_pairs(cases, folder / "boxed"), config, (10, 10, 10))
    with pytest.raises(VolumeError, match=r"a_000.nii.gz: its box is of 20 x 20 x 20 voxels"):
        generated_set([folder / "boxed"], cases, config)


def data_of(**crop):
    scale = [{"kind": "window", "low": 0.0, "high": 300.0}]
    return tiny_data(intensity=scale, crop={"above": 50, "channel": "MR", "margin": 1.0, **crop})


def test_a_copy_is_found_wherever_its_box_lies(folder, tmp_path):
    """A training volume that was generated again: in its box of the whole grid, or with noise around."""
    config = config_of(folder, crop=CROP)
    real, _ = real_set(load_cases(config), config, ["train"])
    known = CopyCheck.of(real.volumes, (8, 6, 6), block=2, flips=(), shift=0)
    dataclasses.replace(known, threshold=0.99).save(tmp_path / "prints.safetensors")
    check = copy_check(tmp_path / "prints.safetensors", data_of())
    record = GenerationRecord("software", "model", 0, 1, box=box_to_json(box("a")))
    attempt = Attempt(to_nibabel(scan("a")), record)
    assert attempt.generated.shape == box("a").target
    for image, in_box in ((attempt.generated, True), (attempt.image, False)):
        refused, findings = check.judge(image, in_box)
        assert findings["similarity"] == pytest.approx(1, abs=1e-3) and refused
    assert check.judge(to_nibabel(scan("b", 7)))[1]["similarity"] < 0.9
    patient = copy_check_with(CopyCheck.load(tmp_path / "prints.safetensors"), to_nibabel(scan("b", 7)), data_of())
    assert patient.judge(to_nibabel(scan("b", 7)))[1]["patient_similarity"] == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="this check compares images without their masks"):
        copy_check_with(CopyCheck.load(tmp_path / "prints.safetensors"), None, data_of(above="mask", channel=None))
    assert in_model_units(to_nibabel(scan("a")), data_of()).shape[1:] == SHAPE


def test_a_copy_is_compared_in_its_recorded_box(folder, tmp_path):
    """Though its foreground is smaller: the box of what is left would be another."""
    config = config_of(folder, crop=CROP)
    real, _ = real_set(load_cases(config), config, ["train"])
    known = dataclasses.replace(CopyCheck.of(real.volumes, (8, 6, 6), block=2, flips=(), shift=0), threshold=0.9)
    known.save(tmp_path / "prints.safetensors")
    dark = scan("a")
    dark.array[0][:6] = 5  # two planes of the body
    assert image_box(dark, CROP).target != box("a").target
    attempt = Attempt(to_nibabel(dark), GenerationRecord("software", "model", 0, 1, box=box_to_json(box("a"))))
    patient = dataclasses.replace(known, fingerprints=known.fingerprints[1:])
    for check in (
        copy_check(tmp_path / "prints.safetensors", data_of()),
        copy_check_with(patient, to_nibabel(scan("a")), data_of()),
    ):
        [outcome] = Rejection([check], 1).sample_until_accepted(1, lambda *_: [attempt], lambda *_: 0)
        assert outcome.accepted is None and outcome.rejected[0]["similarity"] > 0.9


@pytest.mark.parametrize("rule", [None, *RULES], ids=["whole", "value", "mask"])
def test_volumes_of_generated_masks_are_3d(folder, rule):
    """They hold the model's labels, though the data are 4-D files of other label values."""
    for name in "ab":
        path = folder / f"images/{name}.nii.gz"
        array = scan(name).array[0]
        nib.save(nib.Nifti1Image(np.stack([array * 0, array], axis=-1), np.eye(4)), path)
        mask = np.zeros((1, *SHAPE), np.int16)
        mask[0][BODIES[name]] = 7
        write_volume(Volume(mask, np.eye(4)), folder / f"labels/{name}.nii.gz")
    mask[mask == 7] = 1
    made = folder / "made"
    write_volume(Volume(mask, np.eye(4)), made / "masks/map_000.nii.gz")
    sidecar_path(made / "masks/map_000.nii.gz").write_text(json.dumps({"synthetic": True}))
    write_volume(scan("b"), made / "map_000_000.nii.gz")
    source = describe_mask(made / "masks/map_000.nii.gz")
    sidecar_path(made / "map_000_000.nii.gz").write_text(json.dumps({"synthetic": True, "mask": source}))
    config = config_of(folder, crop=rule, time_point=1, label_map={7: 1, 1: 0})
    cases = load_cases(config)
    real = load_pairs([Pair(case) for case in learning_cases(cases)], config, (10, 10, 10))
    pairs = load_pairs(generated_pairs(cases, made), config, (10, 10, 10))
    np.testing.assert_array_equal(pairs.images[0], real.images[1])
    np.testing.assert_array_equal(pairs.labels[0], real.labels[1])
    assert pairs.labels.any()


def test_the_doctor_says_what_the_box_saves(folder):
    def findings(**changes):
        config = config_of(folder, **changes)
        return {
            f.level: f for f in check_geometry([examine(case, config) for case in load_cases(config)], config)
            if f.check == "crop"
        }  # fmt: skip

    share = [float(np.prod(box(name).target)) / np.prod(SHAPE) for name in "ab"]
    found = findings(crop=CROP)
    assert list(found) == ["OK"] and f"boxes hold {np.median(share):.0%} of a volume's voxels" in found["OK"].message
    whole = findings(crop=ForegroundCrop(-1))["WARN"]
    assert "almost all is left of" in whole.message and "a.nii.gz (100%)" in whole.message and len(whole.files) == 2
    dot = scan("a").array * 0
    dot[0, 8, 8, 8:10] = 100
    write_volume(Volume(dot + np.arange(12) / 100, np.eye(4)), folder / "images/a.nii.gz")
    little = findings(crop=ForegroundCrop(50, margin=0))["WARN"]
    assert "little is left of" in little.message and little.files == (str(folder / "images/a.nii.gz"),)
    assert findings() == {}


@pytest.mark.parametrize("shape", [SHAPE, (10, 8, 6)], ids=["equal", "smaller"])
def test_the_doctor_cuts_channels_of_other_grids(folder, shape):
    """Where the box lies in the patient: in it, each voxel of the PET is its place along x in mm."""
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = [1, 0, 1]
    places = np.broadcast_to(1 + 2 * np.arange(shape[0], dtype=np.float32)[:, None, None], shape)
    for name in "ab":
        write_volume(Volume(np.ascontiguousarray(places)[None], affine), folder / f"pet/{name}.nii.gz")
    images = {"ct": "images/{case}.nii.gz", "pet": "pet/{case}.nii.gz"}
    config = config_of(folder, images=images, masks=None, label_names={}, resample_to="ct", crop=CROP)
    examined = examine(load_cases(config)[0], config)
    assert examined.box.start[0] == 3 and examined.box.target[0] == 10
    assert examined.highest == pytest.approx((scan("a").array.max(), 11))  # of 3 to 12 mm
    assert examined.above[0] == 0 and examined.box.shape == SHAPE
