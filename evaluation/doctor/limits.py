"""Warn before a training of what evaluate.py will refuse to measure on these splits."""

from collections.abc import Sequence

from evaluation.studies.limits import Data, problems, table_numbers
from volumes import DataConfig

from .cases import (
    Examined,
    Finding,
    ok,
    warn,
)


def check_evaluation(examined: Sequence[Examined], config: DataConfig) -> list[Finding]:
    """Warn of each command for which these data are too few or too small. No warning without held-out volumes, which
    another check reports."""
    if not any(item.case.split == "test" for item in examined):
        return []
    data = Data([item.case for item in examined], config, [item.model_shape for item in examined])
    commands = ["reconstruction", "realism", "privacy", "copies"]
    commands += ["shapes"] if config.image_labels else []
    commands += ["dice", "few_labels", "pretrain", "samplers"] if config.masks or config.phantom else []
    commands += ["conditions"] if config.classes or table_numbers(config) else []
    commands += ["morphometry"] if config.empty_background else []
    findings, supported = [], []
    for command in commands:
        name = f"evaluation.{command}" if command in ("copies", "samplers") else f"evaluate.py {command}"
        if faults := problems(command, data):
            message = f"{name} will refuse these splits: {'; '.join(faults)}"
            findings.append(warn("evaluation", message, _remedy(command, faults)))
        else:
            supported.append(command)
    return findings + (
        [ok("evaluation", f"the splits are large enough for {', '.join(supported)}")] if supported else []
    )


def _remedy(command: str, faults: Sequence[str]) -> str:
    if all(fault.startswith("--labels") for fault in faults):
        return "give such --labels, or skip the command"
    if command == "conditions":
        return "put volumes of every class, and of several numbers, into both splits, or skip the command"
    return "add subjects, hold out more of them (data.test_fraction, or the column data.split), or skip the command"
