"""Arguments are made plain, or refused by name, before the first step."""

import json
import os
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from tiny import editor_of, mask_image, seeded, tiny_pipeline

from pipelines import (
    GenerationRecord,
    SamplingConfig,
    VolumeRequest,
    describe_mask,
    equal_batches,
    read_sidecar,
    volume_files,
    write_synthetic,
)
from pipelines.inputs.arguments import (
    flag,
    plain,
    real_number,
    translation,
    whole_number,
)
from pipelines.storage.to_dicom import export

MASK = mask_image((7, 8, 6))


@pytest.fixture(scope="module")
def pipe():
    scale = {"kind": "percentile", "low": 100.0, "high": 300.0, "percentiles": [5.0, 95.0]}
    return tiny_pipeline(condition_dropout={"mask": 0.1}, intensity=[scale])


@pytest.fixture(scope="module")
def free():
    return tiny_pipeline(num_labels=0, labels={})


@pytest.mark.parametrize(
    "three", [3, 3.0, np.int64(3), np.uint8(3), np.float32(3), np.array(3), torch.tensor(3), Fraction(3)]
)
def test_whole_numbers(three):
    assert whole_number("n", three) == 3 and type(whole_number("n", three)) is int
    assert type(real_number("n", three)) is float


@pytest.mark.parametrize(
    "wrong", [None, "3", 2.5, True, np.bool_(1), [3], np.array([3]), float("nan"), float("inf"), 0, 1j]
)
def test_what_is_no_whole_number(wrong):
    with pytest.raises(ValueError, match="^steps is a whole number, 1 or more; got"):
        whole_number("steps", wrong)


def test_flags_and_translations():
    assert flag("noise", np.bool_(True)) is True
    for wrong in ("no", 1, None, [True]):
        with pytest.raises(ValueError, match="^noise is True or False; got"):
            flag("noise", wrong)
    read = translation({np.int64(2): np.int64(5), 3.0: "anterior", "4": np.str_("posterior"), "GTV": 2})
    assert read == {2: 5, 3: "anterior", 4: "posterior", "GTV": 2} and json.dumps(list(read.values()))
    for wrong in ([(2, 5)], "2=5", 3, {2: None}, {"": 5}, {2.5: 5}, {2: 5.5}):
        with pytest.raises(ValueError, match="label_map"):
            translation(wrong)


def test_plain_values_are_what_json_has():
    record = {
        "a": np.float32(0.5),
        3: (np.int8(1), Path("x")),
        "t": torch.tensor([[1, 2]]),
        "n": None,
        "b": np.bool_(0),
    }
    record["s"] = np.str_("y")
    expected = {"a": 0.5, "3": [1, "x"], "t": [[1, 2]], "n": None, "b": False, "s": "y"}
    assert plain(record, "r") == expected == json.loads(json.dumps(plain(record, "r")))
    for wrong in (np.nan, float("inf"), object(), b"x", {1, 2}, 1j):
        with pytest.raises(ValueError, match="^r, key: .* cannot be written to a sidecar"):
            plain({"key": wrong}, "r")


def generate(pipe, **asked):
    asked = {"mask": MASK, "num_inference_steps": 2, "generator": seeded(0), "output_type": "pt"} | asked
    return pipe(**asked)


SAME = {
    "num_inference_steps": [np.int64(2), 2.0, np.array(2), torch.tensor(2)],
    "sigmas": [
        [1.0, 0.5],
        (1, 0.5),
        np.array([1.0, 0.5]),
        torch.tensor([1.0, 0.5]),
        np.float32([1, 0.5]),
        iter([1, 0.5]),
    ],
    "guidance_scale": [1, np.float32(1), np.array(1.0)],
    "batch_size": [np.int64(8), 3.0],
    "num_volumes_per_mask": [np.int8(1), 1.0],
    "label_map": [{}, None, {np.int64(2): np.int64(2)}, {5: "posterior"}],
    "residual_noise": [np.bool_(True), False],
    "latents": [None],
}


