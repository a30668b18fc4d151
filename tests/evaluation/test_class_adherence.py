"""evaluate.py conditions: volumes that are bright or dark, so that the classifier's answers are known."""

import json

import numpy as np
import pytest
import torch
import yaml

import evaluate
from evaluation.data.volume_sets import generated_cases, load_classes
from evaluation.networks.classifier import classify, train_classifier
from evaluation.studies.class_adherence import (
    compare_class_rates,
    describe_sizes,
    rates,
)
from pipelines.storage.provenance import sidecar_path
from volumes import Case, DataConfig, Volume, write_volume

SHAPE = (16, 16, 16)
SPLITS = {"train": 3, "test": 2}


def write(path, bright: bool, seed: int) -> None:
    noise = np.random.default_rng(seed).uniform(0, 20, (1, *SHAPE))
    write_volume(Volume((noise + (70 if bright else 10)).astype(np.float32), np.eye(4)), path)


@pytest.fixture
def folder(tmp_path):
    """Bright and dark volumes in both splits, the dark ones thrice as many, and the config that reads them."""
    rows = []
    for split, count in SPLITS.items():
        for number in range(4 * count):
            kind = "bright" if number % 4 == 0 else "dark"
            name = f"{split}{number}"
            write(tmp_path / f"images/{name}.nii.gz", kind == "bright", len(rows))
            rows.append(f"{name},{split},{kind}")
    (tmp_path / "table.csv").write_text("\n".join(["name,split,kind", *rows]) + "\n")
    data = {
        "root": str(tmp_path),
        "table": "table.csv",
        "images": "images/{name}.nii.gz",
        "split": "split",
        "validation_fraction": 0,
        "intensity": {"kind": "window", "low": 0, "high": 100},
        "classes": {"kind": ["dark", "bright"]},
    }
    (tmp_path / "ldm.yaml").write_text(yaml.safe_dump({"data": data}))
    return tmp_path


def generate(folder, swapped: bool) -> None:
    """What generate.py would write, of a model that obeys or of one that has the labels the wrong way round."""
    for number in range(10):
        kind = "bright" if number < 5 else "dark"
        path = folder / f"made/row_{number:04d}_000.nii.gz"
        write(path, (kind == "bright") != swapped, 100 + number)
        sidecar_path(path).write_text(json.dumps({"synthetic": True, "classes": {"kind": kind}, "numbers": None}))


def judge(folder, *more: str):
    args = ["conditions", "--config", str(folder / "ldm.yaml"), "--synthetic", str(folder / "made"), "--column", "kind"]
    args += ["--output", str(folder / "report.json"), "--device", "cpu", "--precision", "no", "--seeds", "2"]
    return evaluate.main([*args, "--iterations", "15", "--shape", "16", "16", "16", *more])


def test_an_obedient_model_differs_from_one_with_swapped_labels(folder, capsys):
    generate(folder, swapped=False)
    report = judge(folder)
    assert report["real"]["right"] == report["generated"]["right"] == 1
    assert report["difference_points"] == {"right": 0, "interval": [0, 0], "balanced": 0}
    assert report["volumes"]["test"] == {"dark": 6, "bright": 2}
    assert [row["seed"] for row in report["seeds"]] == [0, 1]
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    assert "generated minus real: +0.0 points" in capsys.readouterr().out
    generate(folder, swapped=True)
    report = judge(folder)
    assert report["real"]["right"] == 1 and report["generated"]["right"] == 0
    assert report["generated"]["per_class"] == {"dark": 0, "bright": 0}
    assert report["difference_points"]["right"] == -100


