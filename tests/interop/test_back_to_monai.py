"""Networks of ours, written for programs that do not have our code, compute there what they compute here."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import peers
import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets.autoencoderkl import AutoencoderKL
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from safetensors.torch import load_file
from tiny import mask_image, tiny_pipeline

from autoencoder import MonaiAutoencoderKL
from convert import main as command
from convert import parse
from diffusion import MonaiUNet3D, make_scheduler
from interop.bundle_sampler import MaskToVolume, load_program
from interop.bundle_writer import INFERENCE, _left_out, _metadata, _sampling, write_bundle
from interop.convert import convert
from interop.export import Networks, _label_table, export
from interop.networks import monai_state
from interop.programs import DEFERRED, Decoder, Denoiser, export_decoder, export_denoiser
from pipelines import SamplingSettings
from pipelines.storage.loading import load_autoencoder

of_any_size = pytest.mark.skipif(
    DEFERRED not in inspect.signature(torch.export.export).parameters, reason="this torch exports one size only"
)
TOLERANCE = 1e-5  # of the range
WEIGHTS = "diffusion_pytorch_model.safetensors"
OURS = "autoencoder cli diffusion files interop medvolume pipelines training volumes".split()
TWO = [{"kind": "window", "low": -100.0, "high": 300.0}] * 2  # scales of two channels
PROGRAMS = """
import sys, torch
given = torch.load("given.pt")
made = {name: torch.export.load(f"{name}.pt2").module()(**inputs) for name, inputs in given.items()}
torch.save(made, "made.pt")
assert not {"diffusers", "monai"} & sys.modules.keys()
"""


def assert_equal(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape and expected.std() > 1e-3  # an answer that weights and input decide
    assert (found - expected).abs().max() <= tolerance * (expected.max() - expected.min())


def run_elsewhere(folder: Path, cwd: Path, *words: str) -> str:
    """Run Python where none of our packages can be imported. Returns what it printed."""
    folder.mkdir()
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({OURS!r}))\n"
    (folder / "sitecustomize.py").write_text(blocked)
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def guided_pipeline(name: str | None = "UniPCMultistepScheduler", objective: str = "rectified_flow"):
    """A pipeline with every setting of the sampler that the shipped ones have."""
    pipe = tiny_pipeline(objective=objective, condition_dropout={"mask": 0.1})
    pipe.scheduler = make_scheduler(objective, name=name)
    pipe.sampling_settings = SamplingSettings(4, 2.0, (0.2, 0.8))
    return pipe


def write_mask(folder: Path) -> Path:
    """Write a mask that is partly outside the field of view, neither RAS nor of multiples of the stride."""
    affine = np.array([[0.0, -1.0, 0.0, 10.0], [1.0, 0.0, 0.0, -3.0], [0.0, 0.0, 1.0, 5.0], [0.0, 0.0, 0.0, 1.0]])
    labels = np.asarray(mask_image((10, 13, 16)).dataobj).copy()
    labels[:2] = -1
    nib.save(nib.Nifti1Image(labels, affine), folder / "mask.nii.gz")
    return folder / "mask.nii.gz"


def assert_volume_of_seed(path: Path, pipe, mask: Path, seed: int) -> None:
    """The file holds the pipeline's own volume, on the mask's grid."""
    made = nib.load(path)
    call = {"generator": [torch.Generator().manual_seed(seed)], "residual_noise": False}
    expected = pipe(mask=mask, **call).volumes[0]
    assert np.array_equal(made.affine, expected.affine)
    assert_equal(torch.from_numpy(made.get_fdata()), torch.from_numpy(expected.get_fdata()))


def test_a_bundle_generates_what_the_pipeline_generates(tmp_path):
    """Its config and its sampler; the networks are not exported here."""
    pipe = guided_pipeline()
    mask = write_mask(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/sampling.json").write_text(json.dumps(_sampling(pipe)))
    config = {**INFERENCE, "bundle_root": str(tmp_path), "mask": str(mask), "seed": 7}
    config |= {"unet": Denoiser(pipe.unet), "decoder": Decoder(pipe.vae)}
    config["network"] = {**INFERENCE["network"], "_target_": "interop.bundle_sampler.MaskToVolume"}
    ConfigParser(config).get_parsed_content("run")
    assert_volume_of_seed(tmp_path / "out/mask_synthetic_7.nii.gz", pipe, mask, seed=7)


@of_any_size
def test_a_program_takes_other_sizes_than_its_example(tmp_path):
    """MONAI's autoencoder, which is exported in seconds; the slow tests have whole pipelines."""
    vae = MonaiAutoencoderKL(channels=(4, 8), num_res_blocks=(1, 1), attention_levels=(False, False), norm_num_groups=4)
    vae.set_latent_statistics([0.5, 0.0, -0.5, 1.0], [1.0, 2.0, 3.0, 4.0])
    vae.eval().save_pretrained(tmp_path / "pipeline/vae")
    command(["--to", "torch-export", "--pipeline", str(tmp_path / "pipeline"), "--output", str(tmp_path / "out")])
    latents, volume = torch.randn(1, 4, 2, 5, 3), torch.randn(3, 1, 8, 4, 10)
    with torch.no_grad():
        assert_equal(load_program(tmp_path / "out/decoder.pt2")(latents=latents), vae.decode(latents).sample)
        mean, std = load_program(tmp_path / "out/encoder.pt2")(volume=volume)
        posterior = vae.encode(volume).latent_dist
    assert_equal(mean, posterior.mean)
    assert_equal(std, posterior.std)
    text = (tmp_path / "out/README.md").read_text()
    assert "synthetic" in text and "`decoder(latents=...)`" in text and "unknown: ask" in text


