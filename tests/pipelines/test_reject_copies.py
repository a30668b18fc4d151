"""generate.py --reject_copies: a training volume that comes out of a model is caught, made again, and put on record."""

import csv
import dataclasses
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from blobs import SHAPE, blobs
from compared import assert_same
from safetensors.torch import save_file
from tiny import mask_image, tiny_data, tiny_pipeline

import generate
from benchmarks.phantom_set import write_section
from evaluation.copies import fingerprints as copies
from evaluation.copies.fingerprints import CopyCheck, copy_check
from evaluation.data.model_units import in_model_units
from pipelines import Check, GenerationRecord, MedVolumePipeline, Rejection
from pipelines.planning import volume_seed
from pipelines.rejection import Attempt
from volumes import Volume, resample, to_nibabel, write_volume

STEMS = ("a", "b")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A pipeline folder with masks in another orientation than RAS+."""
    folder = tmp_path_factory.mktemp("inputs") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    (folder / "masks").mkdir()
    for seed, stem in enumerate(STEMS):
        nib.save(mask_image(SHAPE, np.diag([-1.0, 1, 1, 1]), seed), folder / "masks" / f"{stem}.nii.gz")
    return folder


def arguments(inputs, output, *more):
    settings = ["--pipeline", str(inputs), "--masks", str(inputs / "masks"), "--steps", "1", "--seed", "3"]
    return [*settings, "--output", str(output), *more]


@pytest.fixture(scope="module")
def plain(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("plain")
    generate.main(arguments(inputs, output))
    return output


@pytest.fixture(scope="module")
def fingerprints(plain, tmp_path_factory):
    """Of a training set whose third volume is what the model makes of mask a with its first seed, moved by a voxel
    along each axis and mirrored along X."""
    made = in_model_units(plain / "a_000.nii.gz", tiny_data())
    copied = np.roll(made, (1, -1, 1), (1, 2, 3))[:, ::-1]
    path = tmp_path_factory.mktemp("prints") / "fingerprints.safetensors"
    check = CopyCheck.of([*blobs(2, 0), copied, *blobs(2, 1)], (8, 8, 8), block=2, flips=(0,), shift=1)
    dataclasses.replace(check, threshold=0.99).save(path)
    return path


def record_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_a_copy_is_made_again_and_recorded(inputs, plain, fingerprints, tmp_path):
    for folder, *more in ((tmp_path / "one",), (tmp_path / "two", "--batch_size", "1")):
        generate.main(arguments(inputs, folder, "--reject_copies", str(fingerprints), *more))
    assert_same(tmp_path / "one", tmp_path / "two")
    first, second = (volume_seed(3, "a", 0, attempt) for attempt in range(2))
    record = record_of(tmp_path / "one", "a_000")
    check, rejected = record["copy_check"], record["rejected"]
    assert record["seed"] == second != first == record_of(plain, "a_000")["seed"]
    assert [(one["seed"], one["check"]) for one in rejected] == [(first, "copy_check")]
    assert check["threshold"] == 0.99 < rejected[0]["similarity"] and check["similarity"] <= 0.99
    # what the sidecar says makes the volume again
    pipe = MedVolumePipeline.from_pretrained(inputs)
    again = pipe(
        inputs / "masks" / "a.nii.gz", num_inference_steps=1, generator=[torch.Generator().manual_seed(second)]
    )
    written = nib.load(tmp_path / "one" / "a_000.nii.gz")
    np.testing.assert_allclose(again.volumes[0].get_fdata(), written.get_fdata(), atol=0.01)
    assert str(second) in str(written.header["descrip"])
    # the other volume is as it was
    other = record_of(tmp_path / "one", "b_000")
    assert other.pop("copy_check") and other.pop("rejected") == [] and other == record_of(plain, "b_000")
    np.testing.assert_allclose(
        nib.load(tmp_path / "one" / "b_000.nii.gz").get_fdata(), nib.load(plain / "b_000.nii.gz").get_fdata(), atol=0.01
    )
    with open(tmp_path / "one" / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rejections"] for row in rows] == ["1", "0"]
    assert rows[0]["rejected_seeds"] == str(first) and float(rows[0]["copy_threshold"]) == 0.99
    assert (
        rows[0]["rejected_because"] == f"copy_check {rejected[0]['similarity']}" and rows[1]["rejected_because"] == ""
    )
    assert float(rows[0]["copy_similarity"]) == check["similarity"]


def test_it_resumes_and_never_mixes_checked_with_unchecked(inputs, plain, fingerprints, tmp_path):
    checked = arguments(inputs, tmp_path, "--reject_copies", str(fingerprints))
    generate.main(checked)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.nii.gz")}
    (tmp_path / "b_000.nii.gz").unlink()
    generate.main(checked)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.nii.gz")}
    assert after["a_000.nii.gz"] == before["a_000.nii.gz"] and after.keys() == before.keys()
    with pytest.raises(ValueError, match="was generated with another copy_check"):
        generate.main(arguments(inputs, tmp_path))
    with pytest.raises(ValueError, match="was generated with another copy_check"):
        generate.main(arguments(inputs, plain, "--reject_copies", str(fingerprints)))
    assert all("copy_check" not in record_of(plain, f"{stem}_000") for stem in STEMS)
    assert "rejections" not in (plain / "manifest.csv").read_text()


def test_a_volume_that_is_always_a_copy_is_dropped_alone(inputs, fingerprints, tmp_path):
    """The others are kept."""
    more = ["--reject_copies", str(fingerprints), "--max_attempts", "1"]
    with pytest.raises(
        ValueError, match=r"(?s)not written.*a_000.nii.gz: each of 1 volumes was refused.*is a copy.*threshold 0.990"
    ):
        generate.main(arguments(inputs, tmp_path, *more))
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [
        "b_000.json",
        "b_000.nii.gz",
        "manifest.csv",
        "preview.png",
    ]


def test_rejections_of_one_volume_change_no_other():
    """Volumes are numbers here: number n of attempt k is 10 n + k; a copy is what the judge is told."""
    copied = {0, 20, 21, 22, 10}

    def sample(numbers, seeds):
        return [Attempt(seed, GenerationRecord("medvolume", "m", seed, 1)) for seed in seeds]

    def judge(image, in_box):
        return image in copied, {"similarity": image / 100}

    def broken(image, in_box):
        return image == 30, {"fault": "no liver"} if image == 30 else {}

    checks = [
        Check("copy_check", judge, lambda found: f"is {found['similarity']} alike", {"threshold": 0.5}),
        Check("map_check", broken, lambda found: f"has {found['fault']}"),
    ]
    rejection = Rejection(checks, max_attempts=3)
    outcomes = {one.number: one for one in rejection.sample_until_accepted(4, sample, lambda n, k: 10 * n + k)}
    images = {number: one.accepted and one.accepted.image for number, one in outcomes.items()}
    assert images == {0: 1, 1: 11, 2: None, 3: 31}
    assert outcomes[1].rejected == [{"seed": 10, "check": "copy_check", "similarity": 0.1}]
    assert outcomes[3].rejected == [{"seed": 30, "check": "map_check", "fault": "no liver"}]
    assert [refusal["seed"] for refusal in outcomes[2].rejected] == [20, 21, 22]
    assert "each of 3 volumes was refused, the last because it is 0.22 alike" in outcomes[2].reason
    record = outcomes[3].accepted.record
    assert record.checks == {"copy_check": {"threshold": 0.5, "similarity": 0.31}, "map_check": {}}
    assert record.seed == 31 and record.rejected == outcomes[3].rejected
    # a finished volume is the planned one whatever its checks found; the planned one has the seed of the first attempt
    unchecked = {number: GenerationRecord("medvolume", "m", 10 * number, 1) for number in range(4)}
    for number in (0, 1, 3):
        finished = outcomes[number].accepted.record
        assert finished.same_settings(rejection.plan(unchecked[number]))
        assert finished.differences(rejection.plan(unchecked[2])) == ["seed"]
        assert finished.differences(unchecked[number]) == ["copy_check", "map_check", "rejected"]
    assert unchecked[0].differences(rejection.plan(unchecked[0])) == ["copy_check", "map_check", "rejected"]


def test_a_copy_of_a_volume_smaller_than_the_crop_is_found():
    """Its edges are repeated in the fingerprint as they are when a volume is compared."""
    volumes = [*blobs(2, 0), blobs(1, 1, (12, 16, 16))[0], blobs(1, 2, (16, 13, 10))[0]]
    check = CopyCheck.of(volumes, SHAPE, block=2, shift=1)
    for number, volume in enumerate(volumes):
        found = check.check(volume)
        assert found.index == number and found.similarity > 0.95


def test_what_does_not_fit_is_named(inputs, fingerprints, tmp_path):
    two = tmp_path / "two.safetensors"
    CopyCheck.of(np.concatenate([blobs(3, 0), blobs(3, 1)], 1), (8, 8, 8), block=2).save(two)
    with pytest.raises(
        ValueError, match=r"two.safetensors: holds fingerprints of 2 channels, the model generates 1 \(MR\)"
    ):
        generate.main(arguments(inputs, tmp_path / "out", "--reject_copies", str(two)))
    save_file({"weights": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name, why in (("other", "no fingerprints"), ("text", "is damaged"), ("nowhere", "no such file")):
        with pytest.raises(ValueError, match=f"{name}.safetensors: .*{why}"):
            copy_check(tmp_path / f"{name}.safetensors", tiny_data())
    assert not (tmp_path / "out").exists()


def test_model_units_undo_scale_orientation_and_spacing():
    image = blobs(1, 0, (8, 10, 12))[0]
    stored = nib.Nifti1Image(100 + 200 * image[0, ::-1], np.diag([-1.0, 1, 1, 1]))
    np.testing.assert_allclose(in_model_units(stored, tiny_data()), image, atol=1e-6)
    fine = to_nibabel(resample(Volume(100 + 200 * image, np.eye(4)), (0.5, 0.5, 0.5)))
    np.testing.assert_allclose(
        in_model_units(fine, tiny_data())[:, 2:6, 2:6, 2:6].mean(), image[:, 2:6, 2:6, 2:6].mean(), atol=0.03
    )
    assert in_model_units(fine, tiny_data()).shape == image.shape
    scales = [{"kind": "window", "low": 0, "high": 1}] * 2
    maps = tiny_data(image_labels={"0": "none", "3": "l", "7": "r"}, channels=["l", "r"], labels={}, intensity=scales)
    label_map = np.array([0, 3, 7, 7], np.uint8).reshape(4, 1, 1)
    found = in_model_units(nib.Nifti1Image(label_map, np.eye(4)), maps)
    assert found[:, :, 0, 0].tolist() == [[0, 1, 0, 0], [0, 0, 1, 1]]
    with pytest.raises(ValueError, match="a volume of 1 channels"):
        in_model_units(stored, tiny_data(channels=["a", "b"]))


@pytest.fixture
def data(tmp_path):
    """6 training volumes, and 10 unseen ones of 5 subjects, as files."""
    rows = []
    for number, array in enumerate(blobs(16, 4, (16, 18, 16))):
        write_volume(Volume(1000 * array, np.eye(4)), tmp_path / "images" / f"v{number:02d}.nii.gz")
        subject = f"t{number}" if number < 6 else f"u{number // 2}"
        rows.append((f"v{number:02d}", subject, "train" if number < 6 else "validation" if number < 10 else "test"))
    write_section(tmp_path, rows, masks=None)
    return tmp_path


def test_the_command_makes_a_check_from_training_and_unseen(data, capsys):
    """A check of the training split, with its threshold set on unseen volumes."""
    output = data / "out" / "prints.safetensors"
    options = [
        "--config",
        str(data / "config.yaml"),
        "--output",
        str(output),
        "--block",
        "2",
        "--flips",
        "0",
        "--alpha",
        "0.2",
    ]
    copies.main([*options, "--shift", "1"])
    assert "6 fingerprints of 6 subjects" in capsys.readouterr().out
    check = CopyCheck.load(output)
    assert check.crop == (14, 16, 14) and check.fingerprints.shape == (6, 1, 7, 8, 7)
    arrays = blobs(16, 4, (16, 18, 16))
    for number in (0, 5):  # planted: moved by a voxel and mirrored
        found = check.check(np.roll(arrays[number], 1, 3)[:, ::-1])
        assert found.copy and found.index == number and found.similarity > 0.95
    assert check.threshold == pytest.approx(max(check.check(array).similarity for array in arrays[6:]), abs=1e-3)
    with pytest.raises(ValueError, match="too few for two blocks of 8"):
        copies.main([*options, "--block", "8"])
    with pytest.raises(ValueError, match="5 subjects are too few"):
        copies.main([*options, "--alpha", "0.01"])
    with pytest.raises(ValueError, match="no unseen volumes"):
        copies.main([*options, "--data.split", "null", "--data.test_fraction", "0", "--data.validation_fraction", "0"])
