"""Weights of MONAI's own classes, converted, compute in our folders what they compute there."""

import json

import peers
import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.data import MetaTensor
from monai.networks.nets.autoencoderkl import AutoencoderKL
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from safetensors.torch import load_file, save_file
from tiny import tiny_data

from autoencoder import MonaiAutoencoderKL
from convert import main as command
from diffusion import LatentUNet3D, MonaiUNet3D, make_scheduler
from files.documents import FileError
from interop.convert import convert
from interop.formats import FORMATS
from interop.networks import PEERS, config_of, expected_shapes, renamed
from pipelines import MedVolumePipeline, read_sidecar
from pipelines.decoding import VolumeDecoder
from pipelines.storage.loading import load_autoencoder

MAISI = [name for name in FORMATS if name.startswith("maisi") and name != "maisi-masks"]
TOLERANCE = 1e-5  # of the range


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape and theirs.std() > 1e-3  # an answer that weights and input decide
    assert (ours - theirs).abs().max() <= TOLERANCE * (theirs.max() - theirs.min())


def assert_same_coding(ours: MonaiAutoencoderKL, theirs, scale_factor: float, low: float) -> None:
    """Encode and decode alike: theirs between `low` and 1, ours between -1 and 1."""
    voxels = torch.rand(1, ours.config["in_channels"], 16, 24, 8) * (1 - low) + low
    with torch.no_grad():
        mean, std = theirs.encode(voxels)
        posterior = ours.encode((voxels - low) * 2 / (1 - low) - 1).latent_dist
        assert_equal(posterior.raw_mean, mean)
        assert_equal(posterior.std / scale_factor, std)
        assert_equal(posterior.mode(), mean * scale_factor)
        noise = torch.randn(mean.shape)
        image = theirs.decode(noise / scale_factor)
        assert_equal((ours.decode(noise).sample + 1) / 2 * (1 - low) + low, image)


def test_tables_are_those_of_the_published_networks():
    """Names and shapes of all tensors, at full width, against MONAI's classes and the counts of the published files."""
    known = {"maisi-ddpm-ct": (372, 169_370_884), "maisi-rflow-ct": (435, 180_500_868)}
    controls = {"maisi-ddpm-ct": (196, 68.64), "maisi-rflow-ct": (231, 72.04)}  # millions
    originals = (AutoencoderKlMaisi, DiffusionModelUNetMaisi, ControlNetMaisi)
    for name in MAISI:
        assert len(FORMATS[name].parts) == (3 if name in controls else 2)
        for part, original in zip(FORMATS[name].parts, originals, strict=False):
            peer = PEERS[part.peers[0]]
            expected = expected_shapes(peer, config_of(peer, part.arguments))
            with torch.device("meta"):
                theirs = original(**part.arguments).state_dict()
            assert {renamed(key, peer.renames): tuple(t.shape) for key, t in theirs.items()} == expected
            counts = len(expected), sum(t.numel() for t in theirs.values())
            if peer.folder == "controlnet":
                assert (counts[0], round(counts[1] / 1e6, 2)) == controls[name]
                continue
            unet = known.get(name, known["maisi-rflow-ct"])
            assert counts == ((130, 20_944_897) if peer.folder == "vae" else unet)


