"""What the README tells people to write is what the code reads."""

import re
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from volumes import DataConfig

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_data_section_parses():
    section = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=DataConfig)
    data = parser.instantiate(parser.parse_object(yaml.safe_load(section))).data
    assert data.label_names == {0: "background", 1: "liver", 2: "tumor"}
    assert data.spacing == (1.5, 1.5, 1.5) and data.scaling("image").low == -160


def test_scripts_and_configs_that_it_names_are_there():
    named = set(re.findall(r"\b(?:[a-z_]+\.py|configs/[a-z]+/(?:[a-z]+\.yaml)?|volumes/[a-z]+\.py)", README))
    assert {"evaluate.py", "generate.py", "train_ldm.py", "configs/phantom/"} <= named
    theirs = "configs/liver/"  # the reader's own, as an example
    assert [name for name in sorted(named) if not name.startswith(theirs) and not (ROOT / name).exists()] == []


def test_it_is_short_and_its_links_lead_somewhere():
    lines = README.splitlines()
    assert len(lines) <= 130 and max(map(len, lines)) <= 120
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []
