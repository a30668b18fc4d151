"""Every volume has its own noise, from its own generator, so that its result depends on no other volume of the call."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from pipelines.inputs.arguments import listed, whole_number
from volumes.formats.carriers import as_array

Generators = torch.Generator | Sequence[torch.Generator] | None


def sample_generators(generator: Generators, count: int) -> list[torch.Generator]:
    """One generator a volume, in the order of the output (all volumes of the first mask, then of the second, ...).

    A list is used as it is, and so is a single generator for a single volume: `generator=G` and `generator=[G]` are the same.
    From a single one for several volumes (None: torch's global one, for one volume too) a seed a volume is taken, in that
    order, by `torch.randint(2**63 - 1, (1,))`, and each volume gets a fresh CPU generator with its seed: volume i is the
    same however many follow it (from two on). Noise is made on the CPU, so a generator of another device gives a seed
    likewise. In every case `torch.Generator().manual_seed(seed)`, of the seed that a volume's record has, makes it again.

    Raises: ValueError if a list has another length, or one generator twice: the second volume's noise would depend on
    the order of the batches, and no seed would reproduce it.
    """
    if generator is None or isinstance(generator, torch.Generator):
        if count != 1 or generator is None:
            return [torch.Generator().manual_seed(_seed_from(generator)) for _ in range(count)]
        generator = [generator]
    if not isinstance(generator, Sequence) or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError(f"generator is a torch.Generator or a list of them, got {generator!r}")
    if len(generator) != count:
        raise ValueError(
            f"{len(generator)} generators for {count} volumes (num_volumes_per_mask of each mask); give one a volume, or a single one"
        )
    if len({id(one) for one in generator}) < count:
        raise ValueError("the list holds one generator twice; give each volume its own, or a single one for all")
    on_cpu = [one.device.type == "cpu" for one in generator]
    return [
        one if here else torch.Generator().manual_seed(_seed_from(one))
        for one, here in zip(generator, on_cpu, strict=True)
    ]


def _seed_from(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (1,), generator=generator, device=device))


def sample_seed(generator: torch.Generator) -> int | None:
    """The seed that reproduces this generator as it is now; None if numbers were drawn from it already."""
    seed = generator.initial_seed()
    fresh = torch.Generator(generator.device).manual_seed(seed)
    return seed if torch.equal(fresh.get_state(), generator.get_state()) else None


def equal_batches(shapes: Sequence[tuple[int, int, int]], batch_size: int) -> Iterator[list[int]]:
    """Indices in groups of at most `batch_size` whose shapes are equal, shapes in order of first appearance."""
    batch_size = whole_number("batch_size", batch_size)
    groups: dict[tuple[int, int, int], list[int]] = {}
    for index, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(index)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def initial_latents(
    generators: Sequence[torch.Generator],
    given: Sequence[torch.Tensor] | None,
    shape: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Standard normal noise (B, C, h, w, d), one row a generator, drawn in float32; or the rows that were given."""
    if given is None:
        rows = [randn_tensor((1, *shape), generator=one, device=device, dtype=torch.float32) for one in generators]
        return torch.cat(rows).to(dtype)
    return torch.stack([row.to(device=device, dtype=dtype) for row in given])


def given_latents(latents: Any, shapes: Sequence[tuple[int, int, int, int]]) -> list[torch.Tensor]:
    """`latents` as people give them, tensors or arrays (B, C, h, w, d) or a list of (C, h, w, d), as one tensor a volume.

    Raises: ValueError unless there is one of its shape for each volume, of finite real numbers.
    """
    rows = listed("latents", latents)
    if len(rows) != len(shapes):
        raise ValueError(f"{len(rows)} latents for {len(shapes)} volumes; give one a volume")
    tensors = []
    for row, shape in zip(rows, shapes, strict=True):
        if not isinstance(row, torch.Tensor | np.ndarray):
            raise ValueError(f"latents are tensors or arrays (C, h, w, d), got {type(row).__name__}")
        if tuple(row.shape) != shape:
            raise ValueError(f"latents of shape {tuple(row.shape)} for a mask that needs {shape} (C, h, w, d)")
        array = as_array(row, "latents")
        with np.errstate(over="ignore"):
            finite = np.isfinite(array.astype(np.float32)).all()
        if array.dtype == bool or not finite:
            raise ValueError(f"latents are finite real numbers, got {row.dtype} with others; replace them first")
        wide = np.float64 if array.dtype.itemsize > 4 else np.float32
        tensors.append(
            torch.from_numpy(np.ascontiguousarray(array, dtype=wide))
        )  # in the machine's order of bytes, too
    return tensors
