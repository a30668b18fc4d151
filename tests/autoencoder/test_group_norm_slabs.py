"""An autoencoder with GroupNorm gives in slabs what it gives for the whole volume."""

import tempfile

import peers
import pytest
import torch
from tiny import peak_bytes
from torch import Tensor

from autoencoder import MonaiAutoencoderKL
from autoencoder.monai import spool as spools
from autoencoder.monai.slabs import SlabCoder, SlabConvTranspose3d, SlabGroupNorm
from autoencoder.monai.spool import FeatureMap, Spool
from evaluation.doctor.memory import generation_bytes
from files.documents import FileError

NETWORKS = {
    "narrowing": {"channels": [8, 16], "num_res_blocks": [2, 1]},
    "maisi": {"channels": [8, 8, 16], "upsampling": "trilinear", "in_channels": 2, "out_channels": 2},
    "transposed": {"channels": [16, 8], "upsampling": "transposed", "norm_num_groups": 8},
    "attention": {"encoder_attention": True, "decoder_attention": True, "attention_output": True},
}
SHAPES = {"odd": (1, 3, 5, 7), "one cell": (1, 1, 1, 1), "flat": (2, 2, 6, 1), "long": (1, 2, 1, 13)}  # latents


def autoencoder(**changes) -> MonaiAutoencoderKL:
    """Narrow, with weights that all matter."""
    config = {"channels": [8, 16], "norm_num_groups": 4} | changes
    levels = len(config["channels"])
    config = {"num_res_blocks": [1] * levels, "attention_levels": [False] * levels} | config
    return peers.random_weights(
        MonaiAutoencoderKL(**config, latents_mean=[0.1, 0.0, -0.2, 0.3], latents_std=[0.8, 1, 1.5, 2])
    )


def volume_for(vae: MonaiAutoencoderKL, shape: tuple[int, ...]) -> Tensor:
    """Brighter toward its end, so that no slab has the statistics of the whole."""
    batch, *cells = shape
    volume = torch.randn(batch, vae.config["in_channels"], *(n * s for n, s in zip(cells, vae.stride, strict=True)))
    return volume + torch.linspace(-2, 2, volume.shape[4])


def assert_same(made: Tensor, whole: Tensor, tolerance: float = 1e-5) -> None:
    assert made.shape == whole.shape and made.dtype == whole.dtype
    assert (made - whole).abs().max() <= tolerance * (whole.max() - whole.min())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_slabs_equal_the_whole(network, shape):
    vae = autoencoder(**NETWORKS[network])
    volume = volume_for(vae, SHAPES[shape])
    latents = vae.encode(volume).latent_dist.mode()
    whole = vae.decode(latents).sample
    for slab_bytes in (1, 30_000, 1 << 28):  # a plane at a time, all maps in the file; some; all in memory
        vae.enable_tiling(slab_bytes)
        assert_same(vae.encode(volume).latent_dist.mode(), latents)
        assert_same(vae.decode(latents).sample, whole)


@torch.no_grad()
def test_statistics_of_single_slabs_would_show(monkeypatch):
    vae = autoencoder()
    latents = vae.encode(volume_for(vae, (1, 4, 4, 12))).latent_dist.mode()
    whole, append = vae.decode(latents).sample, FeatureMap.append
    vae.enable_tiling(1)

    def forgetting(self, slab):
        if self.depth:
            self._sums.zero_()
        append(self, slab)
        self._sums *= self.depth / slab.shape[2]

    monkeypatch.setattr(FeatureMap, "append", forgetting)
    assert (vae.decode(latents).sample - whole).abs().max() > 0.05 * (whole.max() - whole.min())


@torch.no_grad()
def test_slabs_from_outside_and_slabs_for_outside():
    vae = autoencoder(**NETWORKS["maisi"])
    volume = volume_for(vae, (1, 2, 2, 6))
    whole = vae.encode(volume).latent_dist
    parts = list(vae.encode_slabs(volume.split([5, 1, 12, 6], dim=4)))
    assert_same(torch.cat([part.mean for part in parts], dim=4), whole.mean)
    assert_same(torch.cat([part.std for part in parts], dim=4), whole.std)
    vae.slab_bytes = 1
    slabs = list(vae.decode_slabs(whole.mode()))
    assert [slab.shape[4] for slab in slabs] == [1] * 24
    assert_same(torch.cat(slabs, dim=4), vae.decode(whole.mode()).sample)


