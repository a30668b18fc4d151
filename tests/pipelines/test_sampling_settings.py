"""sampling.json: a pipeline's own steps and guidance count where a call says nothing, and records say where they came
from."""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from diffusers import DDIMScheduler
from tiny import editor_of, mask_image, seeded, tiny_pipeline

import generate
from files.documents import FileError
from pipelines import (
    MedVolumeEditPipeline,
    MedVolumePipeline,
    SamplingConfig,
    SamplingSettings,
    VolumeRequest,
    batch_generation,
)
from pipelines.storage import serialization

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "weights"
OWN = {"num_inference_steps": 3, "guidance_scale": 2.5}
MASK = mask_image((8, 8, 8))


@pytest.fixture
def pipe():
    """A pipeline with settings of its own."""
    pipe = tiny_pipeline(condition_dropout={"mask": 0.1})
    pipe.sampling_settings = SamplingSettings(**OWN)
    return pipe


@pytest.fixture
def folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def voxels(pipe, **settings) -> np.ndarray:
    return pipe(MASK, generator=seeded(0), output_type="np", **settings).volumes[0]


def record(pipe, **settings) -> dict:
    return pipe(MASK, generator=seeded(0), output_type="latent", **settings).provenance[0]


def test_the_hippocampus_is_sampled_as_its_card_was_measured():
    """Its card's Dice is of 8 steps of UniPC and a guidance scale of 2 between the noise levels 0.2 and 0.8."""
    pipe = MedVolumePipeline.from_pretrained(WEIGHTS / "hippocampus")
    pipe.set_progress_bar_config(disable=True)
    mask = WEIGHTS / "hippocampus" / "masks" / "hippocampus_015.nii.gz"
    plain = pipe(mask, generator=seeded(0), output_type="np")
    assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler"
    named = pipe(
        mask,
        num_inference_steps=8,
        guidance_scale=2.0,
        guidance_interval=(0.2, 0.8),
        generator=seeded(0),
        output_type="np",
    )
    np.testing.assert_array_equal(plain.volumes[0], named.volumes[0])
    assert [out.provenance[0]["guidance_scale"] for out in (plain, named)] == [2.0, 2.0]
    unguided = pipe(mask, num_inference_steps=8, guidance_scale=1.0, generator=seeded(0), output_type="np")
    assert np.abs(unguided.volumes[0] - named.volumes[0]).max() > 10


GUIDED = {"num_inference_steps": 8, "guidance_scale": 2.0, "guidance_interval": [0.2, 0.8]}
PLAIN = {"num_inference_steps": 20, "guidance_scale": 1.0}
SHIPPED = {"hippocampus": GUIDED, "hippocampus-fast": {"num_inference_steps": 2, "guidance_scale": 1.0}}


@pytest.mark.parametrize("name", ["hippocampus", "hippocampus-fast", "hippocampus-masks", "adrenal-shapes"])
def test_shipped_pipelines_say_how_they_are_sampled(name):
    content = json.loads((WEIGHTS / name / "sampling.json").read_text())
    assert content == SHIPPED.get(name, PLAIN)


def test_own_settings_are_those_of_a_call_that_names_them(pipe):
    np.testing.assert_array_equal(voxels(pipe), voxels(pipe, num_inference_steps=3, guidance_scale=2.5))
    assert np.abs(voxels(pipe) - voxels(pipe, guidance_scale=1.0)).max() > 0


@pytest.mark.parametrize(
    ("call", "used", "places"),
    [
        ({}, (3, 2.5), ("pipeline", "pipeline")),
        ({"num_inference_steps": 2}, (2, 2.5), ("call", "pipeline")),
        ({"guidance_scale": 1.0}, (3, None), ("pipeline", "call")),
        ({"num_inference_steps": 3, "guidance_scale": 2.5}, (3, 2.5), ("call", "call")),
        ({"sigmas": [1.0, 0.5], "guidance_scale": {"mask": 3.0}}, (2, {"mask": 3.0}), ("call", "call")),
    ],
)
def test_arguments_of_a_call_win_and_the_record_says_so(pipe, call, used, places):
    found = record(pipe, **call)
    assert (found["num_inference_steps"], found["guidance_scale"]) == used
    assert found["settings_from"] == dict(zip(("num_inference_steps", "guidance_scale"), places, strict=True))


