"""Arrays of many volumes that need not fit into memory."""

import math
import os
import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MOST_BYTES = 1 << 28  # that one array holds in memory


def large_zeros(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Make a tensor of zeros. One of more than `MOST_BYTES` lies in a file (in $TMPDIR) that disappears with it, and
    the system keeps of it in memory what there is room for. Raises: OSError for a disk without room."""
    if math.prod(shape) * dtype.itemsize <= MOST_BYTES:
        return torch.zeros(tuple(shape), dtype=dtype)
    numpy_type = torch.zeros(0, dtype=dtype).numpy().dtype
    with tempfile.TemporaryFile() as file:  # the map keeps it open
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and not a signal when a page is written
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * dtype.itemsize)
        return torch.from_numpy(np.memmap(file, numpy_type, "w+", shape=tuple(shape)))