@torch.no_grad()
def test_large_volumes_are_coded_in_slabs_by_themselves(monkeypatch):
    vae = autoencoder()
    volume, used = volume_for(vae, (1, 2, 2, 4)), []
    monkeypatch.setattr(SlabCoder, "run", lambda self, x, run=SlabCoder.run: used.append(self) or run(self, x))
    whole = vae(volume).sample
    assert not used
    monkeypatch.setattr("autoencoder.base.WHOLE_BYTES", vae.activation_bytes(volume.shape[2:]) - 1)
    assert_same(vae(volume).sample, whole)
    assert len(used) == 2
    vae.disable_tiling()
    assert torch.equal(vae(volume).sample, whole)


@pytest.mark.parametrize(("kernel", "padding"), [(2, 0), (3, 1), (4, 1), (5, 2)])
@torch.no_grad()
def test_transposed_convolutions(kernel, padding):
    extra = kernel % 2
    conv = SlabConvTranspose3d(2, 3, kernel, stride=2, padding=padding, output_padding=extra)
    x, spool = torch.randn(1, 2, 3, 4, 5), Spool(0)
    for slab_bytes in (1, 2000):
        source = FeatureMap(spool)
        source.append(x.transpose(2, 4))
        slabs = SlabCoder(autoencoder().decoder, spool, slab_bytes)._transposed(source, conv)
        assert_same(torch.cat(list(slabs), dim=2).transpose(2, 4), conv(x))
    spool.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_statistics_are_taken_in_float64(dtype):
    """Sums in a narrow type would overflow or stand still; and in float32 lose the variance of far-away values."""
    x = (torch.arange(40_000).view(1, 2, 4, 50, 100) % 2 * 8 + 2000).to(dtype)
    source = FeatureMap(Spool(1 << 20))
    source.append(x)
    mean, variance = source.moments(1)
    assert mean.item() == x.double().mean().item() and mean.dtype == torch.float64
    assert variance.item() == pytest.approx(x.double().var(correction=0).item(), rel=1e-9)


@torch.no_grad()
def test_narrow_types_are_no_worse_in_slabs():
    vae = autoencoder(**NETWORKS["maisi"])
    latents = vae.encode(volume_for(vae, (1, 2, 2, 4))).latent_dist.mode()
    exact = vae.decode(latents).sample
    vae.to(torch.bfloat16)
    whole = vae.decode(latents.bfloat16()).sample
    vae.enable_tiling(1)
    slabs = vae.decode(latents.bfloat16()).sample
    assert slabs.dtype == torch.bfloat16
    assert (slabs - exact).abs().mean() < 1.2 * (whole - exact).abs().mean()


