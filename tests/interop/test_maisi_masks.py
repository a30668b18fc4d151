"""MAISI's mask autoencoder and mask diffusion generate the label maps that MAISI's scripts generate from them."""

import csv
import json

import nibabel as nib
import numpy as np
import peers
import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from monai.networks.schedulers.ddpm import DDPMScheduler

from convert import main as command
from files.documents import FileError
from generate import main as generate
from interop.convert import convert
from interop.formats import FORMATS
from interop.maisi import SIZES
from interop.maisi_labels import LABELS
from interop.maisi_masks import read_outputs, with_labels
from interop.networks import PEERS, config_of, expected_shapes, renamed
from pipelines import MedVolumePipeline, SamplingSettings, read_sidecar

NAME, OUTPUTS, SHAPE, SCALE = "maisi-masks", 6, (8, 12, 16), 1.0055984258651733
TABLE = {"liver": [1, 1], "spleen": [2, 3], "body": [3, 200], "lung tumor": [4, 23], "something": [5, 240]}
pytestmark = pytest.mark.filterwarnings("ignore:.*its grid of")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """MAISI's networks, narrow, and the folder of the pipeline of their files."""
    folder = tmp_path_factory.mktemp("masks")
    (folder / "labels.json").write_text(json.dumps(TABLE))
    with pytest.MonkeyPatch.context() as patch:
        peers.narrow_masks(patch, OUTPUTS)
        networks = peers.write_masks(folder / "hub", OUTPUTS)
        words = ["--from", NAME, "--weights", folder / "hub", "--labels", folder / "labels.json"]
        command([str(word) for word in [*words, "--output", folder / "out"]])
    return *networks, folder / "out"


@pytest.fixture
def pipe(hub):
    pipe = MedVolumePipeline.from_pretrained(hub[2])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_close(ours, theirs) -> None:
    ours, theirs = torch.as_tensor(ours).float().squeeze(), torch.as_tensor(theirs).float().squeeze()
    assert ours.shape == theirs.shape and theirs.std() > 1e-3
    assert (ours - theirs).abs().max() <= 1e-5 * (theirs.max() - theirs.min())


def sizes(seed: int = 0) -> dict[str, float]:
    values = np.random.default_rng(seed).uniform(0, 1, len(SIZES)).round(3)
    values[5] = -1  # no lung tumor
    return dict(zip(SIZES, values.tolist(), strict=True))


def test_tables_are_those_of_the_published_networks(tmp_path):
    """Names and shapes of all tensors at full width, against MONAI's classes and the counts of the published files."""
    values = sorted({*LABELS} - {0, 1})  # 124 of them
    table = {LABELS[value]: [output, value] for output, value in enumerate(values, start=1)}
    (tmp_path / "labels.json").write_text(json.dumps(table))
    parts = with_labels(FORMATS[NAME], tmp_path / "labels.json").parts
    counts = ((114, 5.26), (558, 197.16))  # tensors, millions of parameters
    originals = (AutoencoderKlMaisi, DiffusionModelUNet)
    for part, original, known in zip(parts, originals, counts, strict=True):
        peer = PEERS[part.peers[0]]
        expected = expected_shapes(peer, config_of(peer, part.arguments) | dict(part.settings))
        with torch.device("meta"):
            theirs = original(**part.arguments).state_dict()
        assert {renamed(key, peer.renames): tuple(t.shape) for key, t in theirs.items()} == expected
        assert (len(theirs), round(sum(t.numel() for t in theirs.values()) / 1e6, 2)) == known


@torch.no_grad()
def test_networks_compute_what_they_computed(hub, pipe):
    vae, unet, _ = hub
    latents = torch.randn(1, 4, 4, 6, 8)
    shares = vae.decode(latents / SCALE).softmax(dim=1)
    decoded = pipe.vae.decode(latents).sample
    assert_close(decoded, shares[:, [1, 2, 4, 3, 5]] - shares[:, :1])  # in the order of the label values
    bits = (torch.rand(1, 8, *SHAPE) > 0.5).float()
    assert_close(pipe.vae.encode(bits * 2 - 1).latent_dist.mode(), vae.encode(bits)[0] * SCALE)
    numbers = torch.tensor([[sizes()[name] for name in sorted(SIZES)]])
    context = torch.tensor([[[sizes()[name] for name in SIZES]]])
    ours = pipe.unet(latents, torch.tensor([300.0]), numbers=numbers).sample
    assert_close(ours, unet(latents, torch.tensor([300.0]), context=context))


