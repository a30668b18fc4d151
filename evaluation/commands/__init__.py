"""The commands of evaluate.py, by name."""

from .arguments import COMMANDS, Command

__all__ = ["COMMANDS", "Command"]
