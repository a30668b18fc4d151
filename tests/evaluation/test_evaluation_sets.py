"""evaluate.py realism and privacy on phantoms: real volumes, and generated ones that are real, copied or blurred."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from generated_sets import SHAPE, write_sets
from tiny import tiny_pipeline

import evaluate
from evaluation.commands import privacy as privacy_command
from evaluation.data.volume_sets import (
    VolumeSet,
    generated_set,
    mask_owners,
    real_set,
)
from evaluation.metrics.memorization import loss_attack
from evaluation.studies.membership_losses import denoising_losses
from pipelines import MedVolumePipeline, describe_mask
from volumes import DataConfig, VolumeDataset, load_cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("sets"))


def config_of(folder) -> DataConfig:
    return DataConfig(**yaml.safe_load((folder / "ldm.yaml").read_text())["data"])


def judge(command: str, folder, made: str, *more: str) -> dict:
    args = [command, "--config", str(folder / "ldm.yaml"), "--synthetic", str(folder / made), "--device", "cpu"]
    args += ["--output", str(folder / "reports" / f"{command}_{made}.json"), *more]
    report = evaluate.main(args)
    assert json.loads((folder / "reports" / f"{command}_{made}.json").read_text()) == json.loads(json.dumps(report))
    return report


def test_generated_volumes_are_scaled_and_owned_as_real_ones(folder):
    """The copies are brighter than the real files, and their sidecars name another mask file: both must not matter."""
    config = config_of(folder)
    cases = load_cases(config)
    real, _ = real_set(cases, config, ["train"])
    copies, skipped = generated_set([folder / "copies"], cases, config)
    assert not skipped and len(real) == 10 and len(copies) == 18
    place = {name: number for number, name in enumerate(copies.names)}
    for number, name in enumerate(real.names):
        copy = place[f"{name}_000"]
        np.testing.assert_allclose(copies.volumes[copy], real.volumes[number], atol=1e-4)
        assert (copies.masks[copy], copies.subjects[copy]) == (name, real.subjects[number])
    assert min(v.min() for v in real.volumes) == 0 and max(v.max() for v in real.volumes) == 1
    assert real.volumes[0].shape == (1, *SHAPE)


def test_volumes_of_two_folders_have_distinct_names(folder, tmp_path):
    """A volume of an unknown mask belongs to no case and to no subject of the data."""
    config = config_of(folder)
    cases = load_cases(config)
    other = shutil.copytree(folder / "fresh", tmp_path / "other")
    sidecar = other / "case_0_000.json"
    sidecar.write_text(json.dumps({"synthetic": True, "mask": {"file": "case_0.nii.gz", "sha256": "of another file"}}))
    found, _ = generated_set([folder / "fresh", other], cases, config)
    assert len(found) == 36 and len(set(found.names)) == 36
    owner = dict(zip(found.names, zip(found.masks, found.subjects, strict=True), strict=True))
    assert owner["fresh/case_0_000"] == ("case_0", "S0")
    assert owner["other/case_0_000"] == (None, "generated other/case_0_000")
    with pytest.raises(ValueError, match="nowhere: no such folder.*generate.py"):
        generated_set([folder / "nowhere"], cases, config)
    with pytest.raises(ValueError, match="no case is in split validation"):
        real_set(cases, config, ["validation"])


def test_a_mask_that_cases_share_owns_nobody(folder, tmp_path):
    cases = load_cases(config_of(folder))
    shared = shutil.copy(cases[0].mask, tmp_path / "copy.nii.gz")
    twice = [*cases, dataclasses.replace(cases[1], mask=tmp_path / "copy.nii.gz")]
    digests = {describe_mask(case.mask)["sha256"]: case.name for case in cases[2:]}
    found = {digest: case.name for digest, case in mask_owners(twice).items()}
    assert describe_mask(shared)["sha256"] not in found
    assert found == {**digests, describe_mask(cases[1].mask)["sha256"]: cases[1].name}


def test_generated_files_are_read_without_the_data_time_point(folder):
    """Real files are 4-D and hold the volume at time point 1; generated files are 3-D."""
    config = dataclasses.replace(config_of(folder), time_point=1)
    cases = load_cases(config)
    plain, _ = generated_set([folder / "fresh"], cases, config_of(folder))
    found, skipped = generated_set([folder / "fresh"], cases, config)
    assert not skipped and np.array_equal(found.volumes[0], plain.volumes[0])


def test_a_set_names_its_volumes_and_counts_must_agree():
    volumes = [np.zeros((1, 4, 4, 4))] * 2
    plain = VolumeSet(volumes)
    assert list(plain.names) == list(plain.subjects) == ["0000", "0001"]
    assert list(VolumeSet(volumes, ["a", "b"]).subjects) == ["a", "b"]
    with pytest.raises(ValueError, match="2 volumes, 2 names, 1 subjects"):
        VolumeSet(volumes, ["a", "b"], ["s"])
    with pytest.raises(ValueError, match="0 volumes"):
        VolumeSet([])


def test_realism_puts_new_draws_at_the_floor_and_blur_above(folder, capsys):
    args = ["--pairs", "20", "--parts"]
    fresh = judge("realism", folder, "fresh", *args, "features", "consistency", "intensity", "diversity")
    kernel = fresh["features"]["random"]["kernel"]["excess"]["interval"]
    assert kernel[0] < 0 < kernel[1]
    assert fresh["diversity"]["generated_minus_test"]["interval"][0] < 0
    assert fresh["volumes"]["generated"]["of_training_masks"] == 10
    assert fresh["volumes"]["test"] == {"volumes": 8, "subjects": 4, "splits": ["test"]}
    said = capsys.readouterr().out
    assert "kernel distance, random:" in said and "do not determine the covariance" in said
    blurred = judge("realism", folder, "blurred", *args, "consistency", "intensity")
    assert "features" not in blurred and "diversity" not in blurred
    for name in ("consistency", "intensity"):
        assert set(blurred[name]) == {"image"}
    worst = [statistics["wasserstein"]["excess"]["mean"] for statistics in blurred["consistency"]["image"].values()]
    best = [statistics["wasserstein"]["excess"]["mean"] for statistics in fresh["consistency"]["image"].values()]
    assert max(worst) > 2 > max(best)
    assert min(blurred["intensity"]["image"]["spectrum_db"]["generated_over_test"]["mean"]) < -6


def test_privacy_finds_the_copies_and_their_patients(folder, capsys):
    args = ["--alpha", "0.34", "--shift", "1", "--pairs", "1", "--spaces", "image"]
    fresh, copies = judge("privacy", folder, "fresh", *args), judge("privacy", folder, "copies", *args, "features")
    for space in ("image", "features random"):
        memory = copies["spaces"][space]["memorized"]["similarity"]
        assert memory["fraction"] == 1 and memory["nearer"]["auc"] == 1
        closest = copies["spaces"][space]["closest"][0]
        assert closest["similarity"] == pytest.approx(1, abs=1e-3) and closest["query"].endswith("_000")
        # Of training masks every volume is its patient's own scan; of test masks it is another patient's.
        found = copies["spaces"][space]["reidentification"]
        assert found["patients"] == 9 and found["top_1"]["rate"] == pytest.approx(5 / 9)
        assert copies["spaces"][space]["own_mask"]["difference"] > 0.3
    image = fresh["spaces"]["image"]["memorized"]["similarity"]
    assert image["interval_drawn"][0] < 0.5 and fresh["spaces"]["image"]["own_mask"]["interval"][0] < 0.1
    picture = folder / "reports" / copies["pictures"]["features random"]
    assert picture.name == "privacy_copies_features_random.png" and picture.read_bytes()[1:4] == b"PNG"
    assert copies["protocol"]["shift"] == {"image": 1, "features random": 0}
    assert "image: 100.0% of generated volumes are memorized" in capsys.readouterr().out


def test_latents_and_losses_come_from_the_pipeline(folder, tmp_path, monkeypatch):
    """Losses do not depend on what is beside a volume, and a volume that the model cannot predict has the largest."""
    pipe = tiny_pipeline(num_labels=2, labels={"0": "background", "1": "organ"}, channels=["image"])
    pipe.save_pretrained(tmp_path)
    config = config_of(folder)
    cases = [case for case in load_cases(config) if case.split == "test"]
    losses = denoising_losses(pipe, VolumeDataset(cases, config), times=(500.0,), draws=1)
    assert losses.shape == (8,) and len(set(losses.round(6))) == 8
    alone = denoising_losses(pipe, VolumeDataset(cases[3:4], config), times=(500.0,), draws=1)
    assert alone[0] == pytest.approx(losses[3], rel=1e-5)
    with torch.no_grad():  # as if one latent channel were far larger than the model has ever seen
        pipe.vae.set_latent_statistics([0.0] * 4, [0.01, 1.0, 1.0, 1.0])
    assert (denoising_losses(pipe, VolumeDataset(cases, config), times=(500.0,), draws=1) > losses).all()
    monkeypatch.setattr(privacy_command, "TIMES", (300.0, 700.0))
    monkeypatch.setattr(privacy_command, "DRAWS", 1)
    args = ["--alpha", "0.34", "--spaces", "latent", "--pipeline", str(tmp_path), "--flips"]
    report = judge("privacy", folder, "fresh", *args)
    assert list(report["spaces"]) == ["latent"]
    pipe = MedVolumePipeline.from_pretrained(tmp_path)
    training = [case for case in load_cases(config) if case.split == "train"]
    quick = {"times": (300.0, 700.0), "draws": 1}
    known = [denoising_losses(pipe, VolumeDataset(part, config), **quick) for part in (training, cases)]
    subjects = [[case.subject for case in part] for part in (training, cases)]
    assert report["loss_membership"]["auc"] == pytest.approx(loss_attack(*known, *subjects)["auc"])
    assert report["protocol"]["losses"] == {"times": [300.0, 700.0], "draws": 1}


def test_extractors_are_named_once_and_latents_need_a_model(folder, capsys):
    with pytest.raises(ValueError, match="--extractor random=.*: give NAME=PATH"):
        judge("realism", folder, "fresh", "--parts", "features", "--extractor", f"random={folder / 'subjects.csv'}")
    args = ["--alpha", "0.34", "--spaces", "latent", "image", "--pairs", "0", "--flips"]
    report = judge("privacy", folder, "fresh", *args)
    assert report["pictures"] == {}
    assert list(report["spaces"]) == ["image"] and "latents are not compared" in capsys.readouterr().out


def test_what_privacy_cannot_tell_is_said_before_the_work(folder, monkeypatch):
    def work(*_, **__):
        raise AssertionError("volumes were compared first")

    monkeypatch.setattr(privacy_command, "privacy_report", work)
    with pytest.raises(
        ValueError, match="3 subjects are too few for a threshold that 1 in 20 exceeds: take alpha >= 0.25"
    ):
        judge("privacy", folder, "fresh")  # 4 unseen subjects
    with pytest.raises(ValueError, match="--spaces latent: .* without --vae or --pipeline"):
        judge("privacy", folder, "fresh", "--spaces", "latent")
