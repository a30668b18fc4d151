"""What people see first: imports are quick, nothing of other libraries is printed, and Ctrl-C ends in one line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.phantom_set import write_phantoms

ROOT = Path(__file__).resolve().parents[2]
MASK = ROOT / "weights/hippocampus/masks/hippocampus_015.nii.gz"
MAIN = "from medvolume import main; main()"


def run(*words: str | Path, code: str = MAIN, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `medvolume` in a folder, as pip's launcher does, with its outputs in pipes."""
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "TERM": "xterm-256color", **environment},
        capture_output=True,
        text=True,
    )


def test_the_import_needs_no_large_package(tmp_path):
    """Those take seconds; `import medvolume` takes 0.3 at most."""
    code = "import sys, medvolume; print(*{'torch', 'numpy', 'diffusers', 'monai', 'nibabel', 'yaml'} & {*sys.modules})"
    assert run(code=code, folder=tmp_path).stdout.split() == []


@pytest.mark.slow  # a time, which a busy machine may exceed
def test_the_import_takes_a_third_of_a_second(tmp_path):
    """In seconds of the processor, so that other programs on the machine do not count; the best of three."""
    code = "import time; import medvolume; print(time.process_time())"
    took = [float(run(code=code, folder=tmp_path).stdout) for _ in range(3)]
    assert min(took) < 0.3, took


def foreign(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The words of other libraries, colors and bars in what a command printed, which succeeded."""
    text = done.stdout + done.stderr
    assert done.returncode == 0 and done.stdout, text
    words = ("\x1b", "Warning", "warn(", "site-packages", "Loading pipeline", "it/s")
    return [text for word in words if word in text]


@pytest.mark.slow
def test_generation_prints_nothing_of_other_libraries(tmp_path):
    pipeline = ROOT / "weights/hippocampus"
    words = ["generate", "--pipeline", pipeline, "--masks", MASK, "--steps", "1", "--output", "out"]
    assert foreign(run(*words, folder=tmp_path)) == []


@pytest.mark.slow
def test_the_doctor_prints_nothing_of_other_libraries(tmp_path):
    section = write_phantoms(tmp_path / "set", range(3), tests=1)
    (tmp_path / "vae.yaml").write_text(yaml.safe_dump({"output": "out", "data": section}))
    assert foreign(run("doctor", "--config", "vae.yaml", folder=tmp_path)) == []


INTERRUPT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT"]:
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from medvolume import main
main()
"""


@pytest.mark.parametrize("module", ["cli.generation", "torch", pytest.param("diffusers", marks=pytest.mark.slow)])
def test_ctrl_c_while_a_command_is_imported_is_one_line(module, tmp_path):
    words = ["generate", "--pipeline", "p", "--masks", "m.nii.gz", "--output", "out"]
    done = run(*words, code=INTERRUPT, folder=tmp_path, INTERRUPT=module)
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "medvolume generate: interrupted\n"), done.stderr
    assert not list(tmp_path.iterdir())
