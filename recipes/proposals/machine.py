"""What this machine can train: cores, memory, accelerator; and how long its steps take."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

CORE_FLOPS = (
    55e9  # a second and core in a training step, float32: 114 GFLOP in 1.03 s on two cores (docs/performance.md)
)
FORWARD_AND_BACKWARD = 3  # a training step costs so many forward passes
STARTUP = 20.0  # seconds of a command before its first step and after its last


@dataclass(frozen=True)
class Machine:
    """Cores and bytes of memory; name and bytes of the accelerator, "" and 0 without one."""

    cores: int
    memory: int
    accelerator: str = ""
    accelerator_memory: int = 0

    @property
    def described(self) -> str:
        """Return the machine in words."""
        plain = f"{self.cores} cores, {self.memory / 2**30:.0f} GiB"
        return f"{self.accelerator} ({self.accelerator_memory / 2**30:.0f} GiB), {plain}" if self.accelerator else plain

    def seconds(self, flops: float) -> float | None:
        """Return how long a forward pass of so many operations takes in training.

        None on an accelerator, where no step was measured.
        """
        return None if self.accelerator else FORWARD_AND_BACKWARD * flops / (self.cores * CORE_FLOPS)


def this_machine() -> Machine:
    """Look at the machine that this runs on. Imports torch to find an accelerator."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory().total
    if not torch.cuda.is_available():
        return Machine(cores, memory)
    found = torch.cuda.get_device_properties(0)
    return Machine(cores, memory, found.name, found.total_memory)


def autoencoder_flops(
    voxels: float, channels: Sequence[int], encoder_blocks: Sequence[int], decoder_blocks: Sequence[int],
    patch: Sequence[int], latents: int,
) -> float:  # fmt: skip
    """Return the operations of one forward pass for one image channel: convolutions of 3 x 3 x 3, two a block."""
    cells = voxels / (patch[0] * patch[1] * patch[2])
    total = 2 * 27 * cells * (patch[0] * patch[1] * patch[2]) * channels[0]
    for level, width in enumerate(channels):
        blocks = encoder_blocks[level] + decoder_blocks[level]
        total += cells * blocks * 2 * 27 * width * width
        if level + 1 < len(channels):
            cells /= 8
            total += 2 * cells * 27 * width * channels[level + 1]
    return 2 * (total + cells * 27 * channels[-1] * 3 * latents)


def unet_flops(cells: float, channels: Sequence[int], blocks: Sequence[int], latents: int, mask_width: int) -> float:
    """Return the operations of one forward pass over so many latent voxels: a level's blocks count on both ways."""
    total = cells * 27 * channels[0] * (2 * latents + mask_width)
    for width, count in zip(channels, blocks, strict=True):
        total += cells * 2 * count * 2 * 27 * width * width
        cells /= 8
    return 2 * total
