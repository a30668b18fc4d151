"""Memory planned for a size of volumes, without any data, and compared with a dry run."""

import json

import pytest
import torch
import yaml
from tiny import peak_bytes

from evaluation.doctor import models as doctor_config
from evaluation.doctor.__main__ import main, parse
from evaluation.doctor.memory import (
    GIB,
    generation_bytes,
    measured_peak,
    networks_of,
    optimizer_bytes,
    training_bytes,
)
from evaluation.doctor.models import build_models, config_from_sections, with_precision
from volumes import DataConfig

VAE = {"class": "autoencoder.AutoencoderKL3D", "channels": [8, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1, 1]}
UNET = {
    "class": "diffusion.LatentUNet3D",
    "channels": [8, 8],
    "blocks": [1, 1],
    "attention": [False, False],
    "mask_width": 4,
}
DATA = {"root": "nowhere", "images": "{name}.nii.gz", "masks": "{name}_seg.nii.gz", "label_names": {0: "no", 1: "yes"}}


def recipe(folder, **changes):
    """A folder with vae.yaml and the ldm.yaml that follows it, of data that are not there."""
    run = str(folder / "run")
    vae = {"output": run, "data": DATA, "model": VAE, "crops": {"shape": [16, 16, 16]}, "loop": {"batch_size": 2}}
    ldm = {"output": run + "-ldm", "vae": run + "/vae", "data": DATA, "model": UNET, "loop": {"batch_size": 2}}
    for name, sections in (("vae", vae), ("ldm", ldm)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**sections, **changes.get(name, {})}))
    return folder


def planned(folder, name, *options):
    assert main(["--config", str(folder / f"{name}.yaml"), "--output", str(folder / "report.json"), *options]) == 0
    return json.loads((folder / "report.json").read_text())


def test_no_data_is_needed(tmp_path):
    recipe(tmp_path)
    vae = planned(tmp_path, "vae", "--shape", "[16, 24, 18]")
    assert vae["memory_bytes"]["volumes"] == 16 * 24 * 18 * (4 + 2)
    ldm = planned(tmp_path, "ldm", "--shape", "[16, 24, 18]")
    said = " ".join(one["message"] for one in ldm["findings"])
    assert "2 latents of [4, 6, 5]" in said and "a volume of [16, 24, 20]" in said
    assert f"using the autoencoder of {tmp_path / 'vae.yaml'}" in said
    wider = recipe(tmp_path, vae={"model": {**VAE, "patch_size": 1}})  # the autoencoder decides the latents' grid
    assert "latents of [8, 12, 9]" in json.dumps(planned(wider, "ldm", "--shape", "[16, 24, 18]")["findings"])


def test_it_is_planned_for_another_accelerator(tmp_path):
    recipe(tmp_path)
    for memory, level in (("0.001", "WARN"), ("80", "OK")):
        report = planned(tmp_path, "vae", "--shape", "[16, 16, 16]", "--memory", memory)
        (said,) = [one for one in report["findings"] if "training takes" in one["message"]]
        assert said["level"] == level and f"of the {float(memory):.1f} GiB of the accelerator" in said["message"]


def test_there_is_nothing_to_train(tmp_path):
    recipe(tmp_path, vae={"model": {"class": "autoencoder.SpaceToDepth3D", "patch_size": 2}})
    report = planned(tmp_path, "vae", "--shape", "[16, 16, 16]")
    assert report["memory_bytes"]["training"] == {"total": 0}
    assert not any("training takes" in one["message"] for one in report["findings"])


def test_what_a_config_saves(tmp_path):
    """Checkpointing and bfloat16 take less of the step, a discriminator more, and nothing else changes."""
    loop = {"batch_size": 2, "mixed_precision": "bf16"}
    steps = {}
    for name, changes in {
        "plain": {},
        "checkpointing": {"gradient_checkpointing": True},
        "bf16": {"loop": loop},
        "critic": {"adversarial": {"channels": 8, "layers": 1}},
    }.items():
        report = planned(recipe(tmp_path, vae=changes), "vae", "--shape", "[16, 16, 16]")
        steps[name] = report["memory_bytes"]["training"]["step"]
    assert steps["checkpointing"] < 0.8 * steps["plain"] and steps["bf16"] < steps["plain"] < steps["critic"]
    recipe(tmp_path, vae={"loop": loop})
    report = planned(tmp_path, "vae", "--shape", "[16, 16, 16]", "--precision", "no")
    assert report["memory_bytes"]["training"]["step"] == steps["plain"]


