"""What a command of evaluate.py is, and the arguments that all of them share."""

from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from jsonargparse import ArgumentParser, Namespace

from volumes import DataConfig
from volumes.stopping import finishing

from ..seen import add_overlap_argument, check_models


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
    if command.READS_DATA and state.is_main_process:
        check_judged(options)
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
    parser.add_argument(
        "--models",
        nargs="+",
        default=[],
        help="pipelines, autoencoders or LoRAs that had a part in the volumes, where neither another option nor the folder of "
        "generated volumes names them: what they learned from must not judge",
    )
    add_overlap_argument(parser)
    parser.add_argument("--device", type=str, help="such as cpu or cuda:1; default: the accelerator if there is one")


def check_judged(options: Namespace) -> None:
    """`check_models` of the models that a command's options name, and of those that made its generated volumes."""
    given = dict(options.items())
    splits = given.get("unseen") or [given.get("split") or "test"]
    models = [given.get("vae"), given.get("pipeline"), *given["models"]]
    others = [path for entry in given.get("extractor") or [] if Path(path := entry.partition("=")[2]).is_dir()]
    made: list[str] = []
    for key in ("synthetic", "judge_synthetic"):
        value = given.get(key) or []
        made += [value] if isinstance(value, str) else value
    check_models(
        options.data,
        splits,
        list(dict.fromkeys(path for path in models if path)),
        others=others,
        generated=[Path(folder) for folder in made if Path(folder).is_dir()],
        accepted=given["accept_overlap"],
    )


def precision_name(dtype: torch.dtype | None) -> str:
    """What a report says of the arithmetic."""
    return "float32" if dtype is None else str(dtype).removeprefix("torch.")
