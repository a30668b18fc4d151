"""What every script and `python -m` command does with --help, mistyped arguments and users' mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli.command import (
    INTERRUPTED,
    ROOMS,
    ArgumentParser,
    CannotContinue,
    at_home,
    error_line,
    first_to_say,
    nearest,
    next_step,
    unknown_options,
    users_message,
)
from volumes.data.config_parser import ConfigParser, config_files

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "diffusers", "transformers", "monai", "accelerate", "matplotlib", "scipy", "nibabel", "pydicom")
MODULES = [
    "reader_study",
    "recipes",
    "studio",
    "evaluation.doctor",
    "evaluation.copies.fingerprints",
    "evaluation.data.label_budget",
]
# Those of MODULES that are packages.
PACKAGES = ("benchmarks.seeds", "tools.figures", "reader_study", "recipes", "studio", "evaluation.doctor")
MODULES += ["evaluation.studies.edit_borders", "evaluation.studies.samplers", "pipelines.storage.to_dicom"]
MODULES += [
    f"benchmarks.{name}"
    for name in (
        "speed.choices",
        "speed.before_after",
        "cohort",
        "equal_time",
        "evaluation_size",
        "full_size",
        "learning.finetuning",
        "generation",
        "group_norm_page",
        "group_norm_streaming",
        "prepared",
        "speed.headline",
        "processes",
        "speed.report",
        "speed.run",
        "stages",
        "survival",
        "learning.shift_page",
        "distillation.compare",
        "distillation.measure",
        "distillation.page",
        "learning.per_step_page",
        "learning.per_step",
        "learning.lesions_page",
        "seeds",
        "seeds.worker",
        "learning.small_lesions",
        "learning.timestep_shift",
    )
]
MODULES += [
    f"tools.{name}"
    for name in (
        "cluster_page",
        "evidence",
        "figures",
        "goals_page",
        "mutants",
        "pictures",
        "quickstart",
        "robust_page",
        "samplers_page",
        "scale_page",
        "settings_page",
        "ship",
        "studio_animation",
        "studio_pictures",
        "studio_times",
    )
]
SCRIPTS = [
    "convert.py",
    "train_vae.py",
    "train_ldm.py",
    "generate.py",
    "edit.py",
    "evaluate.py",
    "demo.py",
    "medvolume.py",
    "prepare.py",
]
SCRIPTS += [
    "tests/helpers/fuzz.py",
    *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("configs/**/prepare.py"))),
]
EVALUATIONS = (
    "reconstruction",
    "dice",
    "few_labels",
    "pretrain",
    "conditions",
    "adherence",
    "realism",
    "shapes",
    "morphometry",
    "privacy",
    "report",
    "all",
)
# Runs commands as Python does, in one process, for none of them may import anything heavy; prints what each said.
RUNNER = """
import contextlib, io, json, runpy, sys
heavy, commands = json.loads(sys.stdin.read())
found = []
for kind, name, *args in commands:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if kind == "-m":
                sys.argv = ["-m", *args]
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                sys.argv = [name, *args]
                runpy.run_path(name, run_name="__main__")
            status = None
        except SystemExit as end:
            status = end.code
    loaded = sorted(set(heavy) & set(sys.modules))
    found.append([kind, name, args, status, out.getvalue(), err.getvalue(), loaded])
    if loaded:
        break
print(json.dumps(found))
"""


def run_all(commands, folder):
    """[kind, name, arguments, status, stdout, stderr, heavy modules] of each command."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([HEAVY, commands]),
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_every_command_is_known_to_this_test():
    mains = {
        str(path.relative_to(ROOT))
        for folder in ("", *ROOMS)
        for path in ((ROOT / folder).rglob("*.py") if folder else ROOT.glob("*.py"))
        if "__main__" in path.read_text()
    }
    known = (
        {f"{name.replace('.', '/')}.py" for name in MODULES if name not in PACKAGES}
        | {f"{name.replace('.', '/')}/__main__.py" for name in PACKAGES}
        | {name for name in SCRIPTS if not name.startswith(("tests", "configs"))}
    )
    quoting = {
        "cli/command.py",
        "benchmarks/short_training.py",
        "evaluation/report.py",
    }  # they write it for programs of others
    assert mains - quoting == known