def test_what_cannot_be_judged_is_refused(folder):
    (folder / "made").mkdir()
    with pytest.raises(ValueError, match="made: no volume with a sidecar"):
        judge(folder)
    generate(folder, swapped=False)
    with pytest.raises(ValueError, match=r"'sex' is not a class or number of the data; choose one of \['kind'\]"):
        judge(folder, "--column", "sex")
    for path in (folder / "made").glob("*.json"):
        path.write_text(json.dumps({"synthetic": True, "classes": {"kind": "dark"}}))
    with pytest.raises(ValueError, match=r"\['bright'\]: has real test volumes, but no generated"):
        judge(folder)
    (folder / "made/row_0000_000.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"row_0000_000.json: its volume has no file of \['image'\]"):
        judge(folder)


def test_each_class_counts_by_its_share():
    right, classes = np.array([1.0, 1, 0, 0.5]), np.array([0, 0, 1, 1])
    overall, of_class = rates(right, classes, np.array([0.8, 0.2]))
    assert of_class == [1, 0.25] and overall == pytest.approx(0.85)


def test_the_difference_is_weighted_and_its_interval_spans_it():
    """Real: 80 of 100 of the first class and 10 of 20 of the second; generated, as many of each: 60 of 100 and 90 of
    100."""
    real = np.concatenate([np.repeat([1.0, 0], [80, 20]), np.repeat([1.0, 0], [10, 10])])
    made = np.concatenate([np.repeat([1.0, 0], [60, 40]), np.repeat([1.0, 0], [90, 10])])
    found = compare_class_rates(
        real, np.repeat([0, 1], [100, 20]), made, np.repeat([0, 1], [100, 100]), ["normal", "ill"]
    )
    assert found["real"]["right"] == pytest.approx(90 / 120) and found["real"]["balanced"] == pytest.approx(0.65)
    assert found["generated"]["right"] == pytest.approx((0.6 * 100 + 0.9 * 20) / 120)
    assert found["generated"]["per_class"] == {"normal": 0.6, "ill": 0.9}
    assert found["difference_points"]["right"] == pytest.approx(-10)
    # by hand: (100/120)^2 (0.8 0.2 + 0.6 0.4) / 100 + (20/120)^2 (0.5 0.5 / 20 + 0.9 0.1 / 100) = 0.0564^2
    low, high = found["difference_points"]["interval"]
    assert low == pytest.approx(-10 - 1.96 * 5.64, abs=1) and high == pytest.approx(-10 + 1.96 * 5.64, abs=1)


def test_equal_seeds_train_equal_classifiers_and_weigh_classes():
    """Of 12 volumes one is bright: a classifier that always says dark would be wrong about it."""
    random = torch.Generator().manual_seed(0)
    classes = torch.tensor([1] + [0] * 11)
    images = 0.3 * torch.rand(12, 1, *SHAPE, generator=random) + 0.5 * classes.view(-1, 1, 1, 1, 1)
    first, second = (train_classifier(images, classes, 2, seed=3, iterations=15) for _ in range(2))
    assert torch.equal(classify(first, images), classes)
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"classes number \[2\] have no volume"):
        train_classifier(images, classes, 3, seed=0, iterations=1)
    with pytest.raises(ValueError, match="too small"):
        train_classifier(images[..., :8], classes, 2, seed=0, iterations=1)


def test_sizes_are_in_milliliters(tmp_path):
    """Voxels of 2 x 3 x 4 mm: 50 and 100 of them are 1.2 and 2.4 ml, 4.8 ml where there are 200."""
    cases = []
    for number, count in enumerate((50, 100, 200)):
        labels = np.zeros((8, 8, 8), np.uint8)
        labels.ravel()[:count] = 7
        path = tmp_path / f"{number}.nii.gz"
        write_volume(Volume(labels[None], np.diag([2.0, 3, 4, 1])), path)
        metadata = {"kind": "small" if number < 2 else "large"}
        cases.append(Case(str(number), subject=str(number), images={"image": path}, metadata=metadata))
    kinds, labels = ["large", "small"], {0: "background", 7: "gland"}
    config = DataConfig(root=str(tmp_path), images="*.nii.gz", image_labels=labels, classes={"kind": kinds})
    sizes = describe_sizes(load_classes(cases, config, "kind", (8, 8, 8)), kinds, config.channels)
    assert sizes["large"]["gland"] == pytest.approx({"p5": 4.8, "median": 4.8, "p95": 4.8})
    assert sizes["small"]["gland"] == pytest.approx({"p5": 1.26, "median": 1.8, "p95": 2.34})


def test_generated_volumes_are_read_as_the_model_writes_them(tmp_path):
    """Files hold label 2 where the model has 1, and are 4-D with the volume at time point 1: generated ones are
    neither."""
    labels = np.zeros((1, 8, 8, 8), np.uint8)
    labels[0, :4] = 1
    labels[0, 4:6] = 2
    write_volume(Volume(labels, np.eye(4)), tmp_path / "a.nii.gz")
    (tmp_path / "a.json").write_text(json.dumps({"synthetic": True, "classes": {"kind": "x"}}))
    names = {0: "background", 1: "cortex", 2: "medulla"}
    config = DataConfig(images="*.nii.gz", image_labels=names, label_map={2: 1, 3: 2}, classes={"kind": ["x"]})
    sizes = load_classes(generated_cases(tmp_path, config), config, "kind", (8, 8, 8)).sizes
    assert sizes is not None
    torch.testing.assert_close(sizes, torch.tensor([[0.256, 0.128]]))
    series = DataConfig(images="*.nii.gz", time_point=1, classes={"kind": ["x"]})
    assert load_classes(generated_cases(tmp_path, series), series, "kind", (8, 8, 8)).images.max() == 1
