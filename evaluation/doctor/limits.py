"""What evaluate.py will refuse to measure on these splits, said before a model is trained."""

from collections.abc import Sequence

from evaluation.studies.limits import Data, problems
from volumes import DataConfig

from .cases import (
    Examined,
    Finding,
    ok,
    warn,
)


def check_evaluation(examined: Sequence[Examined], config: DataConfig) -> list[Finding]:
    """A warning for each command that these data are too few or too small for; none where no volume is held out, which is said
    elsewhere."""
    if not any(one.case.split == "test" for one in examined):
        return []
    data = Data([one.case for one in examined], config, [one.model_shape for one in examined])
    commands = ["reconstruction", "realism", "privacy", "copies"]
    commands += ["shapes"] if config.image_labels else []
    commands += ["dice", "few_labels", "pretrain", "samplers"] if config.masks or config.phantom else []
    commands += ["conditions"] if config.classes else []
    findings, fine = [], []
    for command in commands:
        name = f"evaluation.{command}" if command in ("copies", "samplers") else f"evaluate.py {command}"
        if found := problems(command, data):
            message = f"{name} will refuse these splits: {'; '.join(found)}"
            findings.append(warn("evaluation", message, _remedy(command, found)))
        else:
            fine.append(command)
    return findings + ([ok("evaluation", f"the splits are large enough for {', '.join(fine)}")] if fine else [])


def _remedy(command: str, found: Sequence[str]) -> str:
    if all(one.startswith("--labels") for one in found):
        return "give such --labels, or leave the command out"
    if command == "conditions":
        return "put volumes of every class into both splits, or leave the command out"
    return (
        "add subjects, hold out more of them (data.test_fraction, or the column data.split), or leave the command out"
    )
