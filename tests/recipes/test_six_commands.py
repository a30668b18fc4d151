"""From a folder of scans to a report in six commands, for each layout: no file is edited, and each command is the one
that was printed before it."""

import json
import re
import shlex
from functools import partial
from pathlib import Path

import layouts as made
import pytest
import yaml
from accelerate.state import AcceleratorState

import evaluate
import generate
import train_ldm
import train_vae
from evaluation.doctor import __main__ as doctor
from recipes.__main__ import main as init
from volumes import read_volume

SHORT = ["--loop.max_steps=2", "--loop.batch_size=2", "--loop.validate_every=0", "--loop.checkpoint_every=2"]
SHORT += ["--loop.trackers=[]", "--loop.previews=0", "--optimizer.warmup_steps=0"]
FEW = ["--steps", "2"]  # of denoising
COMMANDS = [
    ("evaluation.doctor", doctor.main, []), ("train_vae.py", train_vae.main, SHORT),
    ("train_ldm.py", train_ldm.main, [*SHORT, "--cache.versions=1", "--inference_steps=2"]),
    ("generate.py", generate.main, FEW), ("evaluate.py", evaluate.main, []),
]  # fmt: skip
SUBJECTS = 12  # of which 4 are held out, as many as realism needs
LAYOUTS = {
    "flat": (made.flat, []),
    "pairs": (made.pairs, []),
    "regridded": (made.regridded, []),
    "patients": (made.patients, ["--classes", "sex", "--numbers", "age"]),
    "nnunet": (made.nnunet, []),
    "nnunet_v1": (made.nnunet_v1, []),
    "decathlon": (made.decathlon, []),
    "bids": (made.bids, ["--numbers", "age"]),
    "totalsegmentator": (made.totalsegmentator, []),
    "listed": (partial(made.listed, tests=4), ["--classes", "grade"]),
    "dicom": (partial(made.dicom, slices=9), []),
    "outlined": (made.outlined, []),
}
QUICK = ("nnunet",)  # in every run; the others with `make test-slow`


def next_line(text: str) -> list[str]:
    """The words of the command that follows `next: `."""
    return shlex.split(re.findall(r"^next: (.*)$", text, re.MULTILINE)[-1])


def run_all(folder: Path, capsys, options: list[str], quick: bool = True) -> list[list[str]]:
    """Run the six commands in the working directory, or the five of a LoRA. Returns the words of those that were
    printed: all but the first."""
    assert init([str(folder), *(["--quick"] if quick else []), *options]) == 0
    printed = [shlex.split(one) for one in capsys.readouterr().out.partition("next, in this order:")[2].splitlines()]
    commands = [words for words in printed if words]
    trained = [one for one in COMMANDS if one[0] != "train_vae.py" or Path("recipe/vae.yaml").is_file()]
    for number, (script, main, short) in enumerate(trained):
        words = commands[number]
        arguments = words[3:] if words[1] == "-m" else words[2:]
        assert words[0] == "python" and typed(words) == script, words
        AcceleratorState._reset_state(reset_partial_state=True)
        returned = main([*arguments, *short])
        said = capsys.readouterr()
        if script == "evaluation.doctor":
            assert returned in (None, 0), said.out
        if script == "generate.py":
            commands.append(next_line(said.err))
    return commands


def typed(words: list[str]) -> str:
    """The script or module of a command."""
    return words[2] if words[1] == "-m" else Path(words[1]).name


def check_layout(name: str, folder: Path, capsys) -> list[str]:
    """Run the commands on a layout, and check what they leave. Returns the scripts of those that were printed."""
    make, options = LAYOUTS[name]
    make(folder / "scans", SUBJECTS)
    commands = run_all(Path("scans"), capsys, options)
    data = yaml.safe_load((folder / "recipe/data.yaml").read_text())
    channels = list(data["images"]) if isinstance(data["images"], dict) else [""]
    (manifest,) = (folder / "recipe/generated").glob("manifest.csv")
    rows = manifest.read_text().splitlines()[1:]
    assert len(rows) >= 4
    for path in (folder / "recipe/generated").glob("*.nii.gz"):
        assert read_volume(path).array.std() > 0, path
    found = len(list((folder / "recipe/generated").glob("*.nii.gz")))
    assert found == len(rows) * len(channels), found
    report = Path(commands[-1][commands[-1].index("--output") + 1])
    realism = json.loads((folder / report / "realism.json").read_text())
    assert (folder / report / "report.html").is_file() and realism["evaluation"] == "realism"
    return [typed(words) for words in commands]


@pytest.mark.parametrize("name", QUICK)
def test_six_commands(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert check_layout(name, tmp_path, capsys) == [script for script, *_ in COMMANDS]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - set(QUICK)))
def test_six_commands_for_every_layout(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert check_layout(name, tmp_path, capsys) == [script for script, *_ in COMMANDS]


@pytest.mark.slow
@pytest.mark.parametrize("asked", [[], ["--from", "hippocampus"], ["--from", "none", "--spacing", "keep"]])
def test_small_sets_like_the_shipped_ones(asked, tmp_path, monkeypatch, capsys):
    """By default a LoRA, whose base the generation uses; all weights, or none of them, if asked."""
    monkeypatch.chdir(tmp_path)
    made.flat(tmp_path / "scans", SUBJECTS, spacing=(1.1, 1.1, 1.1), shape=(24, 28, 24))
    commands = run_all(Path("scans"), capsys, asked, quick=False)
    data = yaml.safe_load((tmp_path / "recipe/data.yaml").read_text())
    assert data["spacing"] == (None if "none" in asked else [1, 1, 1])
    assert (tmp_path / "recipe/vae.yaml").is_file() == bool(asked)
    ldm = yaml.safe_load((tmp_path / "recipe/ldm.yaml").read_text())
    assert ldm.get("init_from") == (None if "none" in asked else "shipped:hippocampus/unet")
    assert ("--lora" in commands[-2]) == (not asked) and (tmp_path / "recipe/ldm/lora").is_dir() == (not asked)
    assert len(list((tmp_path / "recipe/generated").glob("*.nii.gz"))) == 4
