"""Every volume has its own noise, from its own generator, so that its result depends on no other volume of the call."""

from collections.abc import Iterator, Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor

from volumes.carriers import plain_tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def sample_generators(generator: Generators, count: int) -> list[torch.Generator]:
    """One generator a volume, in the order of the output (all volumes of the first mask, then of the second, ...).

    A list is used as it is. From a single generator (None: torch's global one) one seed a volume is drawn, in that
    order, by `torch.randint(2**63 - 1, (1,))`, and each volume gets a fresh CPU generator with its seed: volume i is
    the same however many follow it.

    Raises: ValueError if a list has another length, or one generator twice: the second volume's noise would depend on
    the order of the batches, and no seed would reproduce it.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        if not isinstance(generator, Sequence) or not all(isinstance(one, torch.Generator) for one in generator):
            raise ValueError(f"generator is a torch.Generator or a list of them, got {generator!r}")
        if len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} volumes; give one a volume, or a single one")
        if len({id(one) for one in generator}) < count:
            raise ValueError("the list holds one generator twice; give each volume its own, or a single one for all")
        return list(generator)
    device = "cpu" if generator is None else generator.device
    seeds = [int(torch.randint(2**63 - 1, (1,), generator=generator, device=device)) for _ in range(count)]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample_seed(generator: torch.Generator) -> int | None:
    """The seed that reproduces this generator as it is now; None if numbers were drawn from it already."""
    seed = generator.initial_seed()
    fresh = torch.Generator(generator.device).manual_seed(seed)
    return seed if torch.equal(fresh.get_state(), generator.get_state()) else None


def equal_batches(shapes: Sequence[tuple[int, int, int]], batch_size: int) -> Iterator[list[int]]:
    """Indices in groups of at most `batch_size` whose shapes are equal, shapes in order of first appearance."""
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
    """Standard normal noise (B, C, h, w, d), one row a generator, drawn in float32; or the rows that were given.

    Raises: ValueError if a given row is not of `shape` (C, h, w, d).
    """
    if given is None:
        rows = [randn_tensor((1, *shape), generator=one, device=device, dtype=torch.float32) for one in generators]
        return torch.cat(rows).to(dtype)
    given = [plain_tensor(row) for row in given]  # a MetaTensor's geometry is not that of latents
    for row in given:
        if tuple(row.shape) != shape:
            raise ValueError(f"latents of shape {tuple(row.shape)} for a mask that needs {shape} (C, h, w, d)")
    return torch.stack([row.to(device=device, dtype=dtype) for row in given])