@pytest.mark.parametrize("name", SAME)
def test_arguments_of_any_type_mean_the_same(pipe, name, tmp_path):
    expected = generate(pipe).volumes[0]
    for i, value in enumerate(SAME[name]):
        out = generate(pipe, **{name: value})
        assert torch.equal(out.volumes[0], expected), value
        value = [1, 0.5] if hasattr(value, "__next__") else value
        [path] = generate(pipe, **{name: value, "output_type": "nifti", "paths": tmp_path / f"{i}.nii"}).volumes
        assert read_sidecar(path) == out.provenance[0]


def test_channels_to_keep_are_any_sequence(pipe):
    asked = {"image": MASK, "strength": 0.5}
    expected = generate(editor_of(pipe), **asked, keep_channels=[]).volumes[0]
    for none in ((), np.array([], dtype=str)):
        assert torch.equal(generate(editor_of(pipe), **asked, keep_channels=none).volumes[0], expected)


def test_shapes_and_latents_of_any_type(free, pipe):
    expected = generate(free, mask=None, shape=(7, 8, 6))
    for shape in ([7, 8, 6], (7.0, 8, 6), np.array([7, 8, 6]), torch.Size([7, 8, 6]), torch.tensor([7, 8, 6])):
        out = generate(free, mask=None, shape=shape)
        assert torch.equal(out.volumes[0], expected.volumes[0]) and out.provenance[0]["shape"] == [7, 8, 6]
    noise = torch.randn(1, 4, 2, 2, 2, generator=seeded(3)[0])
    expected = generate(pipe, latents=noise).volumes[0]
    array = noise.numpy()
    others = (
        array.astype(np.float64),
        array.astype(">f4"),
        array.astype(np.longdouble),
        np.flip(np.flip(array, 2).copy(), 2),
    )
    for latents in (array, [noise[0]], [noise[0].numpy()], noise.double(), *others):
        assert torch.equal(generate(pipe, latents=latents).volumes[0], expected)


WRONG = {
    "num_inference_steps": ["3", 2.5, True, [3], 0, float("nan"), 10**9, 10**400, torch.tensor(3, device="meta")],
    "guidance_scale": [10**400, torch.tensor(2.0, device="meta"), "2", {"mask": float("nan")}],
    "guidance_interval": [(0, 10**400), torch.tensor([0.0, 1.0], device="meta"), "01", 0.5, [0.5]],
    "autoguidance_scale": [10**400, torch.tensor(2.0, device="meta"), "2", {"mask": 2.0}, 2.0],
    "sigmas": [
        [0.3, 0.1],
        [10**400],
        "1",
        0.5,
        [],
        [1.0, "x"],
        [1.0, None],
        {1.0: 2},
        [float("nan")],
        np.array(1.0),
        [[1.0, 0.5]],
    ],
    "batch_size": [None, "8", 0, 1.5, True],
    "num_volumes_per_mask": [None, "1", 0, 1.5, False],
    "label_map": [[(2, 5)], "2=5", {2: None}, {2: 1.5}, {2: 5, "2": 0}, {"": 5}],
    "residual_noise": [None, "no", 1],
    "return_dict": [None, "no", 0],
    "output_type": [None, ["pt"], 3, "pil", np.array(["pt", "np"])],
    "strength": ["0.5", 10**400, True, [0.5], float("nan"), 0, 1.5],
    "blend_margin": [None, 10**400, "4", float("inf"), -1],
    "keep_channels": [None, "MR", 3, [3]],
    "generator": ["0", 0, [None], [0]],
    "latents": [
        3,
        "x",
        [3.0],
        np.zeros((1, 4, 2, 2)),
        [None],
        np.full((1, 4, 2, 2, 2), np.nan),
        torch.zeros(1, 4, 2, 2, 2) > 0,
        torch.zeros(1, 4, 2, 2, 2, device="meta"),
        [torch.zeros(4, 2, 2, 2).to_sparse()],
        [np.ma.masked_less(np.ones((4, 2, 2, 2)), 0)],
        np.full((1, 4, 2, 2, 2), 1e300),
    ],
    "paths": [3, [3], b"a.nii", "", [None], {"a": "b"}, "a.txt", "a\0.nii"],
    "callback_on_step_end": [3, "f"],
}


