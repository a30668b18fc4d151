"""Volumes on several grids, and masks in DICOM, which lie on the grid of the series that they were drawn on."""

import layouts as made
import nibabel as nib
import numpy as np
import pydicom
import pytest

from recipes.choice import Ambiguous
from recipes.contents import Grid
from recipes.grids import shown_box
from recipes.proposals.machine import Machine
from recipes.recipe import write_recipe
from recipes.section import data_config
from recipes.survey import Options, look_over
from volumes import VolumeDataset, load_cases

CPU = Machine(2, 16 * 2**30)


def survey_of(folder, **options):
    return look_over(Options(folder, folder.parent / "recipe", quick=True, **options), CPU)


def dataset(survey) -> VolumeDataset:
    """The volumes as training reads them, by a recipe that is written."""
    write_recipe(survey, "python -m recipes DIR")
    config = data_config(survey.section.settings, survey.options.folder)
    return VolumeDataset(load_cases(config), config)


def patients(survey):
    return sorted(path for path in survey.iterdir() if path.is_dir())


@pytest.fixture
def scans(tmp_path):
    """CT, PET and mask on one grid, and a T1 that shows less, in smaller voxels, beside them."""
    folder = made.patients(tmp_path / "scans", 3)
    for n, patient in enumerate(patients(folder)):
        made.save(made.image(n, (18, 18, 20)), patient / "T1.nii.gz", (1, 1, 1))
    return folder


def test_the_channel_that_shows_the_least_is_resampled_to(scans):
    survey = survey_of(scans)
    assert survey.section.settings["resample_to"] == "t1"
    (said,) = [text for text in survey.unsure if "resample_to" in text]
    for words in ("T1.nii.gz lies on another grid than tumour.nii.gz", "the grid of T1.nii.gz, the channel that shows",
                  "--resample_to CT or --resample_to PET or --channels CT,PET (without the others)"):  # fmt: skip
        assert words in said
    found = dataset(survey)
    assert sorted(found.shapes) == sorted(tuple(shape) for shape in survey.shapes.tolist()) == [(18, 18, 20)] * 3


def test_what_all_show_is_the_size_that_is_planned_for(scans):
    survey = survey_of(scans, resample_to="PET")
    assert survey.section.settings["resample_to"] == "pet" and survey.spacings[0].tolist() == [1.5, 1.5, 2.0]
    for shape, planned in zip(sorted(dataset(survey).shapes), sorted(survey.shapes.tolist()), strict=True):
        assert np.abs(np.subtract(shape, planned)).max() <= 1


def test_channels_may_be_left_out_instead(scans):
    survey = survey_of(scans, channels=["CT", "PET"])
    assert "resample_to" not in survey.section.settings and not any("another grid" in one for one in survey.unsure)


def test_a_mask_on_another_grid(tmp_path):
    folder = made.pairs(tmp_path / "scans", 3)
    for n in range(3):
        made.save(made.mask(n, (20, 20, 16), 1), folder / f"study-{n}_mask.nii.gz", (1.2, 1.35, 1.75))
    survey = survey_of(folder)
    assert survey.section.settings["resample_to"] == "image"
    assert any("study-0_image.nii.gz" in text or "{case}_image.nii.gz" in text for text in survey.unsure)
    assert all(sample["mask"].max() == 1 for sample in dataset(survey))


def test_volumes_of_other_places_are_left_out(scans):
    patient = patients(scans)[0]
    image = nib.load(patient / "T1.nii.gz")
    moved = image.affine.copy()
    moved[0, 3] += 500
    nib.save(nib.Nifti1Image(image.get_fdata().astype(np.float32), moved), patient / "T1.nii.gz")
    survey = survey_of(scans)
    assert len(survey.choice.keys) == 2 and len(dataset(survey)) == 2
    assert any("T1.nii.gz" in text and "shows 0.0% of the box" in text for text in survey.unsure)


def test_a_few_cases_on_other_grids_are_left_out(tmp_path):
    folder = made.flat(tmp_path / "scans")
    made.save(made.image(0, (8, 8, 8)), folder / "images/case_02.nii.gz", (3, 3, 3))
    survey = survey_of(folder)
    assert "resample_to" not in survey.section.settings and len(survey.choice.keys) == 5
    assert any("different grids (--resample_to would resample them)" in text for text in survey.unsure)
    assert len(survey_of(folder, resample_to="image").choice.keys) == 6


