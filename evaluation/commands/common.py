"""How a command of evaluate.py is run, and what its report says of that."""

from typing import Any

import torch
from accelerate import PartialState
from jsonargparse import Namespace

from .arguments import Command


def run_command(
    command: Command, options: Namespace, device: torch.device, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Run it in all processes or in the main one alone, as it wants. Returns the report; {} in those that only waited."""
    state = PartialState()
    report = command.run(options, device, dtype) if command.divides or state.is_main_process else {}
    state.wait_for_everyone()
    return report


def precision_name(dtype: torch.dtype | None) -> str:
    """What a report says of the arithmetic."""
    return "float32" if dtype is None else str(dtype).removeprefix("torch.")