EDITING = ("strength", "blend_margin", "keep_channels")


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_before_the_first_step(pipe, name, monkeypatch):
    """Each error names the argument."""
    monkeypatch.setattr(pipe.unet, "forward", lambda *a, **k: pytest.fail("a step was made"))
    for value in WRONG[name]:
        asked = {"image": MASK, "strength": 0.5} if name in EDITING else {}
        asked |= {"output_type": "nifti"} if name == "paths" else {}
        with pytest.raises(
            ValueError, match="name it .nii.gz" if isinstance(value, str) and value == "a.txt" else name
        ):
            generate(editor_of(pipe) if name in EDITING else pipe, **asked | {name: value})


@pytest.mark.parametrize("shape", [8, (8, 8), (7.5, 8, 6), "888", (8, 8, "8"), (8, 8, 0), {8, 7, 6}, True])
def test_what_is_no_shape(free, shape):
    with pytest.raises(ValueError, match="shape"):
        generate(free, mask=None, shape=shape)
    with pytest.raises(ValueError, match="shape"):
        VolumeRequest(shape=shape)


def test_a_record_is_plain(pipe):
    request = VolumeRequest(MASK, label_map={np.int64(3): np.int64(5)})
    sampling = SamplingConfig(np.int64(3), np.array([1.0, 0.5]))  # pyright: ignore[reportArgumentType]
    record = replace(pipe.record(request, sampling, np.int64(7)), numbers={"age": np.float32(0.5)})
    content = record.to_json()
    assert json.loads(json.dumps(content)) == content and GenerationRecord.from_json(content).to_json() == content
    assert (content["seed"], content["num_inference_steps"], content["label_map"]) == (7, 2, {"3": 5})
    assert content["mask"] == describe_mask(MASK) and content["numbers"] == {"age": 0.5}
    with pytest.raises(ValueError, match="the record, numbers, age: nan cannot be written"):
        replace(record, numbers={"age": float("nan")}).to_json()


def test_all_record_entries_but_three_tell_volumes_apart(pipe):
    """A finished volume is the planned one only if all settings are equal, whatever entries there are."""
    record = pipe.record(VolumeRequest(MASK), SamplingConfig(3), 7)
    other = {one.name: "other" for one in fields(record)} | {"checks": {"copy_check": {}}, "rejected": []}
    for name, value in other.items():
        changed = replace(record, **{name: value})
        alike = name in ("software", "settings_from", "network_calls")
        assert changed.same_settings(record) == alike
        entry = "copy_check" if name == "checks" else name
        assert changed.differences(record) == ([] if alike else [entry])


def test_records_that_are_not_json_are_refused_before_writing(pipe, tmp_path):
    """Before the volume is written."""
    out = generate(pipe, output_type="nifti")
    write_synthetic(out.volumes[0], out.provenance[0] | {"score": np.float32(0.5)}, tmp_path / "a.nii")
    assert read_sidecar(tmp_path / "a.nii")["score"] == 0.5
    with pytest.raises(ValueError, match="the record, score: .* cannot be written to a sidecar"):
        write_synthetic(out.volumes[0], out.provenance[0] | {"score": float("nan")}, tmp_path / "b.nii")
    with pytest.raises(ValueError, match="the record is NoneType"):
        write_synthetic(out.volumes[0], None, tmp_path / "b.nii")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.nii"]
    assert list(equal_batches([(4, 4, 4)] * 3, np.int64(2))) == [[0, 1], [2]]
    with pytest.raises(ValueError, match="batch_size"):
        list(equal_batches([(4, 4, 4)], 0))


