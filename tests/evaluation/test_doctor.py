"""The doctor on sets with planted problems, each to be found and named, and on a clean one."""

import json
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from planted_volumes import loaded
from tiny import peak_bytes, tiny_pipeline

from autoencoder import VQGAN3D, AutoencoderKL3D, latent_statistics
from diffusion import LatentUNet3D
from evaluation.doctor.__main__ import main
from evaluation.doctor.after_training import (
    check_latents,
    check_limits,
    distances,
    latent_summary,
)
from evaluation.doctor.cases import find_cases, quantization_step, thumbnail_of
from evaluation.doctor.data_checks import outliers
from evaluation.doctor.leaks import near_duplicates
from evaluation.doctor.memory import (
    OneProcess,
    dataset_bytes,
    peak_of,
    training_bytes,
    training_work,
    unet_inputs,
)
from training import TrainLdmConfig, TrainVaeConfig
from training.ldm_step import build_step as build_ldm_step
from training.vae import build_step as build_vae_step
from volumes import DataConfig, PhantomConfig, VolumeDataset, load_cases, make_phantom, pad_sample

SHAPE = (18, 20, 16)
VAE = {
    "class": "autoencoder.AutoencoderKL3D",
    "channels": [8, 8],
    "encoder_blocks": [1, 1],
    "decoder_blocks": [1, 1],
}


def write_case(folder, name, image, mask, spacing=(1.0, 1.0, 1.0)):
    for kind, array in (("images", image), ("labels", mask)):
        (folder / kind).mkdir(exist_ok=True)
        stored = nib.Nifti1Image(array, np.diag([*spacing, 1.0]))
        stored.header.set_xyzt_units("mm")
        nib.save(stored, folder / kind / f"{name}.nii.gz")


def config_file(folder, data, **sections):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"data": data, **sections}))
    return path


def run(folder, config, capsys, *more):
    """Exit status, findings by check, and what was printed."""
    status = main(["--config", str(config), "--output", str(folder / "report.json"), *more])
    report = json.loads((folder / "report.json").read_text())
    return status, report, capsys.readouterr().out


def about(report, check, level, *words):
    """The findings of a check at a level whose message holds all the words."""
    return [
        one
        for one in report["findings"]
        if one["check"] == check and one["level"] == level and all(word in one["message"] for word in words)
    ]


def planted(folder):
    """Fourteen drawn subjects, of whom eight have a problem each."""
    rows = []
    for number in range(14):
        image, mask, _ = make_phantom(number, SHAPE)
        image, mask, spacing = image.array[0].copy(), mask.array[0].copy(), (1.0, 1.0, 1.0)
        split = "test" if number >= 10 else "validation" if number >= 8 else "train"
        if number == 10:  # the voxels of a training volume
            image = make_phantom(0, SHAPE)[0].array[0].copy()
        if number == 11:  # a training volume mirrored, scaled and with noise
            noise = np.random.default_rng(0).normal(0, 10, SHAPE)
            image = (3 * (make_phantom(1, SHAPE)[0].array[0][::-1] + noise) + 7).astype(np.float32)
        if number in (2, 12):  # one factor for two subjects
            image = (np.rint(image / 5) * 5.95897).astype(np.float32)
        if number == 3:
            image[4, 5, 6] = np.nan
        if number == 4:
            image[:] = 7
        if number == 5:
            mask[mask == 3] = 2
        if number == 6:
            spacing = (1.0, 1.0, 3.0)
        write_case(folder, f"v{number:02d}", image, mask, spacing)
        subject = "S08" if number == 13 else f"S{number:02d}"  # of whom a volume is in validation
        rows.append(f"v{number:02d},{subject},{split},{'' if number == 9 else 40 + number}")
    (folder / "table.csv").write_text("volume,subject,split,age\n" + "\n".join(rows) + "\n")
    whole = folder / "images" / "v07.nii.gz"
    whole.write_bytes(whole.read_bytes()[:-500])
    return {
        "root": str(folder),
        "table": "table.csv",
        "images": "images/{volume}.nii.gz",
        "masks": "labels/{volume}.nii.gz",
        "subject": "subject",
        "split": "split",
        "numbers": ["age"],
        "label_names": {0: "background", 1: "body", 2: "organ", 3: "lesion"},
    }


