"""Measurements whose seconds, memory and end are known."""

import time
from typing import Any

import torch

from benchmarks.speed.measure import Work


def sleep(seconds: float, note: str = "") -> Work:
    return Work(lambda: time.sleep(seconds), {"planned": seconds})


def allocate(megabytes: int) -> Work:
    def run() -> dict[str, Any]:
        return {"bytes": torch.ones(megabytes, 1_000_000, dtype=torch.uint8).nbytes}

    return Work(run)


def crash() -> Work:
    raise ValueError("a planted mistake")


def die() -> Work:
    import os
    import signal

    return Work(lambda: os.kill(os.getpid(), signal.SIGKILL))


def cube(shape: tuple[int, int, int], seconds_per_voxel: float, bytes_per_voxel: int) -> Work:
    """Takes time and memory in proportion to its voxels."""
    voxels = shape[0] * shape[1] * shape[2]

    def run() -> None:
        held = torch.ones(voxels * bytes_per_voxel, dtype=torch.uint8)
        time.sleep(seconds_per_voxel * voxels)
        del held

    return Work(run)
