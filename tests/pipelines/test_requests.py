"""What generate.py is asked for: tables as spreadsheets write them, and names as disks spell them."""

import json
import unicodedata
from types import SimpleNamespace

import pytest

from evaluation.data.pairs import generated_pairs
from pipelines.inputs.request_files import find_masks, mask_requests, read_requests
from pipelines.storage.provenance import read_sidecar, sidecars
from volumes import Case, volume_stem

SCHEMA = SimpleNamespace(classes=["größe"], numbers=["age"], images=[("ct", 1)])
PIPE = SimpleNamespace(unet=SimpleNamespace(condition_schema=SCHEMA), data=SimpleNamespace(crop=None))


def nfd(text):
    return unicodedata.normalize("NFD", text)


def requested(tmp_path, text, *files, say=print):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    (tmp_path / "c.csv").write_text(text, encoding="utf-8-sig")
    return read_requests(tmp_path / "c.csv", PIPE, tmp_path / "out", say)


def test_empty_rows_ask_for_nothing(tmp_path):
    found = requested(tmp_path, f"name;{nfd('größe')};age\r\n;;\r\na;klein;1,5\r\n;groß;\r\n;;\r\n\xa0;;\r\n")
    assert [(one.name, one.classes, one.numbers) for one in found] == [
        ("a", {"größe": "klein"}, {"age": "1,5"}),
        ("row_0002", {"größe": "groß"}, {}),
    ]


def test_masks_of_a_table_are_found_however_they_are_spelled(tmp_path):
    found = requested(tmp_path, "mask\n./m\\Müller.nii.gz\nm//b.nii.gz\n", nfd("m/Müller.nii.gz"), "m/b.nii.gz")
    assert [one.name for one in found] == ["Müller", "b"] and all(one.mask.exists() for one in found)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name,age\n\n.a,1\n", "line 3, for its volumes: the name '.a' begins with a dot"),
        ("name,age\na/b,1\n", "line 2, .*has a slash"),
        ("name,age\na\\b,1\n", "line 2, .*has a slash"),
        ("name,age\na,1\n\nA,2\n", "several rows are called A: line 2 and line 4"),
        (f"name,age\nMü,1\n{nfd('Mü')},2\n", "several rows are called Mü: line 2 and line 3"),
        ("mask\na.nii\n\nb.nii\n", "line 4: .*b.nii: no such file"),
        ("mask\nC:\\masks\\a.nii\n", "line 2: .*no such file; this is a Windows path"),
        ("name,age,\na,1,x\n", "line 2 has a value"),
        ("name,age\na,#N/A\n", "line 2: age is a spreadsheet's error"),
    ],
)
def test_rows_that_are_refused_are_named_by_their_line(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason):
        requested(tmp_path, text, "a.nii")


def test_mask_patterns_match_every_spelling(tmp_path):
    for name in (nfd("Müller.nii.gz"), "b.nii.gz", "._b.nii.gz"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match="1 files of macOS"):
        assert [volume_stem(path) for path in find_masks([str(tmp_path)], tmp_path / "out")] == ["Müller", "b"]
    for pattern in ("Mü*.nii.gz", "Müller.nii.gz"):
        assert [volume_stem(one) for one in find_masks([f"{tmp_path}/{pattern}"], tmp_path / "out")] == ["Müller"]
    (tmp_path / "Müller.nii.gz").touch()
    with pytest.raises(ValueError, match=r"M.*have the same stem|differ only in how Unicode"):
        mask_requests([str(tmp_path)], tmp_path / "out")


