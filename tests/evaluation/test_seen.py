"""A model says whose volumes it learned from, without a name; what overlaps them does not judge it."""

import csv
import json
import logging
import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from tiny import tiny_pipeline
from trained_models import train, train_both, write_data

import evaluate
import generate
import train_ldm
import train_vae
from autoencoder.model import deciding
from evaluation.copies.fingerprints import CopyCheck, check_unseen_subjects
from evaluation.copies.fingerprints import main as make_fingerprints
from evaluation.data.label_budget import main as draw_labels
from evaluation.data.seen import check_models, read_test_cases, refuse_seen_cases
from evaluation.doctor import __main__ as doctor
from evaluation.report import check_report
from evaluation.studies import edit_borders as editing
from evaluation.studies import samplers
from files.atomic import UNFINISHED
from pipelines import MedVolumePipeline
from pipelines.storage.loading import load_autoencoder
from pipelines.storage.trained_on import GENERATED, read_generated, read_model, write_generated_by
from training.splits import refuse_seen
from volumes import Case, DataConfig, load_cases, read_volume, write_volume
from volumes.data.subjects import (
    UNRECORDED,
    check_subjects,
    find_overlap,
    join_records,
    marks_of,
    record_subjects,
    unknown_volumes,
    voxel_digests,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder: data/config.yaml, and an autoencoder and a pipeline that were trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_data(folder / "data")
    vae, pipeline = train_both(config, folder)
    vae.rename(folder / "vae")
    pipeline.rename(folder / "pipeline")
    return folder


@pytest.fixture(scope="module")
def generated(trained) -> Path:
    """A volume that generate.py made with the pipeline."""
    mask = sorted((trained / "data/labels").glob("*.nii.gz"))[0]
    arguments = ["--pipeline", str(trained / "pipeline"), "--masks", str(mask), "--steps", "1"]
    generate.main([*arguments, "--output", str(trained / "generated")])
    return trained / "generated"


ALL = ["--data.validation_fraction=0"]  # learn from the validation subjects of the base, too


def section(trained: Path, **changes) -> DataConfig:
    return replace(DataConfig(**read_section(trained)), **changes)


def read_section(trained: Path) -> dict:
    found = yaml.safe_load((trained / "data/config.yaml").read_text())["data"]
    return {key: value for key, value in found.items() if key != "intensity"}


def held_out(config: DataConfig) -> set[str]:
    return {case.subject for case in load_cases(config) if case.split == "test"}


# Records


def test_a_record_knows_its_own_and_nobody_else(trained):
    config = section(trained)
    cases = load_cases(config)
    train = [case for case in cases if case.split == "train"]
    record = record_subjects({"train": [marks_of(case, config) for case in train]})
    check_subjects([record])
    assert find_overlap([record], cases, config) == []
    wider = load_cases(replace(config, test_fraction=0.5))
    found = find_overlap([record], wider, config)
    expected = {c.name for c in wider if c.split != "train"} & {c.name for c in train}
    assert expected and {one.case.name for one in found} == expected
    assert {(one.role, one.kind) for one in found} == {("train", "subjects")}


def test_equal_trainings_have_equal_records_and_others_differ(trained):
    """The record of another training shares no digest."""
    config = section(trained)
    marks = [marks_of(case, config) for case in load_cases(config)]
    first, again, other = (record_subjects({"train": part}) for part in (marks, marks[::-1], marks[:-2]))
    assert first == again and first["salt"] != other["salt"]
    digests = [{d for text in record["train"].values() for d in text.split()} for record in (first, other)]
    assert len(digests[0]) == 30 and not digests[0] & digests[1]  # 10 subjects, 20 names


def test_validation_subjects_judge_nothing_but_validation(trained):
    config = section(trained)
    marks = [marks_of(case, config) for case in load_cases(config)]
    record = record_subjects({"validation": marks})
    found = find_overlap([record], load_cases(config), config)
    assert {one.case.split for one in found} == {"test"} and {one.role for one in found} == {"validation"}


def test_subjects_and_names_are_not_confused():
    """Volume 5 and subject 5 are of two people."""
    config = DataConfig(images="*.nii.gz", subject="patient")
    record = record_subjects({"train": [marks_of(Case("5", "3"), config)]})
    assert find_overlap([record], [Case("9", "5", "test")], config) == []
    plain = DataConfig(images="*.nii.gz")
    record = record_subjects({"train": [marks_of(Case("5", "5"), plain)]})
    assert find_overlap([record], [Case("9", "5", "test")], config) == []
    assert len(find_overlap([record], [Case("5", "77", "test")], config)) == 1


def test_equal_voxels_have_equal_digests_and_flat_channels_none():
    array = np.random.default_rng(0).integers(-5, 5, (2, 4, 5, 6)).astype(np.float32)
    assert voxel_digests(array) == voxel_digests(array.astype(np.int16)) == voxel_digests(np.asfortranarray(array))
    assert set(voxel_digests(array[::-1])) == set(voxel_digests(array)) and len(voxel_digests(array)) == 2
    assert len(voxel_digests(array, apart=False)) == 1
    assert voxel_digests(np.zeros((1, 4, 4, 4), np.float32)) == ()
    assert voxel_digests(array[:1].reshape(1, 5, 4, 6)) != voxel_digests(array[:1])


@pytest.mark.parametrize(
    "damaged",
    ["x", {}, [1], [{"salt": "a"}], [{"salt": "a", "train": {}, "validation": {}}], [{"unrecorded": False}]],
)
def test_damaged_records_are_refused(damaged, trained, tmp_path):
    with pytest.raises(ValueError, match="not a list of records"):
        check_subjects(damaged)
    shutil.copytree(trained / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps({**config, "subjects": damaged}))
    with pytest.raises(ValueError, match=r"config.json: subjects is not a list of records"):
        read_model(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"config.json: subjects is not a list of records"):
        load_autoencoder(tmp_path / "vae")


@pytest.mark.parametrize("damaged", ["x", [1], [{"salt": "a", "train": {}, "validation": {}}]])
def test_no_training_starts_from_a_model_of_damaged_records(damaged, trained):
    with pytest.raises(ValueError, match="init_from x: config.json: subjects is not a list of records"):
        refuse_seen(damaged, section(trained), None, "init_from x")


# What training leaves


def test_no_name_leaves_with_the_weights(trained, generated):
    names = {text for case in load_cases(section(trained)) for text in (case.subject, case.name)}
    for path in (trained / "vae/config.json", trained / "pipeline/unet/config.json", generated / GENERATED):
        words = set(path.read_text().replace('"', " ").replace(",", " ").split())
        assert "salt" in path.read_text() and not names & words


def test_the_record_changes_neither_model_hash_nor_latents_key(trained, tmp_path):
    pipe = MedVolumePipeline.from_pretrained(trained / "pipeline")
    shutil.copytree(trained / "pipeline", tmp_path / "bare")
    for name in ("vae", "unet"):
        path = tmp_path / "bare" / name / "config.json"
        config = json.loads(path.read_text())
        assert config.pop("subjects") and (name == "unet" or config.pop("data"))
        path.write_text(json.dumps(config))
    older = MedVolumePipeline.from_pretrained(tmp_path / "bare")
    assert older.model_hash == pipe.model_hash and older.unet_hash == pipe.unet_hash
    assert deciding(older.vae.config) == deciding(pipe.vae.config)
    assert older.training_subjects == [UNRECORDED] and len(pipe.training_subjects) == 1


def test_fine_tuning_adds_its_subjects_to_the_base_s(trained, tmp_path):
    config = trained / "data/config.yaml"
    vae = train(train_vae, config, tmp_path / "a", f"--init_from={trained / 'vae'}", *ALL)
    base, tuned = (read_model(folder).subjects for folder in (trained / "vae", vae))
    assert len(base) == 1 and tuned[0] == base[0] and len(tuned) == 2
    unet = (
        train(train_ldm, config, tmp_path / "p", f"--vae={vae}", f"--init_from={trained / 'pipeline/unet'}", *ALL)
        / "unet"
    )
    assert read_model(unet).subjects == tuned  # the base's is that of its autoencoder, for both had the same volumes


def test_weights_that_start_from_unrecorded_ones_say_so(trained, tmp_path, caplog):
    shutil.copytree(trained / "vae", tmp_path / "bare")
    config = json.loads((tmp_path / "bare/config.json").read_text())
    (tmp_path / "bare/config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("subjects", "data")})
    )
    with caplog.at_level(logging.WARNING):
        vae = train(train_vae, trained / "data/config.yaml", tmp_path / "a", f"--init_from={tmp_path / 'bare'}")
    assert (
        "bare: its record of training subjects" in caplog.text
        and "bare: does not record how its volumes were prepared" in caplog.text
    )
    records = read_model(vae).subjects
    assert records[0] == UNRECORDED and "salt" in records[1]


# Training


def test_an_autoencoder_that_saw_held_out_subjects_is_refused(trained, tmp_path):
    config = trained / "data/config.yaml"
    arguments = [f"--vae={trained / 'vae'}", "--data.split_seed=3"]
    with pytest.raises(
        ValueError, match=r"vae .*vae: learned from \d subjects.*S\d \(case_\d+, (test|validation) here, train there"
    ):
        train(train_ldm, config, tmp_path / "p", *arguments)
    with pytest.raises(ValueError, match="init_from .*learned from"):
        train(train_vae, config, tmp_path / "a", f"--init_from={trained / 'vae'}", "--data.split_seed=3")


def test_only_names_can_be_accepted(trained, tmp_path, caplog):
    arguments = [f"--vae={trained / 'vae'}", "--data.split_seed=3", "--accept_overlap=true"]
    with pytest.raises(ValueError, match="identified by its equal voxels"):  # the validation volumes are read
        train(train_ldm, renamed(trained, tmp_path), tmp_path / "p", *arguments)
    other = write_data(tmp_path / "other")
    for path in (tmp_path / "other/images").glob("*.nii.gz"):  # of other people
        image = read_volume(path)
        write_volume(image.replace(image.array + 1), path)
    with pytest.raises(ValueError, match="If they are other people who only share names, add --accept_overlap true"):
        train(train_ldm, other, tmp_path / "p", *arguments[:2])
    with caplog.at_level(logging.WARNING):
        train(train_ldm, other, tmp_path / "p", *arguments)
    assert "accepted: " in caplog.text


@pytest.mark.parametrize(("kind", "refused"), [("names", False), ("voxels", True), ("both", True)])
def test_equal_voxels_are_never_accepted_by_evaluation(kind, refused, caplog):
    """A test case shares its name, its voxels or both with one that the model learned from."""
    config, case = DataConfig(images="{volume}.nii"), Case("a", "a", "test")
    learned = Case("b" if kind == "voxels" else "a", "b")
    record = record_subjects({"train": [marks_of(learned, config, ["w" if kind == "names" else "v"])]})
    asked = [record], [case], config, {"a": ["v"]}, "model"
    with pytest.raises(ValueError, match="1 subject that is held out"):
        refuse_seen_cases(*asked)
    with pytest.raises(ValueError, match="identified by its equal voxels") if refused else nullcontext():
        refuse_seen_cases(*asked, accepted=True)
    assert refused or "accepted: model: learned from 1 subject" in caplog.text


def renamed(trained: Path, folder: Path) -> Path:
    """The data set under other names, with other subjects, as uncompressed files in another order."""
    rows = ["volume,subject"]
    for number, path in enumerate(sorted((trained / "data/images").glob("*.nii.gz"), reverse=True)):
        write_volume(read_volume(path), folder / f"images/x{number}.nii")
        write_volume(read_volume(trained / "data/labels" / path.name), folder / f"labels/x{number}.nii")
        rows.append(f"x{number},patient {number}")
    (folder / "subjects.csv").write_text("\n".join(rows) + "\n")
    found = yaml.safe_load((trained / "data/config.yaml").read_text())["data"]
    found |= {"root": str(folder), "images": "images/{volume}.nii", "masks": "labels/{volume}.nii"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": found}))
    return folder / "config.yaml"


# Evaluation


def test_the_split_of_the_training_judges_and_another_does_not(trained, tmp_path):
    """The issue's example: a model trained with test_fraction 0.2, judged with 0.3."""
    arguments = ["reconstruction", "--config", str(trained / "data/config.yaml"), "--precision", "no"]
    arguments += ["--vae", str(trained / "vae"), "--output", str(tmp_path / "r.json"), "--crop", "16", "16", "16"]
    too_small = "has no frequency"  # what is said of 16 voxels a side, once the check let them pass
    with pytest.raises(ValueError, match=too_small):
        evaluate.main(arguments)
    new = held_out(section(trained, test_fraction=0.3)) - held_out(section(trained))
    assert len(new) == 1
    with pytest.raises(
        ValueError, match=rf"vae: learned from 1 subject that is held out here: {new.pop()} .*data.test_fraction"
    ):
        evaluate.main([*arguments, "--data.test_fraction", "0.3"])
    with pytest.raises(ValueError, match=too_small):
        evaluate.main([*arguments, "--split", "train", "--data.test_fraction", "0.3"])  # asked for by name


@pytest.mark.parametrize(
    "command",
    [
        ["dice"],
        ["few_labels"],
        ["pretrain"],
        ["realism"],
        ["privacy"],
        ["conditions", "--column", "x"],
        ["all"],
        ["shapes"],
        ["adherence"],
        ["morphometry"],
        ["dice", "--judge_synthetic"],
    ],
)
def test_volumes_of_a_model_that_saw_test_subjects_are_refused(command, trained, generated, tmp_path):
    """By every command."""
    name, *more = command
    flag = "--judge_synthetic" if "--judge_synthetic" in more else "--synthetic"
    arguments = [name, "--config", str(trained / "data/config.yaml"), "--output", str(tmp_path / "r.json")]
    arguments += [flag, str(generated), *(one for one in more if one != flag)]
    with pytest.raises(ValueError, match="generated: learned from 1 subject that is held out here"):
        evaluate.main([*arguments, "--data.test_fraction", "0.3"])


@pytest.mark.parametrize("way", [["--vae=~/vae"], ["--vae", "~/vae"], ["--models", "~/vae"], ["--models", "user/vae"]])
def test_no_way_to_name_a_model_goes_round_the_check(way, trained, tmp_path, monkeypatch):
    """A home folder that no shell expanded, and a repository of the Hub."""
    monkeypatch.setenv("HOME", str(trained))
    monkeypatch.setattr(
        "pipelines.storage.trained_on.snapshot_download", lambda name, **_: trained / name.partition("/")[2]
    )
    arguments = ["reconstruction", "--config", str(trained / "data/config.yaml"), "--output", str(tmp_path / "r.json")]
    arguments += [*way, *([] if "--vae" in way[0] else ["--vae", str(trained / "vae")])]
    with pytest.raises(ValueError, match="vae: learned from 1 subject that is held out here"):
        evaluate.main([*arguments, "--data.test_fraction", "0.3"])


def test_a_model_that_is_nowhere_is_refused_before_the_work(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.data.seen.read_test_cases", lambda *_: pytest.fail("read volumes first"))
    arguments = ["--config", str(trained / "data/config.yaml"), "--output", str(tmp_path / "r.json")]
    for named, said in (
        (["reconstruction", "--vae", str(tmp_path / "gone")], "gone: no autoencoder there"),
        (["dice", "--models", str(tmp_path / "gone")], "gone: no such folder"),
        (["dice", "--models", "user/gone"], "user/gone: is neither a folder here nor found on the Hub"),
        (["realism", "--synthetic", "x", "--extractor", f"own={tmp_path / 'gone'}"], "gone: no such file or folder"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate.main([*named, *arguments])
    monkeypatch.setattr(doctor, "before_training", lambda *_: pytest.fail("looked at the data first"))
    with pytest.raises(ValueError, match="gone: no autoencoder there"):
        doctor.main([*arguments[:2], "--pipeline", str(tmp_path / "gone")])


def test_doctor_keeps_its_findings_where_a_model_fails_to_load(trained, tmp_path, capsys):
    shutil.copytree(trained / "vae", tmp_path / "vae")
    next((tmp_path / "vae").glob("*.safetensors")).write_bytes(b"damaged")
    assert doctor.main(["--config", str(trained / "data/config.yaml"), "--pipeline", str(tmp_path / "vae")]) == 1
    said = capsys.readouterr().out
    assert "OK   cases: 20 volumes" in said and f"FAIL model: {tmp_path / 'vae'}" in said


def test_all_refuses_before_it_generates(trained, tmp_path):
    arguments = ["all", "--config", str(trained / "data/config.yaml"), "--output", str(tmp_path / "page")]
    with pytest.raises(ValueError, match="pipeline: learned from 1 subject"):
        evaluate.main([*arguments, "--pipeline", str(trained / "pipeline"), "--data.test_fraction", "0.3"])
    assert [path.name for path in (tmp_path / "page").iterdir() if not path.name.startswith(".")] == []


def disguises(trained: Path, folder: Path) -> dict[str, DataConfig]:
    own = section(trained, test_fraction=0.9, validation_fraction=0.0)
    with open(trained / "data/subjects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    folder.mkdir()
    table = [{"volume": row["volume"], "subject": row["subject"].lower()} for row in reversed(rows)]
    shutil.copytree(trained / "data/images", folder / "moved/images")
    (folder / "moved/other.json").write_text(json.dumps(table))
    (folder / "again").mkdir()
    written = DataConfig(**{**read_section_of(renamed(trained, folder / "again")), "test_fraction": 0.9})
    return {
        "seed": replace(own, split_seed=5),
        "group_by": replace(own, subject=None, group_by=r"case_\d+"),
        "no subjects": replace(own, subject=None),
        "another table and root": replace(
            own, root=str(folder / "moved"), table="other.json", masks=None, label_names={}
        ),
        "no table": replace(own, table=None, subject=None, images="images/*.nii.gz", masks=None, label_names={}),
        "renamed and converted": written,
    }


def read_section_of(path: Path) -> dict:
    found = yaml.safe_load(path.read_text())["data"]
    return {key: value for key, value in found.items() if key != "intensity"}


def test_no_disguise_hides_a_leak(trained, tmp_path):
    learned = read_model(trained / "vae").subjects
    for name, config in disguises(trained, tmp_path / "x").items():
        cases = load_cases(config)
        voxels, _ = read_test_cases(cases, config)
        leaked = {one.case.name for one in find_overlap(learned, cases, config, voxels)}
        test = {case.name for case in cases if case.split == "test"}
        never = held_out(section(trained))  # of the first split, two subjects of two volumes
        assert len(test) - len(leaked) <= 2 * len(never) and len(leaked) >= len(test) - 4 > 8, name


def test_older_models_have_a_warning(trained, tmp_path, caplog):
    tiny_pipeline().save_pretrained(tmp_path / "bare")
    config = section(trained)
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="intensity"):
        check_models(config, ["test"], [trained / "pipeline"])  # percentiles, where it learned a window
    with caplog.at_level(logging.WARNING):
        check_models(config, ["test"], [], others=[tmp_path / "bare"])
    assert "bare: its record of training subjects is not complete" in caplog.text


def test_a_folder_of_generated_volumes_knows_its_models(generated, tmp_path):
    assert all("salt" in record for record in read_generated(generated))
    shutil.copytree(generated, tmp_path / "g")
    (tmp_path / "g" / GENERATED).unlink()
    assert read_generated(tmp_path / "g") == [UNRECORDED]


def test_writers_remove_leftovers_of_killed_processes(trained, generated, tmp_path):
    out = shutil.copytree(generated, tmp_path / "g")
    reports, tables = tmp_path / "reports", tmp_path / "tables"
    for folder in (out / "provenance", reports, tables):
        (folder / f"{UNFINISHED}1/new").mkdir(parents=True)
        os.utime(folder / f"{UNFINISHED}1", (0, 0))
    write_generated_by(MedVolumePipeline.from_pretrained(trained / "pipeline"), out)
    check_report(reports / "copies.safetensors")
    draw_labels([f"--config={trained / 'data/config.yaml'}", f"--output={tables / 'few.csv'}", "--k=8"])
    assert not list(tmp_path.rglob(f"{UNFINISHED}*"))


def test_a_pipeline_knows_what_its_autoencoder_knows(trained, tmp_path):
    shutil.copytree(trained / "pipeline", tmp_path / "p")
    path = tmp_path / "p/vae/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "data": {**config["data"], "time_point": {"image": 2}}}))
    learned = read_model(tmp_path / "p").data
    assert learned is not None and learned["time_point"] == {"image": 2}


@pytest.mark.parametrize("program", [samplers, editing])
def test_a_pipeline_is_not_judged_on_other_preprocessing(program, trained, tmp_path, monkeypatch):
    """The volumes were prepared otherwise than those of its training."""
    monkeypatch.setattr(samplers, "prepare", lambda *_: pytest.fail("worked first"))
    monkeypatch.setattr(editing, "measure", lambda *_: pytest.fail("worked first"))
    monkeypatch.setattr(samplers, "check_command", lambda *_: None)
    arguments = ["--config", str(trained / "data/config.yaml"), "--output", str(tmp_path / "r.json")]
    arguments += ["--pipeline", str(trained / "pipeline"), "--data.intensity", "{kind: window, low: 0, high: 500}"]
    with pytest.raises(
        ValueError, match="pipeline: learned from volumes .*\n.*window 0 to 1100, the data has window 0 to 500"
    ):
        program.main(arguments)


def test_doctor_names_the_overlap(trained, tmp_path, capsys):
    arguments = ["--config", str(trained / "data/config.yaml"), "--pipeline", str(trained / "vae")]
    doctor.main([*arguments, "--data.test_fraction", "0.3"])
    assert "learned from 1 subject that is held out here" in capsys.readouterr().out
    doctor.main(arguments)
    assert "has seen none of the held-out subjects" in capsys.readouterr().out


# Fingerprints


def test_fingerprints_of_another_split_are_refused(trained, generated, tmp_path, caplog):
    command = ["--config", str(trained / "data/config.yaml"), "--output", str(tmp_path / "f.safetensors")]
    command += ["--block", "2", "--alpha", "0.4"]
    pipe = MedVolumePipeline.from_pretrained(trained / "pipeline")
    with caplog.at_level(logging.WARNING):
        make_fingerprints(command)
        check_unseen_subjects(CopyCheck.load(tmp_path / "f.safetensors"), pipe.training_subjects, "f")
    assert not caplog.text
    make_fingerprints([*command, "--data.test_fraction", "0.4"])
    mask = sorted((trained / "data/labels").glob("*.nii.gz"))[0]
    arguments = ["--pipeline", str(trained / "pipeline"), "--masks", str(mask), "--steps", "1", "--output"]
    with pytest.raises(ValueError, match=r"4 of the \d+ volumes that set its threshold are among the model"):
        generate.main([*arguments, str(tmp_path / "g"), "--reject_copies", str(tmp_path / "f.safetensors")])
    make_fingerprints([*command, "--data.test_fraction", "0.2", "--data.validation_fraction", "0.3"])
    with pytest.raises(ValueError, match="are among the model's training volumes"):
        check_unseen_subjects(CopyCheck.load(tmp_path / "f.safetensors"), pipe.training_subjects, "f")


def test_training_volumes_without_a_fingerprint_are_counted(trained):
    config = section(trained)
    marks = [marks_of(case, config) for case in load_cases(config)]
    record = record_subjects({"train": marks})
    assert unknown_volumes([record], marks) == 0 and unknown_volumes([record], marks[:-3]) == 3
    assert unknown_volumes([UNRECORDED], []) == 0


# LoRA


def test_a_lora_brings_its_subjects_along(trained, tmp_path):
    pytest.importorskip("peft")
    base = trained / "pipeline"
    lora = train(
        train_ldm,
        trained / "data/config.yaml",
        tmp_path / "l",
        f"--vae={base / 'vae'}",
        f"--init_from={base / 'unet'}",
        "--lora={rank: 2, alpha: 2}",
        *ALL,
    )
    own = read_model(lora).subjects
    pipe = MedVolumePipeline.from_pretrained(base)
    before = pipe.training_subjects
    assert len(own) == 2 and own[0] == before[0]  # of the base's U-Net, and its own
    with safe_open(lora / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert "case_" not in str(file.metadata())
    pipe.load_lora_weights(lora)
    assert pipe.training_subjects == [*before, own[1]]
    pipe.unload_lora_weights()
    assert pipe.training_subjects == before
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert pipe.training_subjects == [*before, own[1]]
    pipe.save_pretrained(tmp_path / "fused")
    assert MedVolumePipeline.from_pretrained(tmp_path / "fused").training_subjects == [*before, own[1]]
    assert join_records(before, before) == before


# What ships


@pytest.mark.parametrize("name", ["hippocampus", "hippocampus-masks"])
def test_shipped_weights_know_their_subjects(name, hippocampus):
    root = Path(__file__).resolve().parents[2]
    section = yaml.safe_load((root / f"configs/{name.replace('-', '_')}/data.yaml").read_text())
    config = DataConfig(**{**{k: v for k, v in section.items() if k != "intensity"}, "root": str(hippocampus)})
    records = read_model(root / "weights" / name).subjects
    cases = load_cases(config)
    assert len(records) == 1 and find_overlap(records, cases, config) == []
    for record in records:
        counts = {
            role: {kind: len(text.split()) for kind, text in record[role].items()} for role in ("train", "validation")
        }
        assert counts["train"] == {"subjects": 101, "names": 154, "voxels": 154}
        assert counts["validation"] == {"subjects": 11, "names": 18, "voxels": 18}
    leaked = find_overlap(records, [replace(case, split="test") for case in cases], config)
    assert len(leaked) == 172
