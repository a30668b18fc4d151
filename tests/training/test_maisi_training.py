"""MAISI's autoencoder and U-Net, converted and narrow, in `train_ldm.py`: tuned fully and by a LoRA, and resumed."""

import csv

import nibabel as nib
import numpy as np
import peers
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from short_runs import Interrupted

import train_ldm
from diffusion import Conditions, MonaiUNet3D, training_loss
from diffusion.completion import complete_model
from diffusion.objectives import shifted
from evaluation.doctor.after_training import check_latents
from interop.convert import convert
from pipelines import MedVolumePipeline
from pipelines.storage.loading import load_autoencoder
from training import LdmTrainingStep
from training.ldm import model_of
from volumes.description import NumberStats

SPACING = ["spacing_x", "spacing_y", "spacing_z"]
QUICK = ["--loop.batch_size=2", "--loop.mixed_precision=no", "--loop.validate_every=0", "--loop.preview_every=0"]
QUICK += ["--loop.workers=0", "--loop.trackers=[]", "--inference_steps=2", "--optimizer.warmup_steps=0"]
LAYERS = "[to_q, to_k, to_v, out_proj, time_emb_proj, conv]"


@pytest.fixture(scope="module")
def maisi(tmp_path_factory):
    """A converted pipeline, and the config of a data set with its conditions."""
    folder = tmp_path_factory.mktemp("maisi")
    with pytest.MonkeyPatch.context() as patch:
        peers.narrow(patch, "maisi-rflow-ct")
        peers.write_maisi(folder / "hub", "maisi-rflow-ct")
        convert("maisi-rflow-ct", folder / "hub", folder / "pipeline")
    (folder / "data").mkdir()
    random = np.random.default_rng(0)
    with (folder / "data/table.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "modality"])
        for number in range(3):  # of sides that the U-Net cannot halve, too
            voxels = random.normal(0, 300, (8, 10 + 2 * number, 8)).astype(np.int16)
            image = nib.Nifti1Image(voxels, np.diag([1.0, 1.5 + number, 2.0, 1.0]))
            nib.save(image, folder / f"data/case{number}.nii.gz")
            rows.writerow([f"case{number}.nii.gz", "ct"])
    data = {"root": str(folder / "data"), "table": "table.csv", "images": "{file}", "validation_fraction": 0.0}
    data |= {"intensity": {"kind": "window", "low": -1000.0, "high": 1000.0}}
    data |= {"classes": {"modality": ["ct"]}, "numbers": SPACING}
    (folder / "ldm.yaml").write_text(yaml.safe_dump({"data": data}))
    return folder


def train(maisi, output, *args: str):
    AcceleratorState._reset_state(reset_partial_state=True)
    words = [f"--config={maisi / 'ldm.yaml'}", f"--vae={maisi / 'pipeline/vae'}", f"--output={output}", *QUICK]
    train_ldm.main([*words, f"--init_from={maisi / 'pipeline/unet'}", *args])
    AcceleratorState._reset_state(reset_partial_state=True)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_all_weights_are_tuned_and_the_autoencoder_stays(maisi, tmp_path):
    train(maisi, tmp_path / "run", "--loop.max_steps=1", "--loop.ema_decay=0")
    before, after = (weights(folder / "unet") for folder in (maisi / "pipeline", tmp_path / "run/pipeline"))
    assert [n for n in before if n.endswith("weight") and torch.equal(before[n], after[n])] == []
    frozen, kept = (weights(folder / "vae") for folder in (maisi / "pipeline", tmp_path / "run/pipeline"))
    assert all(torch.equal(frozen[name], kept[name]) for name in frozen)
    pipe = MedVolumePipeline.from_pretrained(tmp_path / "run/pipeline")
    assert pipe.unet.config["class_labels"] == [1] and pipe.data.grid_numbers == tuple(SPACING)
    out = pipe(classes={"modality": "ct"}, shape=(8, 10, 8), spacing=(1, 1, 2), num_inference_steps=2)
    assert out.volumes[0].shape == (8, 10, 8) and np.asarray(out.volumes[0].dataobj).std() > 1


def test_a_lora_is_tuned_and_loaded(maisi, tmp_path):
    train(
        maisi,
        tmp_path / "run",
        "--loop.max_steps=1",
        "--loop.ema_decay=0",
        f"--lora={{rank: 2, target_modules: {LAYERS}}}",
    )
    pipe = MedVolumePipeline.from_pretrained(maisi / "pipeline")
    request = {"classes": {"modality": "ct"}, "shape": (8, 8, 8), "num_inference_steps": 2, "output_type": "latent"}

    def sample() -> torch.Tensor:
        return torch.as_tensor(pipe(**request, generator=torch.Generator().manual_seed(0)).volumes[0])

    before = sample()
    pipe.load_lora_weights(tmp_path / "run/lora")
    assert not torch.equal(sample(), before)
    pipe.unload_lora_weights()
    assert torch.equal(sample(), before)


def test_resumed_equals_uninterrupted(maisi, tmp_path, monkeypatch):
    args = ["--loop.max_steps=2", "--loop.checkpoint_every=1"]
    train(maisi, tmp_path / "whole", *args)
    original, calls = LdmTrainingStep.__call__, []

    def interrupted_call(self, batch, generators):
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted
        return original(self, batch, generators)

    with monkeypatch.context() as patch:
        patch.setattr(LdmTrainingStep, "__call__", interrupted_call)
        with pytest.raises(Interrupted):
            train(maisi, tmp_path / "parts", *args)
    torch.manual_seed(99)  # a new process starts from another random state
    train(maisi, tmp_path / "parts", *args, "--resume=latest")
    whole, parts = (weights(tmp_path / run / "pipeline/unet") for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_loss_is_that_of_maisis_objective(maisi):
    """Of a network that predicts nothing: the mean square of noise minus image, at timesteps that are shifted by the
    cube root of the number of latent voxels."""
    unet = MonaiUNet3D.from_pretrained(maisi / "pipeline/unet")
    seen = []

    def nothing(noisy, timesteps, **_):
        seen.append(timesteps)
        return (torch.zeros_like(noisy),)

    latents, weight = torch.zeros(1, 4, 8, 8, 8), torch.ones(1, 1, 8, 8, 8)
    generator = torch.Generator().manual_seed(0)
    loss = training_loss(nothing, "rectified_flow", latents, Conditions(), weight, generator, **unet.loss_settings)
    generator = torch.Generator().manual_seed(0)
    even = 1000 * torch.sigmoid(torch.randn(1, generator=generator))
    assert torch.allclose(seen[0], shifted(even, (8**3 / 32**3) ** (1 / 3), 1000))
    assert loss.item() == pytest.approx(torch.randn(latents.shape, generator=generator).square().mean().item())


class Facts:
    """Facts of a data set of CT, as `complete_model` reads them."""

    def __init__(self, **changes):
        self.channels, self.labels, self.classes = ["image"], {}, {"modality": ["ct"]}
        self.numbers = dict.fromkeys(SPACING, NumberStats(1.0, 1.0, 0.5, 2.0))
        vars(self).update(changes)


def test_the_data_must_have_the_conditions_of_the_unet(maisi):
    vae = load_autoencoder(maisi / "pipeline")
    section = model_of(str(maisi / "pipeline/unet"))
    assert complete_model(section, vae, Facts()) == section and section["class"] == "diffusion.MonaiUNet3D"
    for changes, message in (
        ({"labels": {0: "background", 1: "liver"}}, "takes no masks.*LatentUNet3D"),
        ({"classes": {}}, r"data\.classes is None, the U-Net knows {'modality': \['ct'\]}"),
        ({"numbers": {}}, r"data\.numbers is \[\], the U-Net knows \['spacing_x'"),
    ):
        with pytest.raises(ValueError, match=message):
            complete_model(section, vae, Facts(**changes))


def test_the_doctor_names_the_noise_of_sampled_latents():
    """27.5 % of the variance, as of MAISI's autoencoder."""
    summary = {"mean": [0.0] * 4, "std": [1.0] * 4, "informed": [0.725] * 4, "rms": {}, "codes": {}}
    _, found = check_latents(summary, sampled=True)
    assert found.level == "WARN" and "27.5% of their variance" in found.message and "mode" in found.remedy
    assert [one.level for one in check_latents(summary, sampled=False)] == ["OK"]


def test_latents_are_the_mode_unless_asked(maisi, tmp_path, monkeypatch):
    seen = []
    real = training_loss

    def spy(unet, objective, latents, *args, **kwargs):
        seen.append(latents.detach().clone())
        return real(unet, objective, latents, *args, **kwargs)

    monkeypatch.setattr("training.ldm_step.training_loss", spy)
    for name, args in (("mode", []), ("sample", ["--latents=sample"])):
        train(maisi, tmp_path / name, "--loop.max_steps=1", *args)
    means = [load_file(file)["mean"] for file in (tmp_path / "mode/latents").rglob("*.safetensors")]
    rows = [any(row.shape == one.shape and torch.equal(row, one) for one in means) for row in seen[0]]
    assert any(rows) and not torch.equal(seen[0], seen[1])
