"""What every script and `python -m` command does with --help, mistyped arguments and users' mistakes."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "diffusers", "transformers", "monai", "accelerate", "matplotlib", "scipy", "nibabel", "pydicom")
MODULES = [f"evaluation.{name}" for name in ("copies", "doctor", "editing", "labels", "samplers")] + [
    "pipelines.to_dicom"
]
MODULES += [
    f"benchmarks.{name}"
    for name in (
        "choices",
        "equal_time",
        "finetuning",
        "generation",
        "headline",
        "processes",
        "report",
        "run",
        "survival",
    )
]
MODULES += ["docs.evidence"]
SCRIPTS = [
    "train_vae.py",
    "train_ldm.py",
    "generate.py",
    "evaluate.py",
    "demo.py",
    "docs/pictures.py",
    "weights/record.py",
    "weights/ship.py",
]
SCRIPTS += ["tests/fuzz.py", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("configs/**/prepare.py")))]
EVALUATIONS = (
    "reconstruction",
    "dice",
    "few_labels",
    "pretrain",
    "conditions",
    "realism",
    "shapes",
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
        for folder in (
            "",
            "volumes",
            "autoencoder",
            "diffusion",
            "pipelines",
            "training",
            "evaluation",
            "benchmarks",
            "docs",
            "weights",
        )
        for path in (ROOT / folder).glob("*.py")
        if "__main__" in path.read_text()
    }
    known = {f"{name.replace('.', '/')}.py" for name in MODULES} | {
        name for name in SCRIPTS if not name.startswith(("tests", "configs"))
    }
    assert mains - {"volumes/command.py"} == known


def test_help_and_mistyped_arguments_are_answered_before_torch_is_imported(tmp_path):
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
            assert status in (1, 2) and "error: " in err and not out, what
            assert "usage:" not in err and "Traceback" not in err and len(err.splitlines()) <= 2, what
    assert len(found) == len(commands)
    assert not list(tmp_path.iterdir())  # nothing was begun
