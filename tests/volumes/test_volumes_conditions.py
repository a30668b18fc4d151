"""Classes and numbers of cases: columns of the table, and what a volume's own grid says."""

import math

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.eulerangles import euler2mat
from phantom_tables import PHANTOM, phantoms

from volumes import DataConfig, IntensityScaling, VolumeDataset, VolumeError, describe, load_cases
from volumes.description import NumberStats

NAN = math.nan


@pytest.fixture
def table(tmp_path):
    """A data set of three volumes; sex, age and weight in a table."""
    rows = ["name,sex,age,weight", "a,F,20,50.5", "b,,60,", "c,M,,70"]
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    for name in "abc":
        image = np.arange(512, dtype=np.float32).reshape(8, 8, 8)
        nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / f"{name}.nii")
    return tmp_path


def dataset_of(folder, **changes) -> VolumeDataset:
    arguments = {
        "root": str(folder),
        "table": "table.csv",
        "images": "{name}.nii",
        "intensity": IntensityScaling("window", 0, 512),
        "validation_fraction": 0,
        "classes": {"sex": ["F", "M"]},
        "numbers": ["weight", "age"],
    }
    config = DataConfig(**{**arguments, **changes})
    return VolumeDataset(load_cases(config), config)


def test_cells_become_indices_and_numbers(table):
    dataset = dataset_of(table)
    assert [item["classes"].tolist() for item in dataset] == [[0], [-1], [1]]
    assert dataset[0]["classes"].dtype == torch.int64 and dataset[0]["numbers"].dtype == torch.float32
    numbers = torch.stack([item["numbers"] for item in dataset])  # age, weight
    expected = torch.tensor([[20, 50.5], [60, NAN], [NAN, 70]])
    torch.testing.assert_close(numbers, expected, equal_nan=True)
    assert not {"classes", "numbers"} & dataset_of(table, classes={}, numbers=[])[0].keys()
    assert dataset_of(table, classes={"age": ["60", "20"]}, numbers=[])[0]["classes"].tolist() == [
        1
    ]  # numbers name classes


def test_described_over_what_is_known(table):
    described = describe(dataset_of(table, classes={"sex": ["F", "M"], "age": ["20", "60"]}, numbers=["weight"]))
    assert described.classes == {"age": ["20", "60"], "sex": ["F", "M"]}
    assert described.numbers == {"weight": NumberStats(mean=60.25, std=9.75, low=50.5, high=70.0)}


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("a,X,20,50", "a: sex is 'X', expected one of F, M"),
        ("a,F,old,50", "a: age is 'old', which is not a finite number"),
        ("a,F,nan,50", "a: age is 'nan', which is not a finite number"),
        ("a,F,20,-inf", "a: weight is '-inf', which is not a finite number"),
    ],
)
def test_values_that_cannot_be_are_refused_or_skipped(table, cell, message):
    text = (table / "table.csv").read_text().replace("a,F,20,50.5", cell)
    (table / "table.csv").write_text(text)
    with pytest.raises(VolumeError, match=message):
        dataset_of(table)
    dataset = dataset_of(table, on_error="skip")
    assert [case.name for case in dataset.cases] == ["b", "c"] and message in dataset.skipped[0][1]


def test_values_are_called_by_their_names(table):
    """Records, sidecars and the pipeline's description know the names alone; a second table may have them already."""
    rows = ["name,sex,age", "a,F,20", "b,W,60", "c,M,70", "d,female,80", "e,,90"]
    (table / "table.csv").write_text("\n".join(rows) + "\n")
    for name in "de":
        (table / f"{name}.nii").write_bytes((table / "a.nii").read_bytes())
    sex = {"M": "male", "F": "female", "W": "female"}
    dataset = dataset_of(table, classes={"sex": sex}, numbers=[])
    assert [item["classes"].tolist() for item in dataset] == [[0], [0], [1], [0], [-1]]
    assert [case.metadata["sex"] for case in dataset.cases] == ["female", "female", "male", "female", ""]
    assert [case.metadata["age"] for case in dataset.cases] == ["20", "60", "70", "80", "90"]
    assert describe(dataset).classes == {"sex": ["female", "male"]}
    turned = dict(reversed(sex.items()))  # saved configs are sorted: their order decides nothing
    assert dataset_of(table, classes={"sex": turned}, numbers=[]).config.class_names == {"sex": ["female", "male"]}
    (table / "table.csv").write_text((table / "table.csv").read_text().replace("c,M", "c,X"))
    with pytest.raises(
        VolumeError,
        match=r"c: sex is 'X', expected one of M, F, W, female, male; .* such as data.classes.sex: \{X: female\}",
    ):
        dataset_of(table, classes={"sex": sex}, numbers=[])


