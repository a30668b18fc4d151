"""Which files make a case, whose it is, and in which split: a subject is never in two."""

import csv
import json

import pytest

from volumes import DataConfig, PhantomConfig, load_cases
from volumes.intensity import IntensityScaling

ROWS = [
    {"scan": "a1", "patient": "A", "fold": "train", "age": "50"},
    {"scan": "a2", "patient": "A", "fold": "train", "age": "51"},
    {"scan": "b1", "patient": "B", "fold": "train", "age": "60"},
    {"scan": "c1", "patient": "C", "fold": "test", "age": "70"},
]


def touch(folder, *names):
    """Empty files: cases are found without reading them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write_table(folder, rows, name="table.csv"):
    if name.endswith(".json"):
        (folder / name).write_text(json.dumps(rows))
        return
    with open(folder / name, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def tabled(tmp_path):
    """A folder with a table, images and labels, and the arguments that describe it."""
    write_table(tmp_path, ROWS)
    write_table(tmp_path, ROWS, "table.json")
    touch(tmp_path, *(f"{kind}/{row['scan']}.nii.gz" for row in ROWS for kind in ("images", "labels")))
    return {
        "root": str(tmp_path),
        "table": "table.csv",
        "images": "images/{scan}.nii.gz",
        "masks": "labels/{scan}.nii.gz",
    }


@pytest.mark.parametrize("table", ["table.csv", "table.json"])
def test_a_table_says_everything(tabled, tmp_path, table):
    config = DataConfig(**{**tabled, "table": table}, subject="patient", split="fold", validation_fraction=0)
    cases = load_cases(config)
    assert [(case.name, case.subject, case.split) for case in cases] == [
        ("a1", "A", "train"),
        ("a2", "A", "train"),
        ("b1", "B", "train"),
        ("c1", "C", "test"),
    ]
    assert cases[1].images == {"image": tmp_path / "images/a2.nii.gz"}
    assert cases[1].mask == tmp_path / "labels/a2.nii.gz"
    assert cases[1].metadata == ROWS[1]


def test_the_table_may_hold_the_paths(tmp_path):
    write_table(tmp_path, [{"file": "x/one.nii.gz"}, {"file": "y/one.nii.gz"}])
    touch(tmp_path, "x/one.nii.gz", "y/one.nii.gz")
    cases = load_cases(DataConfig(root=str(tmp_path), table="table.csv", images="{file}", validation_fraction=0))
    assert [case.name for case in cases] == ["x_one", "y_one"]


def test_validation_subjects_come_from_the_training_split_whole(tabled):
    config = DataConfig(**tabled, subject="patient", split="fold", validation_fraction=0.5)
    splits = {case.name: case.split for case in load_cases(config)}
    assert splits["c1"] == "test"
    assert splits["a1"] == splits["a2"] != splits["b1"]
    assert {splits["a1"], splits["b1"]} == {"train", "validation"}


def test_a_table_that_splits_a_subject_is_refused(tabled, tmp_path):
    write_table(tmp_path, [*ROWS, {"scan": "a3", "patient": "A", "fold": "test", "age": "52"}])
    touch(tmp_path, "images/a3.nii.gz", "labels/a3.nii.gz")
    with pytest.raises(ValueError, match=r"subject A is in two splits, 'train' \(a1\) and 'test' \(a3\)"):
        load_cases(DataConfig(**tabled, subject="patient", split="fold", validation_fraction=0))


def test_drawn_splits_keep_subjects_whole_and_fractions(tmp_path):
    names = [f"s{subject:03d}_v{visit}" for subject in range(100) for visit in range(1 + subject % 3)]
    touch(tmp_path, *(f"{name}.nii.gz" for name in names))
    arguments = {"root": str(tmp_path), "images": "*.nii.gz", "group_by": r"^(s\d+)_", "test_fraction": 0.2}
    cases = load_cases(DataConfig(**arguments, validation_fraction=0.1))
    assert sorted(case.name for case in cases) == sorted(names)
    of_subject = {}
    for case in cases:
        assert case.subject == case.name[:4]
        of_subject.setdefault(case.subject, set()).add(case.split)
    assert all(len(splits) == 1 for splits in of_subject.values())
    counts = [sum(splits == {split} for splits in of_subject.values()) for split in ("train", "validation", "test")]
    assert counts == [72, 8, 20]
    assert load_cases(DataConfig(**arguments, validation_fraction=0.1)) == cases
    others = load_cases(DataConfig(**arguments, validation_fraction=0.1, split_seed=1))
    for split in ("validation", "test"):
        first, second = ({case.subject for case in found if case.split == split} for found in (cases, others))
        assert len(first) == len(second) and first != second
    # the test split does not depend on what is done with the rest
    for other in load_cases(DataConfig(**arguments, validation_fraction=0.5)):
        assert (other.split == "test") == (of_subject[other.subject] == {"test"})


def test_channels_and_masks_meet_by_what_their_patterns_share(tmp_path):
    touch(tmp_path, *(f"sub-{s}/{kind}.nii.gz" for s in ("01", "02") for kind in ("t1", "flair", "seg")))
    touch(tmp_path, "sub-01/other.nii.gz")
    config = DataConfig(
        root=str(tmp_path),
        images={"T1": "sub-{subject}/t1.nii.gz", "FLAIR": "sub-{subject}/flair.nii.gz"},
        masks="sub-{subject}/seg.nii.gz",
        subject="subject",
        validation_fraction=0,
    )
    cases = load_cases(config)
    assert [(case.name, case.subject) for case in cases] == [("01", "01"), ("02", "02")]
    assert list(cases[1].images.items()) == [
        ("T1", tmp_path / "sub-02/t1.nii.gz"),
        ("FLAIR", tmp_path / "sub-02/flair.nii.gz"),
    ]
    assert cases[1].mask == tmp_path / "sub-02/seg.nii.gz"
    (tmp_path / "sub-02/flair.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"sub-02/t1.nii.gz: has no FLAIR file"):
        load_cases(config)


def test_wildcards(tmp_path):
    touch(tmp_path, "deep/er/a.nii", "deep/b.nii.gz", "deep/c.txt", "[odd] (1)/d.nii")
    assert found(tmp_path, "**/*.nii") == ["[odd] (1)_d", "deep_er_a"]
    assert found(tmp_path, "deep/?.nii.gz") == ["b"]
    assert found(tmp_path, ["deep/**/*.nii", "deep/{name}.nii.gz"]) == ["b", "er_a"]
    assert found(tmp_path, "[odd] (1)/*.nii") == ["d"]
    assert found(tmp_path, "{z}/{a}/*.nii") == ["deep_er_a"]
    touch(tmp_path, "sub-1/sub-1_T1.nii", "sub-2/sub-1_T1.nii")
    assert found(tmp_path, "sub-{s}/sub-{s}_T1.nii") == ["1"]


def found(root, images):
    return [case.name for case in load_cases(DataConfig(root=str(root), images=images, validation_fraction=0))]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": "images/{scam}.nii.gz"}, r"names the columns \['scam'\]"),
        ({"images": "image/{scan}.nii.gz"}, "image/a1.nii.gz: no such file"),
        ({"table": "tables.csv"}, "tables.csv: no such table"),
        ({"subject": "who"}, "a1: no value for the subject column 'who'"),
        ({"split": "age"}, "a1: column 'age' says '50'; a split is one of train, validation, test"),
        ({"group_by": "^x"}, "a1: group_by '\\^x' matches nothing"),
        ({"group_by": "^(x)?"}, "a1: group_by .* matches no character"),
        ({"table": None, "images": "pictures/*.nii"}, "no file matches pictures"),
    ],
)
def test_mistakes_are_named(tabled, change, reason):
    with pytest.raises(ValueError, match=reason):
        load_cases(DataConfig(**{**tabled, "masks": None, **change}))


def test_space_around_a_value_makes_no_other_subject(tabled, tmp_path):
    (tmp_path / "table.csv").write_text("scan, patient, fold\na1, A, train\na2,A ,test\nb1,B,train\n")
    with pytest.raises(ValueError, match="subject A is in two splits"):
        load_cases(DataConfig(**tabled, subject="patient", split="fold", validation_fraction=0))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.csv", "scan\né".encode("latin-1"), "line 2 holds bytes .0xe9. that are not UTF-8"),
        ("t.csv", b"scan,patient,patient\na1,A,B\n", "two columns have one name"),
        ("t.csv", b"scan,patient\na1,A\na2\n", "line 3 has 1 values, the header has 2 columns"),
        ("t.csv", b"scan,patient\n", "expected rows"),
        ("t.csv", b"", "expected rows"),
        ("t.json", b'[{"scan": "a1",]', "cannot be read as a JSON table"),
        ("t.json", b'{"scan": "a1"}', "expected rows"),
    ],
)
def test_odd_tables_are_named(tabled, tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: .*{reason}"):
        load_cases(DataConfig(**{**tabled, "table": name}))


def test_two_volumes_of_one_name(tabled, tmp_path):
    write_table(tmp_path, [ROWS[0], ROWS[0]])
    with pytest.raises(ValueError, match="two volumes are called 'a1'"):
        load_cases(DataConfig(**tabled))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "images is missing"),
        ({"images": "*.nii", "phantom": PhantomConfig()}, "remove images"),
        ({"images": "*.nii", "split": "s", "test_fraction": 0.1}, "test_fraction has no effect"),
        ({"images": "*.nii", "subject": "s", "group_by": "x"}, "say the same thing twice"),
        ({"images": "*.nii", "validation_fraction": 1.0}, "got 1.0, expected a number, 0 or more and below 1"),
        ({"images": {"CT": "*.nii"}, "intensity": {"MR": IntensityScaling()}}, "intensity names the channels"),
        ({"images": {"CT": "*.nii"}, "time_point": {"MR": 0}}, "time_point names the channels"),
        ({"images": "*.nii", "group_by": "(a"}, r"group_by '\(a' is not a regular expression: missing \)"),
        ({"images": "*.nii", "label_map": {5: 7}, "label_names": {0: "air"}}, r"label_map leads to \[7\]"),
    ],
)
def test_contradictions_in_the_config_are_named(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        DataConfig(**arguments)


@pytest.mark.parametrize(("fraction", "held_out"), [(0.01, 1), (0.25, 1), (0.35, 2), (0.99, 4)])
def test_a_fraction_is_rounded_to_one_at_least_and_never_all(fraction, held_out, tmp_path):
    touch(tmp_path, *(f"{name}.nii" for name in "abcde"))
    cases = load_cases(DataConfig(root=str(tmp_path), images="*.nii", test_fraction=fraction, validation_fraction=0))
    assert [case.split for case in cases].count("test") == held_out


def test_too_few_subjects_to_hold_one_out(tmp_path):
    touch(tmp_path, "a.nii")
    with pytest.raises(ValueError, match="set data.validation_fraction to 0"):
        load_cases(DataConfig(root=str(tmp_path), images="*.nii"))


def test_hippocampus(hippocampus):
    with open(hippocampus / "subjects.csv") as file:
        rows = {row["volume"]: row for row in csv.DictReader(file)}
    config = DataConfig(
        root=str(hippocampus),
        table="subjects.csv",
        images={"MR": "images/{volume}.nii.gz"},
        masks="labels/{volume}.nii.gz",
        subject="subject",
        split="split",
    )
    cases = load_cases(config)
    assert {case.name for case in cases} == set(rows)
    subjects = {split: {c.subject for c in cases if c.split == split} for split in ("train", "validation", "test")}
    assert {name: len(members) for name, members in subjects.items()} == {"train": 101, "validation": 11, "test": 24}
    assert not subjects["train"] & subjects["validation"]
    assert not (subjects["train"] | subjects["validation"]) & subjects["test"]
    for case in cases:
        assert case.subject == rows[case.name]["subject"]
        assert (case.split == "test") == (rows[case.name]["split"] == "test")
        # volumes 2k-1 and 2k are one person (data README); so neighbors are never apart
        number = int(case.name.removeprefix("hippocampus_"))
        pair = f"hippocampus_{number + 1 if number % 2 else number - 1:03d}"
        assert all(other.split == case.split for other in cases if other.name == pair)
