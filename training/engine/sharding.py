"""Weights, gradients, optimizer state and moving average divided among the processes (FSDP; Zhao et al. 2023).

PyTorch's `fully_shard` (FSDP2) is used directly, and not through Accelerate, which knows it on GPUs alone: so two processes
on a CPU test it. Each process holds a part of every tensor; a block's weights are put together when it computes.
"""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

WHOLE = StateDictOptions(full_state_dict=True)
ON_MAIN = StateDictOptions(full_state_dict=True, cpu_offload=True)  # other processes get nothing


def check_sharding(accelerator: Accelerator, *, compile: bool) -> None:
    """Raises: ValueError where sharded training cannot run."""
    if accelerator.num_processes == 1:
        raise ValueError("loop.fsdp: there is one process, and nothing to divide; launch several, or set it to false")
    if accelerator.mixed_precision == "fp16":
        raise ValueError("loop.fsdp: fp16's loss scale is not supported; use loop.mixed_precision bf16 or no")
    if compile:
        raise ValueError("loop.fsdp: with loop.compile it is not supported; set one of the two to false")


def shard(module: Any, accelerator: Accelerator) -> None:
    """Divide `module` among the processes, in place, after all of them have taken the main one's weights. The blocks that it
    names in `_no_split_modules` (diffusers' convention) are put together one at a time, the rest once a pass."""
    module.to(accelerator.device).to(memory_format=torch.contiguous_format)  # fully_shard takes no other
    with torch.no_grad():
        broadcast([*module.parameters(), *module.buffers()])
    blocks = set(getattr(module, "_no_split_modules", None) or ())
    for part in module.modules():
        if type(part).__name__ in blocks:
            fully_shard(part)
    fully_shard(module)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds of each tensor; the tensor itself, if it is not divided."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """A divided tensor put together, in every process, all of which must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_as(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same in every process, divided as `other` is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def whole_weights(module: nn.Module) -> dict[str, Any]:
    """All weights and buffers, put together in every process, all of which must call this."""
    return get_model_state_dict(module, options=WHOLE)


def collect(module: nn.Module, average: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """Everything that a checkpoint holds, put together in the memory of the main process; empty in the others. All must call
    this."""
    weights, averages = (get_model_state_dict(one, options=ON_MAIN) for one in (module, average))
    return {
        "model": weights,
        "average": averages,
        "optimizer": get_optimizer_state_dict(module, optimizer, options=ON_MAIN),
    }


def restore(module: nn.Module, average: nn.Module, optimizer: Optimizer, state: dict[str, dict[str, Any]]) -> None:
    """Divide what `collect` put together; every process has read it. Raises: ValueError if a tensor is missing."""
    for one, held in ((module, state["model"]), (average, state["average"])):
        if missing := sorted(one.state_dict().keys() - held.keys()):  # which PyTorch would leave as they are
            raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")
        set_model_state_dict(one, held, options=WHOLE)
    set_optimizer_state_dict(module, optimizer, state["optimizer"], options=WHOLE)
