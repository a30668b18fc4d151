"""A converted folder of MAISI generates what MAISI's scripts generate, with MONAI's networks and schedulers."""

import csv
import json
from itertools import pairwise

import nibabel as nib
import numpy as np
import peers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from monai.networks.schedulers.ddpm import DDPMScheduler
from monai.networks.schedulers.rectified_flow import RFlowScheduler
from tiny import tiny_data, tiny_pipeline

from diffusion import make_scheduler
from diffusion.monai.maisi_steps import with_maisi_steps
from diffusion.objectives import fit_scheduler
from generate import main as generate
from interop.convert import convert
from interop.formats import FORMATS
from interop.maisi import MODALITY
from pipelines import MedVolumePipeline, SamplingSettings, read_sidecar
from pipelines.storage.loading import load_unet

FLOWS = ("maisi-rflow-ct", "maisi-rflow-mr", "maisi-rflow-mr-brain")
MODALITIES = ("ct", "mri_t2", "mri_swi_skull_stripped")
LABELS = {"ct": 1, "mri_t2": 10, "mri_swi_skull_stripped": 32}
SHAPE, SPACING, SCALE = (12, 16, 8), (1.5, 0.75, 2.0), 1.25
SMALL = (8, 4, 8)
REGIONS = {"top_region": "chest", "bottom_region": "abdomen"}
pytestmark = pytest.mark.filterwarnings("ignore:the shape asked for. its grid")  # narrow networks, small volumes


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Returns a function that converts a variant, once, and loads it: MAISI's networks, and the pipeline of their
    files. The weights of both are aligned in memory, which decides the last bit of a matrix product."""
    root, made = tmp_path_factory.mktemp("maisi"), {}

    def load(name: str):
        folder = root / name
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                peers.narrow(patch, name)
                vae, unet = peers.write_maisi(folder / "hub", name, SCALE)
                convert(name, folder / "hub", folder / "out")
            made[name] = vae, unet
        pipe = MedVolumePipeline.from_pretrained(folder / "out")
        pipe.set_progress_bar_config(disable=True)
        aligned = {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}
        pipe.unet.load_state_dict(aligned, assign=True)
        return *made[name], pipe

    return load


def flow_scheduler(sides, steps: int) -> RFlowScheduler:
    """The scheduler of NVIDIA's config_network_rflow.json."""
    scheduler = RFlowScheduler(
        use_discrete_timesteps=False, use_timestep_transform=True, sample_method="uniform", scale=1.4
    )
    scheduler.set_timesteps(steps, input_img_size_numel=torch.prod(torch.tensor(sides)))
    return scheduler


@torch.no_grad()
def maisi_latents(unet, noise, spacing, label: int | None, steps: int, guidance: float = 0.0, generator=None):
    """What `scripts/diff_model_infer.py` does, on a CPU."""
    inputs = {"spacing_tensor": torch.tensor([spacing]) * 100}
    if label is None:
        inputs["top_region_index_tensor"] = torch.tensor([[0.0, 1.0, 0.0, 0.0]]) * 100
        inputs["bottom_region_index_tensor"] = torch.tensor([[0.0, 0.0, 1.0, 0.0]]) * 100
        scheduler = DDPMScheduler(1000, "scaled_linear_beta", clip_sample=False, beta_start=0.0015, beta_end=0.0195)
        scheduler.set_timesteps(steps)
    else:
        inputs["class_labels"] = torch.tensor([label])
        scheduler = flow_scheduler(noise.shape[2:], steps)
    following = torch.cat((scheduler.timesteps[1:], torch.tensor([0], dtype=scheduler.timesteps.dtype)))
    for t, after in zip(scheduler.timesteps, following, strict=True):
        predicted = unet(noise, torch.Tensor((t,)), **inputs)
        if guidance > 0:
            without = unet(noise, torch.Tensor((t,)), **{**inputs, "class_labels": torch.tensor([0])})
            predicted = without + guidance * (predicted - without)
        if label is None:
            noise, _ = scheduler.step(predicted, t, noise, generator=generator)
        else:
            noise, _ = scheduler.step(predicted, t, noise, after)
    return noise


