"""The test of usefulness: which volumes it reads, and that it agrees with the reference protocol."""

import importlib.util
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import shared_folder

import evaluate
from benchmarks.phantom_set import write_phantoms
from evaluation import (
    Pair,
    generated_pairs,
    learning_cases,
    load_pairs,
    protocol,
    ratios,
    test_cases,
    train_segmenter,
)
from evaluation.networks.segmenter import volume_dice
from evaluation.report import read_config
from evaluation.stats.bootstrap import resample_subjects
from evaluation.studies.training_result import TrainingResult
from volumes import (
    DataConfig,
    IntensityScaling,
    Volume,
    VolumeError,
    load_cases,
    make_phantom,
    read_mask,
    read_volume,
    write_volume,
)

test_cases.__test__ = False  # a function of ours, not a test
SHAPE = (16, 16, 16)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def data(tmp_path):
    """Six phantoms as files, two of them for testing, with a volume generated from every mask."""
    # case_9, case_10, ...: no name may be taken for the beginning of another
    section = write_phantoms(tmp_path, range(6), tests=2, first=9, validation_fraction=0.25)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": section, "model": {"class": "not.Read"}}))
    return tmp_path, DataConfig(**section)


def test_learning_is_from_all_but_the_test_split(data):
    cases = load_cases(data[1])
    assert {case.split for case in cases} == {"train", "validation", "test"}
    assert [case.name for case in learning_cases(cases)] == ["case_10", "case_11", "case_12", "case_9"]
    assert [case.name for case in test_cases(cases)] == ["case_13", "case_14"]


def test_generated_volumes_are_matched_to_training_masks_only(data):
    """Those of test masks are not used."""
    folder, config = data
    cases = load_cases(config)
    image, _, _ = make_phantom(0, SHAPE)
    write_volume(image, folder / "made" / "case_10_001.nii.gz")
    write_volume(image, folder / "made" / "case_1_000.nii.gz")  # made from a mask that is not there
    found = [pair.generated[0].name for pair in generated_pairs(cases, folder / "made")]
    assert found == [f"case_{name}.nii.gz" for name in ("10_000", "10_001", "11_000", "12_000", "9_000")]
    with pytest.raises(ValueError, match="made from|named after a mask"):
        generated_pairs(cases, folder / "images" / "..")
    with pytest.raises(ValueError, match="no such folder.*generate.py"):
        generated_pairs(cases, folder / "nowhere")


def test_loading_scales_by_percentiles_and_aligns_the_mask(data):
    """Image and mask are placed alike."""
    folder, config = data
    cases = learning_cases(load_cases(config))
    real, made = (
        load_pairs(pairs, config, (24, 8, 16))
        for pairs in ([Pair(cases[0])], generated_pairs(cases, folder / "made")[:1])
    )
    assert real.images.shape == (1, 1, 24, 8, 16) and real.images.min() == 0 and real.images.max() == 1
    torch.testing.assert_close(made.images, real.images)  # twice as bright, plus one: the same after scaling
    mask = read_mask(cases[0].mask).array[0]
    assert np.array_equal(real.labels[0, 4:20].numpy(), mask[:, 4:12])
    assert real.labels[0, :4].max() == 0


def test_a_volume_on_another_grid_is_refused_or_skipped(data):
    folder, config = data
    cases = load_cases(config)
    write_volume(
        Volume(np.random.default_rng(0).random((1, 8, 8, 8), np.float32), np.eye(4)),
        folder / "made" / "case_9_000.nii.gz",
    )
    pairs = generated_pairs(cases, folder / "made")
    with pytest.raises(VolumeError, match=r"case_9_000.*not on the grid of .*case_9\.nii"):
        load_pairs(pairs, config, SHAPE)
    config.on_error = "skip"
    loaded = load_pairs(pairs, config, SHAPE)
    assert len(loaded.images) == 3 and loaded.skipped[0][0] == "case_9"


