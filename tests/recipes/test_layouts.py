"""Each layout, fabricated with awkward names: what init finds, and that training lists the same cases."""

import json

import layouts as made
import numpy as np
import pytest
import yaml

from recipes.listing import list_folder
from recipes.proposals.machine import Machine
from recipes.recipe import write_recipe
from recipes.survey import Options, look_over
from volumes import load_cases, read_mask
from volumes.data.config import DataConfig

CPU = Machine(2, 16 * 2**30)


def survey_of(folder, output, **options):
    return look_over(Options(folder, output, quick=True, **options), CPU)


def written(survey):
    """The recipe's data section, read from its file, and the cases that training lists."""
    from recipes.section import data_config

    write_recipe(survey, "python -m recipes DIR")
    settings = yaml.safe_load((survey.options.output / "data.yaml").read_text())
    assert (survey.options.output / settings["root"]).resolve() == survey.options.folder.resolve()
    config = data_config(settings, survey.options.folder)
    assert isinstance(config, DataConfig)
    return settings, load_cases(config)


def test_flat_folders(tmp_path):
    folder = made.flat(tmp_path / "scans")
    survey = survey_of(folder, tmp_path / "recipe")
    settings, cases = written(survey)
    assert (settings["images"], settings["masks"]) == ("images/{case}.nii.gz", "labels/{case}.nii.gz")
    assert sorted(case.name for case in cases) == sorted(
        ["case_00", "case_02", "case_04", "Fall 01 Mü", "Fall 03 Mü", "Fall 05 Mü"]
    )
    assert {v: n for v, (n, _) in survey.labels.items()} == {0: "background", 1: "label_1", 2: "label_2"}
    assert any("twin" in note and "case_00.nii" in note for note in survey.notes)
    assert settings["intensity"] == {"kind": "percentile", "low": 0.5, "high": 99.5}


def test_cases_without_a_mask_are_named_and_left_out(tmp_path):
    folder = made.flat(tmp_path / "scans")
    (folder / "labels/case_02.nii.gz").unlink()
    survey = survey_of(folder, tmp_path / "recipe")
    settings, cases = written(survey)
    assert settings["table"].endswith("cases.csv") and len(cases) == 5
    assert any("case_02" in text and "lack" in text for text in survey.unsure)


def test_names_that_end_in_image_and_mask(tmp_path):
    survey = survey_of(made.pairs(tmp_path / "scans"), tmp_path / "recipe")
    settings, cases = written(survey)
    assert (settings["images"], settings["masks"]) == ("{case}_image.nii.gz", "{case}_mask.nii.gz")
    assert len(cases) == 5 and settings["label_names"] == {0: "background", 1: "foreground"}


def test_a_folder_per_patient_with_a_table(tmp_path):
    folder = made.patients(tmp_path / "Aufnahmen 2024")
    survey = survey_of(folder, tmp_path / "recipe", classes=["sex"], numbers=["age"])
    settings, cases = written(survey)
    assert list(settings["images"]) == ["ct", "pet"]  # one suffix is upper-case, so the cases are a table
    assert settings["table"].endswith("cases.csv") and settings["subject"] == "subject"
    assert settings["classes"] == {"sex": ["F", "M"]} and settings["numbers"] == ["age"]
    assert settings["label_names"] == {0: "background", 1: "tumour"}
    assert settings["intensity"]["ct"] == {"kind": "window", "low": -200.0, "high": 300.0}
    assert settings["intensity"]["pet"]["kind"] == "window" and settings["intensity"]["pet"]["low"] == 0
    assert len(cases) == 6 and {case.subject for case in cases} == {f"Patient {n:02d}ö" for n in range(6)}
    assert {case.metadata["age"] for case in cases} >= {"40,5"}


def test_patterns_and_the_users_table_if_they_suffice(tmp_path):
    folder = made.patients(tmp_path / "scans")
    (folder / "Patient 00ö/CT.NII.GZ").rename(folder / "Patient 00ö/CT.nii.gz")
    settings, cases = written(survey_of(folder, tmp_path / "recipe"))
    assert settings["table"] == "patients.csv"
    assert settings["images"] == {"ct": "{patient}/CT.nii.gz", "pet": "{patient}/PET.nii.gz"}
    assert settings["subject"] == "patient" and len(cases) == 6
    assert not (tmp_path / "recipe/cases.csv").exists()


