"""The benchmark of fine-tuning: what is kept of a run that was stopped, and what is not."""

import json
from pathlib import Path

import pytest

from benchmarks.learning import finetuning


@pytest.fixture
def commands(monkeypatch):
    """The commands that it runs, which here only leave the files that are looked for."""
    ran = []

    def run(*command):
        ran.append([str(part) for part in command])
        output = Path(ran[-1][ran[-1].index("--output") + 1])
        if "evaluation.data.label_budget" in ran[-1] or "dice" in ran[-1]:
            output.parent.mkdir(parents=True, exist_ok=True)
            arm = {"16_real_volumes": 0.8, "fine-tuned": 0.9, "LoRA": 0.7, "from_scratch": 0.5}.get(output.parent.name)
            output.write_text(json.dumps({"scores": {"any": [{"dice": arm}]}}))
        elif "train_ldm.py" in ran[-1] and "stop" in ran:
            raise KeyboardInterrupt

    monkeypatch.setattr(finetuning, "run", run)
    return ran


def test_differences_are_from_training_from_scratch(commands, tmp_path):
    report = finetuning.main(["--output", str(tmp_path / "r.json"), "--seeds", "2"])
    differences = {arm: found["mean"] for arm, found in report["less_from_scratch"].items()}
    assert differences == pytest.approx({"16 real volumes": 0.3, "fine-tuned": 0.4, "LoRA": 0.2})


def test_figures_of_other_settings_are_not_kept(commands, tmp_path):
    """Nor those of a run that was stopped before its first figure."""
    commands.append("stop")
    arguments = ["--output", str(tmp_path / "r.json"), "--seeds", "1"]
    with pytest.raises(KeyboardInterrupt):
        finetuning.main(arguments)
    with pytest.raises(ValueError, match="r.json: was begun with another count, steps; choose another folder"):
        finetuning.main([*arguments, "--steps", "5", "--count", "2"])
    commands.clear()
    assert set(finetuning.main(arguments)["dice"]) == {finetuning.REAL, *finetuning.ARMS}
    trainings = [command for command in commands if "train_ldm.py" in command]
    assert len(trainings) == 3  # each goes on from its own checkpoint, where it has one
    assert all(command[command.index("--resume") + 1] == "latest" for command in trainings)