def test_the_configs_time_point_of_real_files_is_read(data):
    _folder, config = data
    case = learning_cases(load_cases(config))[0]
    volume = read_volume(case.images["image"])
    expected = load_pairs([Pair(case)], config, SHAPE).images
    write_volume(volume.replace(np.concatenate([np.flip(volume.array, 1), volume.array])), case.images["image"])
    config.time_point = 1
    assert torch.equal(load_pairs([Pair(case)], config, SHAPE).images, expected)


def test_a_segmenter_learns_what_is_plain(data):
    """A bright cube on black: a few steps suffice, and chance would not."""
    labels = torch.zeros(4, 16, 16, 16, dtype=torch.uint8)
    for i in range(4):
        labels[i, 2 + i : 10 + i, 4:12, 4:12] = 1
    images = labels[:, None].float() * 0.8
    (scores,) = volume_dice(train_segmenter(images, labels, 2, seed=0, iterations=40), images, labels, 2)
    assert len(scores) == 4 and scores.mean() > 0.9


def test_the_report_and_its_ratios(data, capsys):
    folder, _ = data
    args = [
        "dice",
        "--config",
        str(folder / "config.yaml"),
        "--seeds",
        "2",
        "--iterations",
        "5",
        "--shape",
        "16",
        "16",
        "16",
    ]
    args += ["--device", "cpu", "--precision", "no"]
    evaluate.main([*args, "--train_on", "real", "--output", str(folder / "real.json")])
    earlier = json.loads((folder / "real.json").read_text())
    del earlier["data"]["image_labels"]  # a setting without a value may be missing
    (folder / "real.json").write_text(json.dumps(earlier))
    args += ["--synthetic", str(folder / "made"), "--earlier", str(folder / "real.json")]
    evaluate.main([*args, "--train_on", "synthetic", "both", "--output", str(folder / "dice.json")])
    report = json.loads((folder / "dice.json").read_text())
    assert report["volumes"] == {"judge": 2, "real": 4, "synthetic": 4, "both": 8}
    scores = {source: [result["dice"] for result in results] for source, results in report["scores"].items()}
    # The generated volumes are the real ones, scaled, so each seed must score alike; `both` trains longer.
    assert scores["synthetic"] == pytest.approx(scores["real"], abs=0.02)
    assert report["ratios"]["synthetic/real"]["per_seed"]["1"] == pytest.approx(
        scores["synthetic"][1] / scores["real"][1]
    )
    assert report["earlier"] == {"real.json": earlier["commit"]}
    assert len(scores["both"]) == 2 and report["machine"]["cores"] >= 1
    assert report["scores"]["real"] == json.loads((folder / "real.json").read_text())["scores"]["real"]
    merged = ["--train_on", "real", "synthetic", "--earlier", str(folder / "real.json"), str(folder / "dice.json")]
    again = evaluate.main([*args[:-2], *merged, "--output", str(folder / "merged.json")])  # nothing is left to train
    assert again["scores"] == report["scores"] and again["ratios"] == report["ratios"]
    with pytest.raises(ValueError, match="trained on the volumes in"):
        copied = shutil.copytree(folder / "made", folder / "made_elsewhere")
        elsewhere = ["--synthetic", str(copied), "--output", str(folder / "other.json")]
        evaluate.main([*args, *elsewhere, "--earlier", str(folder / "dice.json")])
    with pytest.raises(ValueError, match="another protocol"):
        evaluate.main([*args, "--train_on", "synthetic", "--iterations", "6", "--output", str(folder / "other.json")])


def test_volumes_of_a_subject_are_resampled_together():
    counts = resample_subjects(["b", "a", "b", "c"], np.random.default_rng(0), one_by_one=True)
    assert (counts[:, 0] == counts[:, 2]).all()
    assert (counts[:, 0] != counts[:, 1]).any() and (counts[:, 1] != counts[:, 3]).any()
    assert (counts[:, [0, 1, 3]].sum(1) == 3).all()  # as many subjects as there are


