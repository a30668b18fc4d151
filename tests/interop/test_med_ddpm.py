"""A converted checkpoint of Med-DDPM computes, and generates, what its network and a plain DDPM do."""

import json
import math
import os
from dataclasses import replace

import med_ddpm_files as files
import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

import train_ldm
from autoencoder import SpaceToDepth3D
from convert import main as command
from diffusion import MedDDPMUNet3D, fold_mask
from diffusion.completion import complete_model
from files.documents import FileError
from generate import main as generate
from interop import med_ddpm
from interop.convert import convert
from interop.networks import PEERS, expected_shapes, renamed
from pipelines import MedVolumePipeline
from volumes import Volume

KINDS = {"whole": med_ddpm.WHOLE_HEAD, "brats": med_ddpm.BRATS}
STEPS = 4
SHAPE = (16, 16, 32)
WEIGHTS = "diffusion_pytorch_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore:.*its grid of")  # the masks here are small


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(med_ddpm, "CHANNELS", files.NARROW)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Returns a function that converts a checkpoint, once: the folder, and the tensors of the file."""
    made = {}

    def folder(name: str):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            state = files.write(root / "model.pt", KINDS[name], STEPS)
            convert("med-ddpm", root / "model.pt", root / "out", license="research only")
            made[name] = root / "out", state
        return made[name]

    return folder


def random_mask(name: str) -> np.ndarray:
    return np.random.default_rng(0).integers(0, len(KINDS[name].labels), SHAPE).astype(np.int16)


def theirs(name: str, state, voxels: torch.Tensor, mask: np.ndarray, timestep: int) -> torch.Tensor:
    """What the file's network predicts for a volume in RAS order, of which its training had arrays [x, y, z]."""
    channels = torch.stack([torch.from_numpy(mask == label) for label in list(KINDS[name].labels)[1:]]).float()[None]
    channels = channels * 2 - 1 if name == "whole" else channels
    x = torch.cat([voxels, channels], dim=1)
    if name == "brats":  # the arrays of BraTS begin at the right and the front
        x = x.flip(2, 3)
    predicted = files.predict(state, x.transpose(2, 4), timestep).transpose(2, 4)
    return predicted.flip(2, 3) if name == "brats" else predicted


def plain_ddpm(name: str, state, mask: np.ndarray, generator: torch.Generator) -> torch.Tensor:
    """Ho et al. 2020, Algorithm 2 with x0 clipped to [-1, 1], and the posterior's variance (their Eq. 6 and 7)."""
    betas = files.cosine_betas(STEPS)
    kept = np.cumprod(1 - betas)
    shape = (1, KINDS[name].tells[1], *SHAPE)
    x = torch.randn(shape, generator=generator)
    for t in reversed(range(STEPS)):
        before = kept[t - 1] if t else 1.0
        clean = (x - math.sqrt(1 - kept[t]) * theirs(name, state, x, mask, t)) / math.sqrt(kept[t])
        clean = clean.clamp(-1, 1)
        mean = math.sqrt(before) * betas[t] * clean + math.sqrt(1 - betas[t]) * (1 - before) * x
        x = mean / (1 - kept[t])
        if t:
            noise = torch.randn(shape, generator=generator)
            x = x + math.sqrt(betas[t] * (1 - before) / (1 - kept[t])) * noise
    return x


def assert_close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == expected.shape and expected.std() > 0.05
    assert (ours - expected).abs().max() <= tolerance * (expected.max() - expected.min())


@pytest.mark.parametrize(("name", "tensors", "parameters"), [("whole", 246, 40_226_433), ("brats", 338, 57_562_564)])
def test_table_is_that_of_the_published_networks(name, tensors, parameters, monkeypatch):
    wide = [64, 64, 128, 192, 256]
    monkeypatch.setattr(med_ddpm, "CHANNELS", wide)
    arguments = KINDS[name].arguments
    arguments["num_res_blocks"] = [arguments["num_res_blocks"]] * len(wide)
    peer, shapes = PEERS[med_ddpm.PEER], files.shapes_of(KINDS[name], wide)
    assert {renamed(key, peer.renames): shape for key, shape in shapes.items()} == expected_shapes(peer, arguments)
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (tensors, parameters)


@pytest.mark.parametrize("name", KINDS)
def test_one_call_is_the_files_network(name, converted):
    folder, state = converted(name)
    unet = MedDDPMUNet3D.from_pretrained(folder / "unet").eval()
    voxels, mask = torch.randn(1, KINDS[name].tells[1], *SHAPE), random_mask(name)
    ids = fold_mask(torch.from_numpy(mask)[None], (1, 1, 1), len(KINDS[name].labels))
    with torch.no_grad():
        for timestep in (0, STEPS - 1):
            ours = unet(voxels, torch.tensor([timestep]), mask=ids).sample
            assert_close(ours, theirs(name, state, voxels, mask, timestep))


