"""The command that a report records runs again as it stands."""

import sys

import pytest

from evaluation import report

COMMANDS = [
    (["-m", "benchmarks.prepared"], "benchmarks/prepared.py", "-m benchmarks.prepared"),
    (["-m", "evaluation.doctor"], "evaluation/doctor/__main__.py", "-m evaluation.doctor"),
    (["evaluate.py"], "evaluate.py", "evaluate.py"),
    (["benchmarks/prepared.py"], "benchmarks/prepared.py", "benchmarks/prepared.py"),
]


@pytest.mark.parametrize(("typed", "file", "recorded"), COMMANDS)
def test_a_module_is_recorded_by_its_name(typed, file, recorded, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", *typed, "--count", "2"])
    monkeypatch.setattr(sys, "argv", [str(report.ROOT / file), "--count", "2"])
    assert report.provenance()["command"] == f"python {recorded} --count 2"


def test_a_script_outside_the_clone_is_recorded_by_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "tool.py")])
    assert report.program() == "tool.py"