def test_every_planted_problem_is_named(tmp_path, capsys):
    data = planted(tmp_path)
    config = config_file(tmp_path, data, model=VAE, crops={"shape": [8, 8, 8]}, loop={"batch_size": 2})
    status, report, printed = run(tmp_path, config, capsys)
    assert status == 1
    expected = [
        ("splits", "FAIL", "S08", "test, validation"),
        ("duplicates", "FAIL", "v00.nii.gz", "v10.nii.gz"),
        ("duplicates", "WARN", "v01.nii.gz", "v11.nii.gz", "mirror"),
        ("steps", "WARN", "v02.nii.gz", "v12.nii.gz", "5.95897"),
        ("files", "FAIL", "v03.nii.gz", "not finite"),
        ("files", "FAIL", "v04.nii.gz", "constant"),
        ("files", "FAIL", "v07.nii.gz", "damaged gzip"),
        ("labels", "WARN", "lesion", "v05"),
        ("spacing", "WARN", "v06.nii.gz", "1 x 1 x 3"),
        ("crops", "WARN", "8, 8, 8"),
    ]
    for check, level, *words in expected:
        assert len(about(report, check, level, *words)) == 1, (check, level, words, printed)
        assert any(level in line and all(word in line for word in words) for line in printed.splitlines())
    # and nobody else is accused of it
    assert len(about(report, "duplicates", "WARN")) == len(about(report, "steps", "WARN")) == 1
    assert len(about(report, "files", "FAIL")) == 3
    for finding in report["findings"]:
        assert finding["level"] == "OK" or finding["remedy"]
    assert report["memory_bytes"]["training"]["total"] > 0 and len(report["volumes"]) == 11


def test_refused_files_only_warn_where_they_are_skipped(tmp_path, capsys):
    data = {**planted(tmp_path), "on_error": "skip", "numbers": []}
    _, report, _ = run(tmp_path, config_file(tmp_path, data), capsys)
    assert not about(report, "files", "FAIL") and len(about(report, "files", "WARN")) == 3


def test_a_constant_number_costs_no_other_finding(tmp_path, capsys):
    """It is named, and so is what else was found."""
    data = {"phantom": {"count": 8, "shape": [12, 12, 12]}, "test_fraction": 0.2, "numbers": ["spacing_x"]}
    config = config_file(tmp_path, data, model=VAE, crops={"shape": [12, 12, 12]})
    status, report, _ = run(tmp_path, config, capsys)
    assert status == 1 and about(report, "model", "FAIL", "cannot be built", "'spacing_x' is 1 for all")
    assert about(report, "numbers", "FAIL", "spacing_x") and about(report, "size", "WARN", "subjects to train on")


def test_a_clean_set_passes(tmp_path, capsys):
    data = {"phantom": {"count": 12, "shape": [16, 16, 16]}, "test_fraction": 0.25}
    config = config_file(tmp_path, data, model=VAE, crops={"shape": [16, 16, 16]}, loop={"batch_size": 2})
    status, report, printed = run(tmp_path, config, capsys)
    assert status == 0 and report["counts"]["FAIL"] == 0 and "FAIL" not in printed.replace("0 FAIL", "")
    assert not about(report, "duplicates", "WARN") and not about(report, "steps", "WARN")
    assert about(report, "size", "WARN", "subjects to train on")


def test_the_whole_report_after_training(tmp_path, capsys):
    """A U-Net's config, and a pipeline of random weights: both halves run, and the latents' made-up statistics are
    off."""
    data = {"phantom": {"count": 8, "shape": [16, 16, 16]}, "test_fraction": 0.25, "validation_fraction": 0.0}
    names = {"0": "background", "1": "body", "2": "organ", "3": "lesion"}
    tiny_pipeline(num_labels=4, labels=names).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "metrics.jsonl").write_text('{"step": 20, "kind": "train", "skipped_steps": 7}')
    model = {"class": "diffusion.LatentUNet3D", "channels": [16, 16], "blocks": [1, 1], "head_dim": 8}
    config = config_file(tmp_path, data, model=model, vae=str(tmp_path / "pipeline"), loop={"batch_size": 2})
    more = ["--pipeline", str(tmp_path / "pipeline"), "--volumes", "2", "--steps", "1", "--device", "cpu"]
    status, report, _ = run(tmp_path, config, capsys, *more)
    assert status == 0 and about(report, "latents", "WARN", "are off") and about(report, "skipped", "WARN", "7 of 20")
    assert {"reconstructed", "generated", "floor"} == set(report["quality"])
    assert len([one for one in report["findings"] if one["check"] == "quality"]) == 3


def test_a_crop_off_the_stride_and_a_wrong_argument_fail(tmp_path, capsys):
    data = {"phantom": {"count": 4, "shape": [16, 16, 16]}, "test_fraction": 0.25}
    config = config_file(tmp_path, data, model=VAE, crops={"shape": [16, 14, 16]})
    status, report, _ = run(tmp_path, config, capsys)
    assert status == 1 and about(report, "crops", "FAIL", "16, 14, 16")
    config = config_file(tmp_path, data, model={**VAE, "chanels": [8]})
    status, report, _ = run(tmp_path, config, capsys)
    assert status == 1 and about(report, "model", "FAIL", "chanels")