@pytest.mark.parametrize("name", ["maisi-ddpm-ct", "maisi-rflow-mr-brain"])
def test_maisi_computes_what_it_computed(name, tmp_path, monkeypatch):
    peers.narrow(monkeypatch, name)
    vae, unet = peers.write_maisi(tmp_path / "hub", name)
    convert(name, tmp_path / "hub", tmp_path / "out")
    ours = load_autoencoder(tmp_path / "out")
    assert_same_coding(ours, vae, 1.25, low=0.0)

    denoiser = MonaiUNet3D.from_pretrained(tmp_path / "out/unet").eval()
    latents, timestep, numbers = torch.randn(1, 4, 8, 16, 8), torch.tensor([437.0]), torch.tensor([[0.7, 1.25, 3.0]])
    given, sign = {"spacing_tensor": numbers * 100}, 1.0
    if name == "maisi-ddpm-ct":
        classes = torch.tensor([[2, 1]])  # from chest to abdomen; bottom_region comes first
        given["top_region_index_tensor"] = torch.tensor([[0.0, 100.0, 0.0, 0.0]])
        given["bottom_region_index_tensor"] = torch.tensor([[0.0, 0.0, 100.0, 0.0]])
    else:
        classes, sign = torch.tensor([[1]]), -1.0  # mri_t1; MONAI's flows lead from noise to image
        given["class_labels"] = torch.tensor([9])
    with torch.no_grad():
        ours = denoiser(latents, timestep, classes=classes, numbers=numbers).sample
        assert_equal(ours, sign * unet(latents, timestep, **given))


@pytest.mark.parametrize("kind", ["nearest", "attention", "transposed"])
def test_autoencoders_of_users(kind, tmp_path):
    arguments = {"spatial_dims": 3, "in_channels": 2, "out_channels": 2, "num_res_blocks": 1, "channels": [8, 16]}
    arguments |= {"attention_levels": [False, kind == "attention"], "latent_channels": 3, "norm_num_groups": 4}
    arguments |= {f"with_{side}_nonlocal_attn": kind == "attention" for side in ("encoder", "decoder")}
    arguments |= {"use_convtranspose": kind == "transposed", "include_fc": kind == "attention"}
    theirs = peers.random_weights(AutoencoderKL(**arguments))
    torch.save({f"module.{key}": value for key, value in theirs.state_dict().items()}, tmp_path / "vae.pt")
    (tmp_path / "network.json").write_text(json.dumps(arguments))
    options = {"network": tmp_path / "network.json", "value_range": (-1.0, 1.0), "scale_factor": 0.8}
    convert("monai-autoencoderkl", tmp_path / "vae.pt", tmp_path / "out", **options)
    assert_same_coding(load_autoencoder(tmp_path / "out"), theirs, 0.8, low=-1.0)


@pytest.mark.parametrize("kind", ["plain", "context", "updown"])
def test_unets_of_users(kind, tmp_path):
    arguments = {"spatial_dims": 3, "in_channels": 5, "out_channels": 3, "num_res_blocks": [1, 2], "channels": [8, 16]}
    arguments |= {"attention_levels": [False, True], "num_head_channels": 8, "norm_num_groups": 4}
    arguments |= {"context": {"with_conditioning": True, "cross_attention_dim": 4}}.get(kind, {})
    arguments |= {"updown": {"resblock_updown": True, "num_class_embeds": 6}}.get(kind, {})
    theirs = peers.random_weights(DiffusionModelUNet(**arguments))
    save_file(theirs.state_dict(), tmp_path / "unet.safetensors")
    (tmp_path / "network.json").write_text(json.dumps(arguments))
    convert("monai-diffusion-unet", tmp_path / "unet.safetensors", tmp_path / "out", network=tmp_path / "network.json")
    ours = MonaiUNet3D.from_pretrained(tmp_path / "out/unet").eval()
    given = {"context": torch.randn(2, 1, 4)} if kind == "context" else {}
    ours_given, theirs_given = dict(given), dict(given)
    if kind == "updown":
        ours_given["classes"], theirs_given["class_labels"] = torch.tensor([[0], [5]]), torch.tensor([0, 5])
    latents, timesteps = torch.randn(2, 5, 4, 6, 8), torch.tensor([3, 990])
    with torch.no_grad():
        assert_equal(ours(latents, timesteps, **ours_given).sample, theirs(latents, timesteps, **theirs_given))


@pytest.mark.parametrize("name", ["AutoencoderKL", "DiffusionModelUNet"])
def test_names_of_monai_generative_are_those_that_monai_reads(name):
    """MONAI's own `load_old_state_dict` and our table read the same file alike."""
    arguments = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "num_res_blocks": 1, "channels": [8, 8]}
    arguments |= {"attention_levels": [False, True], "norm_num_groups": 4}
    if name == "DiffusionModelUNet":
        arguments |= {"num_head_channels": 8, "with_conditioning": True, "cross_attention_dim": 4}
    network = {"AutoencoderKL": AutoencoderKL, "DiffusionModelUNet": DiffusionModelUNet}[name](**arguments)
    old = {peers.old_name(key): torch.randn(value.shape) for key, value in network.state_dict().items()}
    assert set(old) != set(network.state_dict())
    ours = {renamed(key, PEERS[name].renames).removeprefix("network."): value for key, value in old.items()}
    network.load_old_state_dict(dict(old))
    assert ours.keys() == network.state_dict().keys()
    assert all(torch.equal(ours[key], value) for key, value in network.state_dict().items())


def test_weights_are_kept_bit_for_bit_with_card_and_provenance(tmp_path, monkeypatch):
    peers.narrow(monkeypatch, "maisi-rflow-mr")
    vae, unet = peers.write_maisi(tmp_path / "hub", "maisi-rflow-mr")
    convert("maisi-rflow-mr", tmp_path / "hub", tmp_path / "out")
    for folder, network, name in (("vae", vae, "AutoencoderKlMaisi"), ("unet", unet, "DiffusionModelUNetMaisi")):
        stored = load_file(tmp_path / "out" / folder / "diffusion_pytorch_model.safetensors")
        theirs = {renamed(key, PEERS[name].renames): value for key, value in network.state_dict().items()}
        assert stored.keys() == theirs.keys()
        assert all(torch.equal(stored[key], value) for key, value in theirs.items())
    record = json.loads((tmp_path / "out/provenance.json").read_text())
    assert record["scale_factor"] == 1.25 and record["networks"]["unet"]["not_used"] == [
        "epoch",
        "loss",
        "num_train_timesteps",
    ]
    card = (tmp_path / "out/README.md").read_text()
    assert "non-commercial research only" in card and "NV-Generate-MR" in card
    assert record["networks"]["vae"]["sha256"] in card


def test_scale_factors_that_differ_are_refused(tmp_path, monkeypatch):
    """One taken at random would shift every latent."""
    peers.narrow(monkeypatch, "maisi-rflow-mr")
    peers.write_maisi(tmp_path / "hub", "maisi-rflow-mr")
    with pytest.raises(ValueError, match=r"scale factors differ: .*pt has 1\.25, --scale_factor is 2"):
        convert("maisi-rflow-mr", tmp_path / "hub", tmp_path / "out", scale_factor=2.0)
    convert("maisi-rflow-mr", tmp_path / "hub", tmp_path / "out", scale_factor=1.25)


@pytest.mark.parametrize("license", ["MIT\n# A heading of the card", " ", "a\x1b[2J"])
def test_a_license_is_one_line(tmp_path, license):
    (tmp_path / "network.json").write_text("{}")
    with pytest.raises(ValueError, match="--license .*on one line"):
        convert("monai-autoencoderkl", tmp_path, tmp_path / "out", network=tmp_path / "network.json", license=license)


def test_without_a_scale_factor_it_says_what_to_type(tmp_path):
    arguments = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "num_res_blocks": 1, "channels": [8]}
    arguments |= {"attention_levels": [False], "latent_channels": 3, "norm_num_groups": 4}
    torch.save(AutoencoderKL(**arguments).state_dict(), tmp_path / "vae.pt")
    (tmp_path / "network.json").write_text(json.dumps(arguments))
    options = {"network": tmp_path / "network.json", "value_range": (0.0, 1.0)}
    convert("monai-autoencoderkl", tmp_path / "vae.pt", tmp_path / "out", **options)
    with pytest.raises(ValueError, match="convert again with it"):
        load_autoencoder(tmp_path / "out")


def test_a_scale_factor_that_is_an_image_of_monai_is_read(tmp_path, monkeypatch):
    """MAISI computes it from a MetaTensor, which torch.save writes with all that it knows of its file."""
    peers.narrow(monkeypatch, "maisi-rflow-ct")
    _, unet = peers.write_maisi(tmp_path / "hub", "maisi-rflow-ct")
    image = MetaTensor(torch.randn(1, 4, 4, 4), affine=torch.eye(4), meta={"filename_or_obj": "patient.nii.gz"})
    content = {"scale_factor": 1 / torch.std(image), "unet_state_dict": unet.state_dict()}
    torch.save(content, tmp_path / "hub/models/diff_unet_3d_rflow-ct.pt")
    convert("maisi-rflow-ct", tmp_path / "hub", tmp_path / "out")
    vae = load_autoencoder(tmp_path / "out")
    assert vae.config["latents_std"] == pytest.approx([image.std().item()] * 4)
    texts = [path.read_text() for path in (tmp_path / "out").rglob("*.*") if path.suffix in (".json", ".md")]
    assert len(texts) == 7 and "patient" not in "".join(texts)


def test_a_layer_that_ddpm_never_used_is_left_out(tmp_path, monkeypatch):
    peers.narrow(monkeypatch, "maisi-ddpm-ct")
    _, unet = peers.write_maisi(tmp_path / "hub", "maisi-ddpm-ct")
    state = unet.state_dict()
    unused = [key.replace("to_q", "out_proj") for key in state if ".attn.to_q." in key]
    assert len(unused) == 8
    content = {"unet_state_dict": state | {key: torch.randn(16, 16) for key in unused}, "scale_factor": 1.0}
    torch.save(content, tmp_path / "hub/models/diff_unet_3d_ddpm-ct.pt")
    converted = convert("maisi-ddpm-ct", tmp_path / "hub", tmp_path / "out")
    assert sorted(converted[1].dropped) == sorted(unused)
    assert "8 tensors" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(ValueError, match="unknown.*other_proj"):
        content["unet_state_dict"]["middle_block.attention.attn.other_proj.weight"] = torch.randn(16, 16)
        torch.save(content, tmp_path / "hub/models/diff_unet_3d_ddpm-ct.pt")
        convert("maisi-ddpm-ct", tmp_path / "hub", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_our_unet_on_their_autoencoder_is_a_pipeline(tmp_path, monkeypatch):
    """And every volume names the license, where it restricts what may be done."""
    peers.narrow(monkeypatch, "maisi-rflow-mr")
    vae, _ = peers.write_maisi(tmp_path / "hub", "maisi-rflow-mr")
    convert("maisi-rflow-mr", tmp_path / "hub", tmp_path / "out")
    unet = LatentUNet3D(channels=(8, 8), blocks=(1, 1), attention=(False, True), head_dim=8)
    data = tiny_data(labels={})
    pipe = MedVolumePipeline(load_autoencoder(tmp_path / "out"), unet.eval(), make_scheduler("rectified_flow"), data)
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded = MedVolumePipeline.from_pretrained(tmp_path / "pipeline")
    assert loaded.model_hash == pipe.model_hash
    loaded.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 4, 4, 4)
    path = tmp_path / "volume.nii.gz"
    loaded(shape=(8, 8, 8), num_inference_steps=1, latents=latents, paths=[path])
    assert read_sidecar(path)["license"] == FORMATS["maisi-rflow-mr"].license
    with torch.no_grad():  # a new U-Net predicts zero: the latents stay as they are
        expected = 100 + 200 * vae.decode(latents / 1.25).clamp(0, 1)  # as `tiny_data` describes its intensities
    raw = loaded(shape=(8, 8, 8), num_inference_steps=1, latents=latents, output_type="pt").volumes[0]
    assert_equal(torch.as_tensor(raw).float().reshape(8, 8, 8), expected[0, 0])


def test_conditions_are_checked():
    unet = MonaiUNet3D(**peers_unet())
    latents, spacing = torch.randn(1, 4, 4, 4, 4), torch.ones(1, 3)
    for given, message in (
        ({}, r"conditioned on 3 numbers \(spacing_x, spacing_y, spacing_z\): pass numbers .*got none"),
        ({"numbers": torch.zeros(1, 2)}, r"got a tensor \(1, 2\)"),
        ({"numbers": spacing, "context": torch.zeros(1, 1, 4)}, "without context"),
        ({"numbers": spacing, "classes": torch.zeros(1, 1)}, "without classes"),
    ):
        with pytest.raises(ValueError, match=message):
            unet(latents, 1.0, **given)


def test_sides_that_cannot_be_halved_are_padded():
    unet = peers.random_weights(MonaiUNet3D(**peers_unet()))
    latents, spacing = torch.randn(1, 4, 4, 3, 4), torch.ones(1, 3)
    with torch.no_grad():
        padded = unet(torch.nn.functional.pad(latents, (0, 0, 0, 1)), 1.0, numbers=spacing).sample
        assert torch.equal(unet(latents, 1.0, numbers=spacing).sample, padded[:, :, :, :3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_class_embeds": 4}, "needs 1 class"),
        ({"classes": {"sex": ["F"]}, "class_labels": [0]}, "needs 0 class"),
        ({"num_class_embeds": 4, "classes": {"sex": ["F", "M"]}, "class_labels": [1]}, "one class label for each"),
        ({"num_class_embeds": 4, "classes": {"sex": ["F"]}, "class_labels": [4]}, "below num_class_embeds 4"),
        ({"condition_dropout": {"sex": 0.1}}, "condition_dropout names"),
        ({"objective": "flow"}, "unknown objective"),
        ({"objective": "flow_map"}, "students are LatentUNet3D"),
        ({"objective": "epsilon", "shift_voxels": 64}, "omit it, or set objective"),
        ({"beta_schedule": "linear"}, "give all three"),
    ],
)
def test_configs_that_contradict_themselves(changes, message):
    with pytest.raises(ValueError, match=message):
        MonaiUNet3D(**peers_unet(), **changes)


def peers_unet():
    config = {"channels": [8, 8], "num_res_blocks": [1, 1], "attention_levels": [False, True], "norm_num_groups": 4}
    return config | {"num_head_channels": [0, 8], "takes_spacing": True}


def test_a_converted_autoencoder_decodes_large_volumes_in_slabs(tmp_path, monkeypatch):
    peers.narrow(monkeypatch, "maisi-rflow-ct")
    peers.write_maisi(tmp_path / "hub", "maisi-rflow-ct")
    convert("maisi-rflow-ct", tmp_path / "hub", tmp_path / "out")
    vae, latents = load_autoencoder(tmp_path / "out"), torch.randn(1, 4, 4, 6, 8)
    decoder = VolumeDecoder(vae, None, None, "pt")  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        whole = list(decoder._decode(latents[0]))
        monkeypatch.setattr("autoencoder.base.WHOLE_BYTES", 0)
        vae.slab_bytes = 20_000
        slabs = list(decoder._decode(latents[0]))
    assert len(whole) == 1 < len(slabs)
    assert_equal(torch.cat(slabs, dim=3), whole[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": "$[8, 16]"}, "channels: expressions and references are not evaluated"),
        ({"in_channels": "@image_channels"}, "in_channels: expressions"),
        ({"latent_channels": "4"}, "latent_channels is '4': text where a number belongs"),
        ({"channels": ["8", 16]}, "channels is .*: text where a number belongs"),
        ({"widths": [8, 16]}, "widths: not an argument"),
        ({"spatial_dims": 2}, "spatial_dims is 2; only 3"),
        ({"use_combined_linear": True}, "use_combined_linear is True"),
        ({"_target_": "os.system"}, "_target_ is 'os.system'"),
        ({"norm_num_groups": 3}, "cannot be built"),
        ({"channels": [8]}, "one entry per level"),
        ({"latent_channels": -1}, "latent_channels"),
        ({"num_channels": [8, 16]}, "same argument"),
    ],
)
def test_arguments_that_cannot_be_converted(changes, message, tmp_path):
    arguments = {"channels": [8, 16], "num_res_blocks": 1, "attention_levels": [False, False], "norm_num_groups": 4}
    torch.save({"encoder.blocks.0.conv.weight": torch.zeros(8)}, tmp_path / "vae.pt")
    (tmp_path / "network.json").write_text(json.dumps(arguments | changes))
    with pytest.raises(ValueError, match=message) as caught:
        convert(
            "monai-autoencoderkl",
            tmp_path / "vae.pt",
            tmp_path / "out",
            network=tmp_path / "network.json",
            value_range=(0.0, 1.0),
        )
    assert str(tmp_path) in str(caught.value) and not (tmp_path / "out").exists()


