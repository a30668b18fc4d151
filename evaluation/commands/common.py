"""What all commands of evaluate.py share: how a command runs, the checks before its work, and the report that it
writes."""

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from jsonargparse import Namespace

from cli.stopping import finishing
from evaluation.data.seen import check_models
from evaluation.report import check_report, only_writer_of, provenance, write_report
from pipelines.storage.loading import find_autoencoder

from .arguments import Command

INPUTS = ("synthetic", "judge_synthetic", "vae", "pipeline")  # options that a report repeats


def run_command(
    command: Command, options: Namespace, device: torch.device, dtype: torch.dtype | None
) -> dict[str, object]:
    """Run a command in all processes, or in the main process alone. Returns the report; {} in processes that only
    waited."""
    state = PartialState()
    if command.divides:  # such a command calls `finishing` for each part of its work
        with lock_report(command, options):
            if state.is_main_process:
                check_first(command, options)
            report = command.run(options, device, dtype)
            state.wait_for_everyone()
        print_path(command, options)
        return report
    try:
        if not state.is_main_process:
            return {}
        with lock_report(command, options):
            check_first(command, options)
            with finishing(f"{command.name}, whose report is written at its end"):
                report = command.run(options, device, dtype)
        print_path(command, options)
        return report
    finally:
        state.wait_for_everyone()


def print_path(command: Command, options: Namespace) -> None:
    """Print the path of a command's report, in the main process. Commands that write a page print its path
    themselves."""
    if PartialState().is_main_process and not command.makes_folder:
        print(f"report: {options.output}", flush=True)


def lock_report(command: Command, options: Namespace) -> AbstractContextManager[None]:
    """Lock a command's report against other processes, in the main process. Folders are locked earlier, before the
    first volume is generated (`lock_folder`)."""
    if command.makes_folder or not PartialState().is_main_process:
        return nullcontext()
    return only_writer_of(options.output, options.wait_minutes)


def lock_folder(command: Command, options: Namespace) -> AbstractContextManager[None]:
    """Lock the folder of a command that writes to a folder, in the main process."""
    if not command.makes_folder or not PartialState().is_main_process:
        return nullcontext()
    return only_writer_of(Path(options.output) / "report.html", options.wait_minutes)


def check_first(command: Command, options: Namespace) -> None:
    """Check before the work what would stop a command after it.

    Raises: ValueError for a wrong path, a test set that a model was trained on, and a report that cannot be written.
    """
    if vae := options.get("vae"):
        find_autoencoder(vae)
    for entry in options.get("extractor") or []:
        if (path := entry.partition("=")[2]) and not Path(path).exists():
            raise ValueError(f"--extractor {entry}: no such file or folder")
    if command.reads_data:
        check_test_set(options)
    output = Path(options.output)
    check_report(output / "report.html" if command.makes_folder else output)


def check_test_set(options: Namespace) -> None:
    """Check the models that the options name and those that generated the volumes, as `check_models`."""
    splits = options.get("unseen") or [options.get("split") or "test"]
    models = [options.get("vae"), options.get("pipeline"), *options.models]
    others = [path for entry in options.get("extractor") or [] if Path(path := entry.partition("=")[2]).is_dir()]
    folders: list[str] = []
    for key in ("synthetic", "judge_synthetic"):
        value = options.get(key) or []
        folders += [value] if isinstance(value, str) else value
    check_models(
        options.data,
        splits,
        list(dict.fromkeys(path for path in models if path)),
        others=others,
        generated=[Path(folder) for folder in folders if Path(folder).is_dir()],
        accepted=options.accept_overlap,
    )


def describe_study(name: str, options: Namespace, result: Mapping[str, object]) -> dict[str, object]:
    """Make the report of a command: its name, the result, the inputs that the options name, the data and the
    provenance."""
    inputs = {key: options[key] for key in INPUTS if key in options and key not in result}
    return {"evaluation": name, **result, **inputs, "data": dataclasses.asdict(options.data), **provenance()}


def write_study(name: str, options: Namespace, result: Mapping[str, object]) -> dict[str, object]:
    """Write the report of a command (`describe_study`) to `--output` and return it."""
    report = describe_study(name, options, result)
    write_report(options.output, report)
    return report


def precision_name(dtype: torch.dtype | None) -> str:
    """Return the name of the precision for a report."""
    return "float32" if dtype is None else str(dtype).removeprefix("torch.")
