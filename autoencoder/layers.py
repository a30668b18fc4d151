"""The layers of the autoencoders. Axes: (B, C, X, Y, Z), stored channels_last_3d.

Every layer has a finite receptive field: no statistics over space (no GroupNorm), no global attention.
So a volume coded in pieces, with enough context, equals the volume coded whole.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .streaming import delayed, streaming, whole_cells, window

Stride = tuple[int, int, int]


def as_stride(value: int | Sequence[int]) -> Stride:
    """Return one stride per axis: `2` means (2, 2, 2), `(4, 4, 1)` stays. Raises: ValueError for anything but positive
    integers.
    """
    axes = (value,) * 3 if isinstance(value, int) else tuple(int(v) for v in value)
    if len(axes) != 3 or min(axes) < 1:
        raise ValueError(f"a stride is one positive integer or three, got {value!r}")
    return axes


def space_to_depth(x: Tensor, stride: Stride) -> Tensor:
    """Map (B, C, X, Y, Z) to (B, C * sx * sy * sz, X / sx, Y / sy, Z / sz); no voxel is lost. Sides must be multiples
    of the stride.
    """
    b, c, *_ = x.shape
    (sx, sy, sz), (nx, ny, nz) = stride, (n // s for n, s in zip(x.shape[2:], stride, strict=True))
    x = x.reshape(b, c, nx, sx, ny, sy, nz, sz).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return x.reshape(b, nx, ny, nz, c * sx * sy * sz).permute(0, 4, 1, 2, 3)


def depth_to_space(x: Tensor, stride: Stride) -> Tensor:
    """Invert `space_to_depth`."""
    b, folded, nx, ny, nz = x.shape
    sx, sy, sz = stride
    c = folded // (sx * sy * sz)
    x = x.permute(0, 2, 3, 4, 1).reshape(b, nx, ny, nz, c, sx, sy, sz).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(b, c, nx * sx, ny * sy, nz * sz)


class Conv3d(nn.Conv3d):
    """nn.Conv3d that does not fall into PyTorch's slow CPU kernel for a single small volume.

    PyTorch (seen in 2.13) calls oneDNN only if batch > 1 or batch * C * X * Y > 20480, and an im2col kernel
    otherwise, which on the latents of one volume is two to four times slower (python -m benchmarks.speed.choices).
    oneDNN is called here by name, in inference.
    """

    def forward(self, x: Tensor) -> Tensor:
        assert not isinstance(self.padding, str)
        (px, py, pz), stride = (int(n) for n in self.padding), self.stride[2]
        if not streaming():
            return self._convolve(x, (px, py, pz))
        size = self.dilation[2] * (self.kernel_size[2] - 1) + 1
        planes = window(self, x, size, stride, pz)
        if planes.shape[4] == 0:  # nothing can be made yet; a convolution refuses an empty volume
            return self._convolve(x.new_zeros((*x.shape[:4], size)), (px, py, 0))[..., :0]
        return self._convolve(planes, (px, py, 0))

    def _convolve(self, x: Tensor, padding: Stride) -> Tensor:
        stride, dilation = as_stride(self.stride), as_stride(self.dilation)
        return convolve(x, self.weight, self.bias, stride, padding, dilation, self.groups)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Stride, padding: Stride, dilation: Stride, groups: int
) -> Tensor:
    """Convolve, on a CPU in inference by oneDNN, whatever the size: see `Conv3d`."""
    if (
        not torch.compiler.is_compiling()  # first: an exported program is of any batch
        and x.device.type == "cpu"
        and x.dtype == torch.float32 == weight.dtype
        and len(x) == 1
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    ):
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
    return F.conv3d(x, weight, bias, stride, padding, dilation, groups)


class ChannelRMSNorm(nn.Module):
    """RMSNorm over the channels of each voxel (Zhang & Sennrich 2019, Eq. 4): nothing mixes across space."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 4, 1)  # a view without a copy in channels_last_3d
        return self._normalize(x, self.weight.to(x.dtype)).permute(0, 4, 1, 2, 3)

    def _normalize(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
            return F.rms_norm(x, (x.shape[-1],), weight, self.eps)
        # the same in two passes over memory; PyTorch's makes five on a CPU (python -m benchmarks.speed.choices)
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
        normed = x * torch.rsqrt(mean_square + self.eps)
        return normed * weight if torch.is_grad_enabled() else normed.mul_(weight)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), 3x3x3 convolutions; the last one starts at zero, so the block starts
    as the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = ChannelRMSNorm(channels)
        self.conv1 = Conv3d(channels, channels, 3, padding=1)
        self.norm2 = ChannelRMSNorm(channels)
        self.conv2 = Conv3d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return delayed(self, x, hidden) + hidden


class Downsample(nn.Module):
    """Space-to-depth by the stride, then a learned 1x1x1 mixture (a convolution with kernel = stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: Stride):
        super().__init__()
        self.stride = stride
        self.mix = Conv3d(in_channels * stride[0] * stride[1] * stride[2], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(space_to_depth(whole_cells(self, x, self.stride[2]), self.stride))


class Upsample(nn.Module):
    """A learned 1x1x1 mixture, then depth-to-space by the stride (sub-pixel convolution, Shi et al. 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: Stride):
        super().__init__()
        self.stride = stride
        self.mix = Conv3d(in_channels, out_channels * stride[0] * stride[1] * stride[2], 1)

    def forward(self, x: Tensor) -> Tensor:
        return depth_to_space(self.mix(x), self.stride)
