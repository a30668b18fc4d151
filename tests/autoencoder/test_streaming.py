"""A network run over slabs gives what it gives for the whole volume."""

import threading

import pytest
import torch
import torch._dynamo
from tiny import peak_bytes
from torch import Tensor, nn

from autoencoder import VQGAN3D, AutoencoderKL3D
from autoencoder.layers import Conv3d, Downsample, ResidualBlock, Upsample
from autoencoder.streaming import Stream, delayed, stream_slabs


def slabs_of(x: Tensor, thicknesses: list[int]) -> list[Tensor]:
    """Slabs of these thicknesses over and over, the last one what is left."""
    cuts, at = [], 0
    while at < x.shape[4]:
        n = thicknesses[len(cuts) % len(thicknesses)]
        cuts.append(x[..., at : at + n])
        at += n
    return cuts


def joined(network, x: Tensor, thicknesses: list[int]) -> Tensor:
    return torch.cat(list(stream_slabs(network, slabs_of(x, thicknesses))), dim=4)


def autoencoder(model_class=AutoencoderKL3D, **changes):
    """Small, with no layer at zero, so that every plane depends on all its neighbors."""
    torch.manual_seed(0)
    arguments = {
        "channels": (8, 16),
        "encoder_blocks": (1, 2),
        "decoder_blocks": (2, 2),
        "latent_channels": 4,
    } | changes
    vae = model_class(**arguments).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    vae.set_latent_statistics([0.1, 0.0, -0.1, 0.2], [1.0, 0.5, 2.0, 1.5])
    return vae


class Branches(nn.Module):
    """What nobody wrote a slab version for: branches of three lengths, summed and concatenated."""

    def __init__(self):
        super().__init__()
        self.short, self.long = Conv3d(4, 4, 1), nn.Sequential(*(Conv3d(4, 4, 3, padding=1) for _ in range(3)))
        self.block, self.down, self.up = ResidualBlock(8), Downsample(8, 8, (1, 2, 2)), Upsample(8, 4, (1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        long = self.long(x)
        both = torch.cat([delayed((self, "cat"), self.short(x), long), long], dim=1)
        out = self.up(self.down(self.block(both)).sigmoid())
        return delayed((self, "sum"), x, out) + out


@pytest.mark.parametrize("model_class", [AutoencoderKL3D, VQGAN3D])
@pytest.mark.parametrize("thicknesses", [[1], [2], [3], [1, 4, 2], [7], [24]])
@torch.no_grad()
def test_streamed_equals_whole(thicknesses, model_class):
    vae = autoencoder(model_class)
    latents = torch.randn(2, 4, 3, 5, 12)
    whole = vae._decode(latents)
    assert (joined(vae._decode, latents, thicknesses) - whole).abs().max() < 1e-5
    assert (joined(vae._encode, whole, thicknesses) - vae._encode(whole)).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": (2, 2, 1), "strides": ((2, 2, 1),)},  # thick slices: 4 x 4 x 1
        {"patch_size": 1, "strides": ((2, 2, 3),)},
        {
            "patch_size": 2,
            "strides": (2, 2),
            "channels": (8, 8, 16),
            "encoder_blocks": (1, 1, 1),
            "decoder_blocks": (1, 1, 1),
        },  # x8
        {"patch_size": 4, "strides": (), "channels": (16,), "encoder_blocks": (1,), "decoder_blocks": (2,)},
        {"in_channels": 2, "out_channels": 2},
        {"in_channels": 2, "out_channels": 2, "per_channel": True},
    ],
)
@torch.no_grad()
def test_any_stride_and_depth(changes):
    vae = autoencoder(**changes)
    volume = torch.randn(1, changes.get("in_channels", 1), *(3 * s for s in vae.stride[:2]), 24)
    whole_latents, whole = vae.encode(volume).latent_dist.mode(), vae(volume).sample
    vae.enable_tiling(slab_bytes=1)  # one plane of latents a slab
    streamed = vae.encode(volume).latent_dist.mode()
    assert (streamed - whole_latents).abs().max() < 1e-5
    assert (vae.decode(streamed).sample - whole).abs().max() < 1e-5
    vae.disable_tiling()
    assert torch.equal(vae(volume).sample, whole)


