"""A study that generates its own volumes, by the command."""

import nibabel as nib
import numpy as np
import pytest
import torch
from study_folders import write_sets
from tiny import mask_image, tiny_pipeline

from pipelines.planning import volume_seed
from reader_study.__main__ import main
from reader_study.generated import generate_for_study
from reader_study.kit import KEY, read_key

STUDY = ["--training", "0", "--pairs", "2", "--repeats", "0", "--readers", "1"]


@pytest.fixture
def pipe():
    return tiny_pipeline()


@pytest.fixture
def folder(tmp_path, pipe):
    """Real volumes, and a pipeline with two examples, named as the first two real volumes."""
    write_sets(tmp_path, 3)
    pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "pipe/masks").mkdir()
    for number in range(2):
        nib.save(mask_image((12, 10, 9), seed=number), tmp_path / f"pipe/masks/mrn_{number:02}.nii.gz")
    (tmp_path / "pipe/examples.csv").write_text("mask\nmasks/mrn_00.nii.gz\nmasks/mrn_01.nii.gz\n")
    return tmp_path


def create(folder, *words):
    main(["create", "--real", str(folder / "real"), "--output", str(folder / "study"), *STUDY, *words])
    return read_key(folder / "study" / KEY)


def test_a_study_generates_from_the_examples(folder, pipe):
    key = create(folder, "--pipeline", str(folder / "pipe"), "--seed", "4")
    shown = {case.name: case for case in key.cases if case.source == "generated"}
    assert set(shown) == {"mrn_00_000", "mrn_01_000"} and len(key.cases) == 5
    assert shown["mrn_01_000"].mask_of == "mrn_01"
    assert sum(item.section == "pair" for item in key.readers["reader_1"]) == 2
    seed = torch.Generator().manual_seed(volume_seed(4, "mrn_01", 0))
    [expected] = pipe(mask=str(folder / "pipe/masks/mrn_01.nii.gz"), generator=[seed]).volumes
    written = nib.load(folder / "study-generated/generated/mrn_01_000.nii.gz")
    assert np.allclose(written.get_fdata(), expected.get_fdata(), atol=1e-3)  # of 200
    sent = "".join(path.read_text() for path in (folder / "study/reader_1").glob("*.*"))
    assert "mrn_0" not in sent and "study-generated" not in sent


def test_masks_and_several_models(folder):
    words = [f"{name}={folder / 'pipe'}" for name in ("teacher", "student")]
    key = create(
        folder, "--pipeline", *words, "--masks", str(folder / "pipe/masks"), "--generated", str(folder / "generated")
    )
    sources = [case.source for case in key.cases]
    assert {name: sources.count(name) for name in set(sources)} == {
        "real": 3,
        "generated": 3,
        "teacher": 2,
        "student": 2,
    }


def test_volumes_of_an_earlier_command_are_not_shown(folder):
    """Such as those of an interrupted attempt with more masks."""
    pipelines, where = {"teacher": str(folder / "pipe")}, folder / "study"
    generate_for_study(pipelines, [], where, 0)
    with pytest.raises(ValueError, match=r"teacher: holds volumes of another command \(mrn_01_000.nii.gz\)"):
        generate_for_study(pipelines, [str(folder / "pipe/masks/mrn_00.nii.gz")], where, 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pipeline", "PIPE", "PIPE"], "another set is called generated; name it: --pipeline NAME="),
        (["--pipeline", "PIPE", "--generated", "generated"], "another set is called generated"),
        (["--pipeline", "real=PIPE"], "'real' names no model"),
        (["--pipeline", "../a=PIPE"], "'../a' names no model"),
        (["--pipeline", "..=PIPE"], "'..' names no model"),
    ],
)
def test_names_of_models_are_checked(folder, words, said):
    with pytest.raises(ValueError, match=said):
        create(folder, *(word.replace("PIPE", str(folder / "pipe")) for word in words))
    assert not (folder / "study-generated").exists()


def test_a_study_that_exists_is_refused_before_generating(folder):
    (folder / "study").mkdir()
    with pytest.raises(FileExistsError, match="give another folder"):
        create(folder, "--pipeline", str(folder / "pipe"))
    assert not (folder / "study-generated").exists()


def test_what_cannot_be_shown_is_refused(folder):
    (folder / "pipe/examples.csv").unlink()
    with pytest.raises(ValueError, match=r"has no examples.csv.*give --masks"):
        generate_for_study({"a": str(folder / "pipe")}, [], folder / "study", 0)
    scaling = {"kind": "percentile", "low": 100.0, "high": 300.0, "percentiles": [0.5, 99.5]}
    two = tiny_pipeline(channels=["T1", "T2"], intensity=[scaling] * 2)
    two.save_pretrained(folder / "two")
    with pytest.raises(ValueError, match="generates the channels T1, T2, and readers see one"):
        generate_for_study({"a": str(folder / "two")}, [str(folder / "pipe/masks")], folder / "study", 0)
    assert not (folder / "study-generated").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "give --generated"), (["--generated", "a", "--masks", "m"], "are for --pipeline")],
)
def test_the_command_needs_generated_volumes(capsys, words, said):
    with pytest.raises(SystemExit):
        main(["create", "--real", "a", "--output", "o", *words])
    assert said in capsys.readouterr().err
