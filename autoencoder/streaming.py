"""Exact streaming: a network with a finite receptive field, run over consecutive slabs of the third axis.

A slab goes through the whole network before the next one is read. A layer keeps what it will need again: a convolution
its last planes, a sum the planes of its faster branch, a fold the planes of an unfinished group. So every plane of
every layer is computed once, from the same neighbors as in the whole volume: no halo, no blending, no seam, and memory
that does not grow with the third axis.

Only layers that look along the third axis know of it, by one call each: `window` (convolutions), `spread` (transposed
convolutions), `delayed` (sums and concatenations of branches), `whole_cells` (folds). Outside a stream the last two
return their input. A layer made of such layers and of anything that works plane by plane (norms over channels,
activations) streams as it is.

Axes: (B, C, X, Y, Z).
"""

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator

import torch
from torch import Tensor


class _Current(threading.local):
    stream: "Stream | None" = None


_current = _Current()  # a thread's own: two volumes may be coded at once


class _Eager:
    """Runs no compiled code while it is entered: that was traced outside a stream. torch has one switch for all
    threads, so the first stream to begin sets it and the last to end resets it.
    """

    def __init__(self):
        self.lock, self.running = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            if not self.running:
                self.stance = torch.compiler.set_stance("force_eager")
            self.running += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.running -= 1
            if not self.running:
                self.stance.__exit__(None, None, None)


_eager = _Eager()


class Stream:
    """One pass of `network` over the slabs of one tensor; a new pass needs a new `Stream`.

    Call it with slab after slab, `last=True` at the final one. The results, joined along the third axis, equal
    `network` of the joined slabs. The first results may have no planes at all: a convolution cannot finish a plane
    before it has seen the next.
    """

    def __init__(self, network: Callable[[Tensor], Tensor]):
        self.network = network
        self.last = False
        self._ended = False
        self._kept: dict[Hashable, Tensor] = {}

    @torch.compiler.disable()  # called from compiled code, it is not traced
    def __call__(self, slab: Tensor, *, last: bool = False) -> Tensor:
        if self._ended:
            raise ValueError("this stream has ended, or failed: start a new one")
        self.last, self._ended = last, True  # after a failure some layers have seen the slab, others not
        outer, _current.stream = _current.stream, self  # only while the network runs, not between slabs
        try:
            with _eager:
                made = self.network(slab)
        finally:
            _current.stream = outer
        self._ended = last
        return made

    def take(self, key: Hashable, new: Tensor) -> tuple[Tensor, bool]:
        """Return what `key` kept, followed by the planes of `new`, and whether these are its first planes."""
        kept = self._kept.pop(key, None)
        return (new, True) if kept is None else (torch.cat([kept, new], dim=4) if kept.shape[4] else new, False)

    def keep(self, key: Hashable, planes: Tensor) -> None:
        self._kept[key] = planes.clone()  # a view would keep the whole slab alive


def stream_slabs(network: Callable[[Tensor], Tensor], slabs: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the planes of `network` applied to the whole tensor, as they are finished, from consecutive slabs of any
    thickness.

    Raises: ValueError if there are no slabs.
    """
    stream, waiting, several = Stream(network), None, False
    for slab in slabs:  # one ahead, to know which is the last
        several = waiting is not None
        if waiting is not None and (made := stream(waiting)).shape[4]:
            yield made
        waiting = slab
    if waiting is None:
        raise ValueError("there are no slabs to stream")
    yield stream(waiting, last=True) if several else network(waiting)


def streaming() -> bool:
    """Return whether the current call is part of a stream."""
    return _current.stream is not None


def window(key: Hashable, x: Tensor, kernel: int, stride: int = 1, padding: int = 0) -> Tensor:
    """Return the planes that a convolution along the third axis can use now, with zeros where the volume begins and
    ends. Convolve them without padding. There may be fewer than `kernel`, which give no output plane.

    Args:
        key: the layer; kernel, stride, padding: its own along the third axis (`kernel` with dilation counted).
    """
    stream = _current.stream
    assert stream is not None
    planes, first = stream.take(key, x)
    margin = x.new_zeros((*x.shape[:4], padding)) if padding else None
    if margin is not None and (first or stream.last):
        planes = torch.cat([*([margin] if first else []), planes, *([margin] if stream.last else [])], dim=4)
    made = max((planes.shape[4] - kernel) // stride + 1, 0)
    if not stream.last:  # a kernel thinner than its stride waits for the planes that it skips
        made = min(made, planes.shape[4] // stride)
    stream.keep(key, planes[..., made * stride :])
    return planes[..., : (made - 1) * stride + kernel] if made else planes[..., :0]


def spread(
    key: Hashable, x: Tensor, convolve: Callable[[Tensor], Tensor], kernel: int, stride: int, padding: int
) -> Tensor:
    """Return the planes of a transposed convolution along the third axis that no later plane of `x` reaches. There may
    be none.

    Args:
        key: the layer; kernel, stride, padding: its own along the third axis (`kernel` with dilation counted).
        convolve: the convolution without padding along the third axis. It makes `stride` planes of one.
    """
    stream = _current.stream
    assert stream is not None
    planes, first = stream.take(key, x)
    if first and not x.shape[4]:
        return convolve(x)
    kept = planes.shape[4] - x.shape[4]  # whose own planes are finished; they reach later ones
    start, end = padding if first else kept * stride, planes.shape[4] * stride + (padding if stream.last else 0)
    stream.keep(key, planes[..., max(planes.shape[4] - (kernel - 1) // stride, 0) :])
    return convolve(planes)[..., start:end]


def delayed(key: Hashable, x: Tensor, like: Tensor) -> Tensor:
    """Return the planes of `x` at the positions of the planes of `like`, which come from a slower branch."""
    stream = _current.stream
    if stream is None:
        return x
    planes, _ = stream.take(key, x)
    ready = like.shape[4]
    stream.keep(key, planes[..., ready:])
    return planes[..., :ready]


def whole_cells(key: Hashable, x: Tensor, size: int) -> Tensor:
    """Return the planes of `x` that fill groups of `size` planes; the rest waits for the next slab.

    Raises: ValueError if the stream ends inside a group.
    """
    stream = _current.stream
    if size == 1:
        return x
    planes, last = (x, True) if stream is None else (stream.take(key, x)[0], stream.last)
    ready = planes.shape[4] - planes.shape[4] % size
    if last and ready < planes.shape[4]:
        raise ValueError(f"the slabs end {planes.shape[4] - ready} planes into a group of {size}: pad the volume first")
    if stream is not None:
        stream.keep(key, planes[..., ready:])
    return planes[..., :ready]