def test_help_and_mistyped_arguments_need_no_import_of_torch(tmp_path):
    every = [("-m", name) for name in MODULES] + [("", str(ROOT / name)) for name in SCRIPTS]
    every += [("", str(ROOT / "evaluate.py"), name) for name in EVALUATIONS]
    commands = [[*command, "--help"] for command in every] + [[*command, "--mistyped"] for command in every]
    found = run_all(commands, tmp_path)
    for _, name, args, status, out, err, loaded in found:
        what = f"{name} {' '.join(args)}\n{out}{err}"
        assert not loaded, what
        if args[-1] == "--help":
            assert status == 0 and "--traceback" in out and not err, what
        else:
            assert status == 2 and "error: " in err and not out, what
            assert "usage:" not in err and "Traceback" not in err and len(err.splitlines()) <= 2, what
    assert len(found) == len(commands)
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_mistakes_in_files_of_settings_are_wrong_arguments(tmp_path):
    """They end with the same status as a mistyped option; a mistake that is found later does not."""
    config = tmp_path / "vae.yaml"
    config.write_text("loop: {max_steps: many}\n")
    found = run_all([["", str(ROOT / "train_vae.py"), "--config", str(config)]], tmp_path)
    assert found[0][3] == 2 and "loop.max_steps: got 'many'" in found[0][5]


def test_an_interrupt_while_arguments_are_imported_is_one_line(tmp_path):
    """Of the scripts that train: their settings take 0.3 s to import."""
    (tmp_path / "jsonargparse.py").write_text("raise KeyboardInterrupt\n")
    for name in ("train_vae.py", "train_ldm.py"):
        done = run_script(ROOT / name, "--help", PYTHONPATH=str(tmp_path))
        assert (done.returncode, done.stderr) == (INTERRUPTED, f"{name}: interrupted\n"), done.stderr


def test_the_next_command_is_quoted_and_said_once(tmp_path, monkeypatch, capsys):
    """As a script, or as the console command if that runs."""
    monkeypatch.chdir(tmp_path)
    words = ["--config", tmp_path / "my ldm.yaml", "--vae", Path("/else/a\x1bb")]
    shown = "--config 'my ldm.yaml' --vae '/else/a\\x1bb'\n"
    next_step("train_ldm.py", *words)
    found = capsys.readouterr()
    assert found.err == f"next: python {ROOT / 'train_ldm.py'} {shown}" and not found.out
    monkeypatch.chdir(ROOT)
    next_step("train_ldm.py")
    assert capsys.readouterr().err == "next: python train_ldm.py\n"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cli.command._console", ["medvolume train-vae", "train_vae"])
    next_step("train_ldm.py", *words)
    assert capsys.readouterr().err == f"next: medvolume train-ldm {shown}"
    monkeypatch.setenv("RANK", "1")
    next_step("train_ldm.py", *words)
    assert not capsys.readouterr().err


def script(folder, body):
    """A command that does `body` in its main."""
    path = folder / "command.py"
    path.write_text(
        "from cli.command import ArgumentParser, run_command\n"
        "def parse(args):\n    return ArgumentParser(description='x').parse_args(args)\n"
        "if __name__ == '__main__':\n    run_command(lambda: parse(None))\n"
        f"def main(args=None):\n    parse(args)\n    {body}\n"
    )
    return path