@pytest.mark.parametrize("name", KINDS)
def test_sampling_is_a_plain_ddpm(name, converted):
    folder, state = converted(name)
    pipe, mask = MedVolumePipeline.from_pretrained(folder), random_mask(name)
    pipe.set_progress_bar_config(disable=True)
    volume = Volume(mask[None], np.diag([*pipe.data.spacing, 1.0]))
    request = {"mask": volume, "output_type": "pt"}
    voxels = torch.as_tensor(pipe(**request, generator=torch.Generator().manual_seed(3)).volumes[0])
    with torch.no_grad():
        expected = plain_ddpm(name, state, mask, torch.Generator().manual_seed(3))
    low, high = KINDS[name].intensity
    expected = (expected.clamp(-1, 1) + 1) / 2 * (high - low) + low
    assert_close(voxels.reshape(expected.shape), expected, tolerance=1e-4)  # every step amplifies rounding
    assert (voxels.reshape(expected.shape) - expected).abs().mean() <= 1e-6 * (high - low)


def test_generated_files_are_on_the_masks_grid(converted, tmp_path):
    """Other schedulers and fewer steps, a mask that lies the other way round, and four channels."""
    folder, _ = converted("brats")
    mask = random_mask("brats")[:, :13]  # a side that four levels cannot halve
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    nib.save(nib.Nifti1Image(mask, affine), tmp_path / "mask.nii.gz")
    words = [f"--pipeline={folder}", f"--masks={tmp_path / 'mask.nii.gz'}", f"--output={tmp_path / 'out'}"]
    generate([*words, "--steps=2"])
    written = sorted((tmp_path / "out").rglob("*.nii.gz"))
    assert all(np.allclose(nib.load(path).affine, affine) for path in written)
    images = [path for path in written if any(f"_{name}." in path.name for name in med_ddpm.BRATS.channels)]
    assert len(images) == 4
    for path in images:
        voxels = nib.load(path).get_fdata()
        assert voxels.shape == mask.shape and 0 <= voxels.min() < voxels.max() <= 1
    texts = [path.read_text() for path in (tmp_path / "out").rglob("*.json")]
    record = next(json.loads(text) for text in texts if '"license"' in text)
    assert record["license"] == "research only" and record["num_inference_steps"] == 2


def test_a_mask_means_the_same_whichever_way_it_lies(converted):
    folder, _ = converted("whole")
    pipe = MedVolumePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    mask, affine = random_mask("whole"), np.diag([1.5, 1.5, 1.5, 1.0])
    turned = np.diag([-1.5, 1.5, 1.5, 1.0])
    turned[0, 3] = 1.5 * (SHAPE[0] - 1)
    masks = [nib.Nifti1Image(mask, affine), nib.Nifti1Image(mask[::-1], turned)]
    made = [pipe(mask=one, num_inference_steps=2, generator=torch.Generator().manual_seed(0)) for one in masks]
    first, second = (out.volumes[0].get_fdata() for out in made)
    assert first.std() > 0 and np.array_equal(first, second[::-1])


@pytest.mark.parametrize("scheduler", [DDIMScheduler, FlowMatchEulerDiscreteScheduler])
def test_schedulers_clip_to_the_range_of_voxels(scheduler, converted):
    folder, _ = converted("whole")
    pipe = MedVolumePipeline.from_pretrained(folder)
    unet = pipe.unet
    if scheduler is FlowMatchEulerDiscreteScheduler:
        with pytest.raises(ValueError, match="cannot sample a model that predicts epsilon"):
            unet.fitted(scheduler())
        return
    fitted = unet.fitted(scheduler.from_config(pipe.scheduler.config))
    assert fitted.config.clip_sample and fitted.config.clip_sample_range == 1
    fitted.set_timesteps(4)
    last = fitted.timesteps[-1]
    clean = fitted.step(torch.full((1, 1, 1), 50.0), last, torch.zeros(1, 1, 1)).pred_original_sample
    assert clean.item() == -1