@pytest.mark.slow
def test_our_packages_cannot_be_imported_elsewhere(tmp_path):
    code = f"import importlib, torch\nfor name in {OURS!r}:\n try: importlib.import_module(name)\n except ImportError: "
    printed = run_elsewhere(tmp_path / "site", tmp_path, "-c", code + "continue\n print(name)")
    assert printed == ""


@of_any_size
@pytest.mark.slow
def test_programs_run_with_torch_alone(tmp_path):
    """On shapes and batches other than those that were traced, odd sides of the latents included."""
    pipe, given = guided_pipeline(), {}
    pipe.save_pretrained(tmp_path / "pipeline")
    export("torch-export", tmp_path / "pipeline", tmp_path / "out")
    noisy, mask = torch.randn(3, 4, 5, 3, 8), torch.randint(-1, 3, (3, 20, 12, 32))
    given["unet"] = {"sample": noisy, "timestep": torch.tensor([999.0, 1.0, 430.0]), "mask": mask}
    given["decoder"], given["encoder"] = {"latents": noisy[:1]}, {"volume": torch.randn(1, 1, 8, 12, 20)}
    torch.save(given, tmp_path / "out/given.pt")
    run_elsewhere(tmp_path / "site", tmp_path / "out", "-c", PROGRAMS)
    made = torch.load(tmp_path / "out/made.pt")
    with torch.no_grad():
        assert_equal(made["unet"], Denoiser(pipe.unet)(**given["unet"]))
        assert_equal(made["decoder"], pipe.vae.decode(noisy[:1]).sample)
        assert_equal(made["encoder"][0], pipe.vae.encode(given["encoder"]["volume"]).latent_dist.mean)
    text = (tmp_path / "out/README.md").read_text()
    assert "mask=label indices" in text and "| 2 | 5 | " in text


