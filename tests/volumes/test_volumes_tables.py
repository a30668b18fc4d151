"""Tables as spreadsheets write them: read right, or refused by line and remedy."""

import gzip
import json
import unicodedata

import pytest

from volumes import DataConfig, load_cases
from volumes.data.tables import read_number, read_table

RIGHT = [{"case": "c00", "age": "50"}, {"case": "c01", "age": "60"}]


def table(tmp_path, content, name="t.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        "case,age\nc00,50\nc01,60\n",
        "case;age\r\nc00;50\r\nc01;60\r\n",
        "case\tage\nc00\t50\nc01\t60",
        "case|age\nc00|50\nc01|60\n",
        "sep=,\ncase,age\nc00,50\nc01,60\n",
        "sep=;\r\ncase;age\r\nc00;50\r\nc01;60\r\n",
        '"sep=\t"\ncase\tage\nc00\t50\nc01\t60\n',
        "sep=^\ncase^age\nc00^50\nc01^60\n",
        "\ufeffcase,age\nc00,50\nc01,60\n",
        b"\xff\xfe" + "case;age\r\nc00;50\r\nc01;60\r\n".encode("utf-16-le"),
        b"\xfe\xff" + "case\tage\nc00\t50\nc01\t60\n".encode("utf-16-be"),
        "case,age\rc00,50\rc01,60\r",
        "\n,\ncase,age\n,\n\nc00,50\n \t,\xa0\nc01,60\n,\n,\n,,,\n",
        "case,age,,\nc00,50,,\nc01,60,,\n",
        "case,age\nc00,50,,\nc01,60,\n",
        ",case,age\n0,c00,50\n1,c01,60\n",  # pandas
        ' case , "age"\n c00 , "50"\n\u200bc01, 60\xa0\n',
        'case,age\n"c00","50"\n"=""c01""",="60"\n',
    ],
)
def test_one_table_in_many_spellings(tmp_path, content):
    assert read_table(table(tmp_path, content)) == RIGHT


def test_what_quotation_marks_hold_is_one_value(tmp_path):
    text = 'case,note\nc00,"a, ""b""; c\nsecond line"\nc01,5" deep\n'
    rows = read_table(table(tmp_path, text), used={"case"})
    assert [row["note"] for row in rows] == ['a, "b"; c\nsecond line', '5" deep']
    assert [row.place for row in rows] == ["line 2", "line 3 (line 4 in a text editor)"]