def test_options_that_do_not_fit(tmp_path, monkeypatch):
    peers.narrow(monkeypatch, "maisi-rflow-ct")
    peers.write_maisi(tmp_path / "hub", "maisi-rflow-ct")
    (tmp_path / "network.json").write_text("{}")
    file = tmp_path / "hub/models/diff_unet_3d_rflow-ct.pt"
    for name, weights, options, message in (
        ("maisi-rflow-ct", tmp_path / "hub", {"network": tmp_path / "network.json"}, "omit --network"),
        ("maisi-rflow-ct", tmp_path / "hub", {"value_range": (0.0, 1.0)}, "omit --value_range"),
        ("maisi-rflow-ct", tmp_path / "hub", {"license": "MIT"}, "omit --license"),
        ("maisi-rflow-mr", tmp_path / "hub", {}, "has no autoencoder_v2.pt"),
        ("monai-autoencoderkl", file, {}, "--network"),
        ("monai-autoencoderkl", file, {"network": tmp_path / "network.json"}, "has no tensors of monai-autoencoderkl"),
        ("maisi-rflow-ct", tmp_path / "none.pt", {}, "cannot be read"),
        ("monai-autoencoderkl", tmp_path / "hub", {"network": tmp_path / "network.json"}, "give the file of weights"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(name, weights, tmp_path / "out", **options)
    convert("maisi-rflow-ct", file, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "provenance.json", "unet"]
    with pytest.raises(FileError, match="holds files already"):
        convert("maisi-rflow-ct", file, tmp_path / "out")


def test_the_command(tmp_path, monkeypatch, capsys):
    peers.narrow(monkeypatch, "maisi-rflow-ct")
    peers.write_maisi(tmp_path / "hub", "maisi-rflow-ct")
    words = ["--from", "maisi-rflow-ct", "--weights", tmp_path / "hub", "--output", tmp_path / "out"]
    command([str(word) for word in words])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "vae" in said[0] and "autoencoder_v1.pt" in said[0] and "diff_unet" in said[1]
    assert load_autoencoder(tmp_path / "out").config["latents_std"] == [0.8] * 4
    (tmp_path / "network.json").write_text('{"channels": [8], "num_res_blocks": 1, "attention_levels": [false]}')
    words = ["--from", "monai-autoencoderkl", "--weights", tmp_path / "hub/models/autoencoder_v1.pt"]
    words += ["--network", tmp_path / "network.json", "--value_range", 0, 1, "--output", tmp_path / "out2"]
    with pytest.raises(ValueError, match=r"autoencoder_v1\.pt"):
        command([str(word) for word in words])
    assert not (tmp_path / "out2").exists()