@of_any_size
@pytest.mark.slow
def test_a_decoder_runs_in_onnx_runtime(tmp_path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    runtime = pytest.importorskip("onnxruntime")
    vae = tiny_pipeline().vae
    vae.save_pretrained(tmp_path / "pipeline/vae")
    export("onnx", tmp_path / "pipeline", tmp_path / "out")
    session = runtime.InferenceSession(tmp_path / "out/decoder.onnx")
    for shape in ((1, 4, 5, 3, 8), (3, 4, 2, 6, 4)):
        latents = torch.randn(shape)
        [volume] = session.run(None, {"latents": latents.numpy()})
        with torch.no_grad():
            assert_equal(torch.from_numpy(volume), vae.decode(latents).sample)


def test_an_old_torch_is_told_to_be_updated(monkeypatch):
    monkeypatch.setattr("interop.programs.DEFERRED", "argument_of_no_version")
    with pytest.raises(ValueError, match="one size only; update it"):
        export_decoder(tiny_pipeline().vae)


def test_onnx_says_which_packages_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr("interop.export.ONNX_PACKAGES", ("onnx_of_nobody",))
    tiny_pipeline().vae.save_pretrained(tmp_path / "pipeline/vae")
    with pytest.raises(ValueError, match=r'needs onnx_of_nobody: pip install -e "\.\[onnx\]"'):
        export("onnx", tmp_path / "pipeline", tmp_path / "out")


@of_any_size
@pytest.mark.slow
def test_a_program_of_monais_unet_takes_other_sizes():
    config = {"channels": [8, 8], "num_res_blocks": [1, 1], "attention_levels": [False, True], "norm_num_groups": 4}
    config |= {"num_head_channels": [0, 8], "takes_spacing": True, "objective": "rectified_flow"}
    unet = peers.random_weights(MonaiUNet3D(**config))
    given = {"sample": torch.randn(1, 4, 5, 8, 3), "timestep": torch.tensor([300.0]), "numbers": torch.rand(1, 3)}
    with torch.no_grad():
        assert_equal(export_denoiser(unet).module()(**given), Denoiser(unet)(**given))


@of_any_size
@pytest.mark.slow
def test_a_bundle_generates_with_monai_alone(tmp_path):
    pipe = guided_pipeline()
    pipe.save_pretrained(tmp_path / "pipeline")
    mask, folder = write_mask(tmp_path), tmp_path / "out"
    command(["--to", "monai-bundle", "--pipeline", str(tmp_path / "pipeline"), "--output", str(folder)])
    given = {"config_file": "configs/inference.json", "mask": str(mask), "output_dir": "made", "seed": 7}
    run_elsewhere(tmp_path / "site", folder, "-c", f"from monai.bundle import run; run(**{given!r})")
    assert_volume_of_seed(folder / "made/mask_synthetic_7.nii.gz", pipe, mask, seed=7)
    assert "From the folder of the bundle" in (folder / "docs/README.md").read_text()


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        ("rectified_flow", None),
        ("rectified_flow", "FlowMatchHeunDiscreteScheduler"),
        ("rectified_flow", "DPMSolverMultistepScheduler"),
        ("v_prediction", "DDIMScheduler"),
        ("epsilon", "UniPCMultistepScheduler"),
        ("flow_map", None),
    ],
)
def test_a_table_samples_what_the_scheduler_samples(objective, name, tmp_path):
    pipe = guided_pipeline(name, objective)
    if objective == "flow_map":
        pipe.sampling_settings = SamplingSettings(3)
    (tmp_path / "sampling.json").write_text(json.dumps(_sampling(pipe)))
    network = MaskToVolume(Denoiser(pipe.unet), None, str(tmp_path / "sampling.json"), seed=3)
    mask = mask_image((12, 8, 16))
    values = torch.from_numpy(np.asarray(mask.dataobj).astype(np.int64))
    indices = torch.searchsorted(torch.tensor(network.settings["labels"]), values)
    with torch.no_grad():
        latents = network.denoise(indices[None])
    call = {"generator": [torch.Generator().manual_seed(3)], "output_type": "latent"}
    assert_equal(latents[0], pipe(mask=mask, **call).volumes[0])


@pytest.mark.parametrize(
    ("objective", "name", "options"),
    [
        ("v_prediction", "DDPMScheduler", {}),
        ("v_prediction", "DDIMScheduler", {"clip_sample": True, "clip_sample_range": 2.0}),
    ],
)
def test_samplers_that_no_table_expresses_are_refused(objective, name, options):
    pipe = guided_pipeline(name, objective)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **options)
    with pytest.raises(ValueError, match=f"{name}: adds noise between steps, or clips"):
        _sampling(pipe)


def test_pipelines_that_no_bundle_expresses_are_refused(tmp_path):
    for pipe, reason in (
        (tiny_pipeline(num_labels=0, labels={}), "is not conditioned on a mask"),
        (tiny_pipeline(images={"MR": 4}, channels=["CT", "MR"], intensity=TWO), "is conditioned on MR"),
        (tiny_pipeline(background_threshold=-0.9), "empties the background"),
    ):
        with pytest.raises(ValueError, match=f"{reason}.*--to torch-export"):
            write_bundle(pipe, tmp_path, "CC-BY-4.0")
    assert not any(tmp_path.iterdir())


def test_a_bundle_says_what_it_leaves_out():
    pipe = guided_pipeline()
    pipe.sampling_settings = SamplingSettings(4, 2.0, (0.2, 0.8), guidance_without={"anterior": "background"})
    notes = _left_out(pipe)
    assert notes == ["Guidance by labels is left out (as guidance_without={})."]
    metadata = _metadata(pipe, _sampling(pipe), "CC-BY-4.0", notes)
    assert metadata["not_in_this_bundle"] == notes and metadata["license"] == "CC-BY-4.0"
    assert metadata["synthetic"] and metadata["model"] == pipe.model_hash
    assert metadata["sampler"].startswith("UniPCMultistepScheduler, as a table of 7 calls")