def noise_of(pipe, seed: int, shape=SHAPE):
    """The noise of a volume, and its generator as the sampler finds it."""
    generator = torch.Generator().manual_seed(seed)
    sides = [side // stride for side, stride in zip(shape, pipe.vae.stride, strict=True)]
    return torch.randn(1, 4, *sides, generator=generator), generator


def assert_close(ours, theirs) -> None:
    ours, theirs = torch.as_tensor(ours).float().squeeze(), torch.as_tensor(theirs).float().squeeze()
    assert ours.shape == theirs.shape and theirs.std() > 1e-3
    assert (ours - theirs).abs().max() <= 1e-5 * (theirs.max() - theirs.min())


@pytest.mark.parametrize(("name", "modality"), [*zip(FLOWS, MODALITIES, strict=True)])
def test_a_flow_is_maisis_bit_for_bit(name, modality, hub):
    vae, unet, pipe = hub(name)
    assert pipe.sampling_settings.maisi_steps is False and pipe.sampling_settings.num_inference_steps == 30
    pipe.sampling_settings = SamplingSettings(30, maisi_steps=True)
    request = {"classes": {MODALITY: modality}, "shape": SHAPE, "spacing": SPACING}
    noise, _ = noise_of(pipe, seed=3)

    latents = pipe(**request, generator=torch.Generator().manual_seed(3), output_type="latent").volumes[0]
    theirs = maisi_latents(unet, noise, SPACING, LABELS[modality], steps=30)
    assert torch.equal(torch.as_tensor(latents).reshape(theirs.shape), theirs) and theirs.std() > 0.1

    voxels = pipe(**request, generator=torch.Generator().manual_seed(3), output_type="pt").volumes[0]
    with torch.no_grad():
        image = vae.decode(theirs / SCALE)
    assert_close(voxels, image.clamp(0, 1) * 2000 - 1000 if modality == "ct" else image.clamp(0, 1) * 1000)
    record = pipe(**request, num_inference_steps=2).provenance[0]
    assert record["scheduler"]["class"] == "FlowMatchMaisiScheduler" and record["spacing"] == list(SPACING)
    assert record["numbers"] == dict(zip(("spacing_x", "spacing_y", "spacing_z"), SPACING, strict=True))


@pytest.mark.slow  # 1000 steps; test_maisi_controlnet takes 50
def test_ddpm_is_maisis_with_the_same_noise(hub):
    vae, unet, pipe = hub("maisi-ddpm-ct")
    assert pipe.sampling_settings == SamplingSettings(1000)
    noise, generator = noise_of(pipe, 5, SMALL)
    theirs = maisi_latents(unet, noise, SPACING, None, steps=1000, generator=generator)
    with torch.no_grad():
        image = vae.decode(theirs / SCALE).clamp(0, 1) * 2000 - 1000
    request = {"classes": REGIONS, "shape": SMALL, "spacing": SPACING, "generator": torch.Generator().manual_seed(5)}
    assert_close(pipe(**request, output_type="pt").volumes[0], image)


@pytest.mark.parametrize("name", ["maisi-rflow-mr", "maisi-rflow-mr-brain"])
def test_guidance_is_by_the_modality(name, hub):
    _, unet, pipe = hub(name)
    assert pipe.sampling_settings.guidance_scale == {MODALITY: 10.0}
    pipe.sampling_settings = SamplingSettings(4, {MODALITY: 2.0}, maisi_steps=True)  # 10 amplifies rounding
    request = {"classes": {MODALITY: "mri_t1"}, "shape": SHAPE, "spacing": SPACING, "output_type": "latent"}
    out = pipe(**request, generator=torch.Generator().manual_seed(1))
    assert_close(out.volumes[0], maisi_latents(unet, noise_of(pipe, 1)[0], SPACING, 9, steps=4, guidance=2.0))
    assert out.provenance[0]["guidance_scale"] == {MODALITY: 2.0}
    with pytest.raises(ValueError, match=r"without spacing_x, .*guided by: {'modality': 3.0}"):
        pipe(**request, guidance_scale=3.0)


def test_steps_of_maisi_sum_to_more_than_one():
    """A known answer: of a constant velocity, the exact steps reach the image, and MAISI's go 0.96 % beyond."""
    shift = float((torch.tensor(64**3) / 32**3) ** (1 / 3))
    exact = fit_scheduler(make_scheduler("rectified_flow"), "rectified_flow", shift=shift)
    ends = {}
    for name, scheduler in (("exact", exact), ("maisi", with_maisi_steps(exact))):
        steps = {"sigmas": np.linspace(1, 1 / 30, 30).tolist()} if name == "exact" else {"num_inference_steps": 30}
        scheduler.set_timesteps(**steps)
        latents = torch.zeros(1, 1, 1, 1, 1)
        for timestep in scheduler.timesteps:
            latents = scheduler.step(-torch.ones_like(latents), timestep, latents, return_dict=False)[0]
        ends[name] = latents.item()
    assert ends["exact"] == pytest.approx(1.0, abs=1e-6)
    assert ends["maisi"] == pytest.approx(1.0096, abs=5e-5)
    theirs = flow_scheduler((64, 64, 64), 30)
    assert torch.equal(with_maisi_steps_timesteps(exact, 30), theirs.timesteps.float())


def with_maisi_steps_timesteps(fitted, steps: int) -> torch.Tensor:
    scheduler = with_maisi_steps(fitted)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps


def test_the_exact_integral_is_the_default(hub):
    """Euler by hand, on the levels of MAISI's shift, by the cube root of the number of latent voxels."""
    _, unet, pipe = hub("maisi-rflow-ct")
    shape, steps = (32, 16, 24), 6
    latents, _ = noise_of(pipe, 2, shape)
    shift = (latents[0, 0].numel() / 32**3) ** (1 / 3)
    assert shift == pytest.approx(pipe.unet.timestep_shift(latents.shape[2:]))
    levels = [shift * t / (1 + (shift - 1) * t) for t in np.linspace(1, 0, steps + 1)]
    for level, after in pairwise(levels):
        with torch.no_grad():
            to_image = unet(
                latents,
                torch.tensor([1000.0 * level], dtype=torch.float32),
                spacing_tensor=torch.tensor([SPACING]) * 100,
                class_labels=torch.tensor([1]),
            )
        latents = latents + (level - after) * to_image
    request = {"classes": {MODALITY: "ct"}, "shape": shape, "spacing": SPACING, "num_inference_steps": steps}
    out = pipe(**request, generator=torch.Generator().manual_seed(2), output_type="latent")
    assert_close(out.volumes[0], latents)
    assert out.provenance[0]["scheduler"]["shift"] == pytest.approx(shift)


def test_a_volume_does_not_depend_on_its_batch(hub):
    _, _, pipe = hub("maisi-rflow-mr")
    pipe.sampling_settings = SamplingSettings(3)  # guidance amplifies rounding
    classes = [{MODALITY: one} for one in ("mri", "mri_t1", "mri_flair")]
    request = {"shape": SHAPE, "spacing": SPACING, "output_type": "pt"}
    together = pipe(classes=classes, generator=[torch.Generator().manual_seed(n) for n in range(3)], **request).volumes
    for number, one in enumerate(classes):
        alone = pipe(classes=one, generator=torch.Generator().manual_seed(number), **request).volumes[0]
        assert_close(together[number], alone)
    assert (together[0] - together[1]).abs().max() > 1


def test_spacing_and_modality_reach_the_network(hub):
    _, _, pipe = hub("maisi-rflow-mr-brain")
    calls = []
    pipe.unet.network.register_forward_pre_hook(lambda _, args, given: calls.append(given), with_kwargs=True)
    pipe(classes={MODALITY: "mri_swi_skull_stripped"}, shape=SHAPE, spacing=SPACING, num_inference_steps=1)
    assert calls[0]["class_labels"].tolist() == [32, 0]  # with the modality, and without
    assert calls[0]["spacing_tensor"].tolist() == [[150.0, 75.0, 200.0]] * 2
    assert calls[0]["top_region_index_tensor"] is None
    pipe(classes={MODALITY: "mri"}, shape=SHAPE, num_inference_steps=1)  # at the template's spacing
    assert torch.allclose(calls[1]["spacing_tensor"], torch.tensor([80.0, 100.0, 100.0]))


def test_volumes_of_any_shape_on_their_own_grid(hub):
    """Padded to what both networks can halve, and cut again."""
    _, _, pipe = hub("maisi-rflow-ct")
    request = {"classes": {MODALITY: "ct"}, "shape": (10, 15, 9), "spacing": SPACING, "num_inference_steps": 2}
    image = pipe(**request).volumes[0]
    assert image.shape == (10, 15, 9) and np.array_equal(image.affine, np.diag([*SPACING, 1.0]))
    voxels = np.asarray(image.dataobj)
    assert voxels.dtype == np.int16 and voxels.min() >= -1000 and voxels.max() <= 1000 and voxels.std() > 1


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_reach_the_same_volume(kind, hub):
    _, _, pipe = hub("maisi-rflow-ct")
    request = {"classes": {MODALITY: "ct"}, "shape": SMALL, "output_type": "latent"}

    def sample(steps):
        out = pipe(**request, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
        return torch.as_tensor(out.volumes[0])

    exact, coarse = sample(100), sample(10)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    error, span = (sample(10) - exact).abs().max(), exact.max() - exact.min()
    assert error < 2e-3 * span and (coarse - exact).abs().max() < 2e-3 * span
    pipe.sampling_settings = SamplingSettings(30, maisi_steps=True)
    with pytest.raises(ValueError, match=rf"the scheduler is {kind.__name__}; set maisi_steps to false"):
        pipe(**request)


def test_the_folder_is_kept_and_checked(hub, tmp_path):
    _, _, pipe = hub("maisi-rflow-mr")
    pipe.sampling_settings = SamplingSettings(20, {MODALITY: 5.0}, maisi_steps=True)
    pipe.save_pretrained(tmp_path / "again")
    again = MedVolumePipeline.from_pretrained(tmp_path / "again")
    assert again.model_hash == pipe.model_hash and again.sampling_settings == pipe.sampling_settings
    settings = {"guidance_scale": {"contrast": 5.0}}
    (tmp_path / "again/sampling.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"sampling\.json: guidance_scale names \['contrast'\]"):
        MedVolumePipeline.from_pretrained(tmp_path / "again")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"classes": {MODALITY: "pet"}, "shape": SHAPE}, r"modality is 'pet'; this model knows .*modality \(ct\)"),
        ({"classes": {MODALITY: "ct"}}, "give shape"),
        ({"classes": {MODALITY: "ct"}, "spacing": SPACING}, "spacing: is of a shape"),
        ({"classes": {MODALITY: "ct"}, "shape": SHAPE, "spacing": (1, 1)}, "three lengths of a voxel"),
        ({"classes": {MODALITY: "ct"}, "shape": SHAPE, "spacing": (1, 1, 0)}, "three lengths of a voxel"),
        ({"classes": {MODALITY: "ct"}, "shape": SHAPE, "sigmas": [1.0, 0.5]}, "does not take sigmas"),
        ({"mask": np.zeros(SHAPE, np.int16)}, "without a mask condition"),
    ],
)
def test_requests_that_cannot_be_generated(request_, message, hub):
    _, _, pipe = hub("maisi-rflow-ct")
    pipe.sampling_settings = SamplingSettings(2, maisi_steps=True)
    with pytest.raises(ValueError, match=message):
        pipe(**request_)