def run_script(path, *args, **environment):
    command = [sys.executable, str(path), *args]
    return subprocess.run(command, env={"PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (
            "raise ValueError('a.nii: is broken; fetch it')",
            1,
            "command.py: error: a.nii: is broken; fetch it (--traceback shows where)\n",
        ),
        (
            "open('/nowhere/x')",
            1,
            "command.py: error: /nowhere/x: No such file or directory; check the path (--traceback shows where)\n",
        ),
        ("open('/')", 1, "command.py: error: /: Is a directory; give a file (--traceback shows where)\n"),
        (
            "import nowhere",
            1,
            "command.py: error: No module named 'nowhere'; pip install it, or run this with .venv/bin/python",
        ),
        ("raise KeyboardInterrupt", INTERRUPTED, "command.py: interrupted\n"),
        ("from tqdm import tqdm; list(tqdm([1]))", 0, ""),  # a bar of another library
        ("return 3", 3, ""),
        ("return {}", 0, ""),
    ],
)
def test_a_users_mistake_is_one_message(tmp_path, body, status, said):
    done = run_script(script(tmp_path, body))
    assert (done.returncode, done.stdout) == (status, "") and done.stderr.startswith(said), done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == bool(said)


def test_bugs_and_the_traceback_option_show_the_traceback(tmp_path):
    for body in ("assert False, 'ours'", "raise TypeError('ours')", "import evaluation.nowhere"):
        done = run_script(script(tmp_path, body))
        assert done.returncode == 1 and "Traceback" in done.stderr, body
    done = run_script(script(tmp_path, "raise ValueError('theirs')"), "--traceback")
    assert done.returncode == 1 and "Traceback" in done.stderr and "ValueError: theirs" in done.stderr


def test_torchrun_processes_print_an_error_once_and_report_it(tmp_path):
    """Only rank 0 prints; each process writes the error for the launcher."""
    path = script(tmp_path, "raise ValueError('no mask')")
    said = []
    for rank in range(2):
        (tmp_path / "attempt_0" / str(rank)).mkdir(parents=True)
        file = tmp_path / "attempt_0" / str(rank) / "error.json"
        said.append(run_script(path, TORCHELASTIC_ERROR_FILE=str(file)).stderr)
        assert json.loads(file.read_text())["message"]["message"] == "no mask"
    assert "no mask" in said[0] and said[1] == ""
    assert "no mask" in run_script(path, TORCHELASTIC_ERROR_FILE="/nowhere/0/error.json").stderr


def test_errors_of_loader_processes_are_shown_without_frames():
    from torch._utils import ExceptionWrapper

    from volumes import VolumeError

    def reraised(error):
        try:
            try:
                raise KeyError("cause")
            except KeyError as cause:
                raise error from cause
        except Exception:
            wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
        try:
            wrapped.reraise()
        except Exception as final:
            return final

    assert users_message(reraised(VolumeError("a.nii: is broken:\n  here"))) == "a.nii: is broken:\n  here"
    assert users_message(reraised(FileNotFoundError(2, "No such file or directory", "a.nii"))) == (
        "[Errno 2] No such file or directory: 'a.nii'"
    )
    cannot_be_built_again = UnicodeDecodeError("utf-8", b"x", 0, 1, "invalid start byte")
    assert "invalid start byte" in (users_message(reraised(cannot_be_built_again)) or "")
    for ours in (TypeError("x"), KeyError("x"), AssertionError("x"), RuntimeError("x")):
        assert users_message(reraised(ours)) is None


def test_kin_of_users_mistakes():
    import safetensors.torch
    import torch
    import yaml

    from training.engine.processes import PeerFailure

    assert (
        users_message(CannotContinue("the disk is full"))
        == users_message(PeerFailure("the disk is full"))
        == "the disk is full"
    )
    noted = ValueError("x")
    noted.add_note("y")
    assert users_message(noted) == "x\ny"
    with pytest.raises(safetensors.SafetensorError) as damaged:
        safetensors.torch.load(b"nonsense!")
    with pytest.raises(yaml.YAMLError) as syntax:
        yaml.safe_load("[")
    for error in (
        damaged.value,
        syntax.value,
        EOFError("ended early"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out"),
    ):
        assert users_message(error), error
    assert "smaller batches" in (users_message(torch.OutOfMemoryError("CUDA out of memory")) or "")
    for error in (TypeError("x"), AssertionError("x"), RuntimeError("x"), KeyError("x"), AttributeError("x")):
        assert users_message(error) is None


OPTIONS = ("--config", "--loop", "--loop.max_steps", "--loop.batch_size", "--model", "--output", "-h", "--help")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--confgi", "--config"),
        ("--loop.max_stepz=3", "--loop.max_steps"),
        ("--max_steps", "--loop.max_steps"),
        ("--loop.batchsize", "--loop.batch_size"),
        ("--something_else", None),
    ],
)
def test_the_option_that_was_meant_is_named(typed, meant):
    (word,) = unknown_options([typed, "x"], OPTIONS)
    assert nearest(word, OPTIONS) == meant
    line = error_line("train.py", f"unrecognized arguments: {typed} x", [typed, "x"], OPTIONS)
    assert line.endswith(
        f"; {word}: did you mean {meant}? See train.py --help\n" if meant else "x. See train.py --help\n"
    )


