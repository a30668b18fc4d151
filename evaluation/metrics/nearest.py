"""Similarity of volumes, whatever their position, orientation and intensity scale: each of one set with each of
another.

The similarity of a query and a reference is their normalized (Pearson) correlation inside a common crop about the
center, the largest over the flips and the shifts that the `Space` allows. For a shift it is taken over the voxels where
the two overlap, with the means and variances of these voxels only, and sums over all voxels of all shifts come from one
FFT per pair (Lewis 1995, Fast normalized cross-correlation). So a copy has similarity 1, to float32 rounding of about
1e-6, also where it was moved by whole voxels, mirrored, or where its intensities were multiplied by a positive factor
and shifted. Gains and offsets that vary in space are not undone.

Axes: volumes (C, X, Y, Z), or (X, Y, Z) of one channel, as arrays or tensors; maps (B, C, X, Y, Z). The similarity of
several channels is the mean of theirs.
"""

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from autoencoder import VolumeAutoencoder
from evaluation.data.pairs import unit_range
from volumes import pad_or_crop, pad_to_multiple

Sides = tuple[int, int, int]
Volumes = Sequence[Any] | np.ndarray
Embedding = Callable[[Tensor], Tensor]
CHUNK_BYTES = 1 << 26  # of the products of spectra that are held at once
HELD_BYTES = 1 << 29  # of the references that are held at once, with their spectra
CONSTANT = 1e-5  # mean variance per voxel, of volumes of variance 1, below which a piece counts as constant


@dataclass(frozen=True)
class Space:
    """The crop and the representation in which volumes are compared.

    Args:
        crop: voxels about the center to compare. Smaller volumes are padded with their lowest intensity, which makes
            them alike: see `common_crop`.
        flips: axes (0 to 2) along which a query may be mirrored, in every combination.
        shift: voxels (of the maps, with `embed`) by which a query may be moved along each axis; less than half of each
            side.
        embed: (B, C, X, Y, Z) float32 in [0, 1] (each channel's percentiles 0.5 and 99.5 in the crop at 0 and 1) ->
            maps (B, C, x, y, z), compared as volumes are, or features (B, F), compared by their correlation without
            shifts. None compares the voxels. Flips are those of the volume, before it is embedded.
        device: on which to compute.
    """

    crop: Sides
    flips: tuple[int, ...] = ()
    shift: int = 0
    embed: Embedding | None = None
    device: torch.device | str = "cpu"

    @property
    def flip_sets(self) -> list[tuple[int, ...]]:
        """Every combination of `flips`, beginning with no flip."""
        return [axes for count in range(len(self.flips) + 1) for axes in itertools.combinations(self.flips, count)]


class Match(NamedTuple):
    """The best placement of a query on a reference: mirrored along `flip`, its voxel x + `shift` lies on the
    reference's x."""

    similarity: float
    flip: tuple[int, ...]
    shift: Sides


def common_crop(shapes: Sequence[Sequence[int]], largest: Sides | None = None) -> Sides:
    """Return the smallest side of all volumes along each axis, at most `largest`: no volume is padded. `shapes` are
    (X, Y, Z) or (C, X, Y, Z)."""
    sides = np.min([shape[-3:] for shape in shapes], axis=0)
    x, y, z = (int(n) for n in (sides if largest is None else np.minimum(sides, largest)))
    return x, y, z


def latent_space(vae: VolumeAutoencoder, crop: Sides, *, flips: tuple[int, ...] = (), shift: int = 1) -> Space:
    """Compare the autoencoder's latents (the means of its posterior), of crops padded to its stride. `shift` counts
    latent voxels: a shift by part of a latent voxel changes the latents somewhat, and is not undone."""

    @torch.inference_mode()
    def embed(volumes: Tensor) -> Tensor:
        placed = pad_to_multiple(tuple(volumes.shape[2:]), vae.stride).apply(2 * volumes - 1, -1.0)
        return vae.encode(placed.to(vae.dtype)).latent_dist.mode().float()  # pyright: ignore[reportAttributeAccessIssue]

    return Space(crop, flips, shift, embed, vae.device)