def test_a_list_that_training_refuses_fails(tmp_path):
    cases, findings = find_cases(DataConfig(root=str(tmp_path), images="none/*.nii.gz"))
    assert cases == [] and [one.level for one in findings] == ["FAIL"] and "no file matches" in findings[0].message
    _, findings = find_cases(DataConfig(root=str(tmp_path), images="*.nii.gz", masks="*.nii.gz"))
    assert "names of their labels" in findings[0].message


def test_the_step_of_intensities_is_found():
    whole = np.random.default_rng(0).integers(0, 4000, (12, 12, 12))
    for factor in (5.95897, 0.0123, 1.0):
        assert quantization_step((whole * factor).astype(np.float32)) == pytest.approx(factor, rel=1e-6)
        assert quantization_step((whole * factor - 300).astype(np.float32)) == pytest.approx(factor, rel=1e-5)
    assert quantization_step(np.random.default_rng(0).normal(size=(12, 12, 12))) is None
    assert quantization_step(np.arange(8.0)) is None  # too few levels


def test_near_duplicates_are_other_subjects_unusually_close():
    images = [make_phantom(seed, SHAPE)[0].array for seed in range(6)]
    images.append(images[2] * 2 + 5)  # another subject's copy
    images.append(images[4] + np.random.default_rng(0).normal(0, 5, images[4].shape).astype(np.float32))
    thumbnails = np.stack([thumbnail_of(image) for image in images])
    subjects = ["a", "b", "c", "d", "e", "f", "g", "e"]  # the last is a second scan of e
    found = near_duplicates(thumbnails, subjects)
    assert [(i, j, mirrored) for i, j, _, mirrored in found] == [(2, 6, False)]
    assert found[0][2] == pytest.approx(1, abs=1e-5)
    assert near_duplicates(thumbnails[:6], subjects[:6]) == []  # alike, but no more than phantoms are


def test_outliers_are_far_in_both_senses():
    assert outliers([1.0, 1.01, 0.99, 1.0, 3.0], 1.25) == [4]
    assert outliers([1.0, 1.0, 1.0, 1.1], 1.25) == []  # many deviations, but only 10 %
    assert outliers([1.0, 2.0, 4.0, 8.0, 16.0], 1.25) == []  # a wide spread is not an outlier


CPU = OneProcess(torch.device("cpu"))
DATA = DataConfig(phantom=PhantomConfig(count=2, shape=SHAPE))


@pytest.mark.parametrize("model_class", [AutoencoderKL3D, VQGAN3D])
def test_an_autoencoders_memory_is_estimated(model_class):
    """Within 20 % of what PyTorch accounts for, though nothing is computed."""
    vae = model_class(latent_channels=4, channels=(16, 16), decoder_blocks=(1, 1))
    step = build_vae_step(TrainVaeConfig(output="x", data=DATA, model={}), vae)
    work = training_work(step, (16, 16, 16), 2, CPU)
    work()  # what is made once is not the step's
    vae.zero_grad(set_to_none=True)
    measured = peak_bytes(work)
    vae.zero_grad(set_to_none=True)
    decoded = peak_bytes(lambda: vae.decode(torch.zeros(1, 4, 6, 6, 6)))
    parameters = sum(p.numel() for p in vae.parameters())
    parts = training_bytes(step, work)
    assert parts["step"] == pytest.approx(measured, rel=0.2)
    assert parts["weights"] == 4 * parameters and parts["total"] == sum(list(parts.values())[:-1])
    whole = model_class(latent_channels=4, channels=(16, 16), decoder_blocks=(1, 1))
    assert peak_of(whole, lambda: whole.decode(torch.zeros(1, 4, 6, 6, 6))) == pytest.approx(decoded, rel=0.2)


def test_a_unets_memory_is_estimated():
    options = {"channels": (16, 16), "blocks": (1, 1), "head_dim": 8, "num_labels": 3, "mask_width": 8}
    unet = LatentUNet3D(**options, classes={"sex": ["F", "M"]}, numbers={"age": {"mean": 50.0, "std": 9.0}})
    step = build_ldm_step(
        TrainLdmConfig(output="x", vae="x", data=DATA, model={}), unet, AutoencoderKL3D(channels=(4, 8))
    )
    work = training_work(step, (6, 6, 6), 2, CPU)
    work()
    unet.zero_grad(set_to_none=True)
    measured = peak_bytes(work)
    called = peak_bytes(lambda: unet(**unet_inputs(unet, (6, 6, 6), 2)))
    again = LatentUNet3D(**options, classes={"sex": ["F", "M"]}, numbers={"age": {"mean": 50.0, "std": 9.0}})
    assert peak_of(again, lambda: again(**unet_inputs(again, (6, 6, 6), 2))) == pytest.approx(called, rel=0.2)
    assert training_bytes(step, work, cpu=True)["step"] == pytest.approx(measured, rel=0.2)


