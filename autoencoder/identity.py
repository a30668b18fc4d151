"""Identify the weights that a model holds. The record belongs to the model, so all pipelines that share it agree on it.

A model that was loaded keeps the files that it was loaded from. Casts and moves (`.to()`) change nothing; weights that
were changed in place afterwards are other weights. Detected changes: operations that PyTorch counts (`Tensor._version`:
unfused optimizers, `load_state_dict`, `copy_`), and all that change one of `SAMPLES` values of each tensor (fused
optimizers, edits of `.data`, merged LoRAs). An edit of single elements of large tensors through `.data` is not
detected. While weights are offloaded or cast by hooks, or a LoRA is fused into them, they cannot be read, and count as
unchanged.
"""

import sys
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

SAMPLES = 256  # values of each tensor that are compared
RECORD = "_weights_record"
_lock = threading.RLock()


@dataclass
class Stamp:
    """A sample of one tensor that shows whether it changed."""

    tensor: int  # its id
    version: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: np.ndarray  # float64


@dataclass
class WeightsRecord:
    """The identity of a model's weights.

    Attributes:
        key: changes whenever the weights change; equal for copies.
        files: the safetensors files that hold them, with size and modification time when they were read; empty for
            weights that were created in memory, or changed since.
    """

    key: str = field(default_factory=lambda: uuid.uuid4().hex)  # a number could be another process's, through a pickle
    files: list[tuple[Path, int, int]] = field(default_factory=list)
    stamps: dict[str, Stamp] = field(default_factory=dict)

    @property
    def intact_files(self) -> list[Path]:
        """The files, if they were not written since."""
        unchanged = all(path.is_file() and _file_state(path) == tuple(state) for path, *state in self.files)
        return [path for path, *_ in self.files] if unchanged else []


def own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a model's own state, by name, without those of a LoRA that peft attached."""
    state = model.state_dict(keep_vars=True)
    yield from sorted((k.replace(".base_layer.", "."), v) for k, v in state.items() if ".lora_" not in k)


def out_of_reach(model: nn.Module) -> bool:
    """Return whether weights are on disk or on the meta device, so that they cannot be read."""
    return hasattr(model, "offloaded_to_disk") or any(tensor.is_meta for _, tensor in own_tensors(model))


def has_hooks(model: nn.Module) -> bool:
    """Return whether Accelerate or diffusers move or cast weights while the model runs."""
    return any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in model.modules())


def moves_weights(model: nn.Module) -> bool:
    """Return whether hooks move weights to the device while the model runs; those that only cast them do not count."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):  # Accelerate's
        return True
    offloading = sys.modules.get("diffusers.hooks.group_offloading")  # its import takes seconds
    return offloading is not None and offloading._is_group_offload_enabled(model)


def remember_files(model: nn.Module, files: Sequence[Path]) -> None:
    """Record the files from which the model's weights have just been loaded."""
    record = WeightsRecord(files=[(path.resolve(), *_file_state(path)) for path in files], stamps=_stamps(model))
    model.__dict__[RECORD] = record


def weights_record(model: nn.Module) -> WeightsRecord:
    """Return the record of the present weights: the previous one, unless they have changed since."""
    with _lock:
        record: WeightsRecord | None = model.__dict__.get(RECORD)
        if record is None:
            record = model.__dict__[RECORD] = WeightsRecord(stamps=_stamps(model))
        elif not _is_closed(model):
            stamps = _stamps(model)
            if not is_same(record.stamps, stamps):
                record = model.__dict__[RECORD] = WeightsRecord(stamps=stamps)
            record.stamps = stamps
        return record


def keep_record(model: nn.Module) -> None:
    """Accept the present weights as those of the record: an addition to them was removed again, up to rounding."""
    with _lock:
        if RECORD in model.__dict__:
            model.__dict__[RECORD].stamps = _stamps(model)


def _is_closed(model: nn.Module) -> bool:
    fused = any(getattr(module, "merged_adapters", None) for module in model.modules())
    return fused or has_hooks(model) or out_of_reach(model)


@torch.no_grad()
def stamps_of(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Stamp]:
    """Sample tensors, so that `is_same` can tell whether they changed."""
    return {name: _stamp(tensor) for name, tensor in tensors}


def _stamps(model: nn.Module) -> dict[str, Stamp]:
    return stamps_of(own_tensors(model))


def _stamp(tensor: Tensor) -> Stamp:
    version = 0 if tensor.is_inference() else tensor._version
    values = np.empty(0)
    if tensor.numel() and not tensor.is_meta:
        shape = tuple(tensor.shape) or (1,)  # of a single number, such as a codebook's flag
        places = np.unravel_index(np.arange(0, tensor.numel(), -(-tensor.numel() // SAMPLES)), shape)
        chosen = tuple(torch.from_numpy(place) for place in places)  # flattening would copy what lies channels last
        values = tensor.detach().reshape(shape)[chosen].double().cpu().numpy()
    return Stamp(id(tensor), version, tensor.dtype, tuple(tensor.shape), values)


def is_same(before: dict[str, Stamp], now: dict[str, Stamp]) -> bool:
    """Return whether tensors are the same, apart from a cast or a move."""
    if before.keys() != now.keys():
        return False
    for name, old in before.items():
        new = now[name]
        if old.shape != new.shape or (old.tensor == new.tensor and old.version != new.version):
            return False
        values = old.values
        if old.dtype != new.dtype:  # as they are after one cast
            values = torch.from_numpy(values).to(old.dtype).to(new.dtype).double().numpy()
        if values.size and new.values.size and not np.array_equal(values, new.values, equal_nan=True):
            return False
    return True


def _file_state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
