"""The doctor on the troubles of docs/troubleshooting.md: each is planted, and named."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from tiny import tiny_pipeline

from autoencoder import VQGAN3D, AutoencoderKL3D, latent_statistics
from evaluation.data.model_units import pipeline_of_boxes
from evaluation.doctor import after_training
from evaluation.doctor.__main__ import main
from evaluation.doctor.after_training import LatentSummary, check_latents, compare_limits, latent_summary
from evaluation.doctor.run_checks import check_log, check_output
from pipelines import SamplingConfig, VolumeRequest
from volumes import DataConfig, PhantomConfig, Volume, VolumeDataset, load_cases, pad_sample

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (12, 12, 12)
NAMES = {0: "background", 1: "organ", 2: "lesion", 3: "stone", 4: "cyst"}
VAE = {
    "class": "autoencoder.AutoencoderKL3D",
    "channels": [8, 8],
    "encoder_blocks": [1, 1],
    "decoder_blocks": [1, 1],
}
UNET = {"class": "diffusion.LatentUNet3D", "channels": [16, 16], "blocks": [1, 1], "head_dim": 8}


def save_set(folder, labels_of, bright=0):
    """Six training and two test volumes from 0 to 1000, with `labels_of[name]` beside the organ, and `bright` voxels at
    3000. Returns the data section."""
    names = [*(f"train{number}" for number in range(6)), "test0", "test1"]
    for number, name in enumerate(names):
        generator = np.random.default_rng(number)
        image = generator.uniform(0, 1000, SHAPE).astype(np.float32)
        image.flat[:bright] = 3000
        mask = np.zeros(SHAPE, np.uint8)
        mask[2:9, 2:9, 2:9] = 1
        for label in labels_of.get(name, ()):
            mask[9:11, label, 3:6] = label
        for kind, array in (("images", image), ("labels", mask)):
            (folder / kind).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / kind / f"{name}.nii.gz")
    rows = [f"{name},{name.rstrip('0123456789')}" for name in names]
    (folder / "table.csv").write_text("\n".join(["volume,split", *rows]))
    return {
        "root": str(folder),
        "table": "table.csv",
        "images": "images/{volume}.nii.gz",
        "masks": "labels/{volume}.nii.gz",
        "subject": "volume",
        "split": "split",
        "validation_fraction": 0.0,
        "label_names": NAMES,
        "intensity": {"kind": "window", "low": 0.0, "high": 1000.0},
    }


def findings(folder, data, check, **sections):
    """The doctor's findings of one check on a data section and other sections."""
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data, **sections}))
    main(["--config", str(folder / "config.yaml"), "--output", str(folder / "report.json")])
    found = json.loads((folder / "report.json").read_text())["findings"]
    return [one for one in found if one["check"] == check]


def test_labels_that_a_split_lacks_are_named(tmp_path):
    """The lesion is missing in one test volume only, the stone is in no training volume, the cyst in no test volume."""
    train = {f"train{number}": [2, 4] if number else [2] for number in range(6)}
    found = findings(tmp_path, save_set(tmp_path, {**train, "test0": [2, 3]}), "labels")
    by_label = {label: [one for one in found if one["message"].startswith(label)] for label in NAMES.values()}
    (stone,) = by_label["stone"]
    assert stone["level"] == "FAIL" and "in no training volume" in stone["message"]
    assert "only in test0 (test)" in stone["message"] and "into the training set" in stone["remedy"]
    (lesion,) = by_label["lesion"]
    assert lesion["level"] == "WARN" and "lacking in test1" in lesion["message"]
    assert "All training volumes have it" in lesion["remedy"]
    lacking, untested = by_label["cyst"]
    assert "lacking in test0, test1, train0" in lacking["message"] and "All training" not in lacking["remedy"]
    assert untested["level"] == "WARN" and "in no test volume" in untested["message"]
    assert [one["level"] for one in by_label["organ"]] == ["OK"]


def test_a_label_that_no_volume_has_is_no_question_of_splits(tmp_path):
    found = findings(tmp_path, save_set(tmp_path, {}), "labels")
    (stone,) = [one for one in found if one["message"].startswith("stone")]
    assert stone["level"] == "FAIL" and "only in" not in stone["message"] and "label_names" in stone["remedy"]


@pytest.mark.parametrize(("share", "level"), [(0.04, "OK"), (0.08, "WARN")])
def test_a_window_that_clips_much_is_named(share, level, tmp_path):
    data = save_set(tmp_path, {}, bright=int(share * np.prod(SHAPE)))
    (found,) = findings(tmp_path, data, "intensity")
    assert found["level"] == level
    assert ("a median of 8% of a volume is clipped to the highest value" in found["message"]) == (level == "WARN")


DATA = {"phantom": {"count": 10, "shape": [16, 16, 16]}, "test_fraction": 0.25, "validation_fraction": 0.0}


