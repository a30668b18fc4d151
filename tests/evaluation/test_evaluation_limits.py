"""What a data set is too small for is said before a model is trained, and before a command works; `all` shows the
rest."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from generated_sets import write_sets

import evaluate
from evaluation.commands import realism as realism_command
from evaluation.commands.arguments import Command
from evaluation.copies import fingerprints as copies
from evaluation.doctor.__main__ import main as doctor
from evaluation.studies.limits import CHECKS, Data, problems
from volumes import Case, DataConfig, load_cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """18 volumes, two a subject: 5 subjects to train on, 4 for testing."""
    return write_sets(tmp_path_factory.mktemp("sets"))


def cases(train: int, test: int, **metadata) -> list[Case]:
    """So many volumes of a subject each."""
    splits = ["train"] * train + ["test"] * test
    return [Case(f"c{i}", subject=f"S{i}", split=split, metadata=metadata) for i, split in enumerate(splits)]


CONFIG = DataConfig(root="nowhere", images="{name}.nii.gz", classes={"sex": ["F", "M"]})


def test_masks_known_in_part_are_named_before_any_work():
    """As segmenters would refuse them, after hours of generation."""
    names = {"masks": "m/{name}.nii.gz", "label_names": {0: "background", 1: "organ"}, "label_map": {255: -2}}
    listed = [replace(case, mask=Path("m.nii.gz")) for case in cases(10, 4)]
    for on_error in ("raise", "skip"):
        config = DataConfig(images="i/{name}.nii.gz", on_error=on_error, **names)
        found = problems("dice", Data(listed, config), {})
        assert ("unknown where masks hold 255 (-2)" in "".join(found)) == (on_error == "raise") == bool(found)


def test_tissues_are_known_from_the_config():
    """One channel, two tissues and volumes of both splits; a number that varies in both."""
    labels = {0: "background", 1: "gray", 2: "white"}
    names = {"masks": "m/{name}.nii.gz", "label_names": labels, "empty_background": True, "numbers": ["age"]}
    config = DataConfig(images="i/{name}.nii.gz", **names)
    listed = [replace(case, metadata={"age": str(30 + n)}) for n, case in enumerate(cases(10, 4))]
    for command in ("adherence", "morphometry", "conditions"):
        assert problems(command, Data(listed, config)) == []
    two = replace(config, images={"ct": "c/{name}.nii.gz", "pet": "p/{name}.nii.gz"})
    assert "the data has the channels ct, pet" in problems("adherence", Data(listed, two))[0]
    assert problems("morphometry", Data(listed[:12], config)) == [
        "2 test volumes are too few to compare; give 4 or more"
    ]
    same = [replace(case, metadata={"age": "30"}) for case in listed]
    assert problems("conditions", Data(same, config)) == [
        "no two volumes of split train differ in age: there is nothing to predict"
    ]


@pytest.mark.parametrize(
    ("command", "train", "test", "options", "said"),
    [
        ("realism", 10, 3, {}, "3 test volumes are too few to compare; give 4 or more"),
        ("realism", 3, 3, {}, "3 training volumes and 3 test volumes are too few"),
        ("realism", 10, 1, {"parts": ["diversity"]}, "1 test volumes do not contain a pair of different subjects"),
        ("realism", 10, 0, {}, "no case is in split test"),
        ("realism", 10, 4, {}, None),
        ("realism", 10, 2, {"parts": ["diversity"]}, None),
        ("privacy", 10, 5, {}, "each of 5 unseen subjects is compared with the others, and 4 subjects are too few"),
        ("privacy", 10, 5, {}, r"take alpha >= 0.2, or hold out 20 subjects"),
        ("privacy", 10, 19, {}, "18 subjects are too few"),
        ("privacy", 10, 20, {}, None),
        ("privacy", 10, 5, {"alpha": 0.2}, None),
        ("privacy", 1, 20, {}, "references of two subjects"),
        ("reconstruction", 10, 0, {}, "no case is in split 'test'"),
        ("reconstruction", 10, 0, {"split": "train"}, None),
        ("copies", 10, 18, {}, "18 subjects are too few"),
        ("copies", 10, 19, {}, None),
        ("samplers", 10, 3, {}, "3 test volumes are too few"),
        ("shapes", 10, 10, {}, "give a config whose data has image_labels"),
        ("few_labels", 10, 10, {"labels": ["12"]}, "--labels 12: give numbers of volumes from 1 to 10"),
        ("conditions", 10, 4, {}, "no volume of split train is of sex M"),
        ("conditions", 10, 4, {"column": "age"}, "'age' is not a class or number of the data; choose one of ['sex']"),
        ("adherence", 10, 4, {}, "set data.masks"),
        ("morphometry", 10, 4, {}, "give a config whose data has empty_background"),
    ],
)  # fmt: skip
def test_limits_are_known_from_the_counts(command, train, test, options, said):
    found = problems(command, Data(cases(train, test, sex="F"), CONFIG), options)
    found = [one for one in found if "segmenter" not in one]  # these cases have no masks
    if said is None:
        assert found == []
    else:
        assert any(said in one for one in found), found


def test_the_segmenter_shape_is_checked_before_generation(folder):
    config = DataConfig(**yaml.safe_load((folder / "ldm.yaml").read_text())["data"])
    data = Data(load_cases(config), config)
    for command in ("dice", "few_labels", "pretrain", "samplers"):
        found = problems(command, data, {"shape": [10, 16, 16], "labels": ["all"]})
        assert "shape (10, 16, 16): every side must be a multiple of 8, and at least 16" in found


def test_sizes_are_checked_where_they_are_known():
    some = cases(10, 4)
    assert any(
        "give 7 or more per side" in one for one in problems("realism", Data(some, CONFIG, [(16, 6, 16), (16, 16, 6)]))
    )
    assert any("shift 2 for sides (4, 16, 16)" in one for one in problems("privacy", Data(some, CONFIG, [(4, 16, 16)])))
    assert not problems("realism", Data(some, CONFIG, [(7, 7, 7)]))


def test_every_command_that_reads_data_has_its_limits():
    from evaluation.commands.run_all import PARTS

    assert PARTS.keys() <= CHECKS.keys()


def test_the_doctor_says_them_before_training(folder, capsys):
    doctor(["--config", str(folder / "ldm.yaml")])
    said = capsys.readouterr().out
    assert "WARN evaluation: evaluate.py privacy will refuse these splits: each of 4 unseen subjects" in said
    assert "WARN evaluation: evaluate.py few_labels will refuse these splits: --labels 16: give numbers" in said
    assert "OK   evaluation: the splits are large enough for reconstruction, realism, dice" in said
    advice = dict(zip(said.splitlines(), said.splitlines()[1:], strict=False))
    few = next(line for line in advice if "few_labels will refuse" in line)
    assert advice[few].strip() == "-> give such --labels, or skip the command"  # not to hold out more


def test_a_command_says_them_before_it_reads_a_volume(folder, monkeypatch, tmp_path):
    config = yaml.safe_load((folder / "ldm.yaml").read_text())
    text = (folder / "subjects.csv").read_text()
    few = text.replace("test", "left_out").replace("S5,left_out", "S5,test")  # two volumes
    (folder / "few.csv").write_text("\n".join(line for line in few.splitlines() if "left_out" not in line) + "\n")
    config["data"]["table"] = "few.csv"
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(config))

    def work(*_, **__):
        raise AssertionError("read volumes first")

    monkeypatch.setattr("evaluation.commands.sets.real_set", work)
    args = ["--config", str(tmp_path / "few.yaml"), "--synthetic", str(folder / "fresh"), "--device", "cpu"]
    with pytest.raises(ValueError, match="realism: 2 test volumes are too few to compare"):
        evaluate.main(["realism", *args, "--output", str(tmp_path / "realism.json")])
    assert not (tmp_path / "realism.json").exists()


def everything(folder, out, *more: str) -> dict:
    args = ["all", "--config", str(folder / "ldm.yaml"), "--synthetic", str(folder / "fresh"), "--device", "cpu"]
    return evaluate.main([*args, "--precision", "no", "--output", str(out), *more])


def test_all_writes_the_page_of_successes_and_names_failures(folder, tmp_path, monkeypatch, capsys):
    """privacy is refused by the counts, shapes by the config, and dice falls over half way."""

    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("evaluation.commands.trainings.score_training", broken)
    parts = ["--parts", "privacy", "dice", "realism", "--set", "realism.parts=consistency"]
    with pytest.raises(
        ValueError, match=r"(?s)report.html lacks .*privacy: each of 4 unseen .*dice: RuntimeError: out of"
    ):
        everything(folder, tmp_path, *parts)
    said = capsys.readouterr()
    assert said.out.index("privacy: cannot be measured: each of 4") < said.out.index("dice: was not measured")
    page = json.loads((tmp_path / "report.json").read_text())
    assert list(page["reports"]) == ["realism"] and list(page["missing"]) == ["privacy", "dice"]
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert (
            ("<h2>Not measured" in text or "## Not measured" in text)
            and "out of memory" in text
            and "4 unseen subjects" in text
        )
    monkeypatch.undo()
    settings = ["dice.seeds=1", "dice.iterations=1", "dice.shape=16 16 16", "dice.train_on=real", "privacy.alpha=0.34"]
    settings += ["privacy.spaces=image", "privacy.pairs=0"]
    page = everything(folder, tmp_path, *parts, *settings)
    assert set(page["reports"]) == {"realism", "dice", "privacy"} and page["missing"] == {}
    assert "realism: " in capsys.readouterr().out  # is there, and not measured again
    assert "<h2>Not measured" not in (tmp_path / "report.html").read_text()


def test_a_damaged_report_of_an_earlier_run_loses_nothing(folder, tmp_path):
    (tmp_path / "realism.json").write_text('{"evaluation": "real')
    page = everything(folder, tmp_path, "--parts", "realism", "--set", "realism.parts=consistency")
    assert list(page["reports"]) == ["realism"] and json.loads((tmp_path / "realism.json").read_text())["consistency"]


def test_nothing_is_generated_for_what_cannot_be_measured(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "generate_volumes", lambda *_: pytest.fail("generated first"))
    args = ["all", "--config", str(folder / "ldm.yaml"), "--device", "cpu", "--output", str(tmp_path)]
    with pytest.raises(ValueError, match="nothing can be measured:\nprivacy: cannot be measured: each of 4 unseen"):
        evaluate.main([*args, "--pipeline", "weights/hippocampus", "--parts", "privacy"])
    with pytest.raises(ValueError, match="dice has no option sides"):
        evaluate.main([*args, "--pipeline", "weights/hippocampus", "--parts", "dice", "--set", "dice.sides=3"])


@pytest.mark.parametrize("command", ["reconstruction", "realism", "dice", "privacy"])
def test_an_unwritable_report_is_refused_before_the_work(folder, tmp_path, monkeypatch, command):
    monkeypatch.setattr(Command, "run", lambda *_: pytest.fail("worked first"))
    (tmp_path / "file").touch()
    args = [command, "--config", str(folder / "ldm.yaml"), "--device", "cpu"]
    args += ["--vae", "weights/hippocampus"] if command == "reconstruction" else ["--synthetic", str(folder / "fresh")]
    monkeypatch.setattr("evaluation.commands.common.check_test_set", lambda *_: None)
    for output, said in ((tmp_path, "is a folder; give a file in it"), (tmp_path / "file/x.json", "cannot be written")):
        with pytest.raises(ValueError, match=f"--output {output}: {said}"):
            evaluate.main([*args, "--output", str(output)])


@pytest.mark.parametrize("program", [doctor, copies.main])
def test_nor_is_one_of_the_other_programs(folder, tmp_path, monkeypatch, program):
    for work in ("evaluation.doctor.__main__.before_training", "evaluation.copies.fingerprints.VolumeDataset"):
        monkeypatch.setattr(work, lambda *_: pytest.fail("worked first"))
    more = [] if program is doctor else ["--alpha", "0.3"]
    with pytest.raises(ValueError, match=f"--output {tmp_path}: is a folder"):
        program(["--config", str(folder / "ldm.yaml"), "--output", str(tmp_path), *more])


def test_too_few_generated_volumes_are_refused_before_features(folder, tmp_path, monkeypatch):
    made = tmp_path / "made"
    made.mkdir()
    for number in range(3):
        for path in (folder / "fresh").glob(f"case_{number}_000.*"):
            (made / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(realism_command, "load_extractors", lambda *_: pytest.fail("worked first"))
    args = ["--config", str(folder / "ldm.yaml"), "--synthetic", str(made), "--device", "cpu"]
    with pytest.raises(ValueError, match="3 generated volumes are too few to compare"):
        evaluate.main(["realism", *args, "--output", str(tmp_path / "realism.json")])
