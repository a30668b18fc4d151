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


def test_the_import_takes_a_third_of_a_second(tmp_path):
    """In seconds of the processor, so that other programs on the machine do not count; the best of three."""
    code = "import time; import medvolume; print(time.process_time())"
    took = [float(run(code=code, folder=tmp_path).stdout) for _ in range(3)]
    assert min(took) < 0.3, took


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What generation and the doctor print, into pipes."""
    folder = tmp_path_factory.mktemp("screen")
    section = write_phantoms(folder / "set", range(3), tests=1)
    (folder / "vae.yaml").write_text(yaml.safe_dump({"output": "out", "data": section}))
    pipeline = ROOT / "weights/hippocampus"
    return {
        "generate": run(
            "generate", "--pipeline", pipeline, "--masks", MASK, "--steps", "1", "--output", "o", folder=folder
        ),
        "doctor": run("doctor", "--config", "vae.yaml", folder=folder),
    }


@pytest.mark.parametrize("command", ["generate", "doctor"])
def test_no_other_library_speaks_and_pipes_have_no_colors(said, command):
    done = said[command]
    for text in (done.stdout, done.stderr):
        assert "\x1b" not in text and "\r" not in text, text
    for word in ("Warning", "warn(", "site-packages", "Traceback", "Loading pipeline"):
        assert word not in done.stderr + done.stdout, done.stderr + done.stdout


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


@pytest.mark.parametrize("module", ["cli.generation", "torch", "diffusers", "pipelines.pipeline"])
def test_ctrl_c_while_a_command_is_imported_is_one_line(module, tmp_path):
    words = ["generate", "--pipeline", "p", "--masks", "m.nii.gz", "--output", "out"]
    done = run(*words, code=INTERRUPT, folder=tmp_path, INTERRUPT=module)
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "medvolume generate: interrupted\n"), done.stderr
    assert not list(tmp_path.iterdir())