@torch.no_grad()
def test_whole_volumes_are_normalized_exactly():
    """PyTorch's kernel for channels_last_3d is off by 1e-5 of the range here."""
    x = torch.randn(1, 64, 32, 32, 32) / 2 + torch.randn(1, 64, 1, 1, 1)
    values = x.double().view(1, 32, -1)
    exact = (values - values.mean(2, keepdim=True)) / (values.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
    norm = SlabGroupNorm(32, 64, eps=1e-6)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        given = x.to(memory_format=layout)
        kept = given.clone()
        assert_same(norm(given).double(), exact.view_as(x), 2e-7)
        assert torch.equal(given, kept)


def test_gradients_are_those_of_the_whole():
    vae, latents = autoencoder(), torch.randn(1, 4, 2, 2, 4)
    gradients = []
    for tiled in (False, True):
        x = latents.clone().requires_grad_()
        if tiled:
            vae.enable_tiling(1)
        vae.decode(x).sample.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


@torch.no_grad()
def test_the_file_has_no_name_and_is_closed_by_an_interrupt(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    vae, made = autoencoder(), []
    vae.slab_bytes = 1
    monkeypatch.setattr(vae, "_spool", lambda: made.append(Spool(0)) or made[-1])
    slabs = vae.decode_slabs(torch.randn(1, 4, 2, 2, 4))
    next(slabs)
    assert made[0]._file is not None and not made[0]._file.closed
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        slabs.throw(KeyboardInterrupt)
    assert made[0]._file.closed


@torch.no_grad()
def test_a_full_disk_is_named(monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda buffering: open("/dev/full", "r+b", buffering=buffering))
    vae = autoencoder()
    vae.enable_tiling(1)
    with pytest.raises(FileError, match=r"No space left on device, after .* set TMPDIR to a folder with more room"):
        vae.decode(torch.randn(1, 4, 2, 2, 4))


@torch.no_grad()
def test_the_file_holds_about_one_map(monkeypatch):
    monkeypatch.setattr(spools, "CHUNK", 256)
    vae, made = autoencoder(**NETWORKS["maisi"]), []
    vae.enable_tiling(1)
    monkeypatch.setattr(vae, "_spool", lambda: made.append(Spool(0)) or made[-1])
    volume = vae.decode(torch.randn(1, 4, 4, 4, 8)).sample
    largest = 8 * volume[0, 0].numel() * volume.element_size()
    assert len(made) == 1 and largest <= made[0].chunks * 256 < 2.6 * largest  # x, conv1's result, and a few planes
    assert sorted(made[0]._free) == list(range(made[0].chunks)) and made[0].held == 0


@torch.no_grad()
def test_planes_come_back_as_they_were():
    with Spool(700) as spool:  # four of them in memory
        planes = [torch.randn(5, 4, 3, 2)[:, :, i % 3] for i in range(8)]
        kept = [spool.put(plane) for plane in planes]
        assert {type(one) for one in kept} == {torch.Tensor, list}
        spool.drop(kept.pop(0))
        planes[0] = torch.randn(700).bfloat16()
        kept.insert(0, spool.put(planes[0]))
        for plane, one in zip(planes, kept, strict=True):
            found = torch.full_like(plane, torch.nan)
            spool.get(one, found)
            assert torch.equal(found, plane)


def test_the_estimate_of_slabs_is_what_decoding_takes():
    """Doctor's, without values, beside PyTorch's own account; and far below that of the whole."""
    config = {"channels": [16, 16], "norm_num_groups": 8}
    vae, latents = autoencoder(**config), torch.randn(1, 4, 12, 12, 12)
    vae.enable_tiling(300_000)
    taken = peak_bytes(lambda: vae.decode(latents))
    parts = generation_bytes(vae, None, (24, 24, 24), 1, cpu=True)
    assert 0.6 < parts["decoding"] / taken < 1.6
    whole = autoencoder(**config)
    assert parts["decoding"] < 0.5 * generation_bytes(whole, None, (24, 24, 24), 1, cpu=True)["decoding"]


@torch.no_grad()
def test_slabs_of_an_offloaded_network(tmp_path):
    vae = autoencoder(**NETWORKS["attention"])
    vae.enable_tiling(1)
    volume = volume_for(vae, (1, 2, 2, 4))
    expected = vae(volume).sample
    options = {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path)}
    vae.enable_group_offload(torch.device("cpu"), **options)
    for parameter in vae.parameters():
        parameter.data.fill_(float("nan"))  # whatever is not read from the disk shows
    assert_same(vae(volume).sample, expected)


@torch.no_grad()
def test_misuse_is_named():
    vae = autoencoder()
    with pytest.raises(ValueError, match="no slabs"):
        list(vae.encode_slabs([]))
    with pytest.raises(ValueError, match="5 planes, not a multiple of 2: pad"):
        list(vae.encode_slabs([torch.zeros(1, 1, 4, 4, 3), torch.zeros(1, 1, 4, 4, 2)]))
    with pytest.raises(ValueError, match="volume of 2 channels"):
        list(vae.encode_slabs([torch.zeros(1, 2, 4, 4, 4)]))