def test_masks_that_the_model_does_not_know_are_refused(tmp_path):
    (tmp_path / "sampling.json").write_text(json.dumps(_sampling(guided_pipeline())))
    network = MaskToVolume(None, None, str(tmp_path / "sampling.json"))
    read = ConfigParser({"read": {"_target_": "LoadImage", "ensure_channel_first": True}}).get_parsed_content("read")
    for image, message in (
        (nib.Nifti1Image(np.full((8, 8, 8), 3, np.int16), np.eye(4)), r"holds \[3\.0\]; the model knows .*\[0, 2, 5\]"),
        (mask_image((8, 8, 8), np.diag([2.0, 1.0, 1.0, 1.0])), r"2\.0, 1\.0, 1\.0\] mm, the model's \[1\.0"),
    ):
        nib.save(image, tmp_path / "mask.nii.gz")
        with pytest.raises(ValueError, match=message):
            network(read(tmp_path / "mask.nii.gz"))


@pytest.mark.parametrize("name", ["maisi-rflow-mr", "maisi-ddpm-ct"])
def test_weights_of_maisi_go_back_bit_for_bit(name, tmp_path, monkeypatch):
    """Into the layout of its scripts, and into its classes as MONAI's configs name them."""
    peers.narrow(monkeypatch, name)
    originals = peers.write_maisi(tmp_path / "hub", name)
    convert(name, tmp_path / "hub", tmp_path / "ours")
    export("monai-weights", tmp_path / "ours", tmp_path / "back")
    for part, original in zip(("vae", "unet"), originals, strict=True):
        content = torch.load(tmp_path / f"back/{part}.pt", weights_only=True)
        state = content if part == "vae" else content["unet_state_dict"]
        assert_same_state(state, original.state_dict())
        network = ConfigParser(json.loads((tmp_path / f"back/{part}.json").read_text())).get_parsed_content()
        assert type(network) is type(original)
        network.load_state_dict(state)
    assert content["scale_factor"].item() == 1.25 and content["num_train_timesteps"] == 1000
    license = (tmp_path / "back/README.md").read_text().partition("License of the weights: ")[2]
    assert license.startswith("non-commercial research only" if name == "maisi-rflow-mr" else "see weights.md")


@pytest.mark.parametrize("name", ["maisi-rflow-mr", "maisi-ddpm-ct"])
def test_what_monai_does_not_know_comes_back_too(name, tmp_path, monkeypatch):
    """Value range, scale factor, objective, betas, classes and license, from the JSON beside the weights alone."""
    peers.narrow(monkeypatch, name)
    peers.write_maisi(tmp_path / "hub", name)
    convert(name, tmp_path / "hub", tmp_path / "ours")
    export("monai-weights", tmp_path / "ours", tmp_path / "back")
    for part, kind in {"vae": "monai-autoencoderkl", "unet": "monai-diffusion-unet"}.items():
        told = tmp_path / f"back/{part}.network.json"
        convert(kind, tmp_path / f"back/{part}.pt", tmp_path / part, network=told)
        first, again = (
            json.loads((tmp_path / f"{folder}/{part}/config.json").read_text()) for folder in ("ours", part)
        )
        assert again == first
        states = [load_file(tmp_path / f"{folder}/{part}/{WEIGHTS}") for folder in ("ours", part)]
        assert_same_state(*states)
    assert first["objective"] == ("epsilon" if name == "maisi-ddpm-ct" else "rectified_flow")
    record = json.loads((tmp_path / "vae/provenance.json").read_text())
    assert record["scale_factor"] == 1.25 and (record["license"] is None) == (name == "maisi-ddpm-ct")