def test_lines_are_counted_as_a_spreadsheet_does(tmp_path):
    assert [row.place for row in read_table(table(tmp_path, "case,age\n\nc00,50\n,\nc01,60\n"))] == ["line 3", "line 5"]
    said = read_table(table(tmp_path, "sep=;\ncase;age\nc00;50\n"))
    assert said[0].place == "line 2 (line 3 in a text editor)"  # a spreadsheet does not show sep=
    with pytest.raises(ValueError, match=r"t.csv: line 5 has 3 values, the header has 2 columns"):
        read_table(table(tmp_path, "case,age\n\nc00,50\n\nc01,60,7\n"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("case,age\nc00,50\nMüller,60\n".encode("cp1252"), r"line 3 holds bytes .* not UTF-8.*save it as .CSV UTF-8"),
        (b"case,age\nc00,50\nc01,\x0060\n", "line 3 holds a NUL"),
        ("case,age\nc00,50\n".encode("utf-16-le"), "NUL character: .* UTF-16 without its mark"),
        (b"PK\x03\x04rest", r"a workbook \(.xlsx.*CSV UTF-8"),
        (b"\x00\x05\x16\x07\x00", "resource fork"),
        ('case,age\nc00,"50\nc01,60\n', "line 2: opens a quotation mark that is never closed"),
        ('case,age\nc00,"50\nc01,60"\n', "line 2: a value in quotation marks spans lines that look like rows"),
        ('case,age\nc00,"5"0\n', "line 2: "),
        ("case,age\n“c00”,50\n", "line 2: case is in curly quotation marks"),
        ("“case”,age\nc00,50\n", "column “case” is in curly"),
        ("case,age\nc00,50\n#N/A,60\n", "line 3: case is a spreadsheet's error, #N/A"),
        ("case,age\nc00,#DIV/0!\n", "line 2: age is a spreadsheet's error"),
        ("case,age\nc00,=B1+1\n", "line 2: age is a formula"),
        ("case,age,\nc00,50,x\n", r"line 2 has a value \('x'\) in column 3, which has no name"),
        ("case, case \nc00,50\n", "two columns have one name: case"),
        ("caf\u00e9,cafe\u0301\nc00,50\n", "two columns have one name"),
        ('"case,age"\n"c00,50"\n', "whole lines are in quotation marks"),
        ("a;b,c\n1;2,3\n", "may be separated by commas or semicolons; say which .* sep=,"),
        ("case;age\nc00;50;7\n", "line 2 has 3 values.* separated by semicolons"),
        ('[{"case": "c00"}]', "is JSON by its content; rename it"),
        (gzip.compress(b"case\nc00\n", mtime=0), r"is gzip, .*rename it to t.csv.gz"),
        ("# of 2024\ncase,age\nc00,50\n", "line 2 has 2 values.*remove what stands above the header"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer"),
        ("\n<!DOCTYPE html>\n<html></html>", "is a web page by its content"),
    ],
)
def test_what_cannot_be_read_right_is_refused(tmp_path, content, reason):
    with pytest.raises(ValueError, match=f"t.csv: .*{reason}" if "column “" not in reason else reason):
        read_table(table(tmp_path, content))


def test_columns_that_nobody_reads_may_hold_anything(tmp_path):
    rows = read_table(table(tmp_path, "case,note\nc00,#N/A\nc01,=A1\n"), used={"case"})
    assert [row["case"] for row in rows] == ["c00", "c01"]


def test_gzip_tables(tmp_path):
    packed = gzip.compress(b"case,age\nc00,50\nc01,60\n", mtime=0)
    assert read_table(table(tmp_path, packed, "t.csv.gz")) == RIGHT
    assert read_table(table(tmp_path, gzip.compress(json.dumps(RIGHT).encode()), "t.json.gz")) == RIGHT
    with pytest.raises(ValueError, match="is not gzip, .*rename it to t.csv"):
        read_table(table(tmp_path, "case,age\nc00,50\n", "t.csv.gz"))
    with pytest.raises(ValueError, match="is gzip within gzip"):
        read_table(table(tmp_path, gzip.compress(packed), "t.csv.gz"))
    with pytest.raises(ValueError, match="damaged gzip"):
        read_table(table(tmp_path, packed[:-9], "t.csv.gz"))


def test_json_tables(tmp_path):
    text = '\ufeff[{"case ": "c00", "age": null}, {}, {"case": null}, {"case": " c01", "age": NaN}]'
    rows = read_table(table(tmp_path, text, "t.json"))
    assert rows == [{"case": "c00", "age": ""}, {"case": "c01", "age": ""}]
    assert [row.place for row in rows] == ["entry 1", "entry 4"]
    assert read_table(table(tmp_path, '[{"a": 1.0}, {"b": 1.5}]', "t.json")) == [{"a": 1, "b": ""}, {"a": "", "b": 1.5}]


def test_a_subject_of_json_is_one_however_its_number_is_written(tmp_path):
    """pandas writes 1.0 as soon as one cell of the column was empty. A missing path is an empty cell."""
    for name in "abc":
        (tmp_path / f"{name}.nii.gz").touch()
    rows = [{"file": "a", "id": 1}, {"file": "b", "id": "1"}, {"file": "c", "id": 1.0}]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    config = DataConfig(root=str(tmp_path), table="t.json", images="{file}.nii.gz", subject="id", validation_fraction=0)
    assert [case.subject for case in load_cases(config)] == ["1", "1", "1"]
    (tmp_path / "t.json").write_text(json.dumps([*rows, {"id": 2}]))
    with pytest.raises(ValueError, match="t.json: entry 4 has no value for 'file'"):
        load_cases(config)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[{"case": "c00"}, ["c01"]]', "entry 2 is .*expected rows"),
        ('[{"case": "c00"}, null]', "entry 2 is 'None'"),
        ('[{"case": {"id": 1}}]', "entry 1: case holds a dict"),
        ('[{"case": ["c00"]}]', "entry 1: case holds a list"),
        ('[{"age": Infinity}]', "holds Infinity"),
        ('[{"case": "a", "case": "b"}]', "two values called case"),
        ('{"cases": [{"case": "c00"}]}', "it is called 'cases' here"),
        ('{"channel_names": {"0": "CT"}, "numTraining": 3}', "give patterns instead of a table"),
        ('"text"', "expected rows"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_odd_json_is_refused(tmp_path, content, reason):
    with pytest.raises(ValueError, match=f"t.json: .*{reason}"):
        read_table(table(tmp_path, content, "t.json"))


def test_the_decathlons_dataset_json_is_a_table(tmp_path, caplog):
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
        for number in range(2):
            (tmp_path / folder / f"liver_{number}.nii.gz").touch()
    rows = [{"image": f"./imagesTr/liver_{n}.nii.gz", "label": f"./labelsTr/liver_{n}.nii.gz"} for n in range(2)]
    whole = {"labels": {"0": "background"}, "training": rows, "test": ["./imagesTs/liver_9.nii.gz"]}
    (tmp_path / "dataset.json").write_text(json.dumps(whole))
    config = DataConfig(
        root=str(tmp_path), table="dataset.json", images="{image}", masks="{label}", label_names={0: "b"},
        validation_fraction=0,
    )  # fmt: skip
    cases = load_cases(config)
    assert [case.name for case in cases] == ["imagesTr_liver_0", "imagesTr_liver_1"]
    assert cases[0].mask == tmp_path / "labelsTr" / "liver_0.nii.gz"
    assert "'test' (1 entries) not read" in caplog.text


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("1.5", 1.5),
        ("1,5", 1.5),
        (" -0,25 ", -0.25),
        ("0,500", 0.5),
        ("1,2345", 1.2345),
        ("2e3", 2000),
        (7, 7),
        ("\u22125", -5),
    ],
)
def test_numbers(cell, value):
    assert read_number(cell) == value


