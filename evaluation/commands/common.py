"""How a command of evaluate.py is run, and what its report says of that."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from jsonargparse import Namespace

from cli.stopping import finishing
from evaluation.data.seen import check_models
from evaluation.report import check_report, only_writer_of
from pipelines.storage.loading import find_autoencoder

from .arguments import Command


def run_command(
    command: Command, options: Namespace, device: torch.device, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Run it in all processes or in the main one alone, as it wants. Returns the report; {} in those that only waited."""
    state = PartialState()
    if command.divides:  # it says itself what is finished when a signal comes
        with holding(command, options):
            if state.is_main_process:
                check_first(command, options)
            report = command.run(options, device, dtype)
            state.wait_for_everyone()
        return report
    try:
        if not state.is_main_process:
            return {}
        with holding(command, options):
            check_first(command, options)
            with finishing(f"{command.name}, whose report is written at its end"):
                return command.run(options, device, dtype)
    finally:
        state.wait_for_everyone()


def holding(command: Command, options: Namespace) -> AbstractContextManager[None]:
    """Hold a command's report against other processes, in the main process. Of a folder evaluate.py does so, from before the first
    volume is generated (`holding_folder`)."""
    if command.makes_folder or not PartialState().is_main_process:
        return nullcontext()
    return only_writer_of(options.output, options.wait_minutes)


def holding_folder(command: Command, options: Namespace) -> AbstractContextManager[None]:
    """Hold the folder that a command writes to, if it writes to one, in the main process."""
    if not command.makes_folder or not PartialState().is_main_process:
        return nullcontext()
    return only_writer_of(Path(options.output) / "report.html", options.wait_minutes)


def check_first(command: Command, options: Namespace) -> None:
    """Raises: ValueError for what would else stop a command after its work: a wrong path, judges that a model has seen, a report that
    cannot be written."""
    if vae := options.get("vae"):
        find_autoencoder(vae)
    for entry in options.get("extractor") or []:
        if (path := entry.partition("=")[2]) and not Path(path).exists():
            raise ValueError(f"--extractor {entry}: no such file or folder")
    if command.reads_data:
        check_judged(options)
    output = Path(options.output)
    check_report(output / "report.html" if command.makes_folder else output)


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