def test_visits_of_a_patient_are_one_subject(tmp_path):
    for n in range(5):
        for visit in ("visit1", "visit2"):
            made.save(made.image(n), tmp_path / f"folders/p{n}/{visit}/T1.nii.gz")
            made.save(made.image(n), tmp_path / f"names/p{n}_{visit}.nii.gz")
    for kind, setting in (("folders", "subject"), ("names", "group_by")):
        survey = survey_of(tmp_path / kind, tmp_path / f"recipe_{kind}")
        settings, cases = written(survey)
        assert setting in settings and len(cases) == 10 and len({case.subject for case in cases}) == 5, kind
        assert survey.choice.mask is None
    assert any("p0_visit1 and p0_visit2 count as one subject" in text for text in survey.unsure)


@pytest.mark.parametrize("make", [made.nnunet, made.nnunet_v1])
def test_nnunet(tmp_path, make):
    survey = survey_of(make(tmp_path / "Dataset501_HN"), tmp_path / "recipe")
    settings, cases = written(survey)
    assert survey.layout.name == "nnU-Net" and len(cases) == 4
    assert settings["images"] == {"ct": "imagesTr/{case}_0000.nii.gz", "pet": "imagesTr/{case}_0001.nii.gz"}
    assert settings["masks"] == "labelsTr/{case}.nii.gz"
    assert settings["label_names"] == {0: "background", 1: "GTVp", 2: "GTVn"}
    assert settings["intensity"]["ct"]["kind"] == settings["intensity"]["pet"]["kind"] == "window"
    assert any("imagesTs" in note for note in survey.notes)


def test_the_decathlons_four_axes_are_channels(tmp_path):
    survey = survey_of(made.decathlon(tmp_path / "Task01"), tmp_path / "recipe")
    settings, cases = written(survey)
    pattern = "imagesTr/{case}.nii.gz"
    assert settings["images"] == {"flair": pattern, "t1w": pattern} and len(cases) == 4
    assert settings["time_point"] == {"flair": 0, "t1w": 1}
    assert settings["label_names"] == {0: "background", 1: "edema", 2: "core"}
    assert survey.ranges["flair"] != survey.ranges["t1w"]


def test_bids(tmp_path):
    survey = survey_of(made.bids(tmp_path / "ds000001"), tmp_path / "recipe", numbers=["age"])
    settings, cases = written(survey)
    assert survey.layout.name == "BIDS" and len(cases) == 10
    assert {case.subject for case in cases} == {f"sub-{n:02d}" for n in range(1, 6)}
    assert all(str(case.mask).endswith("label-lesion_mask.nii.gz") for case in cases)
    assert settings["numbers"] == ["age"] and {case.metadata["age"] for case in cases} == {"31", "32", "33", "34", "35"}
    assert any("func" in note for note in survey.notes)


def test_structures_become_a_label_map(tmp_path):
    survey = survey_of(made.totalsegmentator(tmp_path / "cases"), tmp_path / "recipe")
    settings, cases = written(survey)
    assert settings["label_names"] == {0: "background", 1: "liver", 2: "spleen"}
    assert survey.labels[2] == ("spleen", 3) and survey.labels[1] == ("liver", 4)
    assert len(cases) == 4 and settings["images"] == "{case}/ct.nii.gz"
    combined = read_mask(next(case.mask for case in cases if case.name == "s0002")).array[0]
    expected = made.mask(2)
    expected[7, 4, 4] = 2
    assert np.array_equal(combined, expected)
    assert any("overlap in 3 voxels" in text for text in survey.unsure)
    assert any("aorta" in note for note in survey.notes)


def test_structures_that_are_asked_for(tmp_path):
    survey = survey_of(made.totalsegmentator(tmp_path / "cases"), tmp_path / "recipe", structures=["Liver"])
    assert survey.labels == {0: ("background", 4), 1: ("liver", 4)}


