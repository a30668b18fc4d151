"""evaluate.py conditions for a number: volumes whose brightness says it, so that the regressor's answers are known."""

import json

import numpy as np
import pytest
import torch
import yaml

import evaluate
from evaluation.networks.classifier import regress, train_regressor
from evaluation.studies.number_adherence import number_errors
from pipelines.storage.provenance import sidecar_path
from volumes import Volume, write_volume

SHAPE = (16, 16, 16)
AGES = {"train": range(20, 60, 2), "test": range(21, 60, 4)}


def write(path, age: float, seed: int) -> None:
    noise = np.random.default_rng(seed).uniform(0, 5, (1, *SHAPE))
    write_volume(Volume((noise + age).astype(np.float32), np.eye(4)), path)


@pytest.fixture
def folder(tmp_path):
    """Volumes as bright as their subjects are old, and the config that reads them."""
    rows = ["name,split,age"]
    for split, ages in AGES.items():
        for age in ages:
            write(tmp_path / f"images/{split}{age}.nii.gz", age, len(rows))
            rows.append(f"{split}{age},{split},{age}")
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    data = {
        "root": str(tmp_path),
        "table": "table.csv",
        "images": "images/{name}.nii.gz",
        "split": "split",
        "validation_fraction": 0,
        "intensity": {"kind": "window", "low": 0, "high": 80},
        "numbers": ["age"],
    }
    (tmp_path / "ldm.yaml").write_text(yaml.safe_dump({"data": data}))
    return tmp_path


def generate(folder, shown) -> None:
    """What generate.py would write for ages 22, 26, ..., of a model that shows age `shown(age)`."""
    for number, age in enumerate(range(22, 60, 4)):
        path = folder / f"made/row_{number:04d}_000.nii.gz"
        write(path, shown(age), 100 + number)
        sidecar_path(path).write_text(json.dumps({"synthetic": True, "classes": None, "numbers": {"age": age}}))


def judge(folder, *more: str):
    args = ["conditions", "--config", str(folder / "ldm.yaml"), "--synthetic", str(folder / "made"), "--column", "age"]
    args += ["--output", str(folder / "report.json"), "--device", "cpu", "--precision", "no", "--seeds", "2"]
    return evaluate.main([*args, "--iterations", "60", "--shape", "16", "16", "16", *more])


def test_a_model_that_inverts_the_age_is_found(folder, capsys, tmp_path):
    generate(folder, lambda age: age)
    report = judge(folder)
    real, generated = report["real"], report["generated"]
    assert real["correlation"]["mean"] > 0.9 and generated["correlation"]["mean"] > 0.9
    assert real["mae"]["mean"] < real["constant_mae"] / 2 and real["constant_mae"] == pytest.approx(10, abs=0.1)
    assert real["mae"]["interval"][0] < real["mae"]["mean"] < real["mae"]["interval"][1]
    assert [row["seed"] for row in report["seeds"]] == [0, 1]
    expected = {"volumes": 10, "mean": 40, "std": 12.11, "min": 22, "max": 58}
    assert report["volumes"]["generated"] == pytest.approx(expected, abs=0.01)
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    assert "for always the mean; R2 " in capsys.readouterr().out
    generate(folder, lambda age: 80 - age)
    report = judge(folder)
    assert report["generated"]["correlation"]["interval"][1] < -0.8 and report["generated"]["r2"]["mean"] < -1
    assert report["difference"]["interval"][0] > 5
    page = evaluate.main(["report", str(folder / "report.json"), "--output", str(tmp_path / "page")])
    assert [row["within"] for row in page["sections"][0]["tables"][0]["rows"]] == [False] * 3


def test_what_cannot_be_judged_is_refused(folder):
    generate(folder, lambda age: age)
    with pytest.raises(ValueError, match=r"'weight' is not a class or number of the data; choose one of \['age'\]"):
        judge(folder, "--column", "weight")
    for path in (folder / "made").glob("*.json"):
        path.write_text(json.dumps({"synthetic": True, "numbers": {"age": 30}}))
    with pytest.raises(ValueError, match="the number is the same for all 10 generated volumes"):
        judge(folder)
    for path in (folder / "made").glob("*.json"):
        path.write_text(json.dumps({"synthetic": True}))
    with pytest.raises(ValueError, match="none of the 10 volumes has a age, such as row_0000_000"):
        judge(folder)
    table = (folder / "table.csv").read_text().splitlines()
    (folder / "table.csv").write_text("\n".join(line for line in table if "test" not in line or "test21" in line))
    with pytest.raises(ValueError, match="no two volumes of split test differ in age"):
        judge(folder)


def test_errors_by_hand():
    """Of 10, 20 and 30 the predictions 12, 20 and 26: errors 2, 0 and 4; squares 20 of 200; the constant is off by
    15, 5 and 5."""
    found, resampled = number_errors(np.array([12.0, 20, 26]), np.array([10.0, 20, 30]), 25.0, ["a", "b", "c"], seed=0)
    assert found["mae"]["mean"] == 2 and found["constant_mae"] == pytest.approx(25 / 3)
    assert found["r2"]["mean"] == pytest.approx(1 - 20 / 200)
    assert found["correlation"]["mean"] == pytest.approx(np.corrcoef([12, 20, 26], [10, 20, 30])[0, 1])
    assert resampled.shape == (2000,) and {*np.unique(resampled.round(6))} <= {*np.unique(
        [round((2 * a + 4 * c) / 3, 6) for a in range(4) for c in range(4 - a)]
    )}  # fmt: skip


def test_equal_seeds_train_equal_regressors():
    numbers = torch.linspace(20, 60, 12)
    images = numbers.view(-1, 1, 1, 1, 1) / 80 + 0.05 * torch.rand(12, 1, *SHAPE)
    first, second = (train_regressor(images, numbers, seed=3, iterations=5) for _ in range(2))
    assert torch.equal(regress(first, images), regress(second, images))
    with pytest.raises(ValueError, match="the same for all 12 volumes"):
        train_regressor(images, torch.full((12,), 3.0), seed=0, iterations=1)
    with pytest.raises(ValueError, match="too small"):
        train_regressor(images[..., :8], numbers, seed=0, iterations=1)