def test_unwritable_places_are_refused_before_the_first_step(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pipe.unet, "forward", lambda *a, **k: pytest.fail("a step was made"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "other.json").write_text('{"mine": 1}')
    (tmp_path / "taken.json").mkdir()
    for path, words in {
        "file/a.nii": "is a file, not a folder",
        "folder.nii": "is a folder",
        "taken.nii": "is a folder",
        "other.nii": "is not the sidecar of a generated volume",
    }.items():
        with pytest.raises(ValueError, match=words):
            generate(pipe, output_type="nifti", paths=tmp_path / path)
    for path, words in {
        tmp_path / f"{'a' * 300}.nii": "cannot be written",
        tmp_path / ".nii": "name it .nii.gz or .nii",
        "/proc/nothing/a.nii": "cannot be written",  # whatever its permissions say
    }.items():
        with pytest.raises(ValueError, match=words):
            generate(pipe, output_type="nifti", paths=path)
    nib.save(MASK, tmp_path / "m.nii")
    with pytest.raises(ValueError, match="m.nii is a mask or an image of this call"):
        generate(pipe, mask=nib.load(tmp_path / "m.nii"), output_type="nifti", paths=tmp_path / "m.nii")
    assert not list(tmp_path.glob(".writing-*"))


class BytesPath(os.PathLike):
    def __fspath__(self):
        return b"m.nii"


def test_unreadable_masks_and_images_are_refused_by_name(pipe, monkeypatch):
    monkeypatch.setattr(pipe.unet, "forward", lambda *a, **k: pytest.fail("a step was made"))
    labels = torch.zeros(7, 8, 6, dtype=torch.int16)
    wrong = {
        "is on the device meta": labels.to("meta"),
        "is sparse": labels.to_sparse(),
        "holds complex64": labels.to(torch.complex64),
        "holds <U1; give real numbers": labels.numpy().astype("U1"),
        "holds objects that are not numbers": np.full((7, 8, 6), "x", object),
        "is bytes; give os.fsdecode": BytesPath(),
        "File name too long": "a" * 5000 + ".nii",
    }
    for words, given in wrong.items():
        with pytest.raises(ValueError, match=words):
            generate(pipe, mask=given)
        for asked in ({"image": given, "strength": 0.5}, {"image": MASK, "region": given}):
            with pytest.raises(ValueError, match=words):
                generate(editor_of(pipe), **asked)
    with pytest.raises(ValueError, match="image holds 1, MR"):
        generate(editor_of(pipe), image={1: MASK, "MR": MASK}, strength=0.5)
    with pytest.raises(ValueError, match="image names 1, MR"):
        generate(pipe, image={1: MASK, "MR": MASK})


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    nib.save(MASK, tmp_path / "home" / "m.nii.gz")
    scale = {"kind": "percentile", "low": 0.0, "high": 1.0, "percentiles": [0.0, 100.0]}
    pipe = tiny_pipeline(intensity=[scale])
    image = nib.Nifti1Image(np.random.default_rng(0).random((7, 8, 6), np.float32), MASK.affine)
    nib.save(image, tmp_path / "home" / "i.nii.gz")
    home = {"mask": "~/m.nii.gz", "image": {"MR": Path("~/i.nii.gz")}, "region": "~/m.nii.gz"}
    memory = {"mask": MASK, "image": {"MR": image}, "region": MASK}
    out = generate(editor_of(pipe), **home, output_type="nifti", paths=["~/out/a.nii.gz"])
    made = tmp_path / "home" / "out" / "a.nii.gz"
    assert out.volumes == [made] and read_sidecar("~/out/a.nii.gz") == out.provenance[0]
    expected = generate(editor_of(pipe), **memory, output_type="nifti").volumes[0]
    np.testing.assert_array_equal(np.asarray(nib.load(made).dataobj), np.asarray(expected.dataobj))
    write_synthetic(expected, out.provenance[0], "~/b.nii")
    assert volume_files("~/b.nii", {}) == [tmp_path / "home" / "b.nii"] and (tmp_path / "home" / "b.json").is_file()
    assert export("~/out/a.nii.gz", "~/dicom", "MR")[0].parent == tmp_path / "home" / "dicom"
    with pytest.raises(ValueError, match="is a mask or an image of this call"):
        generate(pipe, mask="~/m.nii.gz", output_type="nifti", paths=tmp_path / "home" / "m.nii.gz")
    assert {one.name for one in tmp_path.iterdir()} == {"home"} and not os.path.exists("~")
