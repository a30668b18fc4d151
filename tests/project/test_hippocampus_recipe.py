"""configs/hippocampus/prepare.py: from the folder of Task04_Hippocampus.tar to data/hippocampus with its split."""

import csv
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from published import CONFIGS, prepare_script, save

from training import TrainLdmConfig, parse_config
from volumes import load_cases, read_mask

TABLE = CONFIGS / "hippocampus/subjects.csv"
ROWS = "volume,subject,split\nhippocampus_001,S001,train\nhippocampus_003,S002,test\nhippocampus_004,S002,test\n"


def task04(folder: Path, numbers: tuple[int, ...] = (1, 2, 3, 4)) -> Path:
    """A folder as the archive unpacks to, with the hidden files that macOS adds; labels of 3 are float32."""
    for number in numbers:
        name = f"hippocampus_{number:03d}.nii.gz"
        labels = np.zeros((4, 5, 6), np.float32 if number == 3 else np.uint8)
        labels[1], labels[2] = 1, 2
        save(np.full((4, 5, 6), number, np.float32), folder / "imagesTr" / name)
        save(labels, folder / "labelsTr" / name)
        (folder / "imagesTr" / f"._{name}").write_bytes(b"not a volume")
    labels = {"0": "background", "1": "Anterior", "2": "Posterior"}
    (folder / "dataset.json").write_text(json.dumps({"name": "Hippocampus", "labels": labels}))
    return folder


@pytest.fixture
def few(tmp_path) -> Path:
    path = tmp_path / "few.csv"
    path.write_text(ROWS)
    return path


def test_pairs_are_copied_and_the_config_finds_them(tmp_path, few):
    source, output = task04(tmp_path / "Task04_Hippocampus"), tmp_path / "data"
    rows = prepare_script("hippocampus")(source, output, few)
    assert [row["volume"] for row in rows] == ["hippocampus_001", "hippocampus_003", "hippocampus_004"]
    files = sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
    names = [f"{folder}/hippocampus_{n}.nii.gz" for folder in ("images", "labels") for n in ("001", "003", "004")]
    assert files == [*names, "subjects.csv"]
    for ours, theirs in (("images", "imagesTr"), ("labels", "labelsTr")):
        for path in (output / ours).iterdir():
            assert path.read_bytes() == (source / theirs / path.name).read_bytes()
    config = parse_config(
        TrainLdmConfig,
        ["--config", str(CONFIGS / "hippocampus/ldm.yaml"), f"--data.root={output}", "--data.validation_fraction=0"],
    )
    cases = load_cases(config.data)
    assert [(case.name, case.subject, case.split) for case in cases] == [
        ("hippocampus_001", "S001", "train"),
        ("hippocampus_003", "S002", "test"),
        ("hippocampus_004", "S002", "test"),
    ]
    assert cases[1].mask is not None and nib.load(cases[1].mask).get_data_dtype() == np.float32
    assert set(np.unique(read_mask(cases[1].mask).array)) == {0, 1, 2}


def refusal(source: Path, tmp_path: Path, few: Path) -> str:
    """What the script says of a folder that it refuses, before it writes a table."""
    with pytest.raises(ValueError) as refused:
        prepare_script("hippocampus")(source, tmp_path / "data", few)
    assert not (tmp_path / "data/subjects.csv").exists()
    return str(refused.value)


def test_another_folder_is_refused_by_name(tmp_path, few):
    source = task04(tmp_path / "t")
    other = json.dumps({"name": "Spleen", "labels": {"0": "background", "1": "spleen"}})
    (source / "dataset.json").write_text(other)
    assert re.search(
        "t: dataset.json describes 'Spleen', not Hippocampus; give the folder", refusal(source, tmp_path, few)
    )
    (source / "dataset.json").unlink()
    assert re.search(
        "t: has no dataset.json; give the folder that Task04_Hippocampus.tar", refusal(source, tmp_path, few)
    )
    assert re.search("none: has no dataset.json", refusal(tmp_path / "none", tmp_path, few))


def test_an_incomplete_folder_is_refused_by_name(tmp_path, few):
    assert re.search(
        r"imagesTr/hippocampus_003.nii.gz, labelsTr/hippo.*tar ag",
        refusal(task04(tmp_path / "a", (1, 2, 4)), tmp_path, few),
    )
    source = task04(tmp_path / "b")
    save(np.zeros((4, 5, 7), np.uint8), source / "labelsTr/hippocampus_004.nii.gz")
    assert re.search(
        r"labelsTr/hippocampus_004.nii.gz: has \(4, 5, 7\) voxels, its image \(4, 5, 6\)",
        refusal(source, tmp_path, few),
    )
    save(np.full((4, 5, 6), 3, np.uint8), source / "labelsTr/hippocampus_004.nii.gz")
    assert re.search(r"hippocampus_004.nii.gz: has the labels \[3\] beside 0, 1 and 2", refusal(source, tmp_path, few))
    whole = (source / "imagesTr/hippocampus_001.nii.gz").read_bytes()
    (source / "imagesTr/hippocampus_001.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert re.search("imagesTr/hippocampus_001.nii.gz", refusal(source, tmp_path, few))


def test_the_split_keeps_subjects_together():
    with open(TABLE, newline="") as file:
        rows = list(csv.DictReader(file))
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["subject"], set()).add(row["split"])
        assert row["subject"] == f"S{(int(row['volume'].rpartition('_')[2]) + 1) // 2:03d}"
    assert all(len(found) == 1 for found in splits.values())
    counts = {split: sum(row["split"] == split for row in rows) for split in ("train", "test")}
    assert counts == {"train": 172, "test": 34} and sum(found == {"test"} for found in splits.values()) == 24


def test_what_it_writes_is_the_set_of_all_figures(tmp_path, hippocampus):
    source = tmp_path / "Task04_Hippocampus"
    source.mkdir()
    (source / "imagesTr").symlink_to(hippocampus / "images")
    (source / "labelsTr").symlink_to(hippocampus / "labels")
    labels = {"0": "background", "1": "Anterior", "2": "Posterior"}
    (source / "dataset.json").write_text(json.dumps({"name": "Hippocampus", "labels": labels}))
    prepare_script("hippocampus")(source, tmp_path / "data")
    ours = sorted(path.relative_to(tmp_path / "data") for path in (tmp_path / "data").rglob("*") if path.is_file())
    assert ours == sorted(path.relative_to(hippocampus) for path in hippocampus.rglob("*") if path.is_file())
    assert all((tmp_path / "data" / path).read_bytes() == (hippocampus / path).read_bytes() for path in ours)
