"""A student of a pipeline, trained by train_ldm.py: it resumes bit for bit, samples in few calls, and edits."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from short_runs import COMMON, LDM, Interrupted, everything
from tiny import editor_of

import generate
import train_ldm
from autoencoder import AutoencoderKL3D
from diffusion.objectives import FLOW_MAP
from pipelines import MedVolumePipeline, SamplingSettings
from training import LdmTrainingStep

DROPOUT = LDM[0].replace("}", ", condition_dropout: {mask: 0.3}, shift_voxels: 20}")
STEPS = 5
SHORT = [f"--loop.max_steps={STEPS}", "--loop.validate_every=0", "--optimizer.gradient_accumulation=1"]
DISTILL = ["--distill.steps=4", "--distill.guidance_scale=2", "--distill.pairs=2", "--distill.from_images=0.3"]


def train(output: Path, vae: Path, *args: str) -> dict[str, float]:
    AcceleratorState._reset_state(reset_partial_state=True)
    return train_ldm.main([f"--output={output}", f"--vae={vae}", *COMMON, *SHORT, *LDM[1:], *args])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, vae_folder) -> Path:
    """A pipeline of a few steps, which mostly shows its random weights."""
    output = tmp_path_factory.mktemp("teacher")
    train(output, vae_folder, DROPOUT, "--loop.max_steps=2")
    return output / "pipeline"


@pytest.fixture(scope="module")
def student(tmp_path_factory, vae_folder, teacher) -> Path:
    output = tmp_path_factory.mktemp("student")
    train(output, vae_folder, f"--distill.teacher={teacher}", *DISTILL)
    return output


def test_student_resumes_bit_for_bit(student, teacher, tmp_path, vae_folder, monkeypatch):
    original, calls = LdmTrainingStep.__call__, []

    def interrupted(self, batch, generators):
        calls.append(1)
        if len(calls) == STEPS:  # after the checkpoint of step 3
            raise Interrupted
        return original(self, batch, generators)

    args = [f"--distill.teacher={teacher}", *DISTILL]
    monkeypatch.setattr(LdmTrainingStep, "__call__", interrupted)
    with pytest.raises(Interrupted):
        train(tmp_path / "run", vae_folder, *args)
    monkeypatch.setattr(LdmTrainingStep, "__call__", original)
    torch.manual_seed(99)
    train(tmp_path / "run", vae_folder, *args, "--resume=latest")
    last = f"checkpoints/step_{STEPS:06d}"
    whole, parts = everything(student / last), everything(tmp_path / "run" / last)
    assert whole.keys() == parts.keys()
    assert [key for key in whole if not torch.equal(whole[key], parts[key])] == []


def test_student_is_its_teacher_with_a_second_time(student, teacher):
    name = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(teacher / name), load_file(student / "pipeline" / name)
    assert {key for key in after if key not in before} == {
        f"next_embedding.linear_{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")
    }
    config = json.loads((student / "pipeline/unet/config.json").read_text())
    assert config["objective"] == FLOW_MAP and config["shift_voxels"] == 20
    assert config["condition_dropout"] == {"mask": 0.3}
    settings = json.loads((student / "pipeline/sampling.json").read_text())
    assert settings == {"num_inference_steps": 2, "guidance_scale": 1.0}
    metrics = json.loads((student / "metrics.json").read_text())
    assert np.isfinite(metrics["loss"])


def test_student_samples_in_few_calls_and_edits(student, tmp_path, monkeypatch):
    pipe = MedVolumePipeline.from_pretrained(student / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    calls = count_calls(pipe.unet, monkeypatch)
    labels = np.zeros((12, 12, 12), np.int16)
    labels[2:10, 2:10, 2:10], labels[4:8, 4:8, 4:8], labels[5:7, 5:7, 5:7] = 1, 2, 3
    mask = nib.Nifti1Image(labels, np.eye(4))
    volumes = {}
    for steps in (None, 1, 4):
        calls.clear()
        out = pipe(mask, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
        assert len(calls) == (steps or 2)
        assert out.provenance[0]["num_inference_steps"] == (steps or 2)
        volumes[steps] = out.volumes[0]
    with pytest.raises(ValueError, match="this model is a student, which has its teacher's guidance"):
        pipe(mask, guidance_scale=2.0)
    weak = MedVolumePipeline.from_pretrained(student / "pipeline")
    weak.load_unet_weak(student / "pipeline")
    with pytest.raises(ValueError, match="autoguidance_scale 1.5: this model is a student"):
        weak(mask, autoguidance_scale=1.5)
    with pytest.raises(ValueError, match="guidance_without: this model is a student"):
        pipe(mask, guidance_without={"lesion": "organ"})
    pipe.sampling_settings = SamplingSettings(2, 2.0)
    with pytest.raises(ValueError, match="this model is a student"):
        pipe.save_pretrained(tmp_path / "guided")
    editor = editor_of(MedVolumePipeline.from_pretrained(student / "pipeline"))
    calls = count_calls(editor.unet, monkeypatch)
    options = {"mask": mask, "image": volumes[4], "generator": torch.Generator().manual_seed(1)}
    editor(**options, strength=0.5, num_inference_steps=2)
    assert len(calls) == 1
    region = nib.Nifti1Image(np.pad(np.ones((4, 4, 4), np.int16), 4), np.eye(4))
    with pytest.raises(ValueError, match="strength 0.5 of 2 steps fills the region in one call"):
        editor(**options, region=region, strength=0.5, num_inference_steps=2)
    calls.clear()
    editor(**options, region=region)
    assert len(calls) == 2
    nib.save(mask, tmp_path / "mask.nii.gz")
    folders = {"pipeline": student / "pipeline", "masks": tmp_path / "mask.nii.gz", "output": tmp_path / "out"}
    generate.main([*(f"--{name}={path}" for name, path in folders.items()), "--steps=1"])
    [sidecar] = (tmp_path / "out").glob("mask_*.json")
    record = json.loads(sidecar.read_text())
    assert record["num_inference_steps"] == 1 and record["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert record["settings_from"] == {"num_inference_steps": "call", "guidance_scale": "pipeline"}


def count_calls(unet, monkeypatch) -> list[float]:
    """A list that gets the timestep of every call of the U-Net from now on."""
    calls, forward = [], unet.forward

    def call(sample, timestep, *args, **kwargs):
        calls.append(float(timestep))
        return forward(sample, timestep, *args, **kwargs)

    monkeypatch.setattr(unet, "forward", call)
    return calls


def test_lora_of_a_student(student, teacher, tmp_path, vae_folder):
    unet = student / "pipeline/unet"
    args = [f"--distill.teacher={teacher}", *DISTILL, f"--init_from={unet}", "--loop.max_steps=1"]
    train(tmp_path, vae_folder, *args, "--lora={rank: 2, target_modules: [conv1, linear_2]}")
    pipe = MedVolumePipeline.from_pretrained(student / "pipeline")
    pipe.load_lora_weights(tmp_path / "lora")
    with pytest.raises(ValueError):  # it belongs to the student
        MedVolumePipeline.from_pretrained(teacher).load_lora_weights(tmp_path / "lora")


def test_refusals(student, teacher, tmp_path, vae_folder):
    def refused(match: str, *args: str, vae: Path = vae_folder) -> None:
        with pytest.raises(ValueError, match=match):
            train(tmp_path / "run", vae, *args)

    named = f"--distill.teacher={teacher}"
    refused("model.objective flow_map is that of a student: give --distill.teacher", "--model={class: diffusion."
            "LatentUNet3D, objective: flow_map}")  # fmt: skip
    refused(r"model has channels: \[8, 24\], .*; omit the model section", named, "--model={channels: [8, 24]}")
    refused(r"distill: 4 steps of the teacher are no multiple of \[3\] calls", named, *DISTILL, "--distill.calls=[3]")
    refused("distill: the teacher predicts flow_map", f"--distill.teacher={student / 'pipeline'}", *DISTILL)
    refused("distill.teacher .*: no model_index.json", f"--distill.teacher={tmp_path}", *DISTILL)
    refused("the model section needs `class", "--loop.max_steps=1")
    away = tmp_path / "away"
    shutil.copytree(teacher, away)
    (away / "sampling.json").write_text(json.dumps({"guidance_without": {"lesion": "organ"}}))
    refused("has guidance_without, which a student does not learn", f"--distill.teacher={away}")
    other = tmp_path / "vae"
    vae = AutoencoderKL3D.from_pretrained(vae_folder)
    vae.set_latent_statistics([0.3] * 4, [0.5] * 4)
    vae.save_pretrained(other)
    refused("its latents are not those of distill.teacher", named, *DISTILL, vae=other)