def test_a_pipeline_needs_the_scale_factor(tmp_path, monkeypatch):
    peers.narrow(monkeypatch, "maisi-rflow-ct")
    _, unet = peers.write_maisi(tmp_path / "hub", "maisi-rflow-ct")
    torch.save({"unet_state_dict": unet.state_dict()}, tmp_path / "hub/models/diff_unet_3d_rflow-ct.pt")
    with pytest.raises(ValueError, match="no file has a scale_factor.*--scale_factor"):
        convert("maisi-rflow-ct", tmp_path / "hub", tmp_path / "out")
    convert("maisi-rflow-ct", tmp_path / "hub", tmp_path / "out", scale_factor=0.8)
    assert MedVolumePipeline.from_pretrained(tmp_path / "out").vae.config["latents_std"] == [1.25] * 4


def test_a_unet_of_a_user_says_how_it_was_trained(tmp_path):
    """Without it no pipeline has it: another objective or noise schedule would give noise."""
    arguments = {"in_channels": 4, "out_channels": 4, "channels": [8, 8], "num_res_blocks": 1, "norm_num_groups": 4}
    arguments |= {"attention_levels": [False, False], "spatial_dims": 3}
    network = peers.random_weights(DiffusionModelUNet(**arguments))
    torch.save(network.state_dict(), tmp_path / "unet.pt")
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0205}
    vae = tiny_pipeline().vae

    def pipeline(name: str, **trained) -> MedVolumePipeline:
        (tmp_path / "network.json").write_text(json.dumps(arguments | trained))
        convert("monai-diffusion-unet", tmp_path / "unet.pt", tmp_path / name, network=tmp_path / "network.json")
        unet = load_unet(tmp_path / name)
        return MedVolumePipeline(vae, unet, make_scheduler("epsilon"), tiny_data(labels={}))

    with pytest.raises(ValueError, match="does not say what it predicts.*--network"):
        pipeline("unknown")
    with pytest.raises(ValueError, match="give beta_schedule, beta_start and beta_end"):
        pipeline("half", objective="epsilon")
    pipe = pipeline("whole", objective="epsilon", **betas)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(shape=(16, 16, 16), num_inference_steps=4, output_type="latent", generator=torch.Generator())
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="leading", **betas)
    scheduler.set_timesteps(4)
    latents = torch.randn(1, 4, 4, 4, 4, generator=torch.Generator())
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            latents = scheduler.step(network(latents, timestep[None]), timestep, latents).prev_sample
    assert_close(out.volumes[0], latents)


