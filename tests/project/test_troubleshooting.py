"""docs/troubleshooting.md and docs/coming_from.md name what the code prints, takes and exports."""

import ast
import dataclasses
import inspect
import re
from functools import cache
from pathlib import Path

import pytest

import autoencoder
import diffusion
import pipelines
from autoencoder import VQGAN3D, AutoencoderKL3D
from diffusion import LatentUNet3D
from training import TrainLdmConfig, TrainVaeConfig

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("files", "cli", "volumes", "autoencoder", "diffusion", "pipelines", "training", "evaluation")
MODELS = (AutoencoderKL3D, VQGAN3D, LatentUNet3D)
TROUBLES = (ROOT / "docs/troubleshooting.md").read_text()


def rows(text):
    """The cells of every row of a Markdown table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "you see"]


@cache
def texts():
    """Every text in the code: constants, and f-strings with a gap for each value."""
    found = []
    for path in (path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        described = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings are not messages
        for node in nodes:
            if id(node) in described:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def checks():
    """Names of the doctor's checks: the first argument of its findings, and of oddities of a header."""
    names = set()
    for path in [*(ROOT / "evaluation/doctor").glob("*.py"), ROOT / "volumes/plausible.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                first = node.args[0]
                if node.func.id in ("ok", "warn", "fail", "Oddity") and isinstance(first, ast.Constant):
                    names.add(first.value)
    return names


def test_checks_and_messages_that_are_quoted_are_the_codes():
    named, quoted = [], []
    for row in rows(TROUBLES):
        assert len(row) == 4, row
        named += [name for name in re.findall(r"`([^`]+)`", row[3]) if not name.startswith(("-", "python"))]
        quoted += re.findall(r'"([^"]+)"', row[3])
    assert len(named) >= 20 and sorted(set(named) - checks()) == []
    assert len(quoted) >= 30 and [one for one in quoted if not any(one in text for text in texts())] == []


def test_every_trouble_says_what_names_it():
    for row in rows(TROUBLES):
        if "not possible" not in row[1]:
            assert row[2] and re.search(r'`[a-z ]+`|(training|generation): "|^no check', row[3]), row


def settings(config, prefix=""):
    """Dotted names of the settings of a config class."""
    names = set()
    for field in dataclasses.fields(config):
        names.add(f"{prefix}{field.name}")
        for kind in re.findall(r"\w+Config|\w+Losses", str(field.type)):
            nested = getattr(inspect.getmodule(config), kind, None)
            if dataclasses.is_dataclass(nested):
                names |= settings(nested, f"{prefix}{field.name}.")
    return names


@pytest.mark.parametrize("page", ["troubleshooting.md", "coming_from.md"])
def test_settings_that_a_page_names_exist(page):
    text = (ROOT / "docs" / page).read_text()
    dotted = r"\b(?:data|loop|losses|optimizer|adversarial|crops|model|cache)\.[a-z_]+(?:\.[a-z_]+)?\b(?!\()"
    known = settings(TrainVaeConfig) | settings(TrainLdmConfig)
    known |= {f"model.{name}" for model in MODELS for name in inspect.signature(model.__init__).parameters}
    named = {name for name in re.findall(dotted, text) if not name.endswith((".yaml", ".py", ".json", ".pt"))}
    assert len(named) >= 5 and sorted(named - known) == []


def test_what_the_page_for_others_calls_ours_exists():
    text = (ROOT / "docs/coming_from.md").read_text()
    ours = " ".join(row[1] for row in rows(text))
    exported = {*autoencoder.__all__, *diffusion.__all__, *pipelines.__all__}
    others = {"DDPMScheduler", "OUTPUT"}  # a class of diffusers, and a folder
    classes = set(re.findall(r"`([A-Z][a-z]*[A-Z0-9]\w+)", ours)) - others
    assert {"AutoencoderKL3D", "LatentUNet3D", "MedVolumePipeline"} <= classes <= exported
    scripts = set(re.findall(r"\b[a-z_]+\.py\b", ours))
    assert len(scripts) >= 4 and [name for name in scripts if not (ROOT / name).exists()] == []
    options = set(re.findall(r"`--(\w+)", ours))
    generating = (ROOT / "generate.py").read_text() + (ROOT / "cli/generation.py").read_text()
    known = settings(TrainVaeConfig) | set(re.findall(r'"--(\w+)"', generating)) | {"config"}
    assert len(options) >= 5 and sorted(options - known) == []
    arguments = set(re.findall(r"`(\w+)=", ours))
    assert len(arguments) >= 5 and arguments <= set(inspect.signature(pipelines.MedVolumePipeline.__call__).parameters)


@pytest.mark.parametrize("page", ["troubleshooting.md", "coming_from.md"])
def test_links_of_a_page_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "docs" / page).read_text())
    inside = [link for link in links if not link.startswith("https://github.com/")]
    assert inside and [link for link in inside if not (ROOT / "docs" / link).exists()] == []