def test_the_box_that_all_show():
    whole, part = np.diag([2.0, 2.0, 2.0, 1.0]), np.diag([-1.0, 1.0, 1.0, 1.0])
    part[:3, 3] = [10, 0, 0]  # x from 10.5 mm down to 0.5 mm
    shape, share = shown_box(Grid((10, 10, 10), whole, 1), {"a": Grid((10, 20, 30), part, 1)})
    assert shape == (5, 9, 9) and share == pytest.approx(0.5 * 0.975**2)  # y and z begin a half voxel later
    assert shown_box(Grid((10, 10, 10), whole, 1), {})[1] == 1


# Masks in DICOM


@pytest.mark.parametrize("kind", ["RTSTRUCT", "SEG"])
def test_masks_in_dicom_are_matched_and_named(tmp_path, kind):
    if kind == "SEG":
        pytest.importorskip("highdicom", reason="the extra dicomseg is not installed")
    survey = survey_of(made.outlined(tmp_path / "export", 3, kind))
    assert survey.choice.mask == kind and [one.name for one in survey.choice.channels] == ["ct", "pet"]
    settings = survey.section.settings
    assert settings["resample_to"] == "ct"  # PET shows more
    assert settings["label_names"] == {0: "background", 1: "GTV-1", 2: "Node left"}
    assert survey.labels[1][1] == survey.labels[2][1] == 3
    for sample in dataset(survey):
        n = int(sample["name"][2])
        assert np.array_equal(sample["mask"].numpy(), made.mask(n))


def test_some_segments_may_be_asked_for_and_renamed(tmp_path):
    folder = made.outlined(tmp_path / "export", 3)
    survey = survey_of(folder, structures=["gtv-1"], label_names={1: "tumor"})
    assert survey.section.settings["label_names"] == {0: "background", 1: "tumor"}
    assert list(survey.section.settings["label_map"].values()) == [1]
    assert any("left out: Node left" in note for note in survey.notes)
    assert all(sample["mask"].max() == 1 for sample in dataset(survey))


def test_segments_that_overlap_are_asked_about(tmp_path):
    folder = made.outlined(tmp_path / "export", 3)
    for path in folder.glob("*/RTSTRUCT/RS.dcm"):
        one = pydicom.dcmread(path)
        one.ROIContourSequence[1].ContourSequence = one.ROIContourSequence[0].ContourSequence
        one.save_as(path)
    with pytest.raises(Ambiguous, match=r"overlap in \d+ voxels.*say --structures with some of 'GTV-1,Node left'"):
        survey_of(folder)
    assert survey_of(folder, structures=["gtv-1"]).labels[1][1] == 3


def test_several_kinds_of_masks_are_asked_about(tmp_path):
    folder = made.outlined(tmp_path / "export", 3)
    for n, patient in enumerate(patients(folder)):
        made.save(made.mask(n), patient / "tumour.nii.gz", (1.5, 1.5, 2.0))
    with pytest.raises(Ambiguous, match=r"2 files could be the mask: .*say --mask RTSTRUCT.* or --mask tumour"):
        survey_of(folder)
    assert survey_of(folder, mask="RTSTRUCT").choice.mask == "RTSTRUCT"
    assert survey_of(folder, mask="none").choice.mask is None


def test_masks_of_absent_series_are_left_out(tmp_path):
    folder = made.outlined(tmp_path / "export", 3)
    path = folder / "P 0/RTSTRUCT/RS.dcm"
    one = pydicom.dcmread(path)
    study = one.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
    study.RTReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.3"
    one.save_as(path)
    survey = survey_of(folder)
    assert any("P 0/RTSTRUCT is left out: the series" in note for note in survey.notes)
    assert len(survey.choice.keys) == 2


# TotalSegmentator


def test_structures_on_another_grid_are_resampled(tmp_path):
    folder = made.totalsegmentator(tmp_path / "cases")
    for n, case in enumerate(patients(folder)):
        made.save(made.image(n, (12, 14, 10), kind="ct"), case / "ct.nii.gz", (1.8, 1.8, 2.5))
    survey = survey_of(folder)
    assert survey.section.settings["resample_to"] == "image"
    assert any("lies on another grid than structures" in text for text in survey.unsure)
    assert all(sample["mask"].max() >= 1 for sample in dataset(survey))


def test_the_folder_of_one_case_is_refused(tmp_path):
    folder = made.totalsegmentator(tmp_path / "cases")
    with pytest.raises(ValueError, match=rf"is the folder of one case; give the folder that .*: {folder}$"):
        survey_of(folder / "s0001")