def feature_space(
    extractor: Embedding,
    references: Volumes,
    crop: Sides,
    *,
    flips: tuple[int, ...] = (),
    device: torch.device | str = "cpu",
) -> Space:
    """Compare features (B, F), each scaled to mean 0 and variance 1 over the references, so that none decides by its
    scale alone. Features that are constant over the references are ignored. Shifts are undone only as far as the
    features ignore them."""
    plain = Space(crop, embed=extractor, device=device)
    features = torch.cat([_maps([volume], plain) for volume in references])[:, 0, :, 0, 0]
    mean, std = features.mean(0), features.std(0, correction=0)
    kept = std > 1e-6 * features.abs().amax(0).clamp_min(1e-12)

    def embed(volumes: Tensor) -> Tensor:
        return ((extractor(volumes).float() - mean) / std)[:, kept]

    return Space(crop, flips, 0, embed, device)


class MapsOf:
    """The maps of volumes in a space, for comparisons with several sets. Close it to remove its files.

    A network embeds each volume once for each flip, and the result stays in a temporary file (in $TMPDIR). Crops of
    voxels are made on each access: that takes no longer than to read them.
    """

    def __init__(self, volumes: Volumes, space: Space):
        self.volumes, self.space = volumes, space
        self._files: dict[tuple[int, ...], tuple[IO[bytes], tuple[int, ...], set[int]]] = {}

    def __len__(self) -> int:
        return len(self.volumes)

    def read(self, numbers: range, flip: tuple[int, ...] = ()) -> Tensor:
        """Return the maps of some adjacent volumes, (B, C, x, y, z) float32 on the space's device."""
        if self.space.embed is None:
            return torch.cat([_maps([self.volumes[number]], self.space, flip) for number in numbers])
        if flip not in self._files:
            shape = tuple(_maps([self.volumes[0]], self.space, flip).shape[1:])
            self._files[flip] = (tempfile.TemporaryFile(), shape, set())
        file, shape, done = self._files[flip]
        size = math.prod(shape)
        for number in numbers:
            if number not in done:
                file.seek(4 * size * number)
                file.write(_maps([self.volumes[number]], self.space, flip).cpu().numpy().astype(np.float32).tobytes())
                done.add(number)
        file.seek(4 * size * numbers.start)
        stored = np.frombuffer(bytearray(file.read(4 * size * len(numbers))), np.float32)
        return torch.from_numpy(stored).reshape(len(numbers), *shape).to(self.space.device)

    def close(self) -> None:
        """Remove the temporary files."""
        for file, _, _ in self._files.values():
            file.close()
        self._files.clear()


@contextmanager
def maps_of(volumes: "Volumes | MapsOf", space: Space) -> Iterator[MapsOf]:
    """Give the maps of volumes in a space, and close them after the block; maps that are given already stay open."""
    if isinstance(volumes, MapsOf):
        yield volumes
        return
    maps = MapsOf(volumes, space)
    try:
        yield maps
    finally:
        maps.close()


