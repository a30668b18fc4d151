"""The networks against what their docstrings say, written down once more with torch's functions alone and random
weights."""

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder import AutoencoderKL3D
from autoencoder.layers import Conv3d, ResidualBlock
from autoencoder.streaming import stream_slabs
from diffusion import LatentUNet3D, fold_mask
from diffusion.attention import SelfAttention
from diffusion.folding import FoldedMaskEmbedding
from diffusion.unet import TimeResidualBlock
from volumes import PADDING

Weights = Mapping[str, Tensor]
Stride = tuple[int, int, int]


def randomize(module: torch.nn.Module) -> Weights:
    """Every weight at random, so that each counts. Returns them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1)
    return module.state_dict()


def convolve(weights: Weights, name: str, x: Tensor) -> Tensor:
    kernel = weights[f"{name}.weight"]
    return F.conv3d(x, kernel, weights[f"{name}.bias"], padding=kernel.shape[2] // 2)


def norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    """x / sqrt(mean over channels of x^2), scaled (Zhang & Sennrich 2019, Eq. 4)."""
    scale = weights[f"{name}.weight"].view(1, -1, 1, 1, 1)
    return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * scale


def offsets(stride: Stride) -> list[Stride]:
    return [(i, j, k) for i in range(stride[0]) for j in range(stride[1]) for k in range(stride[2])]


def fold(x: Tensor, stride: Stride) -> Tensor:
    """Each channel's voxels of a cell become channels, the last axis fastest."""
    sx, sy, sz = stride
    return torch.stack([x[:, :, i::sx, j::sy, k::sz] for i, j, k in offsets(stride)], 2).flatten(1, 2)


def unfold(x: Tensor, stride: Stride) -> Tensor:
    sx, sy, sz = stride
    x = x.unflatten(1, (-1, sx * sy * sz))
    made = x.new_zeros(len(x), x.shape[1], x.shape[3] * sx, x.shape[4] * sy, x.shape[5] * sz)
    for place, (i, j, k) in enumerate(offsets(stride)):
        made[:, :, i::sx, j::sy, k::sz] = x[:, :, place]
    return made


def residual(weights: Weights, name: str, x: Tensor) -> Tensor:
    hidden = convolve(weights, f"{name}.conv1", F.silu(norm(weights, f"{name}.norm1", x)))
    return x + convolve(weights, f"{name}.conv2", F.silu(norm(weights, f"{name}.norm2", hidden)))