@pytest.mark.parametrize(
    ("latent", "steps", "more", "level", "words"),
    [
        (False, 499, {}, "WARN", "too few steps for random weights"),
        (False, 500, {}, "OK", "500 steps"),
        (True, 1499, {}, "WARN", "too few steps for random weights"),
        (True, 1500, {}, "OK", "1,500 steps"),
        (False, 39, {"init_from": str(ROOT / "weights/hippocampus/vae")}, "OK", "see 9.8"),
    ],
)
def test_a_run_that_is_too_short_is_named(latent, steps, more, level, words, tmp_path):
    """Two samples a step; eight training volumes. A fine-tuning may be short, but not see each volume a few times."""
    sections = {"model": VAE, "crops": {"shape": [16, 16, 16]}} if not latent else {"model": UNET, "vae": "x"}
    loop = {"max_steps": steps, "batch_size": 2}
    (found,) = findings(tmp_path, DATA, "length", loop=loop, **sections, **more)
    if more:
        level = "WARN"
    assert found["level"] == level and words in found["message"]


def test_fp16_is_warned_of_and_refused_beside_a_discriminator(tmp_path):
    sections = {"model": VAE, "crops": {"shape": [16, 16, 16]}, "loop": {"mixed_precision": "fp16", "batch_size": 2}}
    (found,) = findings(tmp_path, DATA, "precision", **sections)
    assert found["level"] == "WARN" and "NaN" in found["message"] and "auto" in found["remedy"]
    (found,) = findings(tmp_path, DATA, "precision", adversarial={"channels": 4}, **sections)
    assert found["level"] == "FAIL" and "fp16 with a discriminator is not supported" in found["message"]
    sections["loop"]["mixed_precision"] = "no"
    assert findings(tmp_path, DATA, "precision", **sections) == []


def test_a_run_that_the_output_holds_is_named(tmp_path):
    (tmp_path / "run/checkpoints/step_000500").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step_000040").mkdir()
    sections = {"model": VAE, "crops": {"shape": [16, 16, 16]}, "loop": {"batch_size": 2}}
    (found,) = findings(tmp_path, DATA, "output", output=str(tmp_path / "run"), **sections)
    assert found["level"] == "WARN" and "already holds a run, up to step_000500" in found["message"]
    assert "--resume latest" in found["remedy"]
    assert check_output(str(tmp_path / "other")) == []


def phantoms():
    config = DataConfig(phantom=PhantomConfig(count=3, shape=(16, 16, 16)), validation_fraction=0.0)
    return VolumeDataset(load_cases(config), config)


def test_a_collapsed_codebook_is_named():
    """A healthy codebook first, then one in which a single code is nearest to all latents."""
    dataset = phantoms()
    torch.manual_seed(0)
    vae = VQGAN3D(channels=(8, 8), decoder_blocks=(1, 1), num_codes=32).eval()
    samples = [pad_sample(dataset[i], vae.stride) for i in range(3)]
    batches = [{key: sample[key][None] for key in ("image", "fov")} for sample in samples]
    raw = torch.cat([vae.encode(one["image"], return_dict=False)[0].raw_mean.movedim(1, -1).flatten(0, 3).detach()
                     for one in batches])  # fmt: skip
    vae.set_latent_statistics(*latent_statistics(vae, batches))
    vae.codebook.codes.copy_(raw[torch.linspace(0, len(raw) - 1, 32).long()])
    (found,) = [one for one in check_latents(latent_summary(vae, dataset)) if one.check == "codebook"]
    assert found.level == "OK" and "of 32 codes are used" in found.message
    vae.codebook.codes.fill_(1e6)
    vae.codebook.codes[7] = 0
    summary = latent_summary(vae, dataset)
    assert summary["codes"] == {"perplexity": 1.0, "usage": 1 / 32, "codes": 32, "latent_voxels": 3 * 64}
    (found,) = [one for one in check_latents(summary) if one.check == "codebook"]
    assert found.level == "WARN" and "it has collapsed to few codes" in found.message
    assert latent_summary(AutoencoderKL3D(channels=(8, 8), decoder_blocks=(1, 1)), dataset)["codes"] == {}


@pytest.mark.parametrize(("signal", "expected"), [(0.6, ["OK"]), (0.4, ["OK", "WARN"]), (0.05, ["OK", "WARN"])])
def test_latents_that_are_mostly_noise_are_named(signal, expected):
    summary = LatentSummary(mean=[0.0, 0.0], std=[1.0, 1.0], informed=[1.0, signal], rms={}, codes={})
    found = check_latents(summary)
    assert [one.level for one in found] == expected
    assert f"noise is up to {1 - signal:.0%} of the variance" in found[0].message
    if signal == 0.4:
        assert "channels [1] are noisy: 60% of their variance" in found[1].message and "losses.kl" in found[1].remedy
    if signal == 0.05:
        assert "channels [1] are dead" in found[1].message