def test_ratios_of_known_scores():
    def result(seed, *per_volume):
        dice = float(np.mean(per_volume))
        return TrainingResult(arm="", labels="any", seed=seed, dice=dice, per_label=[dice], per_volume=list(per_volume))

    real = [result(0, 0.9, 0.7, 0.8), result(1, 0.5, 0.7, 0.6)]
    scores = {"real": real, "synthetic": [result(0, 0.45, 0.35, 0.4)], "both": real}
    found = ratios(scores, ["a", "a", "b"])
    assert found["synthetic/real"] == {
        "of_means": pytest.approx(0.5),
        "per_seed": {"0": pytest.approx(0.5)},
        "interval_seeds": None,
        "interval_subjects": [pytest.approx(0.5), pytest.approx(0.5)],
    }
    assert found["both/real"]["per_seed"] == {"0": 1, "1": 1} and found["both/real"]["interval_seeds"] == [1, 1]
    better = {**scores, "both": [result(0, 0.9, 0.7, 1.0), result(1, 0.5, 0.7, 0.8)]}  # for subject b alone
    found = ratios(better, ["a", "a", "b"])["both/real"]
    assert found["interval_subjects"] == [pytest.approx(1.0), pytest.approx(0.9 / 0.7)]
    assert ratios({"synthetic": scores["synthetic"]}, ["a", "a", "b"]) == {}


def test_a_shape_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="40, 50, 40.*multiple of 8"):
        protocol((40, 50, 40), 600, None)


def test_missing_sections_and_folders_are_named(data):
    folder, _ = data
    (folder / "empty.yaml").write_text("model: {}\n")
    with pytest.raises(ValueError, match=r"empty.yaml: has no section `data`"):
        evaluate.main(["dice", "--config", str(folder / "empty.yaml"), "--output", str(folder / "out.json")])
    with pytest.raises(ValueError, match="--synthetic is missing"):
        evaluate.main(["dice", "--config", str(folder / "config.yaml"), "--output", str(folder / "out.json")])


def test_agrees_with_the_reference_protocol(hippocampus, monkeypatch):
    """Same volumes, same network, same draws: the same numbers, to the last bit, as the fixed test computed in
    float32."""
    path = shared_folder("tools/segmenter_test.py")
    spec = importlib.util.spec_from_file_location("segmenter_test", path)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    recipe = read_config(ROOT / "configs/hippocampus/ldm.yaml")["data"]
    config = DataConfig(**{**recipe, "root": str(hippocampus), "intensity": IntensityScaling()})
    cases = load_cases(config)
    learn, judge = learning_cases(cases), test_cases(cases)
    assert (len(learn), len(judge)) == (172, 34)  # as the fixed test counts them
    chosen = {"learn": learn[:5], "judge": judge[:3]}
    theirs = {
        name: reference.stack([(case.images[config.channels[0]], case.mask) for case in listed])
        for name, listed in chosen.items()
    }
    ours = {
        name: load_pairs([Pair(case) for case in listed], config, reference.SHAPE) for name, listed in chosen.items()
    }
    for name in chosen:
        assert torch.equal(ours[name].images, theirs[name][0]) and torch.equal(ours[name].labels, theirs[name][1])

    middle = (..., slice(8, 32), slice(16, 40), slice(8, 32))  # to be quick
    (x, y), (judged_x, judged_y) = [(images[middle], labels[middle]) for images, labels in theirs.values()]
    segmenter = train_segmenter(x, y, 3, seed=1, iterations=20)
    scores = [dice.mean().item() for dice in volume_dice(segmenter, judged_x, judged_y, 3)]
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    expected = reference.train(x, y, 20, seed=1)
    for ours_weight, their_weight in zip(segmenter.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours_weight, their_weight)
    assert float(np.mean(scores)) == reference.dice(expected, judged_x, judged_y) > 0
