"""The console command `medvolume`, and the public API of `import medvolume`."""

import importlib.util
import os
import platform
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import medvolume
from cli import command

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def console(tmp_path):
    """Run the command as pip's launcher does, from a folder whose modules have the names of ours."""
    launcher = tmp_path / "bin" / "medvolume"
    launcher.parent.mkdir()
    launcher.write_text("import sys\nfrom medvolume import main\nsys.exit(main())\n")
    folder = tmp_path / "scans"
    for room in ("volumes", "training", "pipelines", "cli", "generate"):
        (folder / room).mkdir(parents=True)
        (folder / room / "__init__.py").write_text("raise SystemExit('the wrong module')\n")

    def run(*args):
        return subprocess.run(
            [sys.executable, str(launcher), *args],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
            capture_output=True,
            text=True,
        )

    return run


def test_pip_installs_the_command_and_its_modules():
    assert PROJECT["project"]["scripts"] == {"medvolume": "medvolume:main"}
    packaged = {*PROJECT["tool"]["setuptools"]["packages"], *PROJECT["tool"]["setuptools"]["py-modules"]}
    assert {"medvolume", *(entry.module for entry in medvolume.COMMANDS.values())} <= packaged
    for entry in medvolume.COMMANDS.values():
        assert importlib.util.find_spec(entry.module) is not None, entry


def test_help_lists_every_command(console):
    done = console("--help")
    assert done.returncode == 0, done.stderr
    for name, entry in medvolume.COMMANDS.items():
        assert f"{name:<12} {entry.help}" in done.stdout


def test_version_names_packages_and_machine(console):
    """A bug report needs both; a package that is missing is said to be."""
    done = console("--version")
    assert done.returncode == 0, done.stderr
    ours, python, packages, machine = done.stdout.splitlines()
    assert ours.startswith(f"medvolume {PROJECT['project']['version']}") or "(not installed)" in ours
    assert python.startswith(f"Python {platform.python_version()}, ")
    assert f"torch {version('torch')}, diffusers {version('diffusers')}" in packages
    assert re.search(r"\d+ cores?, \d+ GiB of memory, .+$", machine)
    assert medvolume.installed("a package that nobody has") == "(not installed)"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "raise OSError('libcudart.so.12: cannot open shared object file\\nmore')",
            "libcudart.so.12: cannot",
        ),
        ("raise ModuleNotFoundError", "ModuleNotFoundError"),
    ],
)
def test_version_says_why_torch_cannot_be_imported(console, tmp_path, code, reason):
    """A package beside the launcher is imported before the installed one."""
    (tmp_path / "bin/torch").mkdir(parents=True)
    (tmp_path / "bin/torch/__init__.py").write_text(f"{code}\n")
    done = console("--version")
    assert done.returncode == 0, done.stderr
    *_, machine, torch = done.stdout.splitlines()
    assert machine.endswith("GiB of memory, GPU unknown") and "more" not in done.stdout
    assert torch.startswith(f"torch: cannot be imported ({reason}") and torch.endswith(")")


@pytest.mark.parametrize("name", medvolume.COMMANDS)
def test_users_modules_do_no_harm(console, name):
    """Each command says its own name, also where the working directory has a `volumes` and a `training`."""
    done = console(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:3] == ["usage:", "medvolume", name] and "wrong module" not in done.stderr


def test_mistakes_name_the_command(console):
    done = console("genrate")
    assert done.returncode == 2 and "did you mean generate?" in done.stderr
    done = console("generate", "--mask", "x", "--pipelin", "y")
    assert done.returncode == 2 and done.stderr.startswith("medvolume generate: error: ")


def test_a_mistake_in_a_value_names_the_command(tmp_path, monkeypatch, capsys):
    """In this process, which has imported what the command imports after its arguments."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(command, "_console", [])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        medvolume.main(["generate", "--pipeline", "none", "--output", "out", "--masks", "none.nii.gz"])
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count("\n") == 1, said
    assert said.startswith("medvolume generate: error: ")


def test_a_message_repeats_what_was_typed(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert command.command_line("train_vae.py", "--config", "a b.yaml") == "python train_vae.py --config 'a b.yaml'"
    monkeypatch.setattr(command, "_console", ["medvolume train-vae", "train_vae"])
    assert command.command_line("train_vae.py", "--resume", "latest") == "medvolume train-vae --resume latest"


def test_the_public_names_are_there():
    for name in medvolume.__all__:
        assert getattr(medvolume, name).__name__ == name
    assert set(medvolume.__all__) <= set(dir(medvolume))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        medvolume.Nothing  # noqa: B018
