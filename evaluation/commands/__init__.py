"""The commands of evaluate.py, by name: one module each."""

from . import conditions, dice, everything, few_labels, page, pretrain, privacy, realism, reconstruction, shapes
from .common import Command

MODULES: tuple[Command, ...] = (
    reconstruction,
    dice,
    few_labels,
    pretrain,
    conditions,
    realism,
    shapes,
    privacy,
    page,
    everything,
)
COMMANDS: dict[str, Command] = {module.NAME: module for module in MODULES}

__all__ = ["COMMANDS", "Command"]