def test_without_settings_20_steps_are_made_unguided(tmp_path):
    pipe = tiny_pipeline(condition_dropout={"mask": 0.1})
    found = record(pipe)
    assert (found["num_inference_steps"], found["guidance_scale"]) == (20, None)
    assert found["settings_from"] == {"num_inference_steps": "default", "guidance_scale": "default"}
    pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "sampling.json").exists()
    (tmp_path / "saved" / "sampling.json").write_text('{"guidance_scale": 3}')
    pipe = MedVolumePipeline.from_pretrained(tmp_path / "saved")
    assert pipe.sampling_settings == SamplingSettings(guidance_scale=3.0)
    assert record(pipe, num_inference_steps=1)["guidance_scale"] == 3


def test_settings_travel_with_the_pipeline(pipe, folder, tmp_path):
    assert json.loads((folder / "sampling.json").read_text()) == OWN
    loaded = MedVolumePipeline.from_pretrained(folder)
    edits = MedVolumeEditPipeline.from_pretrained(folder)
    of_pipe = MedVolumeEditPipeline.from_pipe(loaded)
    for one in (loaded, edits, of_pipe, MedVolumePipeline.from_pipe(edits)):
        assert one.sampling_settings == SamplingSettings(**OWN)
    of_pipe.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "sampling.json").read_bytes() == (folder / "sampling.json").read_bytes()


def test_settings_of_an_older_folder_do_not_stay(folder):
    tiny_pipeline().save_pretrained(folder)
    assert MedVolumePipeline.from_pretrained(folder).sampling_settings == SamplingSettings()


def test_the_model_is_the_same_whatever_its_settings(pipe, folder):
    before = MedVolumePipeline.from_pretrained(folder).model_hash
    (folder / "sampling.json").unlink()
    assert MedVolumePipeline.from_pretrained(folder).model_hash == before == pipe.model_hash


def test_an_edit_takes_its_share_of_the_pipelines_own_steps():
    pipe = tiny_pipeline(condition_dropout={"mask": 0.1}, intensity=[{"kind": "window", "low": 0, "high": 300}])
    pipe.sampling_settings = SamplingSettings(**OWN)
    image = voxels(pipe, num_inference_steps=1)[0]
    steps: list[int] = []
    out = editor_of(pipe)(
        mask=np.asarray(MASK.dataobj),
        image=image,
        strength=0.67,
        output_type="np",
        callback_on_step_end=lambda _, step, timestep, tensors: steps.append(step),
    )
    assert len(steps) == 2 and out.provenance[0]["num_inference_steps"] == 3
    assert out.provenance[0]["guidance_scale"] == 2.5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"num_inference_steps": 0}', "num_inference_steps: got 0, expected a whole number, from 1 to 100000"),
        ('{"num_inference_steps": 1e9}', "num_inference_steps: got 1000000000.0, expected a whole number"),
        ('{"num_inference_steps": true}', "num_inference_steps: got true, expected a whole number"),
        ('{"num_inference_steps": "20"}', r"num_inference_steps: got '20' \(text\), expected a whole number"),
        ('{"num_inference_steps": 99999999999999999999}', "num_inference_steps: got 9+, expected a whole number"),
        ('{"guidance_scale": -1}', "guidance_scale: got -1, expected a number, 0 or more"),
        ('{"guidance_scale": NaN}', "guidance_scale: got nan, expected a number, 0 or more"),
        ('{"guidance_scale": 1e999}', "guidance_scale: got inf, expected a number, 0 or more"),
        ('{"guidance_scale": [2]}', r"guidance_scale: got \[2\], expected a number, 0 or more"),
        ('{"guidance": 2}', "guidance: is not a setting; did you mean guidance_scale?"),
        ('{"_class_name": "X"}', "_class_name: is not a setting; valid here: autoguidance_scale, controlnet_"),
    ],
)
def test_a_wrong_setting_is_refused_by_file_name_and_value(folder, content, said):
    (folder / "sampling.json").write_text(content)
    with pytest.raises(ValueError, match=rf"sampling.json: {said}.*; correct it, or remove the file"):
        MedVolumePipeline.from_pretrained(folder)


@pytest.mark.parametrize("content", ["[1]", "{", "", '{"guidance_scale": 1, "guidance_scale": 2}', "[" * 100_000])
def test_what_is_no_object_of_settings_is_refused(folder, content):
    (folder / "sampling.json").write_text(content)
    with pytest.raises(ValueError, match=r"sampling.json: "):
        MedVolumePipeline.from_pretrained(folder)


