"""A converted ControlNet of MAISI turns label maps into the volumes that MAISI's scripts turn them into."""

import csv
import json

import nibabel as nib
import numpy as np
import peers
import pytest
import torch
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.networks.schedulers.ddpm import DDPMScheduler
from monai.networks.schedulers.rectified_flow import RFlowScheduler
from safetensors.torch import load_file

from diffusion import MonaiControlNet3D
from diffusion.monai.controlnet import ControlledUNet
from files.documents import FileError
from generate import main as generate
from interop.convert import convert
from interop.export import WRITERS, export
from interop.maisi import MODALITY
from interop.maisi_labels import BODY, LABELS
from interop.networks import PEERS, renamed
from pipelines import MedVolumeEditPipeline, MedVolumePipeline, SamplingSettings, read_sidecar
from pipelines.storage.loading import load_unet
from studio.models import StudioModel
from training.ldm import model_of

DDPM, FLOW = "maisi-ddpm-ct", "maisi-rflow-ct"
SPACING, SCALE, SHAPE = (1.5, 0.75, 2.0), 1.25, (8, 12, 16)
REGIONS = {"top_region": "chest", "bottom_region": "abdomen"}
CLASSES = {DDPM: REGIONS, FLOW: {MODALITY: "ct"}}
pytestmark = pytest.mark.filterwarnings("ignore:.*its grid of")  # narrow networks, small volumes


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Returns a function that converts a variant with its ControlNet, once, and loads it: MAISI's networks, and the
    pipeline of their files."""
    root, networks = tmp_path_factory.mktemp("controlnet"), {}

    def load(name: str):
        folder = root / name
        if name not in networks:
            with pytest.MonkeyPatch.context() as patch:
                peers.narrow(patch, name)
                vae, unet = peers.write_maisi(folder / "hub", name, SCALE)
                networks[name] = vae, unet, peers.write_controlnet(folder / "hub", name)
                convert(name, folder / "hub", folder / "out")
        pipe = MedVolumePipeline.from_pretrained(folder / "out")
        pipe.set_progress_bar_config(disable=True)
        return *networks[name], pipe

    return load


def label_map(shape=SHAPE, seed: int = 0) -> np.ndarray:
    """Blocks of labels, with low and high bits, inside a body with air around it."""
    generator = np.random.default_rng(seed)
    labels = np.full(shape, BODY, np.int16)
    corners = generator.choice([1, 3, 26, 28, 57, 128, 132], [n // 4 for n in shape])
    labels[2:-2, 2:-2, 2:-2] = np.kron(corners, np.ones((4, 4, 4), np.int16))[2:-2, 2:-2, 2:-2]
    labels[0] = 0
    return labels


def image_of(labels: np.ndarray) -> nib.Nifti1Image:
    return nib.Nifti1Image(labels, np.diag([*SPACING, 1.0]))


def bits_of(labels: np.ndarray) -> torch.Tensor:
    """Eight channels, the lowest bit first, as MAISI's `binarize_labels`."""
    return torch.stack([torch.from_numpy(labels // 2**bit % 2).float() for bit in range(8)])[None]


@torch.no_grad()
def maisi_latents(unet, controlnet, noise, labels, name: str, steps: int, scale=1.0, guidance=0.0, generator=None):
    """What `ldm_conditional_sample_one_image` does, on a CPU."""
    inputs, classes = {"spacing_tensor": torch.tensor([SPACING]) * 100}, {}
    if name == DDPM:
        inputs["top_region_index_tensor"] = torch.tensor([[0.0, 1.0, 0.0, 0.0]]) * 100
        inputs["bottom_region_index_tensor"] = torch.tensor([[0.0, 0.0, 1.0, 0.0]]) * 100
        betas = {"beta_start": 1.5 / steps, "beta_end": 19.5 / steps}  # MAISI's, for its 1000 steps
        scheduler = DDPMScheduler(steps, "scaled_linear_beta", clip_sample=False, **betas)
        scheduler.set_timesteps(steps)
    else:
        classes = {"class_labels": torch.tensor([1])}
        scheduler = RFlowScheduler(use_discrete_timesteps=False, use_timestep_transform=True, scale=1.4)
        scheduler.set_timesteps(steps, input_img_size_numel=torch.prod(torch.tensor(noise.shape[2:])))

    def predict(t, classes):
        down, middle = controlnet(noise, t, bits_of(labels), conditioning_scale=scale, **classes)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return unet(noise, t, **inputs, **classes, **added)

    following = torch.cat((scheduler.timesteps[1:], torch.tensor([0], dtype=scheduler.timesteps.dtype)))
    for t, after in zip(scheduler.timesteps, following, strict=True):
        predicted = predict(torch.Tensor((t,)), classes)
        if guidance > 0:
            without = predict(torch.Tensor((t,)), {"class_labels": torch.tensor([0])})
            predicted = without + guidance * (predicted - without)
        if name == DDPM:
            noise, _ = scheduler.step(predicted, t, noise, generator=generator)
        else:
            noise, _ = scheduler.step(predicted, t, noise, after)
    return noise


def noise_of(seed: int, shape=SHAPE):
    """The noise of a volume, and its generator as the sampler finds it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 4, *(side // 2 for side in shape), generator=generator), generator


def assert_close(ours, theirs) -> None:
    ours, theirs = torch.as_tensor(ours).float().squeeze(), torch.as_tensor(theirs).float().squeeze()
    assert ours.shape == theirs.shape and theirs.std() > 1e-3
    assert (ours - theirs).abs().max() <= 1e-5 * (theirs.max() - theirs.min())


def test_the_list_of_labels():
    """The 132 values of NVIDIA's list, without its eight dummies, and background and body."""
    assert set(LABELS) == {*range(133), 200} - {2, 16, 18, 20, 21, 129, 130, 131}
    known = {1: "liver", 14: "left kidney", 33: "vertebrae L5", 56: "vertebrae C1", 57: "trachea", 62: "colon"}
    known |= {74: "left rib 12", 86: "right rib 12", 96: "right hip", 107: "right iliopsoas", 132: "airway"}
    known |= {113: "right common carotid artery", 124: "right subclavian artery", 128: "bone lesion", 200: "body"}
    assert {value: LABELS[value] for value in known} == known and len(set(LABELS.values())) == len(LABELS)


@pytest.mark.parametrize("name", [DDPM, FLOW])
def test_one_call_is_maisis(name, hub):
    """Of the ControlNet, and of the U-Net with what it adds."""
    _, unet, controlnet, pipe = hub(name)
    latents, timestep, labels = torch.randn(2, 4, 4, 6, 8), torch.tensor([900.0, 20.0]), label_map()
    inputs = {"spacing_tensor": torch.tensor([SPACING]).expand(2, -1) * 100}
    numbers = torch.tensor([SPACING]).expand(2, -1)
    classes, given = torch.tensor([[0], [-1]]), {"class_labels": torch.tensor([1, 0])}
    if name == DDPM:
        classes, given = torch.tensor([[2, 1], [2, 1]]), {}
        inputs["top_region_index_tensor"] = torch.tensor([[0.0, 100.0, 0.0, 0.0]] * 2)
        inputs["bottom_region_index_tensor"] = torch.tensor([[0.0, 0.0, 100.0, 0.0]] * 2)
    bits = bits_of(labels).expand(2, -1, -1, -1, -1)
    with torch.no_grad():
        indices = torch.from_numpy(np.searchsorted(sorted(LABELS), labels))[None].expand(2, -1, -1, -1)
        mask = pipe.controlnet.embed_mask(indices)
        ours = pipe.controlnet(latents, timestep, mask, given.get("class_labels"), 0.7)
        theirs = controlnet(latents, timestep, bits, conditioning_scale=0.7, **given)
        assert len(ours[0]) == len(theirs[0]) == 4
        for mine, own in zip([*ours[0], ours[1]], [*theirs[0], theirs[1]], strict=True):
            assert_close(mine, own)
        denoiser = ControlledUNet(pipe.unet, pipe.controlnet, 0.7)
        ours = denoiser(latents, timestep, mask=mask, classes=classes, numbers=numbers).sample
        added = {"down_block_additional_residuals": theirs[0], "mid_block_additional_residual": theirs[1]}
        theirs = unet(latents, timestep, **inputs, **given, **added)
        assert_close(ours, theirs if name == DDPM else -theirs)
        alone = unet(latents, timestep, **inputs, **given)
    assert (theirs - alone).abs().max() > 0.01  # the label map matters


def test_a_flow_from_a_label_map_is_maisis(hub):
    vae, unet, controlnet, pipe = hub(FLOW)
    pipe.sampling_settings = SamplingSettings(30, maisi_steps=True)
    labels, noise = label_map(), noise_of(3)[0]
    request = {"mask": image_of(labels), "classes": CLASSES[FLOW]}
    latents = pipe(**request, generator=torch.Generator().manual_seed(3), output_type="latent").volumes[0]
    theirs = maisi_latents(unet, controlnet, noise, labels, FLOW, steps=30)
    assert_close(latents, theirs)

    out = pipe(**request, generator=torch.Generator().manual_seed(3), output_type="pt")
    with torch.no_grad():
        image = vae.decode(theirs / SCALE).clamp(0, 1)[0, 0] * 2000 - 1000
    assert image[labels == 0].std() > 1
    image[labels == 0] = -1000  # air, where the label map has none
    assert_close(out.volumes[0], image)
    without = pipe(**CLASSES_OF_SHAPE, generator=torch.Generator().manual_seed(3), output_type="latent").volumes[0]
    assert (torch.as_tensor(without) - torch.as_tensor(latents)).abs().max() > 0.1


CLASSES_OF_SHAPE = {"classes": CLASSES[FLOW], "shape": SHAPE, "spacing": SPACING}


def test_ddpm_from_a_label_map_is_maisis(hub):
    """With the same noise, on a schedule of 50 steps in place of 1000, so that the test is short."""
    vae, unet, controlnet, pipe = hub(DDPM)
    assert pipe.sampling_settings == SamplingSettings(1000)
    pipe.unet.register_to_config(train_steps=50, beta_start=1.5 / 50, beta_end=19.5 / 50)
    pipe.scheduler = pipe.unet.new_scheduler("DDPMScheduler")
    pipe.sampling_settings = SamplingSettings(50)
    shape = (8, 4, 8)
    labels, (noise, generator) = label_map(shape, seed=1), noise_of(5, shape)
    theirs = maisi_latents(unet, controlnet, noise, labels, DDPM, steps=50, generator=generator)
    with torch.no_grad():
        image = vae.decode(theirs / SCALE).clamp(0, 1)[0, 0] * 2000 - 1000
    image[labels == 0] = -1000
    request = {"mask": image_of(labels), "classes": REGIONS, "generator": torch.Generator().manual_seed(5)}
    assert_close(pipe(**request, output_type="pt").volumes[0], image)


def test_guidance_and_conditioning_scale_are_maisis(hub):
    """MAISI's script without tumors in the map: class label 0 in both networks, with the same label map."""
    _, unet, controlnet, pipe = hub(FLOW)
    labels = label_map()
    pipe.sampling_settings = SamplingSettings(3, {MODALITY: 2.5}, maisi_steps=True, controlnet_conditioning_scale=0.5)
    request = {"mask": image_of(labels), "classes": CLASSES[FLOW], "output_type": "latent"}
    out = pipe(**request, generator=torch.Generator().manual_seed(1))
    theirs = maisi_latents(unet, controlnet, noise_of(1)[0], labels, FLOW, 3, scale=0.5, guidance=2.5)
    assert_close(out.volumes[0], theirs)
    record = out.provenance[0]
    assert record["controlnet_conditioning_scale"] == 0.5 and record["guidance_scale"] == {MODALITY: 2.5}
    assert record["settings_from"]["controlnet_conditioning_scale"] == "pipeline"
    other = pipe(**request, generator=torch.Generator().manual_seed(1), controlnet_conditioning_scale=1)
    assert "controlnet_conditioning_scale" not in other.provenance[0]
    assert (torch.as_tensor(other.volumes[0]) - torch.as_tensor(out.volumes[0])).abs().max() > 0.01


@torch.no_grad()
def test_guidance_by_the_mask_is_from_the_unet_alone(hub):
    """A known answer: one Euler step from s times the prediction with, and 1 - s times that without the label map."""
    _, unet, controlnet, pipe = hub(FLOW)
    labels, noise = label_map(), noise_of(2)[0]
    request = {"mask": image_of(labels), "classes": CLASSES[FLOW], "num_inference_steps": 1, "output_type": "latent"}
    out = pipe(**request, guidance_scale={"mask": 3.0}, generator=torch.Generator().manual_seed(2))
    given = {"spacing_tensor": torch.tensor([SPACING]) * 100, "class_labels": torch.tensor([1])}
    t = torch.tensor([1000.0])
    down, middle = controlnet(noise, t, bits_of(labels), class_labels=given["class_labels"])
    alone = unet(noise, t, **given)
    steered = unet(noise, t, **given, down_block_additional_residuals=down, mid_block_additional_residual=middle)
    assert_close(out.volumes[0], noise + 3 * steered - 2 * alone)


@torch.no_grad()
def test_guidance_away_from_the_map_without_tumors(hub):
    _, unet, controlnet, pipe = hub(FLOW)
    labels, noise = label_map(), noise_of(4)[0]
    assert (labels == 26).any()
    request = {"mask": image_of(labels), "classes": CLASSES[FLOW], "num_inference_steps": 1, "output_type": "latent"}
    guidance = {"guidance_without": {"hepatic tumor": "liver"}, "without_scale": 2.0}
    out = pipe(**request, **guidance, generator=torch.Generator().manual_seed(4))
    given, t = {"class_labels": torch.tensor([1])}, torch.tensor([1000.0])
    predicted = []
    for one in (labels, np.where(labels == 26, 1, labels)):
        down, middle = controlnet(noise, t, bits_of(one), **given)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        predicted.append(unet(noise, t, spacing_tensor=torch.tensor([SPACING]) * 100, **given, **added))
    assert_close(out.volumes[0], noise + 2 * predicted[0] - predicted[1])


def test_a_map_is_embedded_in_slabs_as_in_one_piece(hub, monkeypatch):
    _, _, controlnet, pipe = hub(FLOW)
    labels = label_map((8, 8, 40), seed=3)
    indices = torch.from_numpy(np.searchsorted(sorted(LABELS), labels))[None]
    with torch.no_grad():
        whole = controlnet.controlnet_cond_embedding(bits_of(labels))
        assert_close(pipe.controlnet.embed_mask(indices), whole)
    embedded = []
    pipe.controlnet.network.register_forward_pre_hook(lambda _, args: embedded.append(args[2]))
    widths = []
    pipe.controlnet.embedding.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[4]))
    for planes in (2, 3, 16):
        monkeypatch.setattr("pipelines.inputs.conditions.LATENT_PLANES", planes)
        pipe(mask=image_of(labels), classes=CLASSES[FLOW], num_inference_steps=1, output_type="latent")
        assert embedded[-1].shape == whole.shape
        assert (embedded[-1] - whole).abs().max() <= 1e-6 * (whole.max() - whole.min())
    assert max(widths[:10]) == 2 * (2 + 3 + 3) and max(widths) == 2 * (16 + 3)


def test_a_label_map_of_any_size_and_spacing(hub):
    """Padded as no label, and cut again; spacing is that of the file, which the network is told."""
    _, _, _, pipe = hub(FLOW)
    labels = label_map((12, 16, 12))[1:11, :15, :9]
    seen = []
    pipe.unet.network.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    image = nib.Nifti1Image(labels, np.diag([-2.5, 1.25, 3.0, 1.0]))
    volume = pipe(mask=image, classes=CLASSES[FLOW], num_inference_steps=2).volumes[0]
    assert volume.shape == labels.shape and np.array_equal(volume.affine, image.affine)
    assert np.asarray(volume.dataobj).std() > 1
    assert seen[0]["spacing_tensor"].tolist() == [[250.0, 125.0, 300.0]]
    assert (np.asarray(volume.dataobj)[labels == 0] == -1000).all()


def test_batches_and_slabs_change_nothing(hub, monkeypatch, tmp_path):
    _, _, _, pipe = hub(FLOW)
    masks = [image_of(label_map(seed=seed)) for seed in range(3)]
    request = {"classes": CLASSES[FLOW], "num_inference_steps": 3}
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = pipe(mask=masks, **request, generator=generators, output_type="pt").volumes
    monkeypatch.setattr("autoencoder.base.WHOLE_BYTES", 0)
    pipe.vae.slab_bytes = 20_000
    paths = [tmp_path / f"{seed}.nii.gz" for seed in range(3)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    pipe(mask=masks, **request, generator=generators, batch_size=1, paths=paths)
    for path, whole in zip(paths, together, strict=True):
        written = np.asarray(nib.load(path).dataobj)
        assert np.abs(written - whole.numpy().squeeze()).max() <= 0.51  # rounded to whole HU
        assert read_sidecar(path)["mask"]["sha256"]
    assert (together[0] - together[1]).abs().max() > 1


def test_edits(hub):
    """A label map steers them, too."""
    *_, pipe = hub(FLOW)
    labels = label_map()
    image = nib.Nifti1Image(np.where(labels == 0, -1000, 40).astype(np.int16), np.diag([*SPACING, 1.0]))
    edit = MedVolumeEditPipeline.from_pipe(pipe)
    edit.set_progress_bar_config(disable=True)
    request = {"image": image, "strength": 0.5, "classes": CLASSES[FLOW], "num_inference_steps": 4}

    def edited(**more):
        out = edit(**request, **more, generator=torch.Generator().manual_seed(0)).volumes[0]
        return np.asarray(out.dataobj).astype(np.float32)

    steered = edited(mask=image_of(labels))
    assert np.abs(steered - edited())[labels > 0].max() > 1 and (steered[labels == 0] == -1000).all()


def test_half_precision(hub):
    """All three networks run in bfloat16. (On a CPU torch cannot pool it, as MAISI's flows do.)"""
    *_, pipe = hub(DDPM)
    pipe.scheduler = pipe.unet.new_scheduler("DDIMScheduler")
    request = {"mask": image_of(label_map()), "classes": REGIONS, "num_inference_steps": 4, "output_type": "pt"}
    whole = pipe(**request, generator=torch.Generator().manual_seed(0)).volumes[0]
    pipe.to(torch.bfloat16)
    out = pipe(**request, generator=torch.Generator().manual_seed(0))
    assert out.provenance[0]["dtype"] == "bfloat16"
    assert 0 < (out.volumes[0] - whole).abs().mean() < 0.05 * (whole.max() - whole.min())


@pytest.mark.filterwarnings("ignore:.*has no body")
def test_label_maps_that_maisi_does_not_know_are_refused(hub):
    """Every byte has eight bits; values that the ControlNet never saw give noise, without a word."""
    _, _, _, pipe = hub(FLOW)
    for value in (2, 20, 129, 133, 201, 255, 300):
        labels = label_map()
        labels[4, 4, 4] = value
        with pytest.raises(ValueError, match=rf"{value}.*label_map"):
            pipe(mask=image_of(labels), classes=CLASSES[FLOW], num_inference_steps=1)
    labels = np.where(label_map() == BODY, 133, label_map())
    out = pipe(mask=image_of(labels), classes=CLASSES[FLOW], label_map={133: "body"}, num_inference_steps=1)
    assert out.provenance[0]["label_map"] == {"133": "body"}
    unknown = np.where(label_map() == 1, -2, label_map())
    with pytest.raises(ValueError, match="unknown"):
        pipe(mask=image_of(unknown), classes=CLASSES[FLOW], num_inference_steps=1)


def test_a_map_without_the_body_is_warned_of(hub):
    _, _, _, pipe = hub(FLOW)
    labels = np.where(label_map() == BODY, 0, label_map())
    with pytest.warns(UserWarning, match="has no body, which every training mask has"):
        pipe(mask=image_of(labels), classes=CLASSES[FLOW], num_inference_steps=1)


def test_the_folder_has_the_controlnet(hub, tmp_path):
    _, _, controlnet, pipe = hub(FLOW)
    pipe.save_pretrained(tmp_path / "again")
    again = MedVolumePipeline.from_pretrained(tmp_path / "again")
    assert again.model_hash == pipe.model_hash and again.data == pipe.data
    stored = load_file(tmp_path / "again/controlnet/diffusion_pytorch_model.safetensors")
    theirs = {renamed(key, PEERS["ControlNetMaisi"].renames): value for key, value in controlnet.state_dict().items()}
    assert stored.keys() == theirs.keys() and all(torch.equal(stored[key], theirs[key]) for key in stored)
    index = json.loads((tmp_path / "again/model_index.json").read_text())
    assert index["controlnet"] == ["diffusion", "MonaiControlNet3D"]
    with torch.no_grad():
        again.controlnet.network.controlnet_mid_block.conv.bias.add_(1)
    assert again.model_hash != pipe.model_hash
    config = tmp_path / "again/controlnet/config.json"
    config.write_text(config.read_text().replace('"label_values": [', '"label_values": [-1,'))
    with pytest.raises(ValueError, match="label_values"):
        MedVolumePipeline.from_pretrained(tmp_path / "again")


def test_a_controlnet_that_does_not_fit_is_refused(hub):
    *_, pipe = hub(FLOW)
    *_, other = hub(DDPM)
    parts = {"vae": pipe.vae, "unet": pipe.unet, "scheduler": pipe.scheduler, "data": pipe.data}
    with pytest.raises(ValueError, match="controlnet has num_class_embeds None, the U-Net 128"):
        MedVolumePipeline(**parts, controlnet=other.controlnet)
    config = {**pipe.controlnet.config, "label_values": [0, 1, 2]}
    with pytest.raises(ValueError, match=r"label values 0, 1, 2, data names 0, 1, 3, 4, ... \(126 in all\)"):
        MedVolumePipeline(**parts, controlnet=MonaiControlNet3D.from_config(config))
    with pytest.raises(ValueError, match="controlnet and unet_weak"):
        MedVolumePipeline(**parts, controlnet=pipe.controlnet, unet_weak=pipe.unet)
    with pytest.raises(ValueError, match="load_unet_weak: the pipeline has a ControlNet"):
        pipe.load_unet_weak("nowhere")
    with pytest.raises(ValueError, match="controlnet is MonaiUNet3D; a MonaiControlNet3D is needed"):
        MedVolumePipeline(**parts, controlnet=pipe.unet)
    with pytest.raises(ValueError, match=r"controlnet is torch.bfloat16, the U-Net torch.float32"):
        MedVolumePipeline(**parts, controlnet=MonaiControlNet3D.from_config(pipe.controlnet.config).bfloat16())
    alone = MedVolumePipeline(**parts)
    with pytest.raises(ValueError, match="without a mask condition"):
        alone(mask=image_of(label_map()), classes=CLASSES[FLOW])
    with pytest.raises(ValueError, match=r"controlnet_conditioning_scale 0\.5: the pipeline has no ControlNet"):
        alone(**CLASSES_OF_SHAPE, controlnet_conditioning_scale=0.5)


@pytest.mark.parametrize("scale", [-1, float("nan"), "much", True])
def test_conditioning_scales_that_are_none(scale, hub):
    *_, pipe = hub(FLOW)
    with pytest.raises(ValueError, match="controlnet_conditioning_scale"):
        pipe(**CLASSES_OF_SHAPE, controlnet_conditioning_scale=scale)


def test_tensors_that_do_not_fit_are_named(tmp_path, monkeypatch):
    peers.narrow(monkeypatch, FLOW)
    peers.write_maisi(tmp_path / "hub", FLOW)
    state = peers.write_controlnet(tmp_path / "hub", FLOW).state_dict()
    file, key = tmp_path / "hub/models/controlnet_3d_rflow-ct.pt", "controlnet_mid_block.conv.weight"
    kernel = "controlnet_cond_embedding.conv_in.conv.weight"
    for changed, message in (
        ({name: tensor for name, tensor in state.items() if name != key}, r"1 missing \(network\.controlnet_mid"),
        (state | {"up_blocks.0.weight": torch.zeros(1)}, r"1 unknown \(up_blocks\.0\.weight\)"),
        (state | {key: torch.zeros(3)}, rf"1 of another shape \({key} \(3,\), not \(16, 16, 1, 1, 1\)\)"),
        (state | {key: torch.zeros(16, 16, 1, 1, 1, dtype=torch.int64)}, rf"1 not floating point \({key}\)"),
        (state | {kernel: state[kernel][:, :1]}, rf"{kernel} \(8, 1, 3, 3, 3\), not \(8, 8"),
    ):
        torch.save({"controlnet_state_dict": changed}, file)
        with pytest.raises(ValueError, match=message) as caught:
            convert(FLOW, tmp_path / "hub", tmp_path / "out")
        assert str(file) in str(caught.value) and not (tmp_path / "out").exists()
    torch.save({"controlnet_state_dict": state, "unet_state_dict": state}, file)
    with pytest.raises(FileError, match="expected under one of"):
        convert(FLOW, tmp_path / "hub", tmp_path / "out")


def test_a_controlnet_alone_and_a_folder_without(tmp_path, monkeypatch):
    """A single file is known by its tensors; a folder without a ControlNet is a pipeline without."""
    peers.narrow(monkeypatch, DDPM)
    peers.write_maisi(tmp_path / "hub", DDPM)
    [*_] = convert(DDPM, tmp_path / "hub", tmp_path / "without")
    assert MedVolumePipeline.from_pretrained(tmp_path / "without").controlnet is None
    state = peers.write_controlnet(tmp_path / "hub", DDPM).state_dict()
    unused = {key.replace("to_q", "out_proj"): torch.randn(16, 16) for key in state if ".attn.to_q.weight" in key}
    file = tmp_path / "hub/models/controlnet_3d_ddpm-ct.pt"
    torch.save({"controlnet_state_dict": {f"module.{key}": value for key, value in (state | unused).items()}}, file)
    [part] = convert(DDPM, file, tmp_path / "alone")
    assert part.peer.folder == "controlnet" and len(part.dropped) == len(unused) > 0
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == [
        "README.md",
        "controlnet",
        "provenance.json",
    ]
    with pytest.raises(ValueError, match="not a U-Net"):
        load_unet(tmp_path / "alone/controlnet")


def test_the_way_back_to_monai(hub, tmp_path, monkeypatch):
    """Under MONAI's names, bit for bit; other targets say that they leave it out."""
    *_, controlnet, pipe = hub(FLOW)
    pipe.save_pretrained(tmp_path / "pipeline")
    assert export("monai-weights", tmp_path / "pipeline", tmp_path / "back") == []
    stored = torch.load(tmp_path / "back/controlnet.pt", weights_only=True)["controlnet_state_dict"]
    assert stored.keys() == controlnet.state_dict().keys()
    assert all(torch.equal(stored[key], value) for key, value in controlnet.state_dict().items())
    arguments = json.loads((tmp_path / "back/controlnet.json").read_text())
    assert arguments.pop("_target_").endswith("controlnet_maisi.ControlNetMaisi")
    ControlNetMaisi(**arguments).load_state_dict(stored)
    assert not (tmp_path / "back/controlnet.network.json").exists()
    assert "--from maisi-rflow-ct" in (tmp_path / "back/README.md").read_text()
    with pytest.raises(ValueError, match="has a ControlNet"):
        export("monai-bundle", tmp_path / "pipeline", tmp_path / "bundle")
    monkeypatch.setitem(WRITERS, "torch-export", lambda networks, folder: "programs")  # which take a minute
    [note] = export("torch-export", tmp_path / "pipeline", tmp_path / "programs")
    assert "ControlNet is left out" in note and note in (tmp_path / "programs/README.md").read_text()


def test_the_studio_paints_masks_for_it(hub, tmp_path):
    *_, pipe = hub(FLOW)
    model = StudioModel.of(str(tmp_path), pipe).to_json()
    assert model["mask"] == "optional" and model["edits"]


def test_training_a_controlnet_is_refused_by_name(hub, tmp_path):
    from diffusion.completion import denoiser_class

    *_, pipe = hub(FLOW)
    pipe.save_pretrained(tmp_path / "pipeline")
    section = model_of(str(tmp_path / "pipeline/controlnet"))
    with pytest.raises(ValueError, match="MonaiControlNet3D: ControlNets are not trained here.*PIPELINE/unet"):
        denoiser_class(section)


@pytest.mark.parametrize("source", ["masks", "table"])
def test_generate_from_label_maps(source, hub, tmp_path):
    """The command, by label maps or a table of them: volumes, sidecars, resumed."""
    *_, pipe = hub(FLOW)
    pipe.sampling_settings = SamplingSettings(2)
    pipe.save_pretrained(folder := tmp_path / "pipeline")
    for seed in range(2):
        nib.save(image_of(label_map(seed=seed)), tmp_path / f"case_{seed}.nii.gz")
    words = ["--pipeline", folder, "--masks", tmp_path / "case_*.nii.gz", "--classes", "modality=ct"]
    if source == "table":
        with (tmp_path / "table.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["mask", MODALITY], ["case_0.nii.gz", "ct"], ["case_1.nii.gz", "ct"]])
        words = ["--pipeline", folder, "--conditions", tmp_path / "table.csv"]
    words += ["--output", tmp_path / "volumes"]
    generate([str(word) for word in words])
    with pytest.raises(SystemExit):
        generate([*map(str, words), "--classes", "modality=ct", "--classes", "modality=mr"])
    record = read_sidecar(tmp_path / "volumes/case_1_000.nii.gz")
    assert record["classes"] == {MODALITY: "ct"} and record["mask"]["file"] == "case_1.nii.gz"
    assert record["model"] == pipe.model_hash
    image = nib.load(tmp_path / "volumes/case_1_000.nii.gz")
    generator = torch.Generator().manual_seed(record["seed"])
    again = pipe(mask=tmp_path / "case_1.nii.gz", classes=record["classes"], generator=generator).volumes[0]
    assert np.abs(np.asarray(again.dataobj) - np.asarray(image.dataobj)).max() <= 1
    before = (tmp_path / "volumes/case_0_000.nii.gz").stat().st_mtime_ns
    generate([str(word) for word in words])
    assert (tmp_path / "volumes/case_0_000.nii.gz").stat().st_mtime_ns == before