def test_masks_that_differ_in_case_alone_are_refused(tmp_path):
    (tmp_path / "a.nii").touch()
    (tmp_path / "A.nii").touch()
    with pytest.raises(ValueError, match="have the same stem, apart from upper and lower case"):
        mask_requests([str(tmp_path)], tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "pattern", "names"),
    [
        (["p01/tumour.nii.gz", "p02/tumour.nii.gz"], "*/tumour.nii.gz", ["p01", "p02"]),
        (["p01/seg/t.nii", "p02/seg/t.nii"], "**/*.nii", ["p01", "p02"]),
        (["p01/pre/t.nii", "p01/post/t.nii", "p02/pre/t.nii"], "**/t.nii", ["p01_post", "p01_pre", "p02_pre"]),
        (["p01/t.nii", "p02/t.nii", "p01/liver.nii"], "*/*.nii", ["p01_liver", "p01_t", "p02_t"]),
        (["p01/t.nii", "p02/late/t.nii"], "**/t.nii", ["p01", "p02_late"]),
        (["t.nii", "late/t.nii"], "**/t.nii", ["late", "t"]),
        (["p01/a.nii", "p02/b.nii"], "*/*.nii", ["a", "b"]),  # stems that differ are names, as ever
        (["p01/tumour.nii.gz"], "*/tumour.nii.gz", ["tumour"]),
        ([nfd("Zoë/t.nii"), "p/t.nii"], "*/t.nii", ["Zoë", "p"]),
    ],
)
def test_masks_of_one_name_are_called_by_what_differs(tmp_path, files, pattern, names, monkeypatch):
    for name in files:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).touch()
    found = mask_requests([f"{tmp_path}/d/{pattern}"], tmp_path / "out")
    assert sorted(request.name for request in found) == names
    assert sorted(str(request.mask) for request in found) == sorted(str(tmp_path / "d" / name) for name in files)
    monkeypatch.chdir(tmp_path)
    again = mask_requests([f"d/{pattern}"], tmp_path / "out")  # however the pattern is written
    assert [request.name for request in again] == [request.name for request in found]


def test_names_that_still_collide_are_refused(tmp_path):
    for name in ("a_b/c/t.nii", "a/b_c/t.nii"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"t.nii and .*t.nii: their volumes would both be called a_b_c; rename one"):
        mask_requests([f"{tmp_path}/**/t.nii"], tmp_path / "out")


def test_columns_that_the_model_does_not_know_are_not_read(tmp_path):
    said: list[str] = []
    text = "name,age,site,note\na,1,Bonn,=A1+1\nb,2,Kiel,#REF!\n"
    found = requested(tmp_path, text, say=said.append)
    assert [(one.name, one.numbers) for one in found] == [("a", {"age": "1"}), ("b", {"age": "2"})]
    assert said == [f"{tmp_path / 'c.csv'}: columns that this model does not know are not read: note, site"]
    assert requested(tmp_path, "name,age\na,1\n", say=said.append) and len(said) == 1


@pytest.mark.parametrize(
    ("column", "meant"), [("Age", "age"), ("agee", "age"), ("names", "name"), ("Grösse", "größe"), ("CT", "ct")]
)
def test_a_column_that_is_nearly_known_is_refused(tmp_path, column, meant):
    with pytest.raises(
        ValueError, match=rf"unknown columns '{column}' \(did you mean {meant}\?\); .* mask, name, größe"
    ):
        requested(tmp_path, f"name,{column}\na,1\n" if meant != "name" else f"age,{column}\n1,a\n")


def test_a_table_of_unknown_columns_alone_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"unknown columns \['gender', 'site'\]; for this model a table has mask, name"
    ):
        requested(tmp_path, "gender,site\nF,Bonn\n")


def test_generated_volumes_match_masks_in_any_unicode_form(tmp_path):
    generated = tmp_path / "generated"
    generated.mkdir()
    for name in (nfd("Müller_000.nii.gz"), "._Müller_000.nii.gz", "._Müller_000.json"):
        (generated / name).touch()
    (generated / nfd("Müller_000.json")).write_text(json.dumps({"synthetic": True}))
    case = Case("Müller", "s", images={"image": tmp_path / "i.nii.gz"}, mask=tmp_path / "Müller.nii.gz")
    (pair,) = generated_pairs([case], generated)
    assert pair.generated == (generated / nfd("Müller_000.nii.gz"),)
    assert [path.name for path in sidecars(generated)] == [nfd("Müller_000.json")]
    assert read_sidecar(generated / "Müller_000.nii.gz") == {"synthetic": True}
