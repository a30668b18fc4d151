"""Whose the cases are: no patient in two splits, and nothing about patients decided without a word."""

import layouts as made
import pytest

from recipes.choice import Ambiguous
from recipes.layouts.layout import case_name
from recipes.people import conditions, find_people
from recipes.proposals.machine import Machine
from recipes.survey import Options, look_over
from volumes.data.tables import Row

CPU = Machine(2, 16 * 2**30)


def survey_of(folder, **options):
    return look_over(Options(folder, folder.parent / "recipe", quick=True, **options), CPU)


def cases(*names):
    return [(("case", name),) for name in names]


def people_of(names, table="people.csv", **columns):
    """People of cases with a table of these columns."""
    rows = [
        Row({column: values[n] for column, values in columns.items()}, f"line {n + 2}")
        for n in range(max(map(len, columns.values())))
    ]
    return find_people(cases(*names), {}, {table: rows})


def test_visits_in_two_split_folders_are_one_subject(tmp_path):
    for n in range(6):
        made.save(made.image(n), tmp_path / f"scans/train/images/p{n}_visit1.nii.gz")
        made.save(made.image(n), tmp_path / f"scans/test/images/p{n + 3}_visit2.nii.gz")
    survey = survey_of(tmp_path / "scans")
    assert len(survey.section.cases) == 12 and len({case.subject for case in survey.section.cases}) == 9
    splits = {}
    for case in survey.section.cases:
        assert splits.setdefault(case.subject, case.split) == case.split, case.subject
    assert any("split is not used: it puts p3 into two splits" in text for text in survey.unsure)


def test_visits_in_a_table_of_files_are_one_subject(tmp_path):
    lines = ["scan"]
    for n in range(5):
        for visit in (1, 2):
            folder = "train" if visit == 1 else "test"
            made.save(made.image(n), tmp_path / f"scans/{folder}/p{n}_visit{visit}.nii.gz")
            lines.append(f"{folder}/p{n}_visit{visit}.nii.gz")
    (tmp_path / "scans/files.csv").write_text("\n".join(lines))
    survey = survey_of(tmp_path / "scans")
    assert survey.layout.name == "the table files.csv"
    assert len(survey.section.cases) == 10 and len({case.subject for case in survey.section.cases}) == 5


def test_rows_with_files_of_one_name_are_cases_of_their_own(tmp_path):
    lines = ["scan,part"]
    for n in range(4):
        made.save(made.image(n), tmp_path / f"scans/p{n // 2}/x/visit{n % 2}.nii.gz")
        lines.append(f"p{n // 2}/x/visit{n % 2}.nii.gz,a")
    (tmp_path / "scans/files.csv").write_text("\n".join(lines))
    survey = survey_of(tmp_path / "scans")
    assert [case_name(key) for key in survey.choice.keys] == [f"p{n}_x_visit{v}" for n in (0, 1) for v in (0, 1)]
    assert len({case.subject for case in survey.section.cases}) == 2


def test_a_visit_that_two_splits_list_is_of_one_subject(tmp_path):
    lines = ["scan", *(f"{split}/p{n}_visit1.nii.gz" for n in range(4) for split in ("train", "test"))]
    for n, line in enumerate(lines[1:]):
        made.save(made.image(n), tmp_path / "scans" / line)
    (tmp_path / "scans/files.csv").write_text("\n".join(lines))
    survey = survey_of(tmp_path / "scans")
    assert len(survey.choice.keys) == 8 and set(survey.people.subjects.values()) == {f"p{n}" for n in range(4)}


def test_names_of_many_scans_each_are_noted():
    names = [f"pat{p}_{s}" for p in range(5) for s in range(10)]
    people = find_people(cases(*names), {}, {})
    assert any("pat0_0 and pat0_1 have similar names" in text for text in people.unsure)
    assert not find_people(cases(*(f"case_{n}" for n in range(50))), {}, {}).unsure


