"""The order in which training sees its samples, as a pure function of (seed, position), so that a resume is exact.

Nothing here has state to save: sample number `s` of a run is position `s % n` of the permutation of epoch `s // n`.
A resumed run continues with the next number and gets what the uninterrupted run would have got, with any number of
workers, persistent or not.
"""

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .processes import outlive_signals


def derive_seed(*numbers: int) -> int:
    """Mix non-negative integers such as (seed, step, process) into one 63-bit seed, by numpy's SeedSequence.

    SeedSequence does not distinguish (1,) from (1, 0), so their number is appended.
    """
    return int(np.random.SeedSequence((*numbers, len(numbers))).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seeded(device: torch.device, *numbers: int) -> torch.Generator:
    """Return a generator with the seed that is derived from the numbers."""
    return torch.Generator(device).manual_seed(derive_seed(*numbers))


class ResumableBatchSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of (epoch, index) keys for one process.

    A batch may hold the end of one epoch and the beginning of the next, so every batch is full and no sample is
    dropped, however small the data set.

    Args:
        length: number of samples in the data set.
        batch_size: samples per batch and process.
        start: number of samples that all processes together have already seen.
        process, processes: number of this process, and of all; each takes its slice of every global batch.
    Raises: ValueError for an empty data set.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int, start: int = 0, process: int = 0, processes: int = 1
    ):
        if length < 1:
            raise ValueError("there is nothing to train on: the training set is empty (see `data:` in the config)")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.process, self.processes = start, process, processes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first, epoch, order = self.start + self.process * self.batch_size, -1, torch.empty(0)
        while True:
            keys = []
            for sample in range(first, first + self.batch_size):
                if sample // self.length != epoch:
                    epoch = sample // self.length
                    generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
                    order = torch.randperm(self.length, generator=generator)
                keys.append((epoch, int(order[sample % self.length])))
            yield keys
            first += self.batch_size * self.processes


class EpochAwareDataset(Dataset):
    """A data set with keys (epoch, index), which sets the data set's epoch first, in whichever worker process it
    lives."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        set_epoch = getattr(self.dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        return self.dataset[index]


def training_batches(
    dataset: Any, stream: ResumableBatchSampler, *, workers: int, collate: Any, pin_memory: bool
) -> Generator[Any, None, None]:
    """Yield collated batches without end, in the order of `stream`, loaded by `workers` processes (0: by this one),
    which end with `close()`."""
    yield from DataLoader(
        EpochAwareDataset(dataset),
        batch_sampler=stream,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=outlive_signals,
        collate_fn=collate,
        pin_memory=pin_memory,
    )