def test_a_table_that_names_files(tmp_path):
    survey = survey_of(made.listed(tmp_path / "scans"), tmp_path / "recipe", classes=["grade"])
    settings, cases = written(survey)
    assert survey.layout.name == "the table scans.csv"
    assert len(cases) == 4 and {case.subject for case in cases} == {"S0", "S1"}
    assert settings["classes"] == {"grade": ["1", "2"]}
    assert any("puts S1 into two splits" in text for text in survey.unsure)


def test_a_dicom_tree(tmp_path):
    survey = survey_of(made.dicom(tmp_path / "export"), tmp_path / "recipe")
    settings, cases = written(survey)
    assert survey.layout.name == "a DICOM tree" and list(settings["images"]) == ["ct", "pet"]
    assert {case.subject for case in cases} == {"ID0", "ID1", "ID2"}
    assert all(case.images["ct"].is_dir() and "PT" in case.images["pet"].name for case in cases)
    assert survey.choice.mask == "tumour" and survey.shapes[0].tolist() == [16, 18, 5]
    assert survey.people.numbers == {"age": (40.0, 42.0)}
    assert any("localizers" in note for note in survey.notes)


def test_a_recipe_among_the_scans_is_passed_over(tmp_path):
    folder = made.pairs(tmp_path / "scans")
    written(survey_of(folder, folder / "recipe"))
    made.save(made.image(0), folder / "recipe/generated/study-0_image.nii.gz")
    assert len(survey_of(folder, tmp_path / "other").choice.keys) == 5


def test_a_folder_without_volumes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no volumes"):
        survey_of(tmp_path, tmp_path / "recipe")


def test_linked_folders_are_followed_once(tmp_path):
    folder = made.patients(tmp_path / "disk")
    scans = tmp_path / "scans"
    scans.mkdir()
    for patient in sorted(path for path in folder.iterdir() if path.is_dir()):
        (scans / patient.name).symlink_to(patient, target_is_directory=True)
    (scans / "again").symlink_to(scans, target_is_directory=True)  # a loop
    (scans / "twice").symlink_to(scans / "Patient 01ö", target_is_directory=True)
    assert list_folder(scans).volumes == list_folder(folder).volumes
    _, cases = written(survey_of(scans, tmp_path / "recipe"))
    assert len(cases) == 6


def test_linked_folders_that_are_hidden_are_followed(tmp_path):
    folder = made.pairs(tmp_path / "scans/.store/images").parent.parent
    (folder / "images").symlink_to(folder / ".store/images", target_is_directory=True)
    assert len(list_folder(folder).volumes) == 10


def test_the_decathlons_names_may_end_in_four_digits(tmp_path):
    for n in range(4):
        made.save(made.image(n, kind="ct"), tmp_path / f"scans/imagesTr/liver_{n:04d}.nii.gz")
        made.save(made.mask(n), tmp_path / f"scans/labelsTr/liver_{n:04d}.nii.gz")
    said = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "cancer"}}
    (tmp_path / "scans/dataset.json").write_text(json.dumps(said))
    survey = survey_of(tmp_path / "scans", tmp_path / "recipe")
    assert survey.layout.name == "Medical Segmentation Decathlon" and len(survey.choice.keys) == 4
    assert [channel.name for channel in survey.choice.channels] == ["ct"]


def test_cases_without_the_structures_are_left_out(tmp_path):
    folder = made.totalsegmentator(tmp_path / "cases")  # the first has no spleen
    survey = survey_of(folder, tmp_path / "recipe", structures=["spleen"])
    assert survey.labels == {0: ("background", 3), 1: ("spleen", 3)}
    assert any("1 cases have none of spleen and are left out: s0000" in text for text in survey.unsure)
    assert sorted(case.mask.name for case in written(survey)[1]) == [f"s000{n}.nii.gz" for n in (1, 2, 3)]


@pytest.mark.parametrize("place", ["synthetic.json", "dataset.json", "study-0_image.json"])
def test_synthetic_volumes_are_pointed_out(tmp_path, place):
    folder = made.pairs(tmp_path / "scans")
    (folder / place).write_text(json.dumps({"synthetic": False}))
    assert not any("SYNTHETIC" in text for text in survey_of(folder, tmp_path / "recipe").unsure)
    (folder / place).write_text(json.dumps({"synthetic": True}))
    assert f"THESE VOLUMES ARE SYNTHETIC: {place}" in survey_of(folder, tmp_path / "recipe").unsure[0]