def changed(state, name: str):
    """The tensors of a checkpoint, damaged."""
    first = "denoise_fn.input_blocks.1.0.in_layers.0.weight"
    if name == "missing":
        del state[first]
    elif name == "extra":
        state["denoise_fn.extra.weight"] = torch.zeros(2)
    elif name == "shape":
        state[first] = torch.zeros(7)
    elif name == "integers":
        state[first] = torch.zeros(32, dtype=torch.int64)
    elif name == "linear":
        state["betas"] = torch.linspace(1e-4, 2e-2, STEPS)
    elif name == "no schedule":
        del state["betas"]
    elif name == "other channels":
        state["denoise_fn.out.2.weight"] = torch.zeros(2, 32, 3, 3, 3)
    elif name == "attention":
        del state["denoise_fn.middle_block.1.qkv.bias"]
    elif name == "not finite":
        state[first] = torch.full((32,), float("nan"))
    return state


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", r"1 missing \(down\.1\.0\.norm1\.weight\)"),
        ("extra", r"1 unknown \(denoise_fn\.extra\.weight\)"),
        ("shape", r"of another shape \(denoise_fn\.input_blocks\.1\.0\.in_layers\.0\.weight \(7,\), not \(32,\)\)"),
        ("integers", r"not floating point \(denoise_fn\.input_blocks\.1"),
        ("linear", "betas are not those of the cosine schedule of 4 steps"),
        ("no schedule", "has no betas"),
        ("other channels", "3 input and 2 output channels; .*whole heads: 3 and 1, BraTS: 8 and 4"),
        ("attention", r"missing \(middle\.1\.qkv\.bias\)"),
        ("not finite", "not finite"),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(name, message, tmp_path):
    state = changed(files.random_state(med_ddpm.WHOLE_HEAD, STEPS), name)
    torch.save({"step": 1, "model": state, "ema": state}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message) as caught:
        convert("med-ddpm", tmp_path / "model.pt", tmp_path / "out")
    assert "model.pt" in str(caught.value) and not (tmp_path / "out").exists()