@torch.no_grad()
def test_label_maps_are_maisis(hub, pipe, monkeypatch):
    """With the same noise, on a schedule of 50 steps in place of 1000; in one piece and in slabs."""
    vae, unet, _ = hub
    assert pipe.sampling_settings == SamplingSettings(1000)
    betas = {"beta_start": 1.5 / 50, "beta_end": 19.5 / 50}  # MAISI's, for its 1000 steps
    pipe.unet.register_to_config(train_steps=50, **betas)
    pipe.scheduler = pipe.unet.new_scheduler("DDPMScheduler")
    pipe.sampling_settings = SamplingSettings(50)
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(1, 4, *(side // 2 for side in SHAPE), generator=generator)
    scheduler = DDPMScheduler(50, "scaled_linear_beta", clip_sample=False, **betas)
    scheduler.set_timesteps(50)
    context = torch.tensor([[[sizes()[name] for name in SIZES]]])
    for t in scheduler.timesteps:
        predicted = unet(latents, torch.Tensor((t,)), context=context)
        latents, _ = scheduler.step(predicted, t, latents, generator=generator)
    indices = vae.decode(latents / SCALE).softmax(dim=1).argmax(dim=1)[0]
    theirs = np.array([0, 1, 3, 200, 23, 240])[indices]

    request = {"shape": SHAPE, "numbers": sizes()}
    ours = pipe(**request, generator=torch.Generator().manual_seed(7)).volumes[0]
    values, counts = np.unique(theirs, return_counts=True)
    assert len(values) >= 3 and counts.min() > 10
    assert ours.get_data_dtype() == np.uint8 and np.allclose(ours.header.get_zooms(), 1.5)
    assert np.mean(np.asarray(ours.dataobj) != theirs) < 2e-3  # of equal probabilities
    monkeypatch.setattr("autoencoder.base.WHOLE_BYTES", 0)
    pipe.vae.slab_bytes = 20_000
    slabs = pipe(**request, generator=torch.Generator().manual_seed(7)).volumes[0]
    assert np.mean(np.asarray(slabs.dataobj) != theirs) < 2e-3


def test_the_pipeline_names_its_labels(pipe):
    """As a pipeline with a ControlNet does, where the value is MAISI's."""
    assert pipe.data.image_labels == {
        0: "background", 1: "liver", 3: "spleen", 23: "lung tumor", 200: "body", 240: "something",
    }  # fmt: skip
    assert all(LABELS[value] == name for value, name in pipe.data.image_labels.items() if value != 240)
    with pytest.raises(ValueError, match="stomach must be given"):
        pipe(shape=SHAPE, numbers={name: 0.5 for name in SIZES if name != "stomach"}, num_inference_steps=2)


def test_generate_from_a_table_of_sizes(hub, pipe, tmp_path):
    pipe.scheduler = pipe.unet.new_scheduler("DDIMScheduler")
    pipe.sampling_settings = SamplingSettings(2)
    pipe.save_pretrained(tmp_path / "pipeline")
    with (tmp_path / "sizes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["name", *SIZES], ["first", *sizes().values()]])
    words = ["--pipeline", tmp_path / "pipeline", "--conditions", tmp_path / "sizes.csv", "--shape", *SHAPE]
    generate([str(word) for word in [*words, "--output", tmp_path / "maps"]])
    labels = np.asarray(nib.load(tmp_path / "maps/first_000.nii.gz").dataobj)
    assert set(np.unique(labels)) <= {0, 1, 3, 23, 200, 240} and len(np.unique(labels)) > 1
    assert read_sidecar(tmp_path / "maps/first_000.nii.gz")["numbers"] == sizes()


def test_the_label_file_is_in_the_card(hub):
    record = json.loads((hub[2] / "provenance.json").read_text())
    assert record["config"]["file"] == "labels.json" and record["scale_factor"] == pytest.approx(SCALE)
    assert set(record["networks"]) == {"vae", "unet"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"body": [3, 1]}, "several outputs one label value"),
        ({"body": [2, 200]}, "'body' is .*outputs are 1 to 5, each once"),
        ({"body": [6, 200]}, "outputs are 1 to 5"),
        ({"body": [3, 256]}, "label values 1 to 255"),
        ({"body": "200"}, r"expected \[output, label value\]"),
        ({"body": [3.0, 200]}, r"expected \[output, label value\]"),
        ({"body": [0, 0]}, "no label for 1 outputs, such as 3"),
        ({"something": [5, 241], "body": [3, 240]}, None),
    ],
)
def test_files_of_labels(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr("interop.maisi_masks.OUTPUTS", OUTPUTS)
    (tmp_path / "labels.json").write_text(json.dumps(TABLE | changes))
    if message is None:
        assert read_outputs(tmp_path / "labels.json")[5] == (241, "something")
        return
    with pytest.raises(FileError, match=message) as caught:
        read_outputs(tmp_path / "labels.json")
    assert str(tmp_path) in str(caught.value)


def test_the_label_file_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="maisi-masks: give configs/label_dict_124_to_132.json .*--labels FILE"):
        convert(NAME, tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="maisi-rflow-ct: its labels are known.*omit --labels"):
        convert("maisi-rflow-ct", tmp_path, tmp_path / "out", labels=tmp_path / "labels.json")


def test_tensors_that_do_not_fit_are_named(tmp_path, monkeypatch):
    peers.narrow_masks(monkeypatch, OUTPUTS)
    vae, _ = peers.write_masks(tmp_path / "hub", OUTPUTS)
    (tmp_path / "labels.json").write_text(json.dumps(TABLE))
    state, file = vae.state_dict(), tmp_path / "hub/models/mask_generation_autoencoder.pt"
    key = next(name for name in state if name.endswith("conv.conv.conv.weight") and name.startswith("decoder"))
    for changed, message in (
        ({name: tensor for name, tensor in state.items() if name != key}, r"1 missing \(decoder.*postconv.conv.weight"),
        (state | {key: state[key][..., :2, :2, :2]}, "1 of another shape"),
        (state | {"decoder.extra": torch.zeros(1)}, r"1 unknown \(decoder.extra\)"),
    ):
        torch.save(changed, file)
        with pytest.raises(ValueError, match=message) as caught:
            convert(NAME, tmp_path / "hub", tmp_path / "out", labels=tmp_path / "labels.json")
        assert str(file) in str(caught.value)
