"""The workspace of convolutions on a CPU: what a kernel holds besides its inputs and outputs.

It is that of PyTorch 2.13 with oneDNN 3.12 in float32, as PyTorch's own allocator counted it on a machine with AVX2
(`torch.profiler` with `profile_memory`, beside `ONEDNN_VERBOSE=1`). Processors with AVX-512 or AMX have other kernels
for the gradients of weights, which were not measured.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def workspace(func: Any, args: Sequence[Any]) -> int:
    """Return the bytes that an operation takes besides its inputs and outputs; 0 for all but convolutions.

    A convolution in oneDNN reorders its weights. The gradient of the weights is a matrix product of im2col's columns:
    it holds the input once more, the columns of one plane of the first axis, and four tensors like the weights. A
    convolution of PyTorch's own (`slow_conv3d`: a single small volume in training, and kernels of 1 on one thread)
    holds the input once more, and the columns of all its planes, unless the kernel is 1.
    """
    aten = torch.ops.aten
    if func is aten.mkldnn_convolution.default:
        return _bytes(args[1])
    if func is aten.convolution.default:
        x, weight, _, stride, padding, dilation = args[:6]
        own = _backend(args) == "Slow3d"
        return columns_bytes(x, weight, stride, padding, dilation) if own else _bytes(weight)
    if func is aten.convolution_backward.default:
        _, x, weight, _, stride, padding, dilation = args[:7]
        if _backend((x, weight, None, *args[4:10])) == "Slow3d":
            return columns_bytes(x, weight, stride, padding, dilation)
        if not args[10][1]:
            return _bytes(weight)
        plane = math.prod(_output(x, weight, stride, padding, dilation)[1:])
        columns = weight[0].numel() * plane * x.element_size() if weight[0, 0].numel() > 1 else 0
        return _bytes(x) + columns + 4 * _bytes(weight)
    return 0


def columns_bytes(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> int:
    """Return the bytes of im2col's columns of a batch; for a kernel of 1 they are the input in another order."""
    cells = math.prod(_output(x, weight, stride, padding, dilation))
    columns = len(x) * weight[0].numel() * cells * x.element_size()
    return columns if weight[0, 0].numel() == 1 else columns + _bytes(x)


def _output(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    sides = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides]


def _backend(args: Sequence[Any]) -> str:
    """Return the name of the kernel that PyTorch chooses, such as Mkldnn or Slow3d."""
    return torch._C._select_conv_backend(*args[:9]).name


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
