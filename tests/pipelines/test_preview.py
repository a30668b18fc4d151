"""preview.png of a run: its finished volumes, also when it resumes, and never at the cost of the run."""

import errno

import nibabel as nib
import numpy as np
import pytest
from tiny import mask_image, tiny_pipeline

import generate
from pipelines import preview
from volumes import contact_sheet as sheet
from volumes import read_volume

SCALES = [
    {"kind": "window", "low": -1000.0, "high": 1000.0, "percentiles": [0.5, 99.5]},
    {"kind": "percentile", "low": 0.0, "high": 20.0, "percentiles": [0.5, 99.5]},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preview")
    tiny_pipeline().save_pretrained(folder / "pipeline")
    (folder / "masks").mkdir()
    for seed, stem in enumerate("abcd"):
        nib.save(mask_image((8, 7, 6), np.diag([-1.0, 1, 1, 1]), seed), folder / f"masks/{stem}.nii.gz")
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The cases of every sheet that is drawn."""
    sheets, original = [], sheet.contact_sheet

    def keep(cases, names=None):
        cases = list(cases)
        sheets.append((cases, names))
        return original(cases, names)

    monkeypatch.setattr(sheet, "contact_sheet", keep)
    return sheets


def run(place, output, *words, pipeline="pipeline", masks="masks"):
    settings = ["--pipeline", str(place / pipeline), "--masks", str(place / masks), "--steps", "1"]
    generate.main([*settings, "--output", str(output), *map(str, words)])


def test_the_first_volumes_with_the_masks_the_model_saw(place, tmp_path, drawn, capsys):
    run(place, tmp_path, "--count", "2", "--label_map", "2=5")
    [(cases, names)] = drawn
    assert [case["title"] for case in cases] == ["a_000", "a_001", "b_000", "b_001", "c_000", "c_001"]
    assert names == {0: "background", 2: "anterior", 5: "posterior"}
    assert (tmp_path / "preview.png").read_bytes().startswith(b"\x89PNG")
    np.testing.assert_array_equal(cases[2]["images"]["generated"][0], read_volume(tmp_path / "b_000.nii.gz").array[0])
    assert set(np.unique(cases[2]["mask"])) == {0, 5}  # as the model saw it
    assert cases[0]["windows"] == {"MR": (100.0, 300.0)}
    assert f"preview: {tmp_path / 'preview.png'}" in capsys.readouterr().out


def test_a_resumed_run_draws_what_is_finished_and_its_own(place, tmp_path, drawn):
    run(place, tmp_path, masks="masks/a.nii.gz")
    (tmp_path / "preview.png").unlink()
    run(place, tmp_path, masks="masks/a.nii.gz")
    assert (tmp_path / "preview.png").is_file()
    run(place, tmp_path, masks="masks/b.nii.gz")  # another command in the same folder
    assert [[case["title"] for case in cases] for cases, _ in drawn] == [["a_000"], ["a_000"], ["b_000"]]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("odd"), MemoryError()])
def test_a_picture_that_cannot_be_drawn_does_not_fail_the_run(place, tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(sheet, "contact_sheet", lambda *_: (_ for _ in ()).throw(error))
    run(place, tmp_path, masks="masks/a.nii.gz")
    assert "preview.png: was not drawn: " in capsys.readouterr().out
    assert not (tmp_path / "preview.png").exists() and (tmp_path / "a_000.nii.gz").is_file()


def test_a_bug_in_the_drawing_is_an_error(place, tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, "contact_sheet", lambda *_: 1 + "a")
    with pytest.raises(TypeError):
        run(place, tmp_path, masks="masks/a.nii.gz")
    assert (tmp_path / "manifest.csv").is_file()


def test_given_channels_stand_beside_generated_ones(tmp_path, drawn):
    tiny_pipeline(channels=["ct", "pet"], intensity=SCALES, images={"ct": 4}).save_pretrained(tmp_path / "pipeline")
    nib.save(mask_image((8, 8, 8)), tmp_path / "m.nii.gz")
    values = np.random.default_rng(0).uniform(-1000, 1000, (8, 8, 8)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "ct.nii.gz")
    (tmp_path / "table.csv").write_text("mask,ct\nm.nii.gz,ct.nii.gz\n")
    words = ["--pipeline", str(tmp_path / "pipeline"), "--conditions", str(tmp_path / "table.csv"), "--steps", "1"]
    generate.main([*words, "--output", str(tmp_path / "out")])
    [([case], _)] = drawn
    assert case["channels"] == ["pet", "ct (given)"] and case["windows"] == {"pet": (0.0, 20.0)}
    np.testing.assert_array_equal(case["images"]["generated"][1], values)


def test_label_maps_and_volumes_without_masks(tmp_path, drawn):
    tiny_pipeline(num_labels=0, labels={}).save_pretrained(tmp_path / "pipeline")
    words = ["--pipeline", str(tmp_path / "pipeline"), "--shape", "8", "8", "8", "--steps", "1"]
    generate.main([*words, "--output", str(tmp_path / "out")])
    names = {"0": "none", "2": "x", "5": "y"}
    window = {"kind": "window", "low": 0.0, "high": 1.0}
    changes = {"channels": ["x", "y"], "intensity": [window, window], "image_labels": names}
    tiny_pipeline(num_labels=0, labels={}, **changes).save_pretrained(tmp_path / "maps")
    words[1] = str(tmp_path / "maps")
    generate.main([*words, "--output", str(tmp_path / "labels")])
    (volumes, _), (maps, shown) = drawn
    assert "mask" not in volumes[0] and not volumes[0].get("labels")
    assert maps[0]["labels"] and shown == {0: "none", 2: "x", 5: "y"}


def test_a_run_without_a_finished_volume_has_no_picture(tmp_path):
    preview.write_preview([], None, tmp_path)
    assert not list(tmp_path.iterdir())
