"""Volumes on several grids, and masks in DICOM, which lie on the grid of the series that they were drawn on."""

import json

import layouts as made
import nibabel as nib
import numpy as np
import pydicom
import pytest
from structures import on_slice, rtstruct, series_of

from recipes.choice import Ambiguous
from recipes.contents import Grid
from recipes.grids import shown_box
from recipes.proposals.machine import Machine
from recipes.recipe import write_recipe
from recipes.section import data_config
from recipes.survey import Options, look_over
from volumes import Volume, VolumeDataset, load_cases

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
    for words in ("CT.nii.gz, PET.nii.gz, tumour.nii.gz lie on another grid than T1.nii.gz, the channel that shows",
                  "are resampled onto its grid", "; 100% of its box remains; or say --resample_to CT or "
                  "--resample_to PET or --channels CT,PET (without the others)"):  # fmt: skip
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
    survey = survey_of(made.regridded(tmp_path / "scans", 3))
    assert survey.section.settings["resample_to"] == "image"
    said = "{case}_mask.nii.gz lies on another grid than {case}_image.nii.gz, the channel, and is resampled"
    assert any(text.startswith(said) for text in survey.unsure)
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
    asked = survey_of(folder, resample_to="image")
    assert len(asked.choice.keys) == 6 and not any("no effect" in note for note in asked.notes)
    assert "some cases lie on several grids" in asked.section.why["resample_to"]


def test_the_reason_of_the_grid_is_the_one_that_applies(scans):
    assert "the channel that shows the least" in survey_of(scans).section.why["resample_to"]
    assert "this one was asked for" in survey_of(scans, resample_to="PET").section.why["resample_to"]
    even = survey_of(scans, resample_to="PET", channels=["CT", "PET"])
    assert "without effect" in even.section.why["resample_to"]
    assert any("--resample_to PET has no effect: the volumes of each case lie on one grid" in n for n in even.notes)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("foo", "foo: matches none of the channels; the channels are CT, PET$"),
        ("tumour", "tumour: is not a channel of this recipe; the channels are CT, PET$"),
        ("T1", "T1: is not a channel of this recipe; the channels are CT, PET$"),
    ],
)
def test_only_channels_are_resampled_to(scans, asked, says):
    with pytest.raises(ValueError, match=f"--resample_to {says}"):
        survey_of(scans, resample_to=asked, channels=["CT", "PET"])


def test_a_named_channel_alone_is_called_image(tmp_path):
    """As training calls it: nnU-Net says CT, and its masks lie on another grid."""
    folder = made.nnunet(tmp_path / "scans")
    for path in folder.glob("imagesTr/*_0001.nii.gz"):
        path.unlink()
    described = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "GTVp": 1, "GTVn": 2}}
    (folder / "dataset.json").write_text(json.dumps(described))
    for n in range(4):
        made.save(made.mask(n), folder / f"labelsTr/hecktor_{n:03d}.nii.gz", (1.5, 1.5, 2.2))
    for options in ({}, {"resample_to": "ct"}, {"resample_to": "image"}):
        survey = survey_of(folder, **options)
        assert survey.section.settings["resample_to"] == "image" and len(dataset(survey)) == 4


def test_masks_around_a_lesion_are_asked_about(tmp_path):
    """They would cut away the scan: outside them nothing is known."""
    folder, place = made.pairs(tmp_path / "scans", 3), np.diag([1.5, 1.5, 2.0, 1.0])
    place[:3, 3] = [6, 6, 4]
    for n in range(3):
        nib.save(nib.Nifti1Image(made.mask(n, (8, 9, 7), 1), place), folder / f"study-{n}_mask.nii.gz")
    with pytest.raises(Ambiguous, match=r"mask.nii.gz shows only 12% of the box of \{case\}_image.*would be cut away; "
                       r"say --resample_to image \(which cuts it\) or --mask none"):  # fmt: skip
        survey_of(folder)
    survey = survey_of(folder, resample_to="image")
    assert any("12% of its box remains" in text for text in survey.unsure) and survey.shapes[0].tolist() == [8, 9, 7]
    assert survey_of(folder, mask="none").shapes[0].tolist() == [16, 18, 14]


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
    assert "P 0/RTSTRUCT is left out: the series that it was drawn on is not there" in survey.notes
    assert len(survey.choice.keys) == 2
    del one.ReferencedFrameOfReferenceSequence
    one.save_as(path)
    assert "P 0/RTSTRUCT is left out: it does not name the series" in survey_of(folder).notes


def edited(folder, edit, patients_=range(3)):
    """The RTSTRUCT of some patients, changed by edit(dataset)."""
    for n in patients_:
        path = folder / f"P {n}/RTSTRUCT/RS.dcm"
        one = pydicom.dcmread(path)
        edit(one)
        one.save_as(path, enforce_file_format=True)
    return folder


