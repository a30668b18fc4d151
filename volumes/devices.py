"""Devices by the name that a command line gives."""

from __future__ import annotations

import torch


def find_device(name: str | None) -> torch.device:
    """Return the device of that name; None is the GPU if there is one, else the CPU. Raises: ValueError for a device
    that does not exist.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # an unknown word, no GPU, no such GPU
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {name}: {why}; give cpu, or cuda or cuda:0 where there is a GPU") from error
    return device