@torch.inference_mode()
def similarity_matrix(
    queries: Volumes | MapsOf,
    references: Volumes | MapsOf,
    space: Space,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    held_bytes: int = HELD_BYTES,
    on_pairs: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Compute the similarity of each query and each reference, (Q, R) float32 in [-1, 1].

    Both are sequences of volumes, which may be read on access, or their `MapsOf`. References are read once, and the
    queries once for every `held_bytes` of references. Products take at most `chunk_bytes`, whatever the number of
    volumes (a single pair may take more of both). Each row depends on its query alone, so that processes can share the
    queries. `on_pairs(count)` is called with the number of pairs that were just compared.

    Raises: ValueError for an empty set, volumes with values that are not finite or with another number of channels, a
        flip along an unknown axis and a shift of half a side or more.
    """
    if not len(queries) or not len(references):
        raise ValueError(
            f"{len(queries)} volumes cannot be compared with {len(references)}: give one or more in each set"
        )
    result = np.empty((len(queries), len(references)), np.float32)
    with maps_of(queries, space) as asked, maps_of(references, space) as known:
        probe, shift = _first(known.volumes, space)
        pair_bytes = (
            8 * probe.shape[1] * math.prod(_padded(probe.shape[2:], shift))
        )  # half a spectrum, and what is made of it
        rows = max(min(chunk_bytes // (4 * pair_bytes), len(known)), 1)
        columns = max(chunk_bytes // (pair_bytes * rows), 1)
        held = max(held_bytes // pair_bytes // rows, 1) * rows
        for start in range(0, len(known), held):
            block = _prepare(known.read(range(start, min(start + held, len(known)))), shift)
            for first in range(0, len(asked), columns):
                some = range(first, min(first + columns, len(asked)))
                flipped = [_prepare(asked.read(some, flip), shift) for flip in space.flip_sets]
                for low in range(0, len(block.maps), rows):
                    part = block.part(low, low + rows)
                    best = torch.stack([_correlate(one, part).amax(2) for one in flipped]).amax(0)
                    column = start + low
                    result[some.start : some.stop, column : column + len(part.maps)] = best.cpu().numpy()
                    if on_pairs is not None:
                        on_pairs(best.numel())
    return result


@torch.inference_mode()
def best_match(query: Any, reference: Any, space: Space) -> Match:
    """Find the flip and the shift that make a query most similar to a reference."""
    _, shift = _first([reference], space)
    prepared = _prepare(_maps([reference], space), shift)
    flipped = [_prepare(_maps([query], space, flip), shift) for flip in space.flip_sets]
    similarity = torch.stack([_correlate(one, prepared)[0, 0] for one in flipped])
    flip, place = divmod(int(similarity.argmax()), similarity.shape[1])
    x, y, z = (int(i) - shift for i in np.unravel_index(place, (2 * shift + 1,) * 3))
    return Match(float(similarity.max()), space.flip_sets[flip], (x, y, z))


def aligned(query: Any, match: Match, crop: Sides) -> np.ndarray:
    """Crop a query to (C, *crop), mirrored and moved by `match` (in voxels) onto its reference's crop. Where the shift
    leaves no voxel, fill with its lowest intensity."""
    cropped = crop_of(query, crop)
    mirrored = np.flip(cropped, tuple(axis + 1 for axis in match.flip))
    return pad_or_crop(crop, crop, offset=match.shift).apply(mirrored, float(cropped.min()))


def standardized(array: np.ndarray) -> np.ndarray:
    """Scale each channel of (C, ...) to mean 0 and variance 1, as float32; zeros if it is constant."""
    axes = tuple(range(1, array.ndim))
    centered = array.astype(np.float64)
    centered -= centered.mean(axes, keepdims=True)
    deviation = centered.std(axes, keepdims=True)
    deviation[deviation < 1e-7 * np.abs(array).max(axes, keepdims=True)] = np.inf  # rounding of a constant
    return (centered / np.where(deviation == 0, np.inf, deviation)).astype(np.float32)


def crop_of(volume: Any, crop: Sides) -> np.ndarray:
    """Crop (C, *crop) about the center of a volume, as float64."""
    array = np.asarray(volume.detach().cpu() if isinstance(volume, Tensor) else volume, np.float64)
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4:
        raise ValueError(f"a volume is (C, X, Y, Z) or (X, Y, Z), not {array.shape}")
    cropped = pad_or_crop(array.shape[1:], crop).apply(array, float(array.min()))
    if not np.isfinite(cropped).all():
        raise ValueError("a volume contains NaN or infinity: it cannot be compared")
    return cropped


def _maps(volumes: Volumes, space: Space, flip: tuple[int, ...] = ()) -> Tensor:
    """Compute the maps to compare, (B, C, x, y, z) float32 on the space's device; features (B, F) as (B, 1, F, 1,
    1)."""
    crops = [crop_of(volume, space.crop) for volume in volumes]
    if space.embed is None:
        crops = [standardized(crop) for crop in crops]
    else:
        crops = [np.stack([unit_range(channel) for channel in crop]) for crop in crops]
    maps = torch.from_numpy(np.stack(crops)).to(space.device).flip([axis + 2 for axis in flip])
    maps = maps if space.embed is None else space.embed(maps).float()
    return maps[:, None, :, None, None] if maps.ndim == 2 else maps


def _first(references: Volumes, space: Space) -> tuple[Tensor, int]:
    """Return the maps of the first reference, and the shift to search. Raises: ValueError for an impossible space."""
    if not set(space.flips) <= {0, 1, 2}:
        raise ValueError(f"flips along axes {space.flips}: choose from axes 0, 1 and 2")
    probe = _maps([references[0]], space)
    shift = 0 if probe.shape[1] == 1 and probe.shape[3:] == (1, 1) else space.shift
    check_shift(shift, tuple(probe.shape[2:]))
    return probe, shift


def check_shift(shift: int, sides: Sequence[int]) -> None:
    """Raise ValueError for a shift of half a side or more, which leaves too little to compare."""
    if shift < 0 or 2 * shift >= min(sides) > 1:
        raise ValueError(f"shift {shift} for sides {tuple(sides)}: take less than half of a side")


class _Prepared(NamedTuple):
    """Maps as `_correlate` takes them, with sums over the voxels that overlap when the maps, as a query, are moved by
    -shift to shift along each axis (S = 2 shift + 1)."""

    maps: Tensor  # (B, C, x, y, z)
    spectrum: Tensor | None  # of the maps, padded so that no shift wraps around; None without shifts
    total: Tensor  # (B, C, S, S, S): their sum
    deviation: Tensor  # (B, C, S, S, S): root of the sum of their squares less the mean's; 0 where they are constant
    overlap: Tensor  # (S, S, S): their number
    shift: int

    def part(self, start: int, stop: int) -> "_Prepared":
        """Return those of maps start to stop - 1."""
        rows = slice(start, stop)
        spectrum = None if self.spectrum is None else self.spectrum[rows]
        return self._replace(
            maps=self.maps[rows], spectrum=spectrum, total=self.total[rows], deviation=self.deviation[rows]
        )


def _prepare(maps: Tensor, shift: int) -> _Prepared:
    sides = maps.shape[2:]
    windows = [_windows(n, shift).to(maps) for n in sides]
    overlap = torch.einsum("u,v,w->uvw", *(window.sum(1) for window in windows))
    total, energy = (_window_sums(values, windows) for values in (maps, maps**2))
    variance = energy - total**2 / overlap
    scale = maps.var((2, 3, 4), correction=0, keepdim=True)
    deviation = torch.where(variance > CONSTANT * scale * overlap, variance, 0).sqrt()
    spectrum = torch.fft.rfftn(maps, _padded(sides, shift), dim=(2, 3, 4)) if shift else None
    return _Prepared(maps, spectrum, total, deviation, overlap, shift)


def _window_sums(maps: Tensor, windows: Sequence[Tensor]) -> Tensor:
    for axis, window in enumerate(windows):
        maps = (maps.movedim(axis + 2, -1) @ window.T).movedim(-1, axis + 2)
    return maps


def _windows(side: int, shift: int) -> Tensor:
    """Return (2 shift + 1, side): 1 for each voxel of a query that, moved by -shift to shift, lies on a voxel of the
    reference.
    """
    moved = torch.arange(side) - torch.arange(-shift, shift + 1)[:, None]
    return (moved >= 0) & (moved < side)


def _padded(sides: Sequence[int], shift: int) -> list[int]:
    """Return the next sides that have no prime factor above 5, with room for the shift."""
    return [next(n for n in itertools.count(side + shift) if 30**12 % n == 0) for side in sides]


def _correlate(queries: _Prepared, references: _Prepared) -> Tensor:
    """Compute (A, B, S^3) similarities for each shift."""
    shift = queries.shift
    if queries.spectrum is None or references.spectrum is None:
        products = torch.einsum("acn,bcn->abc", queries.maps.flatten(2), references.maps.flatten(2))
        products = products[..., None, None, None]
    else:
        # Correlation theorem: sum over x of q(x + u) r(x) has the spectrum Q conj(R).
        spectrum = queries.spectrum[:, None] * references.spectrum.conj()
        products = _at_shifts(spectrum, _padded(queries.maps.shape[2:], shift), shift)
    # The reference's overlap for shift u is the query's for -u.
    total, deviation = (values.flip((2, 3, 4)) for values in (references.total, references.deviation))
    covariance = products - queries.total[:, None] * total / queries.overlap
    scale = queries.deviation[:, None] * deviation
    varies = scale > 0  # a channel that is constant in either says nothing
    similarity = torch.where(varies, covariance / torch.where(varies, scale, 1), 0).sum(2)
    return (similarity / varies.sum(2).clamp_min(1)).clamp(-1, 1).flatten(2)


def _at_shifts(spectrum: Tensor, sides: Sequence[int], shift: int) -> Tensor:
    """Invert `rfftn` at -shift to shift along each axis alone, (..., X, Y, Z // 2 + 1) to (..., S, S, S). Axis by axis
    it takes a fifth of the time of the whole inverse.
    """
    shifts = torch.arange(-shift, shift + 1, device=spectrum.device)
    for axis, side in ((-1, sides[2]), (-2, sides[1]), (-3, sides[0])):
        frequencies = torch.arange(spectrum.shape[axis], device=spectrum.device)
        phase = 2 * math.pi / side * (frequencies[:, None] * shifts % side)
        weight = torch.full_like(phase[:, :1], 1 / side)
        if axis == -1:  # of a real signal: every frequency but 0 and Nyquist's also stands for its negative
            weight[1 : (side + 1) // 2] *= 2
        waves = torch.polar(weight.expand_as(phase).contiguous(), phase).to(spectrum.dtype)
        spectrum = (spectrum.movedim(axis, -1) @ waves).movedim(-1, axis)
    return spectrum.real