def attend(weights: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over all cells, q and k of mean square 1, added to x."""
    tokens = norm(weights, f"{name}.norm", x).flatten(2).mT  # (B, cells, C)
    parts = F.linear(tokens, weights[f"{name}.qkv.weight"], weights[f"{name}.qkv.bias"])
    query, key, value = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in parts.chunk(3, 2))
    query, key = (
        one / one.square().mean(-1, keepdim=True).sqrt() * weights[f"{name}.{own}.weight"]
        for one, own in ((query, "norm_query"), (key, "norm_key"))
    )
    shares = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
    mixed = (shares @ value).transpose(1, 2).flatten(2)
    return x + F.linear(mixed, weights[f"{name}.out.weight"], weights[f"{name}.out.bias"]).mT.view_as(x)


def time_block(weights: Weights, name: str, x: Tensor, time: Tensor, heads: int) -> Tensor:
    scale, shift = F.linear(time, weights[f"{name}.time.weight"], weights[f"{name}.time.bias"])[
        ..., None, None, None
    ].chunk(2, 1)
    hidden = convolve(weights, f"{name}.conv1", F.silu(norm(weights, f"{name}.norm1", x)))
    hidden = F.silu(norm(weights, f"{name}.norm2", hidden) * (1 + scale) + shift)
    passed = convolve(weights, f"{name}.skip", x) if f"{name}.skip.weight" in weights else x
    out = passed + convolve(weights, f"{name}.conv2", hidden)
    return attend(weights, f"{name}.attention", out, heads) if heads else out


# the autoencoder

PATCH, STRIDES = (2, 1, 2), ((2, 2, 1), (1, 2, 2))


def sequence(weights: Weights, name: str, x: Tensor, plan: Sequence[str | tuple[str, Stride]]) -> Tensor:
    """Layers one after another, numbered."""
    for number, layer in enumerate(plan):
        own = f"{name}.{number}"
        if layer == "conv":
            x = convolve(weights, own, x)
        elif layer == "block":
            x = residual(weights, own, x)
        elif layer == "norm":
            x = norm(weights, own, x)
        elif layer == "silu":
            x = F.silu(x)
        elif layer[0] == "down":
            x = convolve(weights, f"{own}.mix", fold(x, layer[1]))
        else:
            x = unfold(convolve(weights, f"{own}.mix", x), layer[1])
    return x


@torch.no_grad()
def test_an_autoencoder_is_the_layers_of_its_config():
    """Three levels of unlike widths, strides and numbers of blocks, so that none can stand for another."""
    vae = AutoencoderKL3D(
        channels=(4, 6, 10), strides=STRIDES, encoder_blocks=(2, 1, 0), decoder_blocks=(0, 1, 2), patch_size=PATCH,
        latent_channels=3
    ).eval()  # fmt: skip
    weights, volume = randomize(vae), torch.randn(2, 1, 8, 8, 8)
    mean, std = torch.tensor([0.1, -0.2, 0.3]), torch.tensor([2.0, 0.5, 1.5])
    vae.set_latent_statistics(mean.tolist(), std.tolist())
    head, tail = ["conv"], ["norm", "silu", "conv"]
    down = [*head, "block", "block", ("down", STRIDES[0]), "block", ("down", STRIDES[1]), *tail]
    up = [*head, "block", "block", ("up", STRIDES[1]), "block", ("up", STRIDES[0]), *tail]
    raw, logvar = sequence(weights, "encoder", fold(volume, PATCH), down).chunk(2, 1)
    posterior = vae.encode(volume).latent_dist
    per_channel = (1, 3, 1, 1, 1)
    torch.testing.assert_close(posterior.raw_mean, raw, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        posterior.mean, (raw - mean.view(per_channel)) / std.view(per_channel), rtol=1e-4, atol=1e-4
    )
    expected = (0.5 * logvar.clamp(-30, 20)).exp() / std.view(per_channel)
    torch.testing.assert_close(posterior.std, expected, rtol=1e-3, atol=1e-4)
    latents = torch.randn(posterior.mean.shape)
    expected = unfold(sequence(weights, "decoder", latents * std.view(per_channel) + mean.view(per_channel), up), PATCH)
    torch.testing.assert_close(vae.decode(latents).sample, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_new_blocks_are_identities_and_a_new_unet_predicts_zero():
    """So that a deep network begins to train as a shallow one."""
    x, time = torch.randn(2, 8, 3, 4, 5), torch.randn(2, 6)
    assert torch.equal(ResidualBlock(8)(x), x)
    assert torch.equal(SelfAttention(8, 4)(x), x)
    assert torch.equal(TimeResidualBlock(8, 8, 6, head_dim=4)(x, time), x)
    assert not LatentUNet3D(channels=(8, 16), head_dim=8)(torch.randn(1, 4, 3, 3, 3), 500).sample.any()


@torch.no_grad()
def test_a_batch_is_coded_in_slabs_if_all_of_it_is_large(monkeypatch):
    """By the memory of the whole batch: two volumes that each would be coded in one piece are not, nor are their slabs
    thicker."""
    vae = AutoencoderKL3D(channels=(4, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1)).eval()
    volumes, calls = torch.randn(2, 1, 8, 8, 24), []
    one = vae.activation_bytes((8, 8, 24))
    assert vae.activation_bytes((8, 8, 24), 2) == 2 * one and vae.activation_bytes(
        (8, 8, 24)
    ) == 6 * vae.activation_bytes((8, 8, 4))
    monkeypatch.setattr("autoencoder.base.WHOLE_BYTES", one)
    vae.slab_bytes = one
    for network in (vae.encoder, vae.decoder):
        network.register_forward_pre_hook(lambda module, given: calls.append(given[0].shape[4]))
    posterior = vae.encode(volumes[:1]).latent_dist
    vae.decode(posterior.mean)
    assert calls == [12, 6] and not vae.tiles((8, 8, 24)) and vae.tiles((8, 8, 24), 2)
    calls.clear()
    posterior = vae.encode(volumes).latent_dist
    vae.decode(posterior.mean)
    assert calls == [6, 6, 3, 3] and vae.slab_planes((8, 8, 24), 2) == 3
    vae.slab_bytes = 2 * one - 1  # rounded down
    assert vae.slab_planes((8, 8, 24), 2) == 5 and vae.slab_planes((8, 8, 24)) == 11


@torch.no_grad()
def test_a_nested_stream_leaves_the_outer_stream_unchanged():
    """A network whose first part is itself a stream of the slab: what comes after it must still know of the outer
    slabs."""
    inner, outer = Conv3d(2, 2, 1), Conv3d(2, 3, 3, padding=1)
    volume = torch.randn(1, 2, 4, 4, 9)

    def network(x: Tensor) -> Tensor:
        return outer(torch.cat(list(stream_slabs(inner, x.split(1, dim=4))), dim=4))

    slabs = torch.cat(list(stream_slabs(network, volume.split(3, dim=4))), dim=4)
    torch.testing.assert_close(slabs, outer(inner(volume)), rtol=1e-4, atol=1e-5)


# the U-Net


@torch.no_grad()
def test_attention_looks_at_all_cells_in_heads():
    layer, x = SelfAttention(12, head_dim=4), torch.randn(2, 12, 2, 3, 4)
    weights = {f"here.{name}": value for name, value in randomize(layer).items()}
    torch.testing.assert_close(layer(x), attend(weights, "here", x, heads=3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", ["rectified_flow", "epsilon"])
@torch.no_grad()
def test_a_unet_is_the_layers_of_its_config(objective):
    """With a mask, classes, numbers and an image; sides that no stride divides, unlike strides, and a level without
    attention."""
    strides: tuple[Stride, Stride] = ((3, 2, 1), (2, 1, 2))
    unet = LatentUNet3D(
        3,
        2,
        channels=(8, 12, 16),
        strides=strides,
        blocks=(1, 2, 2),
        attention=(False, True, False),
        head_dim=6,
        num_labels=3,
        mask_stride=(2, 1, 2),
        mask_width=5,
        objective=objective,
        classes={"sex": ["F", "M"]},
        numbers={"age": {"mean": 50.0, "std": 20.0}},
        images={"pet": 1},
    ).eval()
    weights, x = randomize(unet), torch.randn(2, 3, 5, 7, 3)
    labels = torch.randint(0, 3, (2, 10, 7, 6), generator=torch.Generator().manual_seed(0))
    labels[:, 9:] = PADDING
    timestep, classes, numbers = (
        torch.tensor([3.0, 611.0]),
        torch.tensor([[1], [-1]]),
        torch.tensor([[70.0], [math.nan]]),
    )
    image = torch.randn(2, 2, 5, 7, 3)

    angles = timestep[:, None] * torch.tensor([10_000 ** (-i / 4) for i in range(4)])
    time = torch.cat([angles.cos(), angles.sin()], 1)
    for number in (1, 2):
        own = f"time_embedding.linear_{number}"
        time = F.linear(time if number == 1 else F.silu(time), weights[f"{own}.weight"], weights[f"{own}.bias"])
    waves = torch.tensor([2 * math.pi / period for period in (16.0, 8.0, 4.0, 2.0)])  # of one standard deviation
    features = torch.stack([torch.cat([waves.sin(), waves.cos(), torch.zeros(1)]), torch.eye(9)[8]])
    own = "condition_embedding.numbers.0"
    time = time + F.linear(features, weights[f"{own}.weight"], weights[f"{own}.bias"])
    time = F.silu(time + weights["condition_embedding.classes.0.weight"][[2, 0]])

    table = weights["mask_embedding.table.weight"]
    cells = fold(labels[:, None], (2, 1, 2))  # (B, 4, ...)
    rows = torch.where(cells == PADDING, 0, cells * 4 + torch.arange(1, 5).view(1, 4, 1, 1, 1))
    embedded = torch.where((rows == 0)[..., None], 0.0, table[rows]).sum(1).movedim(-1, 1)
    h = convolve(weights, "conv_in", torch.cat([x, embedded, image], 1))
    h = time_block(weights, "down_blocks.0.0", h, time, 0)
    skips = [h]
    h = convolve(weights, "downsamplers.0.mix", fold(F.pad(h, (0, 0, 0, 1, 0, 1)), strides[0]))  # (2, 4, 3)
    for i in range(2):
        h = time_block(weights, f"down_blocks.1.{i}", h, time, 2)
    skips.append(h)
    h = convolve(weights, "downsamplers.1.mix", fold(F.pad(h, (0, 1)), strides[1]))  # (1, 4, 2)
    for i in range(2):
        h = time_block(weights, f"down_blocks.2.{i}", h, time, 0)
    h = unfold(convolve(weights, "upsamplers.1.mix", h), strides[1])[:, :, :2, :4, :3]
    h = torch.cat([h, skips[1]], 1)
    for i in range(2):
        h = time_block(weights, f"up_blocks.1.{i}", h, time, 2)
    h = unfold(convolve(weights, "upsamplers.0.mix", h), strides[0])[:, :, :5, :7, :3]
    h = time_block(weights, "up_blocks.0.0", torch.cat([h, skips[0]], 1), time, 0)
    expected = convolve(weights, "conv_out", F.silu(norm(weights, "norm_out", h)))
    found = unet(x, timestep, fold_mask(labels, (2, 1, 2), 3), classes, numbers, image).sample
    torch.testing.assert_close(
        found, expected, rtol=1e-6, atol=5e-6
    )  # what blocks add is small beside what passes them by


def test_an_embedded_mask_has_unit_variance_and_padding_none():
    torch.manual_seed(0)
    embedding = FoldedMaskEmbedding(60, places=8, width=64)
    cells = embedding(torch.randint(1, 61, (1, 6, 6, 6, 8)) * 8 - torch.arange(8)).detach()
    assert cells.std().item() == pytest.approx(1, abs=0.05) and cells.mean().item() == pytest.approx(0, abs=0.05)
    assert not embedding.table.weight[0].any()