def test_a_mask_without_contours_is_left_out(tmp_path):
    def clear(one):
        for roi in one.ROIContourSequence:
            del roi.ContourSequence

    folder = edited(made.outlined(tmp_path / "export", 3), clear, [0])
    survey = survey_of(folder)
    assert len(survey.choice.keys) == len(dataset(survey)) == 2 and survey.labels[1] == ("GTV-1", 2)
    assert any("1 cases have a mask that cannot be read" in t and "has no contours of" in t for t in survey.unsure)
    with pytest.raises(ValueError, match="no RTSTRUCT can be read, so say --mask none: .*has no contours"):
        survey_of(edited(folder, clear, [1, 2]))


def test_a_region_without_a_name_is_called_by_its_number(tmp_path):
    def unname(one):
        one.StructureSetROISequence[1].ROIName = ""

    survey = survey_of(edited(made.outlined(tmp_path / "export", 3), unname))
    assert survey.section.settings["label_names"] == {0: "background", 1: "GTV-1", 2: "ROI 2"}
    assert all(np.array_equal(s["mask"].numpy(), made.mask(int(s["name"][2]))) for s in dataset(survey))


def two_series(folder, drawn_on):
    """Two CT series of a study and description, on grids that differ, and an RTSTRUCT of each in `drawn_on`."""
    for n in range(3):
        for number, name in enumerate("AB"):
            grid = made.affine((1.5, 1.5, 2.0))
            grid[0, 3] = 3.0 * number
            values = made.image(n + 10 * number, kind="ct").astype(np.int16)[None]
            slices = series_of(Volume(values, grid), folder / f"P{n}/{name}")
            for one in slices:
                one.PatientID, one.StudyInstanceUID, one.SeriesDescription = f"ID{n}", f"1.2.{n + 1}", "body"
                one.save_as(str(one.filename), enforce_file_format=True)
            if name in drawn_on:
                corners = [(2.6, 3.6), (9.4, 3.6), (9.4, 8.4), (2.6, 8.4)]
                place = folder / f"P{n}/RS{name}"
                place.mkdir()
                rois = {"GTV": [on_slice(corners, k, grid) for k in range(3, 8)]}
                rtstruct(slices, rois).save_as(place / "RS.dcm", enforce_file_format=True)
    return folder


@pytest.mark.parametrize(("drawn_on", "kept", "left"), [("A", "A", "B"), ("B", "B", "A"), ("AB", "B", "A")])
def test_the_series_that_a_mask_names_is_kept(tmp_path, drawn_on, kept, left):
    survey = survey_of(two_series(tmp_path / "export", drawn_on))
    files = {file.path for file in survey.layout.files}
    assert {f"P0/{kept}", f"P0/RS{kept}"} <= files and not {f"P0/{left}", f"P0/RS{left}"} & files
    assert "resample_to" not in survey.section.settings and len(dataset(survey)) == 3
    why = ", which a mask was drawn on" if len(drawn_on) == 1 else ""
    assert f"P0/{left} is left out: it is CT_body of the same study as P0/{kept}{why}" in survey.notes
    of_left = f"P0/RS{left} is left out: so is P0/{left}, which it was drawn on"
    assert (of_left in survey.notes) == (left in drawn_on)


def test_two_observers_are_asked_about(tmp_path):
    folder = made.outlined(tmp_path / "export", 3)
    one = pydicom.dcmread(folder / "P 1/RTSTRUCT/RS.dcm")
    one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = "1.9.1"
    (folder / "P 1/second").mkdir()
    one.save_as(folder / "P 1/second/RS.dcm", enforce_file_format=True)
    with pytest.raises(Ambiguous, match=r"P 1/RTSTRUCT and P 1/second are both RTSTRUCT of one study.*--mask none"):
        survey_of(folder)
    assert survey_of(folder, mask="none").choice.mask is None
    (folder / "P 1/second/RS.dcm").unlink()
    assert survey_of(folder).choice.mask == "RTSTRUCT"


# TotalSegmentator


def test_structures_on_another_grid_are_resampled(tmp_path):
    folder = made.totalsegmentator(tmp_path / "cases")
    for n, case in enumerate(patients(folder)):
        made.save(made.image(n, (12, 14, 10), kind="ct"), case / "ct.nii.gz", (1.8, 1.8, 2.5))
    survey = survey_of(folder)
    assert survey.section.settings["resample_to"] == "image"
    assert any("structures lies on another grid than ct.nii.gz, the channel," in text for text in survey.unsure)
    assert all(sample["mask"].max() >= 1 for sample in dataset(survey))


def test_the_folder_of_one_case_is_refused(tmp_path):
    folder = made.totalsegmentator(tmp_path / "cases")
    with pytest.raises(ValueError, match=rf"is the folder of one case; give the folder that .*: {folder}$"):
        survey_of(folder / "s0001")