def trained(tmp_path, name, **changes):
    """The models of a recipe, and a function that runs their training step on the CPU."""
    recipe(tmp_path, **{name: changes})
    sections = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
    config = with_precision(config_from_sections(sections, DataConfig(**DATA)), "no")
    models, _ = build_models(config, {}, tmp_path)
    return models, models.work((8, 8, 8), torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vae", {"adversarial": {"channels": 8, "layers": 1, "slices": 3}}),
        ("ldm", {"model": {**UNET, "channels": [16, 16], "blocks": [2, 2]}, "gradient_checkpointing": True}),
    ],
)
def test_the_trainers_own_step_is_estimated(name, changes, tmp_path):
    models, work = trained(tmp_path, name, **changes)
    networks = networks_of(models.step)
    work()
    assert all(p.grad is not None for p in networks.parameters())
    networks.zero_grad(set_to_none=True)
    measured = peak_bytes(work)
    networks.zero_grad(set_to_none=True)
    assert training_bytes(models.step, work)["step"] == pytest.approx(measured, rel=0.2)


def test_the_discriminators_optimizer_counts_as_configured(tmp_path):
    """The autoencoder's Muon keeps one moment of a kernel; the discriminator's AdamW keeps two."""
    models, work = trained(tmp_path, "vae", adversarial={"channels": 32, "layers": 1})
    vae, discriminator = models.step.learners
    two = 2 * 4 * sum(p.numel() for p in discriminator.network.parameters())
    assert optimizer_bytes(discriminator) == two
    parts = training_bytes(models.step, work)
    assert parts["optimizer"] == optimizer_bytes(vae) + two


def test_a_vqgan_and_its_perceptual_network_are_planned(tmp_path):
    """A codebook's step reads values, which planned tensors lack; a network that is missing is named."""
    vqgan = {**VAE, "class": "autoencoder.VQGAN3D", "num_codes": 16}
    recipe(tmp_path, vae={"model": vqgan, "perceptual": {"network": str(tmp_path / "missing")}})
    report = planned(tmp_path, "vae", "--shape", "[16, 16, 16]")
    assert report["memory_bytes"]["training"]["step"] > 0
    assert any("missing does not exist, so its memory is not counted" in f["message"] for f in report["findings"])


def test_auto_is_planned_as_the_trainer_resolves_it(tmp_path, monkeypatch):
    recipe(tmp_path)
    config = config_from_sections(yaml.safe_load((tmp_path / "vae.yaml").read_text()), DataConfig(**DATA))
    for native, precision in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr("training.engine.precision.native_bf16", lambda native=native: native)
        assert with_precision(config).loop.mixed_precision == precision
    assert with_precision(config, accelerator=True).loop.mixed_precision == "bf16"


def test_a_peak_is_measured():
    device = torch.device("cpu")
    assert measured_peak(lambda: torch.ones(64, 2**18).sum(), device) == pytest.approx(
        2**26, rel=0.1
    )  # 64 MiB, freed again
    assert measured_peak(lambda: None, device) < 2**22


def test_a_dry_run(tmp_path):
    recipe(tmp_path)
    report = planned(tmp_path, "ldm", "--shape", "[16, 16, 16]", "--dry_run", "--device", "cpu")
    assert set(report["dry_run"]) == {"training step", "denoising", "decoding"}
    memory = report["memory_bytes"]
    assert report["dry_run"]["training step"]["estimate"] == memory["training"]["step"]
    assert report["dry_run"]["decoding"]["estimate"] == memory["generation"]["decoding"]
    assert all(0 <= one["measured"] < GIB for one in report["dry_run"].values())
    report = planned(tmp_path, "vae", "--shape", "[16, 16, 16]", "--dry_run", "--device", "cpu")
    assert set(report["dry_run"]) == {"training step", "decoding"}


TWO = {**DATA, "images": {"a": "{name}_a.nii.gz", "b": "{name}_b.nii.gz"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": TWO}, "the autoencoder takes 1 channels, but the data has ['a', 'b']"),
        (
            {"crops": {"shape": [15, 16, 16]}},
            "crops.shape [15, 16, 16] is not a multiple of the autoencoder's stride [4, 4, 4]",
        ),
        ({"adversarial": {"layers": 3, "channels": 4}}, "a discriminator of 3 layers needs 24 voxels per side"),
    ],
)
def test_what_would_stop_the_training_is_named(changes, message, tmp_path, capsys):
    recipe(tmp_path, vae=changes)
    assert main(["--config", str(tmp_path / "vae.yaml"), "--shape", "[16, 16, 16]"]) == 1
    assert message in capsys.readouterr().out