def test_volumes_in_memory():
    config = DataConfig(phantom=PhantomConfig(count=3, shape=(16, 18, 20)), validation_fraction=0.0)
    dataset = VolumeDataset(load_cases(config), config)
    held = sum(v.array.nbytes for one in loaded(dataset) for v in (one.image, one.mask) if v is not None)
    assert dataset_bytes(dataset.shapes, 1, masks=True) == held


def test_latents_drift_and_die():
    config = DataConfig(phantom=PhantomConfig(count=3, shape=(16, 16, 16)), validation_fraction=0.0)
    dataset = VolumeDataset(load_cases(config), config)
    vae = AutoencoderKL3D(channels=(8, 8), decoder_blocks=(1, 1)).eval()
    last: Any = vae.encoder[-1]
    samples = [pad_sample(dataset[i], vae.stride) for i in range(3)]
    with torch.no_grad():
        last.bias[4:] = -12.0  # little noise in any channel
    mean, std = latent_statistics(vae, [{k: s[k][None] for k in ("image", "fov")} for s in samples])
    vae.set_latent_statistics(mean, std)
    summary = latent_summary(vae, dataset)
    assert summary["mean"] == pytest.approx([0] * 4, abs=1e-4) and summary["std"] == pytest.approx([1] * 4, abs=1e-3)
    assert min(summary["informed"]) > 0.9 and [one.level for one in check_latents(summary)] == ["OK"]
    vae.set_latent_statistics(mean, [*std[:3], 2 * std[3]])
    (drift,) = check_latents(latent_summary(vae, dataset))
    assert drift.level == "WARN" and "channels [3] are off" in drift.message
    vae.set_latent_statistics(mean, std)
    with torch.no_grad():
        last.bias[5] = 2 * np.log(10 * std[1])  # the noise's log-variance: ten times the signal
        last.weight[5] = 0
    ok, dead = check_latents(latent_summary(vae, dataset))
    assert ok.level == "OK" and dead.level == "WARN" and "channels [1] are dead" in dead.message


def test_distances_see_a_blur_and_a_shift():
    real = [(make_phantom(seed, (16, 16, 16))[0].array[0] / 1000).clip(0, 1) for seed in range(4)]
    same = distances(real, real)
    assert max(same.values()) == pytest.approx(0, abs=1e-9)
    blurred = [torch.nn.functional.avg_pool3d(torch.from_numpy(v)[None], 3, 1, 1)[0].numpy() for v in real]
    found = distances(blurred, real)
    assert found["spectrum"] > 1 and found["sharpness"] > 0.1
    brighter = distances([v + 0.1 for v in real], real)
    assert brighter["intensity"] == pytest.approx(0.1, abs=1e-6)
    assert brighter["spectrum"] == pytest.approx(0, abs=1e-4) and brighter["sharpness"] == pytest.approx(0, abs=1e-5)


def test_who_limits_quality():
    def verdict(decoded, generated, floor):
        found = {"reconstructed": {"m": decoded}, "generated": {"m": generated}, "floor": {"m": floor}}
        (finding,) = check_limits(found, 8)
        return finding.level, finding.message.rpartition(": ")[2]

    assert verdict(0.9, 1.0, 0.1) == ("WARN", "the autoencoder limits it")
    assert verdict(0.1, 1.0, 0.1) == ("WARN", "the diffusion limits it")
    assert verdict(0.5, 1.0, 0.1) == ("WARN", "both limit it")
    assert verdict(0.9, 1.0, 1.5)[0] == "OK"


@pytest.mark.parametrize("model", ["text", [1], {"condition_dropout": 3}, None])
def test_a_malformed_section_is_named_and_the_data_examined(model, tmp_path, capsys):
    status, report, _ = run(tmp_path, config_file(tmp_path, planted(tmp_path), model=model), capsys)
    assert status == 1 and about(report, "cases", "WARN")
    assert [one for level in ("WARN", "FAIL") for name in ("config", "model") for one in about(report, name, level)]


def test_refused_files_are_not_mistaken_for_missing_splits(tmp_path, capsys):
    window = {"kind": "window", "low": -9000.0, "high": -8000.0}
    data = {**planted(tmp_path), "intensity": window}
    _, report, _ = run(tmp_path, config_file(tmp_path, data), capsys)
    for message in ("no volume is held out", "there is no validation volume"):
        (found,) = about(report, "splits", "WARN", message)
        assert found["remedy"] == "see the refused files"