@torch.no_grad()
def test_a_layer_of_layers_needs_no_second_implementation():
    torch.manual_seed(0)
    network, x = Branches().eval(), torch.randn(1, 4, 4, 4, 10)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for thicknesses in ([1], [2, 5], [10]):
        assert (joined(network, x, thicknesses) - network(x)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "kernel,stride,padding,dilation",
    [(3, 2, 1, 1), (5, 1, 2, 1), (3, 1, 2, 2), (4, 3, 0, 1), (2, 2, 0, 1), (1, 2, 0, 1), (1, 3, 1, 1)],
)
@torch.no_grad()
def test_any_convolution(kernel, stride, padding, dilation):
    conv = Conv3d(2, 3, kernel, stride=stride, padding=padding, dilation=dilation)
    x = torch.randn(1, 2, 7, 7, 23)
    for thicknesses in ([1], [4, 1, 3], [23]):
        assert (joined(conv, x, thicknesses) - conv(x)).abs().max() < 1e-5


@torch.no_grad()
def test_every_plane_is_computed_once():
    """No redundant computation at all: as many planes go through each convolution as in the whole volume."""
    vae, planes = autoencoder(), {}

    def count(name):
        def hook(module, inputs, output):
            planes[name] = planes.get(name, 0) + output.shape[4]

        return hook

    for name, module in vae.decoder.named_modules():
        if isinstance(module, Conv3d):
            module.register_forward_hook(count(name))
    latents = torch.randn(1, 4, 3, 3, 12)
    vae._decode(latents)
    whole, planes = dict(planes), planes
    planes.clear()
    list(stream_slabs(vae._decode, latents.split(2, dim=4)))
    assert planes == whole


@torch.no_grad()
def test_two_streams_and_a_forward_pass_do_not_interfere():
    """Two streams run at once, with the ordinary forward pass between their slabs."""
    vae = autoencoder()
    one, two = torch.randn(1, 4, 3, 3, 8), torch.randn(1, 4, 3, 3, 8)
    expected = [vae._decode(one), vae._decode(two)]
    made: list[list[Tensor]] = [[], []]
    for a, b in zip(
        stream_slabs(vae._decode, one.split(4, 4)), stream_slabs(vae._decode, two.split(4, 4)), strict=True
    ):
        made[0].append(a)
        made[1].append(b)
        assert torch.equal(vae._decode(one), expected[0])
    for parts, whole in zip(made, expected, strict=True):
        assert (torch.cat(parts, 4) - whole).abs().max() < 1e-5


@torch.no_grad()
def test_another_thread_is_not_in_the_stream():
    vae, latents, results = autoencoder(), torch.randn(1, 4, 3, 3, 6), []
    expected = vae._decode(latents)

    def network(slab: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: results.append(vae._decode(latents)))
        thread.start()
        thread.join()
        return vae._decode(slab)

    joined(network, latents, [3])
    assert len(results) == 2 and all((r - expected).abs().max() < 1e-5 for r in results)


@torch.no_grad()
def test_a_failure_leaves_no_stream_behind():
    vae, latents = autoencoder(), torch.randn(1, 4, 3, 3, 6)
    whole = vae._decode(latents)
    stream = Stream(vae._decode)
    with pytest.raises(RuntimeError):
        stream(torch.randn(1, 5, 3, 3, 2))  # another number of channels
    assert torch.equal(vae._decode(latents), whole)
    with pytest.raises(ValueError, match="start a new one"):  # a part of the layers has seen the slab
        stream(latents)


@torch.no_grad()
def test_compiled_code_may_stream():
    one_level = {"channels": (8,), "strides": (), "encoder_blocks": (1,), "decoder_blocks": (1,)}
    vae, latents = autoencoder(**one_level), torch.randn(1, 4, 2, 2, 4)
    whole = vae.decode(latents).sample
    vae.enable_tiling(slab_bytes=1)
    decode = torch.compile(vae.decode, backend="eager", dynamic=False)
    assert (decode(latents, return_dict=False)[0] - whole).abs().max() < 1e-5
    torch._dynamo.reset()


def test_streams_that_overlap_leave_compilation_as_it_was():
    """The one that begins first ends first."""
    began, may_end, seen = [threading.Event() for _ in range(2)], [threading.Event() for _ in range(2)], []

    def network(slab: Tensor) -> Tensor:
        which = int(slab)
        began[which].set()
        may_end[which].wait()
        seen.append(torch._dynamo.eval_frame._stance.stance)
        return slab

    threads = [threading.Thread(target=Stream(network), args=(torch.tensor(which),)) for which in range(2)]
    for which in range(2):
        threads[which].start()
        began[which].wait()
    for which in range(2):
        may_end[which].set()
        threads[which].join()
    assert seen == ["force_eager"] * 2 and torch._dynamo.eval_frame._stance.stance == "default"