def run_log(folder, discriminator, skipped=0):
    """A run's folder whose metrics.jsonl has these losses, 20 steps apart, and a line that was not finished."""
    folder.mkdir()
    reports = [{"step": 20 * number, "kind": "train", "loss": 0.1, "skipped_steps": skipped, **more}
               for number, more in enumerate(discriminator, start=1)]  # fmt: skip
    reports.append({"step": 400, "kind": "validation", "psnr": 20.0})
    (folder / "metrics.jsonl").write_text("\n".join([*map(json.dumps, reports), '{"step": 420, "ki']))
    return folder / "vae"


@pytest.mark.parametrize(
    ("losses", "level", "words"),
    [
        ([0.9] * 10 + [0.01] * 10, "WARN", "the discriminator wins"),
        ([0.01] * 10 + [0.9] * 10, "OK", "its loss was 0.9 to 0.9 in the last 10 reports"),
        ([0.9] * 10 + [1.0] * 10, "WARN", "the discriminator guesses"),
        ([0.01] * 3, "OK", "in the last 3 reports"),
    ],
)
def test_a_discriminator_is_judged_by_its_last_reports(losses, level, words, tmp_path):
    skipped, found = check_log(run_log(tmp_path / "run", [{"discriminator": loss} for loss in losses]))
    assert (skipped.check, skipped.level) == ("skipped", "OK")
    assert (found.check, found.level) == ("discriminator", level) and words in found.message
    assert level == "OK" or "adversarial.optimizer.learning_rate" in found.remedy


@pytest.mark.parametrize(("skipped", "level"), [(8, "OK"), (9, "WARN")])
def test_skipped_steps_are_counted(skipped, level, tmp_path):
    """Of 400 steps. A run without a discriminator has no finding about one, and shipped weights have none."""
    (found,) = check_log(run_log(tmp_path / "run", [{}] * 20, skipped))
    assert found.level == level and f"{skipped} of 400 steps were skipped" in found.message
    assert check_log(ROOT / "weights/hippocampus") == []


def test_what_is_outside_the_field_of_view_is_not_judged(monkeypatch):
    """A perfect model, but for what it decodes and generates where the real volume shows nothing."""
    seen = torch.zeros(1, *SHAPE, dtype=torch.bool)
    seen[:, 3:] = True
    inside = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    inside.view(-1)[-1] = -1
    real, painted = torch.where(seen, inside, torch.tensor(-1.0)), torch.where(seen, inside, torch.tensor(1.0))
    dataset: Any = [{"name": "a", "image": real, "seen": seen, "affine": torch.eye(4)}]
    pipe: Any = SimpleNamespace(vae=SimpleNamespace(stride=(1, 1, 1)))
    monkeypatch.setattr(after_training, "reconstruct", lambda vae, image: painted)
    monkeypatch.setattr(after_training, "pipeline_of_boxes", lambda one: one)
    monkeypatch.setattr(after_training, "_generate", lambda *_: 500 * painted.numpy())
    found = compare_limits(pipe, dataset, None, steps=1)
    for kind in ("reconstructed", "generated"):
        assert found[kind] == pytest.approx(dict.fromkeys(found[kind], 0.0), abs=1e-5)


def test_the_doctor_generates_in_boxes_that_were_cut():
    """The mask of a case in its box is not cut again, with its margin."""
    array = np.zeros((1, 12, 10, 8), np.int16)
    array[0, 4:8, 3:6, 2:5] = 2
    facts: Any = SimpleNamespace(classes=(), numbers=(), shape=array.shape[1:])
    config: Any = SimpleNamespace(class_names={}, numbers=[])
    dataset: Any = SimpleNamespace(config=config, facts=[facts], label_map=lambda index: Volume(array, np.eye(4)))
    cropped = tiny_pipeline(crop={"above": "mask", "channel": None, "margin": 1.0})
    pipes = (pipeline_of_boxes(cropped), tiny_pipeline())
    found, expected = (after_training._generate(pipe, dataset, 0, 1) for pipe in pipes)
    np.testing.assert_array_equal(found, expected)


def test_a_pipeline_of_boxes_does_not_change_the_other():
    """While it generates a whole mask, a call of the other one still cuts its mask."""
    cropped, boxes_during_the_call = tiny_pipeline(crop={"above": "mask", "channel": None, "margin": 1.0}), []
    array = np.zeros((12, 10, 8), np.int16)
    array[4:8, 3:6, 2:5] = 2
    mask = nib.Nifti1Image(array, np.eye(4))

    def meanwhile(pipe, step, timestep, tensors):
        [volume] = cropped.prepare([VolumeRequest(mask)], SamplingConfig(1))
        boxes_during_the_call.append(volume.record.box)

    boxes = pipeline_of_boxes(cropped)
    output = boxes(mask, num_inference_steps=1, callback_on_step_end=meanwhile)
    assert boxes.unet is cropped.unet and "box" not in output.provenance[0]
    assert boxes_during_the_call == [{"whole": [12, 10, 8], "shape": [6, 5, 5], "start": [3, 2, 1]}]