def test_names_of_values_that_contradict_are_refused(table):
    with pytest.raises(ValueError, match="classes.sex calls other values 'M', and 'M' itself 'male'"):
        dataset_of(table, classes={"sex": {"F": "M", "M": "male"}})
    with pytest.raises(ValueError, match="classes.sex has an empty value or name"):
        dataset_of(table, classes={"sex": {"F": "female", "": "male"}})
    with pytest.raises(ValueError, match="classes.sex lists the values"):
        dataset_of(table, classes={"sex": {}})
    kept = dataset_of(table, classes={"sex": {"F": "F", "M": "male"}}, numbers=[])
    assert describe(kept).classes == {"sex": ["F", "male"]}


def test_columns_and_values_that_say_nothing_are_refused(table):
    with pytest.raises(
        ValueError, match=r"name the columns \['size'\]; the cases have \['age', 'name', 'sex', 'weight'\]"
    ):
        dataset_of(table, numbers=["size"])
    with pytest.raises(ValueError, match="classes.sex lists the values.*each once"):
        dataset_of(table, classes={"sex": ["F", "F"]})
    with pytest.raises(ValueError, match=r"classes.contrast\[0\]: got true, expected text; put it in quotes"):
        dataset_of(table, classes={"contrast": [True, False]})
    with pytest.raises(ValueError, match=r"\['sex'\] are both classes and numbers"):
        dataset_of(table, numbers=["sex"])
    (table / "table.csv").write_text("name,sex,age\na,F,20\nb,F,20\nc,F,\n")
    with pytest.raises(ValueError, match="'age' is 20 for all training volumes"):
        describe(dataset_of(table, numbers=["age"]))
    for angle, name in enumerate("abc"):  # a spacing of 1.1 to rounding, which must not be divided by its spread
        affine = np.eye(4)
        affine[:3, :3] = euler2mat(0.1 * angle) * 1.1
        nib.save(nib.Nifti1Image(np.arange(512.0, dtype=np.float32).reshape(8, 8, 8), affine), table / f"{name}.nii")
    oblique = dataset_of(table, numbers=["spacing_x"])
    assert len({facts.numbers for facts in oblique.facts}) > 1
    with pytest.raises(ValueError, match="'spacing_x' is 1.1 for all training volumes"):
        describe(oblique)


def test_phantoms_have_both():
    for item in phantoms(**PHANTOM):
        lesion, organ = item["mask"] == 3, item["mask"] == 2
        brighter = item["image"][0][lesion].mean() > item["image"][0][organ].mean()
        assert item["classes"].tolist() == [0 if brighter else 1]
        assert item["numbers"].tolist() == [lesion.sum()]


def test_a_grid_has_its_own_numbers_unless_the_table_has_them(table):
    """In RAS order: the file's first axis runs down, its second to the left."""
    affine = np.array([[0, -2, 0, 0], [0, 0, 3, 0], [-0.5, 0, 0, 0], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((4, 6, 8), np.float32), affine), table / "b.nii")
    names = ["size_x", "size_z", "spacing_x", "spacing_y", "spacing_z"]
    assert dataset_of(table, numbers=names)[1]["numbers"].tolist() == [12, 2, 2, 3, 0.5]
    assert describe(dataset_of(table, numbers=["age", *names])).grid_numbers == tuple(names)
    resampled = dataset_of(table, numbers=["size_y", "spacing_y"], spacing=(1, 1, 1))[1]["numbers"]
    assert resampled.tolist() == [24, 1]  # what the model sees
    (table / "table.csv").write_text("name,spacing_x\na,5\nb,\nc,6\n")
    given = torch.stack([item["numbers"] for item in dataset_of(table, classes={}, numbers=["spacing_x"])])
    torch.testing.assert_close(given, torch.tensor([[5.0], [NAN], [6.0]]), equal_nan=True)
    assert describe(dataset_of(table, classes={}, numbers=["spacing_x"])).grid_numbers == ()
    with pytest.raises(ValueError, match=r"name the columns \['size_x'\]"):
        dataset_of(table, classes={"size_x": ["1"]}, numbers=[])
