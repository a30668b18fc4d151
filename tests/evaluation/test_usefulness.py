"""Usefulness where labels are few: intervals, what each arm learns from, the drawn labels, obedience to masks,
pre-training."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

import evaluate
from benchmarks.phantom_set import write_phantoms
from evaluation import generated_pairs, learning_cases, load_pairs, make_segmenter, mask_adherence, train_segmenter
from evaluation.commands import pretrain as pretrain_command
from evaluation.commands import trainings
from evaluation.commands.ledger import Ledger, content_of
from evaluation.data.label_budget import budget, draw_labeled
from evaluation.data.label_budget import main as draw_main
from evaluation.data.pairs import LoadedPairs
from evaluation.networks.pretraining import (
    BLOCK,
    HEAD,
    body,
    hide,
    pretrain,
)
from evaluation.stats.intervals import compare_paired, over_seeds, student_t
from evaluation.studies.few_labels import RATIOS, summarize, training_set
from evaluation.studies.training_result import Scores, TrainingResult
from evaluation.studies.utility import score_training
from pipelines import describe_mask, read_sidecar
from volumes import Case, DataConfig, load_cases, make_phantom, write_volume
from volumes.data.tables import read_table

SHAPE = (16, 16, 16)
QUICK = ["--device", "cpu", "--precision", "no", "--shape", "16", "16", "16"]


@pytest.fixture
def data(tmp_path):
    """Nine phantoms of six subjects as files, three volumes of two subjects for testing, and one generated from every
    mask: the real volume itself, twice as bright."""
    section = write_phantoms(tmp_path, [2 * number // 3 for number in range(9)], tests=3, validation_fraction=0.25)
    return tmp_path, DataConfig(**section)


def loaded(names: list[str], brightness: float) -> LoadedPairs:
    """A volume of one brightness for each name."""
    images = torch.full((len(names), 1, *SHAPE), brightness)
    return LoadedPairs(images, torch.zeros(len(names), *SHAPE, dtype=torch.uint8), [Case(n, n[0]) for n in names], [])


def cubes(count: int, moved: int = 0) -> LoadedPairs:
    """Bright cubes on black, with labels that lie `moved` voxels beside them."""
    images, labels = torch.zeros(count, 1, *SHAPE), torch.zeros(count, *SHAPE, dtype=torch.uint8)
    for i in range(count):
        images[i, 0, i : 8 + i, 4:12, 2:10] = 0.8
        labels[i, i : 8 + i, 4:12, 2 + moved : 10 + moved] = 1
    return LoadedPairs(images, labels, [Case(f"cube_{i}", f"S{i}") for i in range(count)], [])


# Intervals


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (2, 4.303), (11, 2.201), (30, 2.042), (120, 1.980)])
def test_students_t(freedom, t):
    assert student_t(freedom) == pytest.approx(t, abs=6e-4)


def test_interval_over_seeds():
    assert over_seeds([1, 2, 3]) == pytest.approx([2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5])
    assert over_seeds([0.8]) is None


def test_a_constant_gain_has_no_spread_over_subjects():
    reference = np.array([[0.2, 0.9, 0.5], [0.3, 0.7, 0.5]])
    found = compare_paired(reference + 0.1, reference, ["a", "b", "c"], "difference")
    assert found["of_means"] == pytest.approx(0.1) and found["per_seed"] == pytest.approx([0.1, 0.1])
    assert found["interval_subjects"] == pytest.approx([0.1, 0.1])
    found = compare_paired(reference * 1.2, reference, ["a", "b", "c"], "ratio")
    assert found["interval_subjects"] == pytest.approx([1.2, 1.2]) and found["interval_seeds"] == pytest.approx(
        [1.2, 1.2]
    )


def test_a_seeds_ratio_is_of_its_means():
    """(1 + 2) / (1 + 4), not the mean of 1 and 1/2: a volume that both find hard must not count most."""
    found = compare_paired(np.array([[1.0, 2], [2, 2]]), np.array([[1.0, 4], [1, 1]]), ["a", "b"], "ratio")
    assert found["per_seed"] == [0.6, 2] and found["of_means"] == pytest.approx(7 / 7)


def test_the_subject_is_the_unit_of_the_bootstrap():
    """Two subjects of fifty equal volumes each are two observations, not a hundred."""
    values, zero = np.repeat([[0.0, 1.0]], 50, axis=1), np.zeros((1, 100))
    of_two = compare_paired(values, zero, ["a"] * 50 + ["b"] * 50, "difference")["interval_subjects"]
    of_many = compare_paired(values, zero, [str(i) for i in range(100)], "difference")["interval_subjects"]
    assert of_two == [0, 1] and 0.38 < of_many[0] < 0.42 and 0.58 < of_many[1] < 0.62
    with pytest.raises(ValueError, match=r"\(1, 100\).*for 2 volumes do not pair up"):
        compare_paired(values, zero, ["a", "b"], "difference")


# Which volumes have labels


def test_drawn_subjects_are_nested_and_ignore_the_file_order():
    """The labels that are drawn are those of whole subjects."""
    cases = [Case(f"{subject}{scan}", subject) for subject in "abcdefgh" for scan in range(2)]
    draws = {k: [cases[i].name for i in draw_labeled(cases, k, 0)] for k in (3, 4, 8, 16)}
    assert draws[8][:4] == draws[4] and draws[4][:3] == draws[3] and sorted(draws[16]) == [c.name for c in cases]
    assert len({name[0] for name in draws[8]}) == 4  # whole subjects
    backwards = cases[::-1]
    assert [backwards[i].name for i in draw_labeled(backwards, 8, 0)] == draws[8]
    assert [cases[i].name for i in draw_labeled(cases, 8, 1)] != draws[8]
    for k in (0, 17):
        with pytest.raises(ValueError, match=f"{k} labeled volumes cannot be chosen from 16"):
            draw_labeled(cases, k, 0)


def test_budgets():
    assert [budget("all", 16), budget("8", 16)] == [16, 8]
    for text in ("17", "0", "-1", "some"):
        with pytest.raises(ValueError, match=rf"--labels {text}: .*1 to 16"):
            budget(text, 16)


def test_a_table_restricts_every_reader_of_the_config(data, capsys):
    """Only the volumes that were drawn are read."""
    folder, config = data
    learn = learning_cases(load_cases(config))
    expected = {learn[i].name for i in draw_labeled(learn, 4, 7)}
    args = ["--config", str(folder / "config.yaml"), "--k", "4", "--seed", "7"]
    draw_main([*args, "--output", str(folder / "k4/table.csv")])
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train and evaluate with: "))
    overrides = dict(re.findall(r"--data\.(\w+) (\S+)", told))
    assert overrides == {"table": "k4/table.csv", "split": "split"}
    restricted = load_cases(DataConfig(**{**yaml.safe_load((folder / "config.yaml").read_text())["data"], **overrides}))
    assert {case.name for case in restricted if case.split != "test"} == expected
    assert {case.name for case in restricted if case.split == "test"} == {"case_6", "case_7", "case_8"}
    assert any(case.split == "validation" for case in restricted)  # of the four: the generator gets no other volume
    masks = [(folder / "k4" / row["mask"]).resolve() for row in read_table(folder / "k4/table_masks.csv")]
    assert {mask.name.removesuffix(".nii.gz") for mask in masks} == expected and all(mask.is_file() for mask in masks)
    test_masks = [row["mask"] for row in read_table(folder / "k4/table_test_masks.csv")]
    assert test_masks == [f"../labels/case_{number}.nii.gz" for number in (6, 7, 8)]


def test_a_table_is_written_unless_the_files_have_no_names(data):
    """Data without a table get one."""
    folder, _ = data
    section = {
        "root": str(folder),
        "images": "images/{volume}.nii.gz",
        "masks": "labels/{volume}.nii.gz",
        "test_fraction": 0.3,
        "label_names": {0: "background", 1: "body"},
    }
    for name, pattern in (("named", "{volume}"), ("star", "*")):
        of_pattern = {
            key: value.replace("{volume}", pattern) if isinstance(value, str) else value
            for key, value in section.items()
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"data": of_pattern}))
    before = load_cases(DataConfig(**section))
    draw_main(["--config", str(folder / "named.yaml"), "--k", "2", "--output", str(folder / "two.csv")])
    after = load_cases(DataConfig(**{**section, "table": "two.csv", "split": "split", "test_fraction": 0.0}))
    tests = [{case.name for case in cases if case.split == "test"} for cases in (before, after)]
    assert tests[0] == tests[1] and len(after) == len(tests[0]) + 2
    with pytest.raises(ValueError, match=r"images/\*\.nii\.gz.*\{name\} instead of \*"):
        draw_main(["--config", str(folder / "star.yaml"), "--k", "2", "--output", str(folder / "star.csv")])


# What the arms learn from, and against each other


def test_what_each_arm_learns_from():
    real, made = loaded(["a0", "a1", "b0", "c0"], 0.25), loaded(["a0", "a0", "a1", "b0", "c0", "c0"], 0.75)

    def learned(arm, **options):
        found = training_set(arm, real, made, [3, 0], **options)
        return [
            (case.name, round(image.mean().item(), 2)) for case, image in zip(found.cases, found.images, strict=True)
        ]

    few = [("c0", 0.25), ("a0", 0.25)]
    all_made = [(name, 0.75) for name in ("a0", "a0", "a1", "b0", "c0", "c0")]
    own_made = [(name, 0.75) for name in ("a0", "a0", "c0", "c0")]
    assert learned("real") == learned("real_longer") == few
    assert learned("synthetic") == all_made and learned("synthetic", masks="own") == own_made
    assert learned("both") == few * 3 + all_made  # as many real ones as synthetic ones
    assert learned("both", masks="own") == few * 2 + own_made
    assert learned("both", balanced=False) == few + all_made
    with pytest.raises(ValueError, match=r"from the masks of \['b0'\]"):
        training_set("synthetic", real, made.take([0]), [2], masks="own")


def test_comparisons_of_planted_scores():
    def row(arm, labels, seed, dice):
        per_volume = [dice - 0.1, dice + 0.1]
        return TrainingResult(arm=arm, labels=labels, seed=seed, dice=dice, per_label=[dice], per_volume=per_volume)

    rows = [row("real", "8", 0, 0.5), row("real", "8", 1, 0.7), row("real", "all", 0, 0.8)]
    rows += [row("both", "8", 0, 0.6), row("synthetic", "any", 0, 0.4), row("synthetic", "any", 1, 0.4)]
    found = summarize(rows, ["p", "q"], RATIOS, "ratio")
    assert found["dice"]["real"]["8"]["mean"] == pytest.approx(0.6)
    assert found["dice"]["synthetic"]["any"]["per_seed"] == [0.4, 0.4]
    both = found["ratios"]["both/real"]
    assert list(both) == ["8"] and both["8"]["of_means"] == pytest.approx(0.6 / 0.5)  # of the seed that both have
    synthetic = found["ratios"]["synthetic/real"]
    assert list(synthetic) == ["8", "all"] and synthetic["8"]["of_means"] == pytest.approx(0.4 / 0.6)
    assert synthetic["all"]["of_means"] == pytest.approx(0.4 / 0.8) and "both/real_longer" not in found["ratios"]
    gap = summarize(rows, ["p", "q"], [("both", "real")], "difference")["differences"]["both-real"]["8"]
    assert gap["of_means"] == pytest.approx(0.1) and gap["interval_seeds"] is None


def test_few_labels_is_taken_up_where_it_stopped(data, monkeypatch):
    folder, _ = data
    args = ["few_labels", "--config", str(folder / "config.yaml"), "--synthetic", str(folder / "made"), *QUICK]
    args += ["--output", str(folder / "few.json"), "--seeds", "2", "--iterations", "1"]
    learned = []

    def score(learn, judge, num_labels, **options):
        learned.append((len(learn.images), len(judge.images), options["seed"], options["iterations"]))
        return score_training(learn, judge, num_labels, **options)

    monkeypatch.setattr(trainings, "score_training", score)
    evaluate.main([*args, "--labels", "2"])
    per_seed = [(2, 3, 1), (6, 3, 1), (12, 3, 2), (2, 3, 2)]  # real, synthetic, both (balanced), real_longer
    assert learned == [(volumes, judged, seed, steps) for seed in (0, 1) for volumes, judged, steps in per_seed]
    learned.clear()
    report = evaluate.main([*args, "--labels", "2", "all", "--train_on", "real", "synthetic"])
    assert learned == [(6, 3, 0, 1), (6, 3, 1, 1)]  # only what was not there: real at all labels
    assert json.loads(json.dumps(report)) == json.loads((folder / "few.json").read_text()) and len(report["rows"]) == 10
    assert set(report["ratios"]["both/real"]) == {"2"} and set(report["ratios"]["synthetic/real"]) == {"2", "all"}
    assert all(len(row["per_volume"]) == 3 for row in report["rows"])
    with pytest.raises(ValueError, match=r"few.json: holds figures of another protocol"):
        evaluate.main([*args, "--labels", "2", "--mix", "plain"])
    with pytest.raises(ValueError, match="--labels 7: .*1 to 6"):
        evaluate.main([*args, "--labels", "7"])
    image, _, _ = make_phantom(50, SHAPE)  # the generator was retrained: the folder is the same, its volumes are not
    write_volume(image, folder / "made/case_0_000.nii.gz")
    with pytest.raises(ValueError, match="few.json: holds figures of another content; .*delete it"):
        evaluate.main([*args, "--labels", "2"])


def test_a_ledger_is_of_the_same_volumes_names_and_subjects(tmp_path):
    real = loaded(["a0", "b0"], 0.25)
    assert content_of(real) == content_of(loaded(["a0", "b0"], 0.25))
    others = loaded(["a0", "b0"], 0.5), loaded(["a0", "c0"], 0.25), real.take([0]), real.take([1, 0])
    assert len({content_of(real), *map(content_of, others)}) == 5
    report = {"evaluation": "few_labels", "protocol": {}, "data": {}, "synthetic": "made"}
    path = tmp_path / "few.json"
    rows = [{"arm": "real", "labels": "8", "seed": 0, "dice": 0.5, "per_label": [0.5], "per_volume": [0.5, 0.5]}]
    path.write_text(json.dumps({**report, "content": content_of(real), "rows": rows}))
    ledger = Ledger(path, {**report, "content": content_of(real)}, lambda rows: {})
    assert ledger.missing([("real", "8", 0), ("real", "8", 1)]) == [("real", "8", 1)]
    ledger.write()
    with pytest.raises(ValueError, match="another content"):
        Ledger(path, {**report, "content": content_of(others[0])}, lambda rows: {})
    path.write_text(json.dumps({**report, "rows": rows}))  # of unknown volumes
    with pytest.raises(ValueError, match="another content"):
        Ledger(path, {**report, "content": content_of(real)}, lambda rows: {})


# Does a volume obey its mask


def test_volumes_of_test_masks_are_found_to_be_judged(data):
    folder, config = data
    cases = load_cases(config)
    found = [path.name for pair in generated_pairs(cases, folder / "made", "test") for path in pair.generated or ()]
    assert found == [f"case_{number}_000.nii.gz" for number in (6, 7, 8)]
    assert [case.name for case in load_pairs(generated_pairs(cases, folder / "made", "test"), config, SHAPE).cases] == [
        "case_6",
        "case_7",
        "case_8",
    ]
    for number in (6, 7, 8):
        (folder / f"made/case_{number}_000.nii.gz").unlink()
    with pytest.raises(ValueError, match="none of its 6 volumes is named after a mask of the test split"):
        generated_pairs(cases, folder / "made", "test")


@pytest.mark.parametrize("file", ["{outside}", "../../outside/map.nii.gz", None, "gone.nii.gz"])
def test_a_sidecar_leads_to_no_mask_outside_of_its_folder(data, tmp_path, file):
    """Nor does one of a mask that had no file end the evaluation."""
    _, config = data  # in tmp_path
    made = tmp_path / "made"
    record = {"synthetic": True, "software": "s", "model": "m", "seed": 1}
    for place in (made / "masks", tmp_path / "outside"):
        place.mkdir(exist_ok=True)
    volume = next(made.glob("*.nii.gz"))
    shutil.copy(volume, made / "new_000.nii.gz")
    outside = tmp_path / "outside/map.nii.gz"
    shutil.copy(volume, outside)
    outside.with_name("map.json").write_text(json.dumps(record))
    mask = {"file": file and file.format(outside=outside), "sha256": describe_mask(outside)["sha256"]}
    (made / "new_000.json").write_text(json.dumps({**record, "mask": mask}))
    found = {path.name for pair in generated_pairs(load_cases(config), made) for path in pair.generated or ()}
    assert found and "new_000.nii.gz" not in found


@pytest.mark.parametrize(
    "entry",
    [{"mask": [1]}, {"mask": {"file": 3}}, {"mask": {"sha256": [1]}}, {"classes": 5}, {"images": {"ct": "ct.nii.gz"}}],
)
def test_damaged_sidecars_are_named_when_read(tmp_path, entry):
    (tmp_path / "a_000.json").write_text(json.dumps({"synthetic": True, **entry}))
    with pytest.raises(ValueError, match=f"a_000.json: its {next(iter(entry))} is .*damaged"):
        read_sidecar(tmp_path / "a_000.nii.gz")


def test_a_volume_that_is_beside_its_mask_is_found():
    real, beside = cubes(3), cubes(3, moved=4)
    result = score_training(real, real, 2, arm="real", seed=0, iterations=30, synthetic=real.join(beside))
    assert result.on_synthetic is not None
    volumes = result.on_synthetic.per_volume
    same, moved = (
        mask_adherence([replace(result, on_synthetic=Scores(0.5, [0.5], part))], real.cases, real.cases)
        for part in (volumes[:3], volumes[3:])
    )
    assert same["real"] > 0.8 and same["synthetic-real"]["interval_subjects"] == [0, 0]
    # Half of each cube is outside its mask: Dice is about one half where the segmentation is right.
    assert moved["synthetic"] == pytest.approx(0.5, abs=0.1) and moved["synthetic-real"]["interval_subjects"][1] < -0.2


def test_masks_count_once_and_those_without_a_volume_not_at_all():
    real = [Case("a", "S1"), Case("b", "S1"), Case("c", "S2")]
    on_synthetic = Scores(0.5, [0.5], [0.4, 0.6, 0.5])
    result = TrainingResult(
        arm="real",
        labels="any",
        seed=0,
        dice=0.5,
        per_label=[0.5],
        per_volume=[0.8, 0.1, 0.6],
        on_synthetic=on_synthetic,
    )
    found = mask_adherence([result], real, [real[0], real[0], real[2]])
    assert (found["masks"], found["subjects"]) == (2, 2)
    assert found["real"] == pytest.approx(0.7) and found["synthetic"] == pytest.approx(0.5)
    assert found["synthetic-real"]["interval_subjects"] == pytest.approx([-0.3, -0.1])


def test_dice_judges_volumes_of_test_masks(data, capsys):
    folder, _ = data
    args = ["dice", "--config", str(folder / "config.yaml"), *QUICK, "--seeds", "1", "--iterations", "12"]
    args += ["--train_on", "real", "--output", str(folder / "dice.json")]
    judged = evaluate.main([*args, "--judge_synthetic", str(folder / "made")])
    # They are the real volumes, scaled, and the protocol scales them back.
    assert judged["adherence"]["real"] > 0.05 and judged["volumes"]["judge_synthetic"] == 3
    assert judged["adherence"]["synthetic-real"]["of_means"] == pytest.approx(0, abs=1e-3)
    assert judged["scores"]["real"][0]["on_synthetic"]["dice"] == pytest.approx(
        judged["scores"]["real"][0]["dice"], abs=1e-3
    )
    assert "generated from 3 test masks" in capsys.readouterr().out
    earlier = ["--earlier", str(folder / "dice.json"), "--judge_synthetic"]
    assert evaluate.main([*args, *earlier, str(folder / "made")])["adherence"] == judged["adherence"]
    (folder / "made").rename(folder / "renamed")
    with pytest.raises(ValueError, match="not scored on the volumes in .*renamed"):
        evaluate.main([*args, *earlier, str(folder / "renamed")])


# Pre-training without labels


def test_half_of_the_blocks_are_hidden_in_all_channels():
    images = torch.full((8, 2, 20, 16, 16), 0.5)
    changed = hide(images, torch.Generator().manual_seed(0)) - images
    blocks = (
        changed[:, :, :16].unfold(2, BLOCK, BLOCK).unfold(3, BLOCK, BLOCK).unfold(4, BLOCK, BLOCK).flatten(5).std(5)
    )
    hidden = blocks > 0.2  # uniform noise has a standard deviation of 0.29, visible voxels have 0.1
    assert torch.equal(hidden[:, 0], hidden[:, 1]) and 0.3 < hidden.float().mean() < 0.7
    assert (blocks[hidden] > 0.25).all() and (blocks[~hidden] < 0.12).all()


def test_pretraining_learns_to_restore_and_leaves_padding_out():
    losses = []
    pretrain(cubes(4).images + 0.1, seed=0, iterations=25, on_step=lambda _, loss: losses.append(loss))
    assert len(losses) == 25 and np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    empty = []
    pretrain(torch.zeros(2, 1, *SHAPE), seed=0, iterations=2, on_step=lambda _, loss: empty.append(loss))
    assert empty == [0, 0]


def test_fine_tuning_takes_the_body_and_a_seeded_head():
    """The body is the one it starts from; the head is that of its seed."""
    torch.manual_seed(5)
    other = body(make_segmenter(1, 2))
    volumes = cubes(2)
    torch.manual_seed(1)
    fresh = make_segmenter(1, 2).state_dict()
    trained = train_segmenter(volumes.images, volumes.labels, 2, seed=1, iterations=1, start=other).state_dict()
    heads = [name for name in trained if name not in other]
    assert heads and all(name.startswith(HEAD) for name in heads) and len(other) > 40
    for name, value in trained.items():  # one step of AdamW at a low rate moves a parameter by less than 1e-3
        torch.testing.assert_close(value, fresh[name] if name in heads else other[name], atol=1e-3, rtol=1e-3)
    torch.manual_seed(1)
    own = body(make_segmenter(1, 2))
    scratch, same = (
        train_segmenter(volumes.images, volumes.labels, 2, seed=1, iterations=3, start=start).state_dict()
        for start in (None, own)
    )
    assert all(torch.equal(scratch[name], same[name]) for name in scratch)  # no draw is changed by a start


def test_the_pretrained_body_has_all_layers_but_the_head():
    segmenter = make_segmenter(1, 3)
    names = {name for name in segmenter.state_dict() if not name.startswith(HEAD)}
    learned = pretrain(torch.rand(2, 1, *SHAPE), seed=0, iterations=1)
    assert set(learned) == names
    assert all(value.shape == segmenter.state_dict()[name].shape for name, value in learned.items())


def test_pretraining_that_learns_nothing_changes_nothing(data, monkeypatch):
    """The arms share draws and schedule, so a start that is the random one gives a difference of exactly 0."""
    folder, _ = data
    seen = []

    def nothing(images, *, seed, iterations, **_):
        seen.append((round(images.mean().item(), 4), len(images), seed, iterations))
        return {}

    monkeypatch.setattr(pretrain_command, "pretrain", nothing)
    args = ["pretrain", "--config", str(folder / "config.yaml"), "--synthetic", str(folder / "made"), *QUICK]
    args += ["--output", str(folder / "pretrain.json"), "--iterations", "1", "--pretrain_iterations", "9"]
    report = evaluate.main([*args, "--labels", "2", "all", "--seeds", "2"])
    assert [(count, seed, steps) for _, count, seed, steps in seen] == [(6, 0, 9), (6, 0, 9), (6, 1, 9), (6, 1, 9)]
    assert len(report["rows"]) == 12
    for name in ("synthetic-scratch", "real-scratch", "synthetic-real"):
        for labels in ("2", "all"):
            found = report["differences"][name][labels]
            assert found["per_seed"] == [0, 0] and found["interval_seeds"] == [0, 0] == found["interval_subjects"]
    seen.clear()
    evaluate.main([*args, "--labels", "2", "all", "--seeds", "2"])
    assert seen == []  # all is there


def test_pretrain_runs_whole(data):
    folder, _ = data
    args = ["pretrain", "--config", str(folder / "config.yaml"), "--synthetic", str(folder / "made"), *QUICK]
    args += ["--output", str(folder / "pretrain.json"), "--iterations", "2", "--pretrain_iterations", "2"]
    report = evaluate.main([*args, "--labels", "2", "--seeds", "1", "--starts", "scratch", "synthetic"])
    assert [row["arm"] for row in report["rows"]] == ["scratch", "synthetic"]
    scratch, started = (row["per_volume"] for row in report["rows"])
    assert scratch != started and set(report["differences"]) == {"synthetic-scratch"}