def test_numbers_as_channels_come_back(tmp_path):
    """MONAI's class counts them as channels of its input, ours does not."""
    config = {"in_channels": 3, "out_channels": 3, "channels": [8, 16], "num_res_blocks": [1, 1]}
    config |= {"attention_levels": [False, True], "num_head_channels": [0, 8], "norm_num_groups": 4}
    config |= {"cross_attention_dim": 2, "context_numbers": ["age", "volume"], "numbers_as_channels": True}
    config |= {"objective": "epsilon", "beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0205}
    unet = peers.random_weights(MonaiUNet3D(**config))
    unet.save_pretrained(tmp_path / "ours/unet")
    export("monai-weights", tmp_path / "ours", tmp_path / "back")
    back = tmp_path / "back"
    convert("monai-diffusion-unet", back / "unet.pt", tmp_path / "again", network=back / "unet.network.json")
    assert_same_state(MonaiUNet3D.from_pretrained(tmp_path / "again/unet").state_dict(), unet.state_dict())
    configs = [json.loads((tmp_path / f"{name}/unet/config.json").read_text()) for name in ("ours", "again")]
    assert configs[0]["in_channels"] == 3 and configs[0] == configs[1]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"value_range": ["a", 1]}, "value_range"),
        ({"value_range": [1.0, 0.0]}, "value_range"),
        ({"scale_factor": "1.25"}, "scale_factor"),
        ({"scale_factor": -1.0}, "scale_factor"),
        ({"license": "MIT\n# a heading"}, "license .*on one line"),
        ({"train_steps": 1000}, "train_steps: not an argument"),
    ],
)
def test_what_network_says_is_checked(said, message, tmp_path):
    arguments = {"channels": [8], "num_res_blocks": 1, "attention_levels": [False], "norm_num_groups": 4}
    torch.save(
        AutoencoderKL(**arguments, spatial_dims=3, in_channels=1, out_channels=1).state_dict(), tmp_path / "a.pt"
    )
    arguments |= {"in_channels": 1, "out_channels": 1, "value_range": [0.0, 1.0]}
    (tmp_path / "a.json").write_text(json.dumps(arguments | said))
    with pytest.raises(ValueError, match=message) as caught:
        convert("monai-autoencoderkl", tmp_path / "a.pt", tmp_path / "out", network=tmp_path / "a.json")
    assert str(tmp_path) in str(caught.value)


def test_programs_say_which_value_a_label_index_is(tmp_path):
    pipe = guided_pipeline()
    pipe.save_pretrained(tmp_path / "pipeline")
    labels = Networks.load(tmp_path / "pipeline").labels
    assert labels == pipe.data.labels and len(labels) == 3
    table = _label_table({5: "a | b", 0: "background"})
    assert table[2:] == ["| 0 | 0 | background |", "| 1 | 5 | a \\| b |"]


def assert_same_state(found, expected) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("kind", ["nearest", "transposed", "context"])
def test_weights_of_users_go_back_bit_for_bit(kind, tmp_path):
    arguments = {"spatial_dims": 3, "in_channels": 2, "out_channels": 2, "num_res_blocks": 1, "channels": [8, 16]}
    arguments |= {"attention_levels": [False, True], "norm_num_groups": 4}
    if kind == "context":
        arguments |= {"num_head_channels": 8, "with_conditioning": True, "cross_attention_dim": 4}
        name, original, options = "monai-diffusion-unet", DiffusionModelUNet(**arguments), {}
    else:
        arguments |= {"use_convtranspose": kind == "transposed"}
        name, original = "monai-autoencoderkl", AutoencoderKL(**arguments)
        options = {"value_range": (0.0, 1.0), "scale_factor": 0.8}
    torch.save(original.state_dict(), tmp_path / "file.pt")
    (tmp_path / "network.json").write_text(json.dumps(arguments))
    convert(name, tmp_path / "file.pt", tmp_path / "ours", network=tmp_path / "network.json", **options)
    export("monai-weights", tmp_path / "ours", tmp_path / "back", license="CC-BY-4.0")
    part = "unet" if kind == "context" else "vae"
    again = tmp_path / f"back/{part}.pt", tmp_path / "again"
    convert(name, *again, network=tmp_path / f"back/{part}.json", **options)
    model = MonaiUNet3D.from_pretrained(again[1] / part) if part == "unet" else load_autoencoder(again[1])
    assert_same_state(monai_state(type(original).__name__, model), original.state_dict())


def test_networks_of_ours_have_no_class_of_monai(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match=r"AutoencoderKL3D is not a network of MONAI.*--to torch-export"):
        export("monai-weights", tmp_path / "pipeline", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--to torch-export", "required: --pipeline"),
        ("--from maisi-rflow-ct", "required: --weights"),
        ("--to torch-export --pipeline a --network b", "--network: belongs to --from"),
        ("--from maisi-rflow-ct --weights a --pipeline b", "--pipeline: belongs to --to"),
    ],
)
def test_options_of_the_other_direction_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        parse([*words.split(), "--output", "out"])
    assert message in capsys.readouterr().err