@pytest.mark.parametrize("cell", ["1,500", "1.500,5", "1_000", "63 y", "", "nan", "inf", True, "5%"])
def test_what_is_no_number(cell):
    with pytest.raises(ValueError):
        read_number(cell)


def test_paths_in_cells_are_found_however_they_are_written(tmp_path):
    (tmp_path / "images").mkdir()
    stored = unicodedata.normalize("NFD", "Müller.nii.gz")
    (tmp_path / "images" / stored).touch()
    (tmp_path / "images" / "b.nii.gz").touch()
    for cells in (["images/Müller.nii.gz", "images/b.nii.gz"], ["./images//Müller.nii.gz", "images\\b.nii.gz"]):
        table(tmp_path, "image\n" + "\n".join(cells))
        cases = load_cases(DataConfig(root=str(tmp_path), table="t.csv", images="{image}", validation_fraction=0))
        assert [case.name for case in cases] == ["images_Müller", "images_b"]
        assert cases[0].images["image"].name == stored


def test_an_empty_path_is_named_by_its_line(tmp_path):
    (tmp_path / "a.nii").touch()
    table(tmp_path, "image,age\na.nii,5\n,6\n")
    config = {"root": str(tmp_path), "table": "t.csv", "images": "{image}", "validation_fraction": 0}
    with pytest.raises(ValueError, match="t.csv: line 3 has no value for 'image'"):
        load_cases(DataConfig(**config))
    skipped = load_cases(DataConfig(**config, on_error="skip"))  # refused, and listed, when it is read
    assert [case.images["image"].exists() for case in skipped] == [False, True]
    table(tmp_path, "image,age\nC:\\scans\\a.nii,5\n")
    with pytest.raises(ValueError, match="line 2 of t.csv names it: .*this is a Windows path"):
        load_cases(DataConfig(**config))


def test_names_that_differ_in_case_are_mentioned(tmp_path, caplog):
    for name in ("a", "A", "b"):
        (tmp_path / f"{name}.nii").touch()
    load_cases(DataConfig(root=str(tmp_path), images="*.nii", validation_fraction=0))
    assert "are called 'A' and 'a'" in caplog.text


def test_unicode_spellings_match_between_images_and_masks(tmp_path, caplog):
    for folder, form in (("Bilder_ü", "NFC"), ("labels", "NFD")):
        (tmp_path / folder).mkdir()
        for name in ("Müller", "Ångström"):
            (tmp_path / folder / unicodedata.normalize(form, f"{name}.nii.gz")).touch()
    (tmp_path / "labels" / unicodedata.normalize("NFD", "._Müller.nii.gz")).touch()
    config = DataConfig(
        root=str(tmp_path),
        images=unicodedata.normalize("NFD", "./Bilder_ü//{case}.nii.gz"), masks="labels\\{case}.nii.gz",
        label_names={0: "b"}, validation_fraction=0,
    )  # fmt: skip
    cases = load_cases(config)
    assert [case.name for case in cases] == ["Müller", "Ångström"]
    assert all(unicodedata.is_normalized("NFC", case.name) and case.mask.exists() for case in cases)
    assert "1 files of macOS beside the volumes are ignored" in caplog.text
    (tmp_path / "labels" / "Müller.nii.gz").touch()  # in NFC, beside the same in NFD
    with pytest.raises(ValueError, match="differ only in Unicode normalization"):
        load_cases(config)


def test_a_hidden_case_name_is_refused(tmp_path):
    (tmp_path / ".a.nii").touch()
    table(tmp_path, "image\n.a.nii\n")
    with pytest.raises(ValueError, match="the name '.a' begins with a dot"):
        load_cases(DataConfig(root=str(tmp_path), table="t.csv", images="{image}", validation_fraction=0))
