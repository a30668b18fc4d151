"""Weights, gradients, optimizer state and moving average sharded among the processes (FSDP; Zhao et al. 2023).

PyTorch's `fully_shard` (FSDP2) is used directly, because Accelerate supports it on GPUs only; so two processes on a CPU
can test it. Each process holds a part of every tensor; a block's weights are gathered when it computes.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

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
ON_MAIN = StateDictOptions(full_state_dict=True, cpu_offload=True)  # the other processes get nothing


def check_sharding(accelerator: Accelerator, *, compile: bool) -> None:
    """Raises: ValueError where sharded training cannot run."""
    if accelerator.num_processes == 1:
        raise ValueError("loop.fsdp: there is only one process; launch several, or set it to false")
    if accelerator.mixed_precision == "fp16":
        raise ValueError("loop.fsdp with fp16 is not supported; use loop.mixed_precision bf16 or no")
    if compile:
        raise ValueError("loop.fsdp with loop.compile is not supported; set one of them to false")


def shard(module: Any, accelerator: Accelerator) -> None:
    """Shard `module` among the processes, in place, with the main process's weights. The blocks in its
    `_no_split_modules` (diffusers' convention) are gathered one at a time, the rest once per pass."""
    module.to(accelerator.device).to(memory_format=torch.contiguous_format)  # fully_shard needs it
    with torch.no_grad():
        broadcast([*module.parameters(), *module.buffers()])
    blocks = set(getattr(module, "_no_split_modules", None) or ())
    for part in module.modules():
        if type(part).__name__ in blocks:
            fully_shard(part)
    fully_shard(module)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the part of each tensor that this process holds; the tensor itself if it is not sharded."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor in every process. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_as(tensor: Tensor, other: Tensor) -> Tensor:
    """Shard a full tensor, which is the same in every process, as `other` is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def whole_weights(module: nn.Module) -> Mapping[str, Any]:
    """Gather all weights and buffers in every process. Collective."""
    return get_model_state_dict(module, options=WHOLE)


def on_main(module: nn.Module) -> Mapping[str, Any]:
    """Gather all weights and buffers in the memory of the main process; empty in the others if they are sharded.
    Collective."""
    if any(isinstance(weight, DTensor) for weight in module.parameters()):
        return get_model_state_dict(module, options=ON_MAIN)
    return module.state_dict()


def set_whole(module: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Load full tensors, sharded as the module is. Raises: ValueError if one is missing."""
    if missing := sorted(module.state_dict().keys() - tensors.keys()):  # PyTorch would leave them as they are
        raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")
    set_model_state_dict(module, dict(tensors), options=WHOLE)


class FullState(TypedDict):
    """Everything that a checkpoint holds of a learner, with full tensors."""

    model: Mapping[str, Any]
    average: Mapping[str, Any]
    optimizer: Mapping[str, Any]


def collect(module: nn.Module, average: nn.Module, optimizer: Optimizer) -> FullState:
    """Gather everything that a checkpoint holds in the memory of the main process; empty in the others. Collective."""
    return {
        "model": get_model_state_dict(module, options=ON_MAIN),
        "average": get_model_state_dict(average, options=ON_MAIN),
        "optimizer": get_optimizer_state_dict(module, optimizer, options=ON_MAIN),
    }


def restore(module: nn.Module, average: nn.Module, optimizer: Optimizer, state: FullState) -> None:
    """Shard what `collect` gathered, after every process has read it. Raises: ValueError if a tensor is missing."""
    for network, tensors in ((module, state["model"]), (average, state["average"])):
        set_whole(network, tensors)
    set_optimizer_state_dict(module, optimizer, dict(state["optimizer"]), options=WHOLE)
