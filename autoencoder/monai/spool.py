"""Feature maps kept plane by plane: in memory up to a limit, beyond it in a temporary file.

The file has no name (on Linux and macOS), so the system deletes it even if the process is killed.

Axes: (B, C, Z, Y, X), the volume's axes the other way round, so that planes along its third axis lie one after another
in memory, and a convolution over a few of them is as fast as over many.
"""

import errno
import tempfile
from io import FileIO
from typing import cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from files.documents import FileError

CHUNK = 1 << 20  # bytes of the file that are given to a plane at a time, and to another one afterwards

Chunks = list[int]


class Spool:
    """A place for planes. Close it, or use it in a `with` statement.

    Args:
        memory: bytes of planes that are kept in memory, on the device where they were computed.
    """

    def __init__(self, memory: int):
        self.memory = memory
        self.held = 0  # bytes in memory
        self.chunks = 0  # length of the file
        self._free: Chunks = []
        self._file: FileIO | None = None

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete the file, if there is one."""
        if self._file is not None:
            self._file.close()

    def put(self, plane: Tensor) -> Tensor | Chunks:
        """Keep a plane, of any shape. Returns what `get` and `drop` take.

        Raises: FileError if the disk is full.
        """
        plane, size = plane.contiguous(), _bytes(plane)
        if self.held + size <= self.memory:
            self.held += size
            return plane.clone()  # a view would keep the whole slab alive
        chunks = [self._free.pop() if self._free else self._new() for _ in range(-(-size // CHUNK))]
        if isinstance(plane, FakeTensor):  # without values, for an estimate of memory
            return chunks
        data = _memory_of(plane.cpu())
        try:
            if self._file is None:
                self._file = cast(FileIO, tempfile.TemporaryFile(buffering=0))
            for number, chunk in enumerate(chunks):
                self._file.seek(chunk * CHUNK)
                rest = data[number * CHUNK : (number + 1) * CHUNK]
                while rest:
                    rest = rest[self._file.write(rest) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise FileError(
                f"{tempfile.gettempdir()}: {error.strerror}, after {self.chunks * CHUNK / 1e9:.2f} GB of feature maps; "
                "set TMPDIR to a folder with more room (docs/large_volumes.md says how much it takes)"
            ) from error
        return chunks

    def get(self, kept: Tensor | Chunks, plane: Tensor) -> None:
        """Copy what `put` kept into `plane`, which is of the same shape and type."""
        if isinstance(kept, Tensor):
            plane.copy_(kept)
            return
        if isinstance(plane, FakeTensor):
            return
        direct = plane.device.type == "cpu" and plane.is_contiguous()
        read = plane if direct else torch.empty(plane.shape, dtype=plane.dtype)
        data = _memory_of(read)
        assert self._file is not None
        for number, chunk in enumerate(kept):
            self._file.seek(chunk * CHUNK)
            rest = data[number * CHUNK : (number + 1) * CHUNK]
            while rest:
                count = self._file.readinto(rest)
                assert count
                rest = rest[count:]
        if not direct:
            plane.copy_(read)

    def drop(self, kept: Tensor | Chunks) -> None:
        """Give the place of a plane to others."""
        if isinstance(kept, Tensor):
            self.held -= _bytes(kept)
        else:
            self._free += kept

    def _new(self) -> int:
        self.chunks += 1
        return self.chunks - 1


class FeatureMap:
    """A map (B, C, Z, Y, X) that is written, read and released plane by plane, and its statistics in float64."""

    def __init__(self, spool: Spool):
        self.spool = spool
        self.depth = 0  # planes that were written
        self._released = 0
        self._planes: dict[int, list[Tensor | Chunks]] = {}  # by position; one for each volume of the batch

    def append(self, slab: Tensor) -> None:
        """Write the next planes (B, C, n, Y, X), and count them in the statistics."""
        planes = slab.permute(2, 0, 3, 4, 1)  # (n, B, Y, X, C)
        if not self.depth:
            self.like = slab.new_empty(0)
            self.shape = tuple(planes.shape[1:])
            self._sums = slab.new_zeros((2, len(slab), slab.shape[1]), dtype=torch.float64)
        assert tuple(planes.shape[1:]) == self.shape
        for plane in planes:
            self._sums += plane_sums(plane)
            self._planes[self.depth] = [self.spool.put(one) for one in plane]
            self.depth += 1

    def read(self, start: int, stop: int, before: int = 0, after: int = 0) -> Tensor:
        """Return a copy of planes `start` to `stop` (B, C, before + n + after, Y, X), with zeros before and after."""
        batch, *plane = self.shape
        slab = self.like.new_empty((batch, before + stop - start + after, *plane))
        slab[:, :before] = 0
        slab[:, before + stop - start :] = 0
        for position in range(start, stop):
            for number, kept in enumerate(self._planes[position]):
                self.spool.get(kept, slab[number, before + position - start])
        return slab.permute(0, 4, 1, 2, 3)

    def release(self, stop: int) -> None:
        """Forget all planes before `stop`."""
        for position in range(self._released, min(stop, self.depth)):
            for kept in self._planes.pop(position):
                self.spool.drop(kept)
        self._released = max(self._released, min(stop, self.depth))

    def moments(self, groups: int) -> tuple[Tensor, Tensor]:
        """Return mean and variance (B, groups) over all planes, in float64."""
        _, height, width, _ = self.shape
        return group_moments(self._sums, self.depth * height * width, groups)


def plane_sums(plane: Tensor) -> Tensor:
    """Return the sums, and those of the squares, of each channel of a plane (B, Y, X, C): (2, B, C) in float64."""
    values = plane.to(torch.float64)
    return torch.stack([values.sum(dim=(1, 2)), values.square().sum(dim=(1, 2))])


def group_moments(sums: Tensor, voxels: int, groups: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance (B, groups) of groups of channels, from the `plane_sums` of all planes of a map.

    Args:
        voxels: of the map.
    """
    _, batch, channels = sums.shape
    means, squares = sums.view(2, batch, groups, -1).sum(dim=3) / (voxels * channels // groups)
    return means, (squares - means.square()).clamp(min=0)


def _memory_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, of which it is a view."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