def test_a_dry_run_says_what_does_not_fit(tmp_path, capsys, monkeypatch):
    recipe(tmp_path)
    options = ["--config", str(tmp_path / "vae.yaml"), "--shape", "[16, 16, 16]", "--dry_run", "--device", "cpu"]
    monkeypatch.setattr(doctor_config, "measured_peak", lambda work, device: 2 * GIB)
    for memory, level in (("2.1", "WARN"), ("3", "OK  ")):
        assert main([*options, "--memory", memory]) == 0
        assert f"{level} dry run: training step: 2.00 GiB measured" in capsys.readouterr().out

    def full(work, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(doctor_config, "measured_peak", full)
    assert main(options) == 1
    said = capsys.readouterr().out
    assert "FAIL dry run: training step: does not fit (CUDA out" in said and "-> lower loop.batch_size" in said


@pytest.mark.parametrize(
    "options", [["--shape", "[0, 8, 8]"], ["--shape", "[8, 8, 8]", "--memory", "0"], ["--memory", "0"]]
)
def test_sizes_are_above_zero(options, tmp_path, capsys):
    recipe(tmp_path)
    with pytest.raises(SystemExit):
        main(["--config", str(tmp_path / "vae.yaml"), *options])
    assert options[-2] in capsys.readouterr().err


@pytest.mark.parametrize("shape", [["16,24,18"], ["16", "24", "18"], ["(16, 24, 18)"], ["[16,", "24,", "18]"]])
def test_a_shape_is_typed_as_one_likes(shape, tmp_path):
    recipe(tmp_path)
    assert parse(["--config", str(tmp_path / "vae.yaml"), "--shape", *shape]).shape == (16, 24, 18)


@pytest.mark.parametrize(
    "shape", [["64"], ["64", "64"], ["[1.5, 2, 3]"], ["[8, 8, 8, 8]"], ["large"], ["8", "8", "-8"]]
)
def test_what_is_no_shape_is_said_in_a_sentence(shape, tmp_path, capsys):
    recipe(tmp_path)
    with pytest.raises(SystemExit):
        main(["--config", str(tmp_path / "vae.yaml"), "--shape", *shape])
    assert f"--shape {' '.join(shape)}: give voxels along X, Y and Z" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({}, "the config has no section `model`"),
        ("text", "model: got 'text', expected settings"),
        ([1], "model: got [1]"),
    ],
)
def test_a_model_that_is_none_is_named(section, said, tmp_path, capsys):
    recipe(tmp_path)
    config = yaml.safe_load((tmp_path / "vae.yaml").read_text())
    (tmp_path / "vae.yaml").write_text(yaml.safe_dump({**config, "model": section}))
    assert main(["--config", str(tmp_path / "vae.yaml"), "--shape", "16", "16", "16"]) == 1
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [["--dry_run"], ["--memory", "24"], ["--precision", "bf16"], ["--shape", "[8, 8, 8]", "--pipeline", "x"]]
)
def test_options_that_would_do_nothing_are_refused(options, tmp_path, capsys):
    recipe(tmp_path)
    with pytest.raises(SystemExit):
        main(["--config", str(tmp_path / "ldm.yaml"), *options])
    assert "--shape" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["vae", "ldm", "decoding"])
def test_the_workspace_of_a_cpu_is_estimated(stage, tmp_path):
    """Wide layers on a small grid, where the copies of a kernel's weights and its columns are a large share."""
    wide = {**UNET, "channels": [64, 64], "blocks": [1, 2]}
    name = "ldm" if stage == "ldm" else "vae"
    changes = (
        {"model": wide} if name == "ldm" else {"model": {**VAE, "channels": [48, 96]}, "crops": {"shape": [32] * 3}}
    )
    models, work = trained(tmp_path, name, **changes)
    networks = networks_of(models.step)
    if stage == "decoding":
        measured = peak_bytes(lambda: models.vae.decode(torch.zeros(1, 4, 8, 8, 8)))
        found = {cpu: generation_bytes(models.vae, None, (32, 32, 32), 1, cpu=cpu)["decoding"] for cpu in (True, False)}
    else:
        work()
        networks.zero_grad(set_to_none=True)
        measured = peak_bytes(work)
        networks.zero_grad(set_to_none=True)
        found = {cpu: training_bytes(models.step, work, cpu=cpu)["step"] for cpu in (True, False)}
    assert found[True] == pytest.approx(measured, rel=0.1) and found[False] < found[True]


def test_weights_are_counted_once(tmp_path):
    """A step detaches its weights when it recomputes activations; that is not a second copy."""
    models, work = trained(tmp_path, "ldm", model={**UNET, "channels": [64, 64]}, gradient_checkpointing=True)
    networks = networks_of(models.step)
    weights = 4 * sum(p.numel() for p in networks.parameters())
    measured = peak_bytes(work)
    networks.zero_grad(set_to_none=True)
    assert abs(training_bytes(models.step, work, cpu=True)["step"] - measured) < 0.25 * weights
