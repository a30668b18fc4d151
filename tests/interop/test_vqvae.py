"""MONAI's VQVAE, converted, computes what it computed, whole and in slabs."""

import json

import peers
import pytest
import torch
from monai.networks.nets.vqvae import VQVAE
from safetensors.torch import load_file

from autoencoder import MonaiVQVAE
from interop.convert import convert
from pipelines.storage.loading import load_autoencoder

KIND = "monai-vqvae"
ARGUMENTS = {"spatial_dims": 3, "in_channels": 2, "out_channels": 2, "channels": [8, 6], "num_res_channels": [4, 8]}
ARGUMENTS |= {"num_res_layers": 1, "num_embeddings": 16, "embedding_dim": 3}
ARGUMENTS |= {"downsample_parameters": [2, 4, 1, 1], "upsample_parameters": [2, 4, 1, 1, 0]}
UNEVEN = {
    "downsample_parameters": [[2, 4, 1, 1], [4, 6, 1, 1]],
    "upsample_parameters": [[4, 6, 1, 1, 0], [2, 3, 1, 1, 1]],
}
DILATED = {
    "downsample_parameters": [[1, 3, 2, 2], [2, 2, 1, 0]],
    "upsample_parameters": [[2, 2, 1, 0, 0], [1, 3, 2, 2, 0]],
}


def assert_close(ours, theirs) -> None:
    assert ours.shape == theirs.shape and theirs.std() > 1e-3
    assert (ours - theirs).abs().max() <= 1e-5 * (theirs.max() - theirs.min())