def test_generate_from_a_table(hub, tmp_path):
    """The command: volumes, sidecars and preview; and the license of weights that forbid commercial use."""
    _, _, pipe = hub("maisi-rflow-mr")
    pipe.sampling_settings = SamplingSettings(2, {MODALITY: 2.0})
    pipe.save_pretrained(folder := tmp_path / "pipeline")
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["name", MODALITY], ["first", "mri_t1"], ["second", "mri_t2"]])
    words = ["--pipeline", folder, "--conditions", tmp_path / "table.csv", "--output", tmp_path / "volumes"]
    words += ["--shape", *SHAPE, "--spacing", *SPACING]
    generate([str(word) for word in words])
    records = {name: read_sidecar(tmp_path / f"volumes/{name}_000.nii.gz") for name in ("first", "second")}
    assert [record["classes"] for record in records.values()] == [{MODALITY: "mri_t1"}, {MODALITY: "mri_t2"}]
    for name, record in records.items():
        assert record["license"] == FORMATS["maisi-rflow-mr"].license and record["spacing"] == list(SPACING)
        assert record["model"] == pipe.model_hash and record["guidance_scale"] == {MODALITY: 2.0}
        image = nib.load(tmp_path / f"volumes/{name}_000.nii.gz")
        assert image.shape == SHAPE and np.allclose(image.header.get_zooms(), SPACING)
        again = pipe(
            classes=record["classes"],
            shape=SHAPE,
            spacing=SPACING,
            generator=torch.Generator().manual_seed(record["seed"]),
        ).volumes[0]
        assert np.allclose(again.dataobj, image.dataobj, atol=0.5)  # of 1000, as guidance amplifies rounding
    assert (tmp_path / "volumes/preview.png").stat().st_size > 0 and (tmp_path / "volumes/manifest.csv").exists()
    before = (tmp_path / "volumes/first_000.nii.gz").stat().st_mtime_ns
    generate([str(word) for word in words])  # resumes: nothing is left to do
    assert (tmp_path / "volumes/first_000.nii.gz").stat().st_mtime_ns == before
