"""Write a tensor to a safetensors file in blocks, so that it need not fit into memory.

`safetensors` copies a tensor before it writes it. Reading needs no help: its tensors are memory maps of the file.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

ALIGNMENT = 8  # bytes, of the header


def write_blocks(
    path: Path, name: str, blocks: Iterable[Tensor], shape: Sequence[int], metadata: Mapping[str, str]
) -> None:
    """Write a tensor of `shape`, which the blocks are along its first axis, in half precision.

    The layout is that of https://huggingface.co/docs/safetensors: the length of the header, the header, the bytes.

    Raises: ValueError unless the blocks fill the tensor.
    """
    size = 2 * math.prod(shape)
    described = {"dtype": "F16", "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": dict(metadata), name: described}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    written = 0
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for block in blocks:
            written += file.write(block.half().contiguous().numpy().tobytes())
    if written != size:
        raise ValueError(f"{path}: {written} bytes of {size}: the blocks do not fill the tensor")