def write(folder, **changes):
    """A file of weights and its arguments, as a user has them. Returns MONAI's network."""
    arguments = ARGUMENTS | changes
    network = peers.random_weights(VQVAE(**arguments, commitment_cost=0.5, ddp_sync=False))
    with torch.no_grad():  # codes where latents are
        latents = network.encode(torch.rand(1, 2, 32, 32, 32)).movedim(1, -1).reshape(-1, 3)
        network.quantizer.quantizer.embedding.weight.copy_(latents[:: len(latents) // 16][:16])
    torch.save(network.state_dict(), folder / "vqvae.pt")
    (folder / "network.json").write_text(json.dumps(arguments | {"commitment_cost": 0.5, "ddp_sync": False}))
    return network


def converted(folder, **options) -> MonaiVQVAE:
    options = {"network": folder / "network.json", "value_range": (0.0, 1.0), "scale_factor": 0.8} | options
    convert(KIND, folder / "vqvae.pt", folder / "out", **options)
    return load_autoencoder(folder / "out")  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("changes", [{}, UNEVEN, DILATED], ids=["usual", "uneven", "dilated"])
def test_it_computes_what_it_computed(changes, tmp_path):
    theirs = write(tmp_path, **changes)
    ours = converted(tmp_path)
    voxels = torch.rand(1, 2, 32, 24, 16)
    with torch.no_grad():
        posterior = ours.encode(voxels * 2 - 1).latent_dist
        encoded = theirs.encode(voxels)
        assert_close(posterior.raw_mean, encoded)
        assert_close(posterior.mode(), encoded * 0.8)
        indices = theirs.index_quantize(voxels)
        assert len(indices.unique()) > 3 and torch.equal(posterior.indices, indices)
        image = theirs.decode_samples(indices)
        assert_close((ours.decode(posterior.mode()).sample + 1) / 2, image)
        noise = torch.randn(encoded.shape)
        assert_close((ours.decode(noise).sample + 1) / 2, theirs.decode_stage_2_outputs(noise / 0.8))


@pytest.mark.parametrize("changes", [{}, UNEVEN, DILATED], ids=["usual", "uneven", "dilated"])
def test_slabs_are_the_whole(changes, tmp_path):
    write(tmp_path, **changes)
    vae = converted(tmp_path)
    voxels, thinnest = torch.rand(1, 2, 8, 16, 40) * 2 - 1, 1
    with torch.no_grad():
        vae.disable_tiling()
        latents = vae.encode(voxels).latent_dist.mode()
        image = vae.decode(latents).sample
        vae.enable_tiling(thinnest)
        assert len(list(vae.decode_slabs(latents))) > 1
        assert_close(vae.encode(voxels).latent_dist.mode(), latents)
        assert_close(vae.decode(latents).sample, image)
        pieces = vae.encode_slabs(voxels.split([1, 2, 7, 30], dim=4))
        assert_close(torch.cat([piece.mode() for piece in pieces], dim=4), latents)


def test_weights_are_kept_bit_for_bit(tmp_path):
    theirs = write(tmp_path)
    converted(tmp_path)
    stored = load_file(tmp_path / "out/vae/diffusion_pytorch_model.safetensors")
    assert stored.pop("codebook.initialized").item() is True  # a later training keeps the codes
    state = theirs.state_dict()
    names = {"codes": "embedding.weight", "counts": "ema_cluster_size", "sums": "ema_w"}
    for ours, name in names.items():
        assert torch.equal(stored.pop(f"codebook.{ours}"), state.pop(f"quantizer.quantizer.{name}"))
    assert stored.keys() == state.keys() and all(torch.equal(stored[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act": "PRELU"}, "act is 'PRELU'; only 'RELU'"),
        ({"act": ["LEAKYRELU", {"negative_slope": 0.2}]}, "act is .*only 'RELU'"),
        ({"output_act": "SIGMOID"}, "output_act is 'SIGMOID'; only None"),
        ({"spatial_dims": 2}, "spatial_dims is 2; only 3"),
        ({"downsample_parameters": [2, 4, 1, 0]}, "does not change sides by its stride alone"),
        ({"upsample_parameters": [2, 4, 1, 1]}, "is not a stride, a kernel"),
        ({"downsample_parameters": [[2, 4, 1, 1]]}, "one entry per level"),
        ({"downsample_parameters": [4, 4, 1, 0]}, "their strides differ"),
        ({"downsample_parameters": [0, 4, 1, 1]}, "is not a stride"),
        ({"downsample_parameters": [2, 4, 1, -1]}, "downsample"),
        ({"downsample_parameters": "$(2, 4, 1, 1)"}, "expressions and references are not evaluated"),
        ({"num_embeddings": "@codes"}, "num_embeddings: expressions"),
        ({"num_embeddings": "16"}, "text where a number belongs"),
        ({"num_embeddings": 1}, "num_codes"),
        ({"decay": 1.5}, "codebook_decay"),
        ({"norm_eps": 1e-6}, "norm_eps: not an argument"),
        ({"_target_": "os.system"}, "_target_ is 'os.system'; it is VQVAE"),
        ({"channels": [8, 7]}, "of another shape"),
        ({"num_embeddings": 17}, r"quantizer\.embedding\.weight \(16, 3\), not \(17, 3\)"),
        ({"num_res_layers": 2}, "missing"),
    ],
)
def test_arguments_that_cannot_be_converted(changes, message, tmp_path):
    write(tmp_path)
    (tmp_path / "network.json").write_text(json.dumps(ARGUMENTS | changes))
    with pytest.raises(ValueError, match=message) as caught:
        converted(tmp_path)
    assert str(tmp_path) in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["missing", "extra", "renamed", "code", "whole numbers"])
def test_files_that_are_not_its_weights(change, tmp_path):
    state = dict(write(tmp_path).state_dict())
    key, named = "quantizer.quantizer.ema_w", "ema_w|codebook.sums"
    if change in ("missing", "renamed"):
        value = state.pop(key)
    if change == "renamed":
        state["quantizer.ema_w"] = value
    if change == "extra":
        state["decoder.blocks.9.conv.weight"], named = torch.zeros(3), r"unknown \(decoder.blocks.9.conv.weight"
    if change == "code":
        state["run"], named = pytest.raises, "names "  # a function, which torch.save stores by its name
    if change == "whole numbers":
        state[key] = state[key].int()
    torch.save(state, tmp_path / "vqvae.pt")
    with pytest.raises(ValueError, match=named) as caught:
        converted(tmp_path)
    assert "vqvae.pt" in str(caught.value) and not (tmp_path / "out").exists()