class Runs:
    """What a file must not do: run a command when it is read."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_files_with_code_and_other_layouts_are_refused(tmp_path):
    state = files.random_state(med_ddpm.WHOLE_HEAD, STEPS)
    path = tmp_path / "model.pt"
    torch.save({"step": Runs(f"touch {tmp_path / 'ran'}"), "model": state, "ema": state}, path)
    with pytest.raises(FileError, match=r"names (posix|nt)\.system"):
        convert("med-ddpm", path, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    torch.save({"step": 1, "model": state}, path)
    with pytest.raises(FileError, match="expected under one of ema; it has step, model"):
        convert("med-ddpm", path, tmp_path / "out")
    with pytest.raises(FileError, match="is a folder; give the file of weights"):
        convert("med-ddpm", tmp_path, tmp_path / "out")
    torch.save({"ema": {"encoder.weight": torch.zeros(1)}}, path)
    with pytest.raises(FileError, match="has no tensors of med-ddpm"):
        convert("med-ddpm", path, tmp_path / "out")
    for option in ({"value_range": (0.0, 1.0)}, {"scale_factor": 1.0}):
        with pytest.raises(ValueError, match="it has no autoencoder; omit --value_range and --scale_factor"):
            convert("med-ddpm", path, tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_the_owner_says_of_the_license(tmp_path, capsys):
    files.write(tmp_path / "model.pt", med_ddpm.WHOLE_HEAD, STEPS)
    command(["--from=med-ddpm", f"--weights={tmp_path / 'model.pt'}", f"--output={tmp_path / 'out'}"])
    count = len(files.shapes_of(med_ddpm.WHOLE_HEAD, files.NARROW))
    assert f"{count} tensors of model.pt, 13 unused ones left out" in capsys.readouterr().out
    card = (tmp_path / "out/README.md").read_text()
    assert "License of the weights: unknown" in card and "names no license of the weights" in card
    record = json.loads((tmp_path / "out/provenance.json").read_text())
    assert record["license"] is None and record["networks"]["unet"]["not_used"] == ["step", "model"]
    assert sorted(record["networks"]["unet"]["dropped"]) == sorted(files.BUFFERS)


def test_conditions_and_configs_are_checked():
    unet = MedDDPMUNet3D(channels=[32, 32], num_res_blocks=[1, 1], attention_levels=[False, False])
    voxels, ids = torch.randn(1, 1, 4, 4, 4), torch.ones(1, 4, 4, 4, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="conditioned on a mask: pass one"):
        unet(voxels, 1)
    with pytest.raises(ValueError, match=r"the mask is of \(4, 4, 4\) voxels, the latents are \(4, 4, 2\)"):
        unet(voxels[..., :2], 1, mask=ids)
    with pytest.raises(ValueError, match="one entry per level"):
        MedDDPMUNet3D(channels=[32])
    with pytest.raises(ValueError, match="shift_voxels"):
        MedDDPMUNet3D(shift_voxels=8)
    with torch.no_grad():  # padded with background, and cropped
        padded = unet(torch.nn.functional.pad(voxels[..., :3], (0, 1)), 1, mask=ids).sample
        assert torch.equal(unet(voxels[..., :3], 1, mask=ids[:, :, :, :3]).sample, padded[..., :3])


def test_checkpointing_changes_no_gradient():
    unet = MedDDPMUNet3D(channels=[32, 32], num_res_blocks=[1, 1], attention_levels=[False, True])
    voxels, ids = torch.randn(1, 1, 4, 4, 4), torch.randint(0, 4, (1, 4, 4, 4, 1), dtype=torch.int32)
    gradients = []
    for enable in (unet.disable_gradient_checkpointing, unet.enable_gradient_checkpointing):
        enable()
        unet.zero_grad()
        unet(voxels, 5, mask=ids).sample.square().mean().backward()
        gradients.append({name: weight.grad.clone() for name, weight in unet.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert min(gradient.abs().max() for gradient in gradients[0].values()) > 0


def test_it_is_tuned_on_masks_of_its_labels(converted, tmp_path):
    folder, _ = converted("whole")
    random = np.random.default_rng(0)
    for kind in ("image", "mask"):
        (tmp_path / kind).mkdir()
        for number in range(2):
            labels = random.integers(0, 3, (32, 16, 16)).astype(np.int16)
            voxels = labels if kind == "mask" else random.normal(0, 0.3, labels.shape).astype(np.float32)
            nib.save(nib.Nifti1Image(voxels, np.diag([1.5, 1.5, 1.5, 1.0])), tmp_path / kind / f"{number}.nii.gz")
    data = {"root": str(tmp_path), "images": {"mr": "image/{name}.nii.gz"}, "masks": "mask/{name}.nii.gz"}
    data |= {"validation_fraction": 0.0, "label_names": dict(med_ddpm.WHOLE_HEAD.labels)}
    data |= {"intensity": {"kind": "window", "low": -1.0, "high": 1.0}}
    words = [f"--vae={folder / 'vae'}", f"--init_from={folder / 'unet'}", f"--output={tmp_path / 'run'}", "--loss=l1"]
    words += ["--loop.max_steps=1", "--loop.batch_size=1", "--loop.mixed_precision=no", "--loop.validate_every=0"]
    words += ["--loop.preview_every=0", "--loop.workers=0", "--loop.trackers=[]", "--loop.ema_decay=0"]
    words += ["--optimizer.warmup_steps=0", "--inference_steps=2", "--scheduler=DDIMScheduler"]
    (tmp_path / "ldm.yaml").write_text(yaml.safe_dump({"data": data}))
    AcceleratorState._reset_state(reset_partial_state=True)
    train_ldm.main([f"--config={tmp_path / 'ldm.yaml'}", *words])
    AcceleratorState._reset_state(reset_partial_state=True)
    before, after = (load_file(where / "unet" / WEIGHTS) for where in (folder, tmp_path / "run/pipeline"))
    assert [name for name in before if name.endswith("weight") and torch.equal(before[name], after[name])] == []
    pipe = MedVolumePipeline.from_pretrained(tmp_path / "run/pipeline")
    assert pipe.scheduler.config.clip_sample and pipe.scheduler.config.clip_sample_range == 1
    assert pipe.license == "research only" and pipe.vae.config["latents_std"] == [1.0]


def test_data_that_it_cannot_be_tuned_on_is_refused(converted):
    folder, _ = converted("whole")
    pipe = MedVolumePipeline.from_pretrained(folder)
    section = {"class": "diffusion.MedDDPMUNet3D", "num_labels": 3, "in_channels": 1}
    assert complete_model(section, pipe.vae, pipe.data) == {**section, "out_channels": 1}
    four = SpaceToDepth3D(4, channel_names=["mr"])
    for vae, changes, message in (
        (pipe.vae, {"labels": {}}, "model.num_labels is 3, but the data makes it 0"),
        (pipe.vae, {"classes": {"sex": ["F", "M"]}}, "takes a mask alone: remove data.classes"),
        (four, {}, "model.in_channels is 1, but the data makes it 4"),
        (SpaceToDepth3D(1, patch_size=2), {}, "set vae to a SpaceToDepth3D with patch_size: 1"),
    ):
        with pytest.raises(ValueError, match=message):
            complete_model(section, vae, replace(pipe.data, **changes))
