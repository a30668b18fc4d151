"""MONAI's encoder and decoder over slabs, exactly, although their GroupNorms need statistics of whole maps.

One layer after another runs over all slabs: it reads its input from a spool, slab by slab with the planes around it
that its kernel sees, and writes its output to the spool. While that is written, its sums and sums of squares are added
up in float64. So the next norm knows its statistics before its first slab, and every convolution is computed once. A
plane is forgotten as soon as no layer needs it, so the spool holds one map, and in a residual block two. Attention
holds the keys and values of its level.

Axes: (B, C, Z, Y, X), see `autoencoder.monai.spool`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks import SpatialAttentionBlock, Upsample
from monai.networks.nets.autoencoderkl import AEKLDownsample, AEKLResBlock, Decoder, Encoder
from torch import Tensor, nn

from autoencoder.layers import as_stride, convolve

from .spool import FeatureMap, Spool, group_moments, plane_sums


class SlabConv3d(nn.Conv3d):
    """nn.Conv3d that can also convolve a slab, which has its own margin along the third axis."""

    def forward(self, x: Tensor, slab: bool = False) -> Tensor:
        """Convolve (B, C, X, Y, Z); with `slab` (B, C, Z, Y, X), without padding along Z."""
        if not slab:
            return super().forward(x)
        px, py, _ = (int(n) for n in self.padding)
        stride, dilation = as_stride(self.stride[::-1]), as_stride(self.dilation[::-1])
        return convolve(x, self.weight.transpose(2, 4), self.bias, stride, (0, py, px), dilation, self.groups)


class SlabConvTranspose3d(nn.ConvTranspose3d):
    """nn.ConvTranspose3d that can also work on a slab, and then keeps all planes along the third axis."""

    def forward(self, x: Tensor, slab: bool = False) -> Tensor:
        """Convolve (B, C, X, Y, Z); with `slab` (B, C, Z, Y, X), without cropping along Z."""
        if not slab:
            return super().forward(x)
        px, py, _ = (int(n) for n in self.padding)
        ox, oy, _ = self.output_padding
        weight, stride = self.weight.transpose(2, 4), self.stride[::-1]
        return F.conv_transpose3d(x, weight, self.bias, stride, (0, py, px), (0, oy, ox), self.groups)


class SlabGroupNorm(nn.GroupNorm):
    """nn.GroupNorm that can also normalize a slab by the moments of the whole map.

    In inference on a CPU it takes its statistics in float64: PyTorch's kernel for channels_last_3d (seen in 2.13) adds
    up float32, which at 64^3 voxels moves the result by 2e-5 of its range.
    """

    def forward(self, x: Tensor, moments: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Normalize (B, C, ...). With `moments` (mean and variance (B, groups) in float64) in place."""
        if moments is None:
            traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
            if x.device.type != "cpu" or torch.is_grad_enabled() or traced:
                return super().forward(x)
            sums = x.new_zeros((2, *x.shape[:2]), dtype=torch.float64)
            for plane in x.permute(2, 0, 3, 4, 1):
                sums += plane_sums(plane)
            moments, x = group_moments(sums, math.prod(x.shape[2:]), self.num_groups), x.clone()
        mean, variance = (value.repeat_interleave(x.shape[1] // self.num_groups, dim=1) for value in moments)
        scale = (variance + self.eps).rsqrt() * self.weight
        shift = self.bias - mean * scale
        dtype = torch.promote_types(x.dtype, torch.float32)
        scale, shift = (value.to(dtype)[:, :, None, None] for value in (scale, shift))
        for plane in x.unbind(dim=2):
            plane.copy_(torch.addcmul(shift, plane.to(dtype), scale))
        return x


class _Steps:
    """Runs parts of a network inside its forward pass, so that its hooks (offloading) see them."""

    blocks: nn.ModuleList

    def forward(self, x: Any, step: Callable[[Any], Any] | None = None) -> Any:
        """Run the network on `x`, or `step` instead."""
        return super().forward(x) if step is None else step(x)  # pyright: ignore[reportAttributeAccessIssue]


class SlabEncoder(_Steps, Encoder):
    """MONAI's encoder, whose steps can be run one by one."""


class SlabDecoder(_Steps, Decoder):
    """MONAI's decoder, whose steps can be run one by one."""


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv3d: SlabConv3d,
    nn.ConvTranspose3d: SlabConvTranspose3d,
    nn.GroupNorm: SlabGroupNorm,
    Encoder: SlabEncoder,
    Decoder: SlabDecoder,
}


def allow_slabs(network: nn.Module) -> None:
    """Give a network of MONAI layers that can work on slabs. Its weights and results stay the same."""
    for module in network.modules():
        if replacement := _CLASSES.get(type(module)):
            module.__class__ = replacement


class SlabCoder:
    """Runs one encoder or decoder over slabs of one batch.

    Args:
        network: of MONAI, after `allow_slabs`.
        spool: where maps are kept.
        slab_bytes: bytes that a slab, with what is computed from it, may take. A slab has at least one plane.
    """

    def __init__(self, network: SlabEncoder | SlabDecoder, spool: Spool, slab_bytes: int):
        self.network, self.spool, self.slab_bytes = network, spool, slab_bytes

    def run(self, x: FeatureMap) -> Iterator[Tensor]:
        """Yield consecutive slabs (B, C, n, Y, X) of the network's output. The map is forgotten on the way."""
        blocks: list[Any] = list(self.network.blocks)
        final, norm = blocks.pop(), None
        for block in blocks:
            if isinstance(block, nn.GroupNorm):
                norm = block
            elif isinstance(block, AEKLResBlock):
                x = self._residual(x, block)
            elif isinstance(block, SpatialAttentionBlock):
                x = self._stored(self._attention(x, block))
            elif isinstance(block, AEKLDownsample):
                x = self._stored(self._convolution(x, block.conv.conv, margin=(0, 1)))
            elif isinstance(block, Upsample):
                x = self._upsampling(x, dict(block.named_children()))
            else:
                x = self._stored(self._convolution(x, block.conv))
        yield from self._convolution(x, final.conv, norm, silu=False)  # MONAI's networks have none there

    def _stored(self, slabs: Iterator[Tensor]) -> FeatureMap:
        made = FeatureMap(self.spool)
        for slab in slabs:
            made.append(slab)
        return made

    def _upsampling(self, x: FeatureMap, layers: Mapping[str, Any]) -> FeatureMap:
        if "deconv" in layers:
            return self._stored(self._transposed(x, layers["deconv"]))
        conv = layers["postconv"].conv
        if isinstance(conv, nn.ConvTranspose3d):
            return self._stored(self._transposed(x, conv))
        return self._stored(self._convolution(x, conv, upsample=layers["upsample_non_trainable"]))

    def _residual(self, x: FeatureMap, block: Any) -> FeatureMap:
        """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), where a 1x1x1 convolution may change the channels of x."""
        shortcut = None if isinstance(block.nin_shortcut, nn.Identity) else block.nin_shortcut
        if shortcut is not None and block.out_channels < block.in_channels:  # keep the result, which is smaller than x
            added = FeatureMap(self.spool)
            slabs = self._convolution(x, block.conv1.conv, block.norm1, beside=(shortcut, added))
            shortcut = None
        else:
            added = x
            slabs = self._convolution(x, block.conv1.conv, block.norm1, last=False)
        hidden = self._stored(slabs)
        return self._stored(self._convolution(hidden, block.conv2.conv, block.norm2, added=added, shortcut=shortcut))

    def _convolution(
        self,
        x: FeatureMap,
        conv: Any,
        norm: nn.GroupNorm | None = None,
        *,
        silu: bool = True,
        upsample: nn.Module | None = None,
        margin: tuple[int, int] = (1, 1),
        beside: tuple[nn.Module, FeatureMap] | None = None,
        added: FeatureMap | None = None,
        shortcut: nn.Module | None = None,
        last: bool = True,
    ) -> Iterator[Tensor]:
        """Yield slabs of conv(silu(norm(x))), or of conv(upsample(x)).

        Args:
            silu: whether the norm is followed by SiLU.
            margin: planes of zeros before and after the volume, by which `conv` is padded along the third axis.
            beside: a convolution of kernel 1, and the map to which its result for x is written.
            added: a map that is added to the result, after `shortcut` if given.
            last: whether no other layer needs x.
        """
        kernel, stride, scale = conv.kernel_size[2], conv.stride[2], 1 if upsample is None else 2
        moments = None if norm is None else x.moments(norm.num_groups)
        depth = scale * x.depth
        count = (depth + sum(margin) - kernel) // stride + 1

        def step(planes: range) -> Tensor:
            first, end = planes.start * stride - margin[0], (planes.stop - 1) * stride - margin[0] + kernel
            before, after = max(-first, 0), max(end - depth, 0)
            first, end = first + before, end - after
            if upsample is None:
                padded = x.read(first, end, before, after)
                inside = padded[:, :, before : before + end - first]
            else:
                inside = padded = _upsampled(x, upsample, first, end)
                padded = F.pad(inside, (0, 0, 0, 0, before, after)) if before or after else inside
            if beside is not None:
                beside[1].append(beside[0](inside[:, :, planes.start - first : planes.stop - first]))
            if norm is not None:
                norm(inside, moments)
                if silu:
                    F.silu(inside, inplace=True)
            if stride > 1:  # padded at the end of each axis only
                padded = F.pad(padded, (*margin, *margin))
            result = conv(padded, slab=True)
            if added is not None:
                del inside, padded
                other = added.read(planes.start, planes.stop)
                result += other if shortcut is None else shortcut(other)
            return result

        for planes in self._slabs(count, self._thickness(x, conv, scale, beside is not None)):
            with torch.no_grad():
                slab = self.network(planes, step=step)
            if last:
                x.release((planes.stop * stride - margin[0]) // scale - (scale - 1))
            if added is not None:
                added.release(planes.stop)
            yield slab
        if last:
            x.release(x.depth)

    def _transposed(self, x: FeatureMap, conv: nn.ConvTranspose3d) -> Iterator[Tensor]:
        """Yield slabs of a transposed convolution: plane i of x reaches planes i * stride to i * stride + kernel."""
        kernel, stride, cropped = conv.kernel_size[2], conv.stride[2], int(conv.padding[2])
        count = (x.depth - 1) * stride - 2 * cropped + kernel + conv.output_padding[2]

        def step(planes: range) -> Tensor:
            first = max(-((kernel - 1 - cropped - planes.start) // stride), 0)
            end = min((planes.stop - 1 + cropped) // stride + 1, x.depth)
            slab = conv(x.read(first, end), slab=True)
            start = planes.start + cropped - first * stride
            return slab[:, :, start : start + len(planes)]

        for planes in self._slabs(count, self._thickness(x, conv, stride)):
            with torch.no_grad():
                slab = self.network(planes, step=step)
            x.release((planes.stop + cropped - kernel + 1) // stride)
            yield slab
        x.release(x.depth)

    def _attention(self, x: FeatureMap, block: Any) -> Iterator[Tensor]:
        """Yield slabs of x + attention(norm(x)): queries slab by slab, keys and values of all planes at once."""
        moments, attention = x.moments(block.norm.num_groups), block.attn
        batch, height, width, channels = x.shape

        def heads(tokens: Tensor) -> Tensor:  # (B, heads, n, channels of a head)
            return tokens.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)

        def tokens(planes: range) -> Tensor:
            return block.norm(x.read(planes.start, planes.stop), moments).permute(0, 2, 3, 4, 1).flatten(1, 3)

        def keys_and_values(planes: range) -> tuple[Tensor, Tensor]:
            normed = tokens(planes)
            return attention.to_k(normed), attention.to_v(normed)

        def step(planes: range) -> Tensor:
            query = heads(attention.to_q(tokens(planes)))
            found = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
            found = attention.out_proj(found.transpose(1, 2).flatten(2))
            found = found.unflatten(1, (len(planes), height, width)).permute(0, 4, 1, 2, 3)
            return x.read(planes.start, planes.stop) + found

        area = batch * height * width
        scores = area * attention.num_heads * x.depth * height * width  # of a plane
        thickness = self.slab_bytes // ((scores + 6 * area * channels) * x.like.element_size())
        slabs = list(self._slabs(x.depth, thickness))
        with torch.no_grad():
            pairs = [self.network(planes, step=keys_and_values) for planes in slabs]
            key, value = (heads(torch.cat(parts, dim=1)) for parts in zip(*pairs, strict=True))
            del pairs
        for planes in slabs:
            with torch.no_grad():
                slab = self.network(planes, step=step)
            x.release(planes.stop)
            yield slab

    def _thickness(self, x: FeatureMap, conv: Any, scale: int, beside: bool = False) -> int:
        """Return how many planes of a convolution's output fit into a slab with all that they are computed from."""
        batch, *sides, _ = x.shape
        source = x.like.element_size() * batch * math.prod(sides)  # of a plane and a channel
        transposed = isinstance(conv, nn.ConvTranspose3d)
        stride = conv.stride[2]
        read = source * conv.in_channels * (1 if transposed else scale**2)
        made = source * conv.out_channels * scale**2 // (1 if transposed else stride**2)
        if transposed:
            fixed, each = 2 * read, read // stride + made
        else:
            fixed, each = (conv.kernel_size[2] - stride) * read, stride * read + made * (2 if beside else 1)
        if scale > 1:  # a plane of x more at both ends, and their upsampled planes
            fixed, each = fixed + 3 * read, each + read // 8
        return (self.slab_bytes - fixed) // each

    @staticmethod
    def _slabs(count: int, thickness: int) -> Iterator[range]:
        """Yield the positions of consecutive slabs of `count` planes, each of at least one."""
        thickness = max(thickness, 1)
        for start in range(0, count, thickness):
            yield range(start, min(start + thickness, count))


def _upsampled(x: FeatureMap, upsample: nn.Module, first: int, end: int) -> Tensor:
    """Return planes `first` to `end` of the map at twice its size. Interpolation sees one more plane at both sides."""
    start, stop = max(first // 2 - 1, 0), min((end - 1) // 2 + 2, x.depth)
    return upsample(x.read(start, stop))[:, :, first - 2 * start : end - 2 * start]