@torch.no_grad()
def test_misuse_is_named():
    vae = autoencoder()
    with pytest.raises(ValueError, match="2 planes into a group of 4|1 planes into a group of 2"):
        list(vae.encode_slabs(torch.zeros(1, 1, 8, 8, 6).split(4, dim=4)))
    with pytest.raises(ValueError, match="1 planes into a group of 2"):
        list(vae.encode_slabs([torch.zeros(1, 1, 8, 8, 6)]))
    with pytest.raises(ValueError, match="must be a multiple of"):
        list(vae.encode_slabs([torch.zeros(1, 1, 7, 8, 8)]))
    with pytest.raises(ValueError, match="volume of 2 channels"):
        list(vae.encode_slabs([torch.zeros(1, 2, 8, 8, 8)]))
    with pytest.raises(ValueError, match="no slabs"):
        list(vae.encode_slabs([]))
    stream = Stream(vae._decode)
    stream(torch.zeros(1, 4, 2, 2, 2), last=True)
    with pytest.raises(ValueError, match="has ended"):
        stream(torch.zeros(1, 4, 2, 2, 2))


@torch.no_grad()
def test_slabs_from_outside_encode_to_the_volume_posterior():
    vae = autoencoder()
    volume = torch.randn(1, 1, 8, 12, 24)
    whole = vae.encode(volume).latent_dist
    parts = list(vae.encode_slabs(slabs_of(volume, [5, 1, 7])))
    assert (torch.cat([p.mean for p in parts], 4) - whole.mean).abs().max() < 1e-5
    assert (torch.cat([p.std for p in parts], 4) - whole.std).abs().max() < 1e-5


def test_gradients_flow_through_a_stream():
    vae, latents = autoencoder(), torch.randn(1, 4, 3, 3, 6)
    gradients = []
    for tiled in (False, True):
        x = latents.clone().requires_grad_()
        if tiled:
            vae.enable_tiling(slab_bytes=1)
        (vae.decode(x).sample ** 2).sum().backward()
        gradients.append(x.grad)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[0].abs().max()


def test_slab_thickness_follows_the_bytes():
    vae = AutoencoderKL3D()
    assert vae.slab_planes((512, 512, 768)) < 16 < vae.slab_planes((128, 128, 128))
    plane = vae.activation_bytes((512, 512, 4))
    vae.enable_tiling(slab_bytes=5 * plane)
    assert vae.slab_planes((512, 512, 768)) == 5
    vae.enable_tiling(slab_bytes=1)
    assert vae.slab_planes((512, 512, 768)) == 1


@torch.no_grad()
def test_what_is_kept_does_not_grow_with_the_third_axis():
    """benchmarks/ measures the memory of the process; this is what would make it grow."""
    vae, most = autoencoder(), []
    for depth in (12, 48):
        stream, kept = Stream(vae._decode), []
        for slab in torch.randn(1, 4, 3, 3, depth).split(2, dim=4):
            stream(slab)
            kept.append(sum(planes.untyped_storage().nbytes() for planes in stream._kept.values()))
        assert kept[6:] == kept[6:7] * len(kept[6:])
        most.append(max(kept))
    assert most[0] == most[1]


@torch.no_grad()
def test_large_volumes_stream_by_themselves(monkeypatch):
    vae, volume = autoencoder(), torch.randn(1, 1, 12, 12, 24)
    calls: list[int] = []
    vae.decoder.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[4]))
    whole = vae(volume).sample
    assert calls == [12]
    limit = vae.activation_bytes(volume.shape[2:])
    for size, expected in ((limit, [12]), (limit - 1, [2, 10])):
        monkeypatch.setattr("autoencoder.base.WHOLE_BYTES", size)
        vae.slab_bytes = vae.activation_bytes((12, 12, 20))  # five planes of latents, so two slabs
        calls.clear()
        assert (vae(volume).sample - whole).abs().max() < 1e-5
        assert sum(calls) == 12 and len(calls) == len(expected)
    vae.disable_tiling()
    calls.clear()
    vae(volume)
    assert len(calls) == 1
    vae.use_tiling = None
    with torch.enable_grad():
        calls.clear()
        vae(volume)
        assert len(calls) == 1


def test_the_estimate_is_what_decoding_takes():
    """Peak of live tensors while a volume is decoded in one piece, by PyTorch's own account."""
    vae, latents = AutoencoderKL3D().eval(), torch.randn(1, 4, 8, 8, 8)
    assert 0.5 < vae.activation_bytes((32, 32, 32)) / peak_bytes(lambda: vae.decode(latents)) < 1.5
