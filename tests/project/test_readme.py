"""What the README tells people to write is what the code reads."""

import re
import subprocess
import sys
from pathlib import Path

import medvolume

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_its_commands_take_the_options_that_it_gives_them():
    lines = [line.partition("   #")[0].split() for line in README.splitlines() if line.startswith("    medvolume ")]
    assert {name for _, name, *_ in lines} == set(medvolume.COMMANDS) - {
        "convert",
        "edit",
        "demo",
        "prepare",
        "reader-study",
        "studio",
    }
    for _, name, *words in lines:
        options = [word for word in words if word.startswith("--")]
        subcommand = [word for word in words[:1] if name == "evaluate"]
        done = subprocess.run(
            [sys.executable, "medvolume.py", name, *subcommand, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert [option for option in options if option not in done.stdout] == [], name


def test_scripts_and_configs_that_it_names_are_there():
    named = set(re.findall(r"\b(?:[a-z_]+\.py\b|configs/[a-z]+/(?:[a-z]+\.yaml)?)", README))
    assert {"train_vae.py", "train_ldm.py"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_it_is_short_and_its_links_lead_somewhere():
    lines = README.splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 120
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_the_six_files_to_read_first_have_what_is_said():
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Read these six files first")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (.*) \|$", section, re.MULTILINE)
    assert len(rows) == 6
    code = {file: (ROOT / file).read_text() for file, _ in rows}
    for file, look in rows:
        for name in re.findall(r"`([\w.]+)`", look.partition(":")[0]):
            assert re.search(rf"^ *(def|class) {name.rpartition('.')[2]}\b", code[file], re.MULTILINE), (file, name)
    assert [one for one in re.findall(r"`([\w/]+\.py)`", section) if not (ROOT / one).is_file()] == []
    assert sum(text.count("\n") for text in code.values()) < 1_700
