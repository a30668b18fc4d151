"""What a command of evaluate.py is, and the arguments that all of them share."""

from typing import Any, Protocol

import torch
from accelerate import PartialState
from jsonargparse import ArgumentParser, Namespace

from volumes import DataConfig
from volumes.stopping import finishing


class Command(Protocol):
    """A module of this folder.

    NAME is that of the subcommand and HELP its description; READS_DATA says whether it takes `--config`, `--data.*` and
    the other arguments of `add_common_arguments`, which are then added before its own. One with DIVIDES = True is run by all
    processes, which share its work; any other by the main process, while others wait.
    """

    @property
    def NAME(self) -> str: ...
    @property
    def HELP(self) -> str: ...
    @property
    def READS_DATA(self) -> bool: ...

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the command's own arguments."""
        ...

    def run(self, options: Namespace, device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
        """Measure, write the report to `options.output` and return it; `dtype` is that of autocast, None for float32."""
        ...


def run_command(
    command: Command, options: Namespace, device: torch.device, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Run it in all processes or in the main one alone, as it wants. Returns the report; {} in those that only waited."""
    state = PartialState()
    if getattr(command, "DIVIDES", False):  # it says itself what is finished when a signal comes
        report = command.run(options, device, dtype)
        state.wait_for_everyone()
        return report
    try:
        with finishing(f"{command.NAME}, whose report is written at its end"):
            return command.run(options, device, dtype) if state.is_main_process else {}
    finally:
        state.wait_for_everyone()


def make_parser(command: Command, data: dict[str, Any] | None, **settings: Any) -> ArgumentParser:
    """The parser of one command, with `data` (the section of a config) as the defaults of `--data.*`;
    `settings` are those of jsonargparse."""
    parser = ArgumentParser(description=command.HELP, **settings)
    if command.READS_DATA:
        add_common_arguments(parser, data)
    command.add_arguments(parser)
    return parser


def add_common_arguments(parser: ArgumentParser, data: dict[str, Any] | None) -> None:
    """Add `--config`, `--data.*`, `--output`, `--precision` and `--device`."""
    parser.add_argument(
        "--config", type=str, required=True, help="training config whose section `data` says which volumes"
    )
    parser.add_class_arguments(DataConfig, "data", help="overrides of the config's section `data`")
    if data is not None:
        parser.set_defaults({f"data.{key}": value for key, value in data.items()})
    parser.add_argument("--output", type=str, required=True, help="report to write, a JSON file")
    parser.add_argument(
        "--precision",
        choices=["auto", "bf16", "no"],
        default="auto",
        help="auto is bf16 where the hardware has it, else float32",
    )
    parser.add_argument("--device", type=str, help="such as cpu or cuda:1; default: the accelerator if there is one")


def precision_name(dtype: torch.dtype | None) -> str:
    """What a report says of the arithmetic."""
    return "float32" if dtype is None else str(dtype).removeprefix("torch.")