def test_options_that_are_known_are_not_doubted():
    assert unknown_options(["--outp", "--model.width=3", "--loop.max_steps", "3", "--", "--nonsense"], OPTIONS) == []
    line = error_line(
        "evaluate.py", "argument subcommand: invalid choice: 'dicee' (choose from 'dice', 'all')", ["dicee"], []
    )
    assert line.endswith("; dicee: did you mean dice? See evaluate.py --help\n")


def test_parsers_fail_in_one_line_and_hide_the_traceback_option(capsys):
    """The option leaves no attribute in the parsed arguments."""
    for parser in (ArgumentParser(prog="x.py"), ConfigParser(prog="x.py")):
        parser.add_argument("--count", type=int, default=1)
        assert dict(vars(parser.parse_args(["--traceback"]))) == {"count": 1}
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(["--cuont", "3"])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert (
            said == "x.py: error: unrecognized arguments: --cuont 3; --cuont: did you mean --count? See x.py --help\n"
        )


def test_the_home_folder_is_expanded_where_no_shell_does_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/u")
    typed = ["--output=~/x", "--vae", "~/y", "own=~/z", "generate:~/m", "--title=~ about", "a~/b", "~"]
    expected = ["--output=/home/u/x", "--vae", "/home/u/y", "own=/home/u/z", "generate:/home/u/m", *typed[5:]]
    assert at_home(typed) == expected
    for parser in (ArgumentParser(prog="x.py"), ConfigParser(prog="x.py")):
        parser.add_argument("--output", type=str)
        assert parser.parse_args(["--output=~/x"]).output == "/home/u/x"


def test_config_files_that_cannot_be_are_refused_by_name(tmp_path):
    whole, empty, text, syntax = (tmp_path / f"{name}.yaml" for name in ("whole", "empty", "text", "syntax"))
    whole.write_text("a: 1\n")
    empty.write_text("# nothing\n")
    text.write_text("only text\n")
    syntax.write_text("a: [1\n")
    found = config_files(["--config", str(whole), f"--config={whole}", "--other"])
    assert [(file.path, file.settings) for file in found] == [(whole, {"a": 1})] * 2
    for path, said in (
        (tmp_path / "nowhere.yaml", "no such file; check the path"),
        (tmp_path, "is not a file; give a YAML file"),
        (empty, "is empty; give a config"),
        (text, "holds str, not settings by name"),
        (syntax, "is not readable YAML"),
    ):
        with pytest.raises(ValueError, match=said) as refused:
            config_files(["--config", str(path)])
        assert str(path) in str(refused.value)


def test_the_launcher_is_told_only_where_there_is_one(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert first_to_say("x") and first_to_say("x")


def test_a_device_that_is_not_there_is_refused_by_name():
    import torch

    from volumes.devices import find_device

    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cudaa: .*give cpu"):
        find_device("cudaa")
    with pytest.raises(ValueError, match="--device cuda:99: .*give cpu"):
        find_device("cuda:99")


def test_arguments_that_are_missing_are_named_as_they_are_typed(capsys):
    parser = ConfigParser(prog="x.py")
    parser.add_argument("--output", type=str, required=True)
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert capsys.readouterr().err == "x.py: error: the following arguments are required: --output. See x.py --help\n"