@pytest.mark.skipif(os.name == "nt", reason="POSIX links")
def test_a_file_elsewhere_is_not_read(folder, tmp_path):
    (tmp_path / "elsewhere.json").write_text('{"guidance_scale": 2}')
    (folder / "sampling.json").unlink()
    (folder / "sampling.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match="sampling.json: is a link to .*, outside of the folder of the model"):
        MedVolumePipeline.from_pretrained(folder)
    (folder / "sampling.json").unlink()
    (folder / "sampling.json").mkdir()
    with pytest.raises(FileError, match="sampling.json"):
        MedVolumePipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("dropout", "settings", "said"),
    [
        (None, {"guidance_scale": 2.0}, "this model was never trained without mask"),
        ({"mask": 0.1}, {"num_inference_steps": 5000}, "num_inference_steps 5000"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(tmp_path, dropout, settings, said):
    """When it is saved, and when it is loaded; with another scheduler the steps may fit."""
    pipe = tiny_pipeline(condition_dropout=dropout, objective="v_prediction")
    pipe.save_pretrained(tmp_path / "saved")
    pipe.sampling_settings = SamplingSettings(**settings)
    with pytest.raises(ValueError, match=said):
        pipe.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "saved" / "sampling.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"sampling.json: .*{said}.*; correct it, or remove the file"):
        MedVolumePipeline.from_pretrained(tmp_path / "saved")
    if "guidance_scale" not in settings:
        MedVolumePipeline.from_pretrained(
            tmp_path / "saved", scheduler=DDIMScheduler.from_config(pipe.scheduler.config)
        )


def test_prepared_volumes_are_generated_by_the_same_settings(pipe):
    prepared = pipe.prepare([VolumeRequest(MASK)], SamplingConfig())
    assert prepared[0].record.num_inference_steps == 3
    pipe.generate(prepared, SamplingConfig(3, guidance_scale=2.5), seeded(1), output_type="latent")
    pipe.sampling_settings = SamplingSettings(2)
    with pytest.raises(ValueError, match="prepared for other sampling settings"):
        pipe.generate(prepared, SamplingConfig(), seeded(1))
    with pytest.raises(ValueError, match="num_inference_steps is the pipeline's"):
        _ = SamplingConfig().steps


def test_a_download_brings_the_settings(folder, monkeypatch):
    """diffusers' own download leaves the file out."""
    asked = []
    monkeypatch.setattr(MedVolumePipeline, "download", lambda *_, **__: str(folder))
    monkeypatch.setattr(serialization, "snapshot_download", lambda name, **given: asked.append((name, given)))
    pipe = MedVolumePipeline.from_pretrained("somebody/volumes", revision="v1")
    assert pipe.sampling_settings == SamplingSettings(**OWN)
    files = ["sampling.json", "README.md", "LICENSE*", "provenance.json"]
    assert asked == [("somebody/volumes", {"allow_patterns": files, "revision": "v1"})]


def test_finished_volumes_are_found_if_settings_are_equal(folder, tmp_path, monkeypatch, capsys):
    nib.save(MASK, tmp_path / "a.nii.gz")
    command = ["--pipeline", str(folder), "--masks", str(tmp_path / "a.nii.gz"), "--output", str(tmp_path / "out")]
    generate.main(command)
    written = json.loads((tmp_path / "out" / "a_000.json").read_text())
    assert (written["num_inference_steps"], written["guidance_scale"]) == (3, 2.5)
    assert written["settings_from"] == {"num_inference_steps": "pipeline", "guidance_scale": "pipeline"}
    monkeypatch.setattr(MedVolumePipeline, "generate", lambda *_, **__: pytest.fail("generated again"))
    generate.main([*command, "--steps", "3", "--guidance_scale", "2.5"])
    del written["settings_from"]  # which decides no voxel
    (tmp_path / "out" / "a_000.json").write_text(json.dumps(written))
    generate.main(command)
    with pytest.raises(ValueError, match="was generated with another guidance_scale$"):
        generate.main([*command, "--guidance_scale", "1"])
    (folder / "sampling.json").write_text('{"num_inference_steps": 2, "guidance_scale": 2.5}')
    with pytest.raises(ValueError, match="was generated with another num_inference_steps$"):
        generate.main(command)


def test_a_pipeline_of_masks_is_guided_by_its_own_settings(tmp_path, monkeypatch):
    """--guidance_scale is that of the volumes; --steps is for both."""
    asked = []
    monkeypatch.setattr(batch_generation, "check_same_labels", lambda _: None)
    monkeypatch.setattr(
        batch_generation, "generate_to_disk", lambda config, *_, **__: asked.append(config.sampling) or []
    )
    command = ["--pipeline", "p", "--masks", "generate:m", "--output", str(tmp_path)]
    generate.main([*command, "--steps", "4", "--guidance_scale", "3"])
    assert [(one.num_inference_steps, one.guidance_scale) for one in asked] == [(4, None)]
