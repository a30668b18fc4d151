"""What a process on a CPU holds besides live tensors: the workspace of convolutions, and freed memory that glibc keeps.

The workspace is that of PyTorch 2.13 with oneDNN 3.12, as counted by PyTorch's own allocator on a machine with AVX2
(`torch.profiler` with `profile_memory`, beside `ONEDNN_VERBOSE=1`). Processors with AVX-512 or AMX have other kernels
for the gradients of weights, which were not measured. The heap follows glibc's malloc; other systems keep less or more.
"""

import bisect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MAPPED = 32 << 20  # bytes from which glibc maps a block of its own and returns it when freed (DEFAULT_MMAP_THRESHOLD_MAX)
TRIM = 2 * MAPPED  # free bytes at the heap's end from which glibc returns them
ALIGNMENT = 64  # of PyTorch's blocks
HEADER = 16  # before a block, and the unit of its size
LEAST = 32  # bytes of the smallest block


class Heap:
    """The resident bytes of a process whose blocks come and go, by glibc's rules.

    Blocks below 32 MiB are cut from the smallest free block that holds them, or from the heap's end. Freed neighbors
    join, and stay resident until they reach the end. (glibc's limit of 32 MiB is reached as soon as a block of that
    size was freed; it starts at 128 KiB.)
    """

    def __init__(self) -> None:
        self.mapped = self.end = self.peak = 0
        self._free: list[tuple[int, int]] = []  # (bytes, address), sorted
        self._at: dict[int, int] = {}  # address of a free block: its bytes
        self._ending: dict[int, int] = {}  # end of a free block: its address

    def allocate(self, size: int) -> tuple[int, int] | None:
        """Return (address, bytes) of a block in the heap, None for one that is mapped."""
        if size >= MAPPED:
            self.mapped += size
            self.peak = max(self.peak, self.mapped + self.end)
            return None
        size = -(-(size + HEADER // 2) // HEADER) * HEADER
        wanted = size + ALIGNMENT + LEAST
        place = bisect.bisect_left(self._free, (wanted, 0))
        if place < len(self._free):
            address = self._free[place][1]
            length = self._take(address)
        else:
            address = self._ending.get(self.end, self.end)  # a free block at the end grows
            length = self._take(address) if address < self.end else 0
            length = wanted
            self.end = address + wanted
        lead = -(address + HEADER) % ALIGNMENT
        lead += ALIGNMENT if 0 < lead < LEAST else 0
        if lead:
            self._put(address, lead)
        if length - lead - size >= LEAST:
            self.free((address + lead + size, length - lead - size), 0)
        else:
            size = length - lead
        self.peak = max(self.peak, self.mapped + self.end)
        return address + lead, size

    def free(self, block: tuple[int, int] | None, size: int) -> None:
        """Free a block of `allocate(size)`."""
        if block is None:
            self.mapped -= size
            return
        address, length = block
        if address in self._ending:  # the block before it
            before = self._ending[address]
            length += self._take(before)
            address = before
        if address + length in self._at:
            length += self._take(address + length)
        if address + length == self.end and length > TRIM:
            self.end = address
        else:
            self._put(address, length)

    def _take(self, address: int) -> int:
        size = self._at.pop(address)
        del self._ending[address + size]
        self._free.pop(bisect.bisect_left(self._free, (size, address)))
        return size

    def _put(self, address: int, size: int) -> None:
        self._at[address], self._ending[address + size] = size, address
        bisect.insort(self._free, (size, address))


def workspace(func: Any, args: Sequence[Any]) -> int:
    """Return the bytes that an operation takes besides its inputs and outputs; 0 for all but convolutions.

    A convolution in oneDNN reorders its weights. The gradient of the weights is a matrix product of im2col's columns:
    it holds the input once more, the columns of one plane of the first axis, and four tensors like the weights. A
    convolution of PyTorch's own (`slow_conv3d`: a single small volume in training, and kernels of 1 on one thread)
    holds the input once more, and the columns of all its planes, unless the kernel is 1.
    """
    aten = torch.ops.aten
    if func is aten.convolution.default:
        x, weight, bias, stride, padding, dilation = args[:6]
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