def test_an_empty_cell_of_a_subject_is_asked_about():
    names = [f"s{n}" for n in range(6)]
    patients = ["A", "A", "B", "", "C", "C"]
    with pytest.raises(Ambiguous, match=r"the case s3 has no value in the column patient.*say --subject patient"):
        people_of(names, scan=names, patient=patients)
    rows = [Row({"scan": name, "patient": who}, "line") for name, who in zip(names, patients, strict=True)]
    people = find_people(cases(*names), {}, {"people.csv": rows}, subject="patient")
    assert list(people.subjects.values()) == ["A", "A", "B", "s3", "C", "C"]
    with pytest.raises(Ambiguous, match="the case s5 has no value in the column patient"):  # which has no row
        people_of(names, scan=names[:5], patient=["A", "A", "B", "B", "C"])


@pytest.mark.parametrize("column", ["ID", "pid", "MRN", "PatientID", "Subject_ID", "pat"])
def test_names_of_subject_columns(column):
    names = [f"s{n}" for n in range(6)]
    people = people_of(names, scan=names, **{column: ["1", "1", "2", "2", "3", "3"]})
    assert people.subject == column and len(set(people.subjects.values())) == 3
    assert column not in people.classes and column not in people.numbers


def test_an_id_of_each_scan_does_not_hide_the_visits():
    names = [f"p{n}_visit{v}" for n in range(3) for v in (1, 2)]
    people = people_of(names, ID=names)
    assert people.group_by and set(people.subjects.values()) == {"p0", "p1", "p2"}


def test_columns_that_look_like_identifiers_are_asked_about():
    names = [f"s{n}" for n in range(6)]
    kennung = ["K017", "K017", "K018", "K018", "K025", "K025"]
    with pytest.raises(Ambiguous, match=r"the column kennung repeats .* K017; say --subject kennung"):
        people_of(names, scan=names, kennung=kennung)
    rows = [Row({"scan": name, "kennung": who}, "line") for name, who in zip(names, kennung, strict=True)]
    people = find_people(cases(*names), {}, {"people.csv": rows}, group_by=".+")
    assert people.classes == {} and len(set(people.subjects.values())) == 6
    stages = people_of(names, scan=names, stage=["T1", "T2", "T1", "T2", "T3", "T3"], date=["20200101"] * 6)
    assert stages.classes == {"stage": ["T1", "T2", "T3"]}


def test_columns_that_name_the_cases_otherwise_are_asked_about():
    names = [str(n) for n in range(1, 11)]
    with pytest.raises(Ambiguous, match=r"people.csv: the columns row and scan both name the cases"):
        people_of(names, row=names, scan=names[::-1])
    assert people_of(names, row=names, scan=names).join[1] == "row"
    assert people_of(names, row=[*names[:8], "x", "y"], scan=names[::-1]).join[1] == "scan"


@pytest.mark.parametrize(("table", "empty"), [("p.tsv", "n/a"), ("p.tsv", "NA"), ("p.csv", "N/A"), ("p.csv", "n/a")])
def test_cells_without_a_value_are_no_class(table, empty):
    names = [f"s{n}" for n in range(6)]
    people = people_of(names, table, scan=names, sex=["F", "M", "F", "M", empty, empty], age=[*"31425", empty])
    assert people.classes == {"sex": ["F", "M"]} and people.rewritten
    assert conditions(people, cases(*names), ["sex"], ["age"]) == ({"sex": ["F", "M"]}, ["age"])


def test_na_may_be_a_value_in_a_csv():
    names = [f"s{n}" for n in range(4)]
    assert people_of(names, scan=names, country=["NA", "DE", "NA", "DE"]).classes == {"country": ["DE", "NA"]}


def test_numbers_that_are_none_are_refused():
    names = [f"s{n}" for n in range(4)]
    people = people_of(names, scan=names, sex=["F", "M", "F", "M"])
    with pytest.raises(ValueError, match=r"--numbers sex: the case s0 has 'F', which is not a number"):
        conditions(people, cases(*names), [], ["sex"])


def test_a_table_with_empty_words_is_written_anew(tmp_path):
    folder = made.pairs(tmp_path / "scans", 6)
    sexes = ["F", "M", "F", "M", "n/a", "F"]
    (folder / "people.csv").write_text("\n".join(["scan,sex", *(f"study-{n},{sex}" for n, sex in enumerate(sexes))]))
    survey = survey_of(folder, classes=["sex"])
    assert survey.section.settings["classes"] == {"sex": ["F", "M"]} and "n/a" not in survey.section.table
    assert {case.metadata["sex"] for case in survey.section.cases} == {"F", "M", ""}
