"""Each training ends with the command that usually comes next."""

import shlex

import pytest
import yaml
from short_runs import run

import generate
import train_ldm
import train_vae
from autoencoder import AutoencoderKL3D
from training import parse_config
from training.ldm_config import TrainLdmConfig


def said(capsys) -> list[str]:
    return [line.removeprefix("next: ") for line in capsys.readouterr().err.splitlines() if line.startswith("next: ")]


def test_an_autoencoder_is_followed_by_its_sibling_ldm(tmp_path, capsys, monkeypatch):
    """If there is one beside the config; with the autoencoder that was written, whatever `vae:` says."""
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "my recipe" / "vae.yaml"
    config.parent.mkdir()
    config.write_text("loop: {seed: 1}\n")
    run(train_vae, tmp_path / "a", f"--config={config}", "--loop.max_steps=1")
    assert said(capsys) == []
    config.with_name("ldm.yaml").write_text(yaml.safe_dump({"loop": {"seed": 3}}))
    run(train_vae, tmp_path / "b", "--config", str(config), "--loop.max_steps=1")
    (command,) = said(capsys)
    python, script, *args = shlex.split(command)
    assert (python, script.rpartition("/")[2]) == ("python", "train_ldm.py")
    assert args == ["--config", "my recipe/ldm.yaml", "--vae", "b/vae"]
    args += ["--output=x", "--data.phantom={count: 6}", "--model={class: diffusion.LatentUNet3D}"]
    assert parse_config(TrainLdmConfig, args).loop.seed == 3
    assert AutoencoderKL3D.from_pretrained(args[3])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"num_labels": 3, "classes": {"sex": ["f", "m"]}}, ["--masks", "MASKS"]),
        ({"num_labels": 0, "numbers": {"age": {}}}, ["--conditions", "TABLE"]),
        ({"num_labels": 0, "classes": None, "numbers": None}, []),
    ],
)
@pytest.mark.parametrize("lora", [[], ["--lora={rank: 4}", "--init_from=weights/p/unet"]])
def test_a_diffusion_model_is_followed_by_generation(model, words, lora):
    args = ["--output=run", "--vae=x", "--data.phantom={count: 6}", "--model={class: diffusion.LatentUNet3D}", *lora]
    config = parse_config(TrainLdmConfig, args)
    config.model |= model
    found = [str(word) for word in train_ldm.generation(config)]
    folders = ["--pipeline", "weights/p", "--lora", "run/lora"] if lora else ["--pipeline", "run/pipeline"]
    assert found == [*folders, *words, "--output", "run/generated"]
    generate.parse(found)


@pytest.mark.parametrize(
    ("data", "split"),
    [(["--data.test_fraction=0.2"], "test"), ([], "validation"), (["--data.validation_fraction=0"], "train")],
)
def test_files_are_generated_for_a_split(data, split):
    files = [
        "--data.images=images/{case}.nii.gz",
        "--data.masks=labels/{case}.nii.gz",
        "--data.label_names={0: a, 1: b}",
    ]
    args = ["--output=run", "--vae=x", *files, *data, "--model={class: diffusion.LatentUNet3D, num_labels: 2}"]
    found = [str(word) for word in train_ldm.generation(parse_config(TrainLdmConfig, args))]
    assert found == ["--config", "run/config.yaml", "--split", split, "--output", "run/generated"]


def test_a_finished_training_says_it(tmp_path, capsys, monkeypatch):
    vae = AutoencoderKL3D(channels=(4, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    vae.set_latent_statistics([0.1] * 4, [0.5] * 4)
    vae.save_pretrained(tmp_path / "vae")
    monkeypatch.chdir(tmp_path)
    run(train_ldm, tmp_path / "ldm", f"--vae={tmp_path / 'vae'}", "--loop.max_steps=1")
    (command,) = said(capsys)
    assert command.endswith("generate.py --pipeline ldm/pipeline --masks MASKS --output ldm/generated")
