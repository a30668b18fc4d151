"""What may be read in several ways is asked about, and the message says what to type."""

import layouts as made
import nibabel as nib
import numpy as np
import pytest

from recipes.__main__ import main
from recipes.choice import Ambiguous, channel_name
from recipes.proposals.machine import Machine
from recipes.survey import Options, look_over

CPU = Machine(2, 16 * 2**30)


def survey_of(folder, **options):
    return look_over(Options(folder, folder.parent / "recipe", quick=True, **options), CPU)


@pytest.fixture
def two_masks(tmp_path):
    folder = made.patients(tmp_path / "scans")
    for n, patient in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        image = nib.load(patient / "PET.nii.gz")
        made.save(np.ones(image.shape, np.uint8) - made.mask(n, image.shape, 1), patient / "brain.nii.gz")
    return folder


def test_two_masks_are_asked_about(two_masks, capsys):
    with pytest.raises(Ambiguous, match=r"2 files could be the mask: brain.nii.gz, tumour.nii.gz; say --mask brain or"):
        survey_of(two_masks)
    assert main([str(two_masks), "--quick", "--output", str(two_masks.parent / "recipe")]) == 2
    assert "--mask tumour" in capsys.readouterr().err and not (two_masks.parent / "recipe").exists()


@pytest.mark.parametrize("name", ["tumour", "TUMOUR", "tumour.nii.gz"])
def test_a_mask_is_named_in_any_spelling(two_masks, name):
    survey = survey_of(two_masks, mask=name)
    assert survey.choice.mask == "tumour" and survey.labels[1][0] == "tumour"
    assert any("brain.nii.gz is not used" in note for note in survey.notes)


def test_no_mask_if_asked(two_masks):
    survey = survey_of(two_masks, mask="none")
    assert survey.choice.mask is None and "masks" not in survey.section.settings
    assert "mask" not in survey.plan.ldm["model"].get("condition_dropout", {})


def test_an_unknown_name_lists_those_that_are_there(two_masks):
    with pytest.raises(ValueError, match=r"lesion matches none of the files; there are .*brain.*tumour"):
        survey_of(two_masks, mask="lesion")


def test_a_channel_that_many_lack_is_asked_about(tmp_path):
    folder = made.patients(tmp_path / "scans")
    for n in (1, 3):
        next(path for path in folder.glob(f"Patient {n:02d}*/PET.nii.gz")).unlink()
    with pytest.raises(Ambiguous, match=r"PET.nii.gz is there for 4 of 6 cases; say --channels CT to leave"):
        survey_of(folder)
    assert len(survey_of(folder, channels=["CT"]).choice.keys) == 6
    assert len(survey_of(folder, channels=["CT", "PET"]).choice.keys) == 4


def test_masks_that_most_lack_are_asked_about(tmp_path):
    folder = made.flat(tmp_path / "scans")
    for path in sorted((folder / "labels").glob("[!.]*"))[:4]:
        path.unlink()
    with pytest.raises(Ambiguous, match=r"2 of 6 cases have a mask"):
        survey_of(folder)
    assert len(survey_of(folder, mask="none").choice.keys) == 6


def test_two_tables_are_asked_about(tmp_path):
    folder = made.patients(tmp_path / "scans")
    (folder / "more.csv").write_text((folder / "patients.csv").read_text())
    with pytest.raises(Ambiguous, match=r"2 tables name the cases: more.csv, patients.csv; say --table"):
        survey_of(folder)
    assert survey_of(folder, table="patients.csv").people.table == "patients.csv"


def test_two_columns_of_subjects_are_asked_about(tmp_path):
    folder = made.pairs(tmp_path / "scans", 4)
    lines = ["case,subject,patient", *(f"study-{n},S{n // 2},P{n % 2}" for n in range(4))]
    (folder / "people.csv").write_text("\n".join(lines))
    with pytest.raises(Ambiguous, match=r"2 columns could be the subject: subject, patient; say --subject subject"):
        survey_of(folder)
    assert set(survey_of(folder, subject="patient").people.subjects.values()) == {"P0", "P1"}


def test_long_series_of_volumes_are_asked_about(tmp_path):
    for n in range(3):
        made.save(
            np.random.default_rng(n).normal(100, 9, (8, 8, 8, 20)).astype(np.float32), tmp_path / f"scans/r{n}.nii.gz"
        )
    with pytest.raises(Ambiguous, match=r"holds 20 volumes \(4-D\); say which one is the image: --time_point 0"):
        survey_of(tmp_path / "scans")
    survey = survey_of(tmp_path / "scans", time_point=3)
    assert survey.section.settings["time_point"] == 3


def test_damaged_files_are_named_and_left_out(tmp_path):
    folder = made.pairs(tmp_path / "scans")
    (folder / "study-2_image.nii.gz").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    survey = survey_of(folder)
    assert len(survey.choice.keys) == 4
    assert any("study-2_image.nii.gz" in text and "Git LFS" in text for text in survey.unsure)


@pytest.mark.parametrize("with_mask", [False, True])
def test_images_of_one_value_are_no_masks(tmp_path, with_mask):
    folder = made.pairs(tmp_path / "scans")
    for path in folder.glob("*_image.nii.gz"):
        made.save(np.zeros(nib.load(path).shape, np.float32), path)
    for path in [] if with_mask else folder.glob("*_mask.nii.gz"):
        path.unlink()
    with pytest.raises(ValueError, match=r"image.*: all voxels of each file hold one value"):
        survey_of(folder)


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (made.pairs, {"structures": ["foo"]}, "--structures foo: .* holds labels, which have values; leave"),
        (made.pairs, {"structures": ["a", "b"], "mask": "none"}, "--structures a,b: .*there is no mask; leave it out"),
        (made.pairs, {"label_names": {1: "a"}, "mask": "none"}, "--label_names 1=a: .*there are none, without a mask"),
        (made.outlined, {"label_names": {9: "foo"}}, "--label_names 9=foo: .*there are 1=GTV-1, 2=Node left"),
        (made.totalsegmentator, {"label_names": {3: "x"}}, "--label_names 3=x: .*there are 1=liver, 2=spleen$"),
        (made.pairs, {"time_point": 3}, "--time_point 3: no channel is 4-D; leave it out"),
        (made.pairs, {"start": ""}, "--from '': no shipped weights for images are called so; say --from hippocampus,"),
        (made.pairs, {"start": "hippocampus:"}, "--from hippocampus:: no shipped weights"),
    ],
)  # fmt: skip
def test_options_without_effect_are_refused(tmp_path, make, options, says):
    with pytest.raises(ValueError, match=says):
        survey_of(make(tmp_path / "scans"), **options)


def test_labels_of_structures_may_be_renamed(tmp_path):
    survey = survey_of(made.totalsegmentator(tmp_path / "scans"), label_names={1: "leber"})
    assert survey.section.settings["label_names"] == {0: "background", 1: "leber", 2: "spleen"}


@pytest.mark.parametrize(
    ("role", "name"),
    [("CT_image", "ct"), ("images", "images"), ("imagesTr_0000", "imagestr_0000"), ("anat/T1w", "anat_t1w")],
)
def test_names_of_channels(role, name):
    assert channel_name(role) == name


@pytest.mark.parametrize(
    "args",
    [["--spacing", "1", "2"], ["--label_names", "tumor"], ["--subject", "a", "--group_by", "b"], ["--channels", " ,"]],
)
def test_wrong_options_end_with_status_2(args, capsys):
    with pytest.raises(SystemExit) as end:
        main(["scans", *args])
    assert end.value.code == 2 and "error:" in capsys.readouterr().err
