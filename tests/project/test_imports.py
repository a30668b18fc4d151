"""Imports point one way (CONTRIBUTING.md), and nothing is imported that pyproject.toml does not install."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("files", "cli", "volumes", "autoencoder", "diffusion", "pipelines", "interop")
LAYERS += ("training", "evaluation", "reader_study", "recipes", "studio")
ALLOWED: dict[str, set[str]] = {room: set(LAYERS[: i + 1]) for i, room in enumerate(LAYERS)}
ENGINE = ROOT / "training/engine"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Distributions whose import name is another.
IMPORT_NAMES = {"pyyaml": "yaml", "scikit-learn": "sklearn"}

# Packages of evaluation/: each may import those of its own level and of the levels before it. `report` is a module.
EVALUATION_LEVELS = (
    {"report"},
    {"data", "stats", "metrics"},
    {"networks"},
    {"studies", "copies"},
    {"doctor", "html"},
    {"commands"},
)


def imported_roots(path: Path) -> set[str]:
    """First parts of every absolute import in a file, wherever in the file it stands."""
    roots = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.split(".")[0])
    return roots


def wrong_imports(room: Path, ours: set[str], allowed: set[str]) -> list[str]:
    """`file: name` for every import in `room` of a name of ours that is not allowed there."""
    return [
        f"{path.relative_to(room.parent)}: {name}"
        for path in sorted(room.rglob("*.py"))
        for name in sorted(imported_roots(path) & ours - allowed)
    ]


def imported_packages(path: Path, package: str) -> set[str]:
    """First parts below `package` of every absolute or relative import of it in a file that is directly in a package of
    it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = {0: node.module or "", 2: f"{package}.{node.module or ''}".rstrip(".")}.get(node.level, "")
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == package else {module}
    return {name.split(".")[1] for name in names if name.startswith(f"{package}.")}


def wrong_levels(room: Path, levels: tuple[set[str], ...]) -> list[str]:
    """`file: package` for every import in `room` of a package of a later level than the file's own.

    Other names are those that the room itself exports, from packages of any level: only the last level may import them.
    """
    level_of = {name: number for number, names in enumerate(levels) for name in names}
    return [
        f"{path.relative_to(room)}: {name}"
        for package, number in level_of.items()
        for path in sorted(
            room.glob(f"{package}.py") if (room / f"{package}.py").exists() else (room / package).rglob("*.py")
        )
        for name in sorted(imported_packages(path, room.name))
        if level_of.get(name, len(levels) - 1) > number
    ]


def our_names() -> set[str]:
    """Import names of the rooms and of the scripts at the root."""
    return set(ALLOWED) | {"benchmarks"} | {path.stem for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_point_one_way(room):
    assert wrong_imports(ROOT / room, our_names(), ALLOWED[room]) == []


def test_a_wrong_import_is_found(tmp_path):
    room = tmp_path / "volumes"
    room.mkdir()
    (room / "good.py").write_text("import numpy\nfrom volumes.geometry import Volume\nfrom . import nifti\n")
    (room / "late.py").write_text("def f():\n    from pipelines.processor import VolumeProcessor\n")
    (room / "script.py").write_text("import torch, train_vae\n")
    found = wrong_imports(room, {"volumes", "pipelines", "train_vae"}, {"volumes"})
    assert found == ["volumes/late.py: pipelines", "volumes/script.py: train_vae"]


def names_outside(package: Path, root: Path = ROOT) -> set[str]:
    """Rooms that a package within a room imports from, its own room as `room.` before the rest of the name."""
    room = package.relative_to(root).parts[0]
    inside = ".".join(package.relative_to(root).parts)
    names = set()
    for path in package.rglob("*.py"):
        depth = len(path.relative_to(package).parts)
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.ImportFrom) and node.level > depth:
                names.add(f"{room}.{node.module or ''}")
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module or "")
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
    ours = {name for name in names if name.split(".")[0] in ALLOWED and f"{name}.".find(f"{inside}.") != 0}
    return {f"{room}.{name.partition('.')[2]}" if name.split(".")[0] == room else name.split(".")[0] for name in ours}


def test_the_engine_of_training_knows_no_model():
    assert names_outside(ENGINE) <= {"files", "cli", "volumes"}


def test_a_wrong_import_of_the_engine_is_found(tmp_path):
    engine = tmp_path / "training/engine"
    engine.mkdir(parents=True)
    (engine / "good.py").write_text(
        "from .ema import MovingAverage\nfrom training.engine import step\nimport files.atomic\n"
    )
    assert names_outside(engine, tmp_path) == {"files"}
    (engine / "up.py").write_text("from ..vae import build\nfrom training import Learner\nimport diffusion.loss\n")
    assert names_outside(engine, tmp_path) == {"files", "training.vae", "training.", "diffusion"}


def test_the_latent_cache_is_above_the_networks():
    latents = ROOT / "diffusion/latents"
    below = {"diffusion.conditioning", "diffusion.folding", "diffusion.images"}
    assert names_outside(latents) == {"files", "cli", "volumes", "autoencoder"} | below
    modules = set((ROOT / "diffusion").glob("*.py")) - {ROOT / "diffusion/__init__.py"}
    imports = re.compile(r"^\s*(from \.|from diffusion|import diffusion).*\blatents\b", re.MULTILINE)
    assert [module.name for module in modules if imports.search(module.read_text(encoding="utf-8"))] == []


def test_packages_of_evaluation_import_one_way():
    assert wrong_levels(ROOT / "evaluation", EVALUATION_LEVELS) == []
    named = set().union(*EVALUATION_LEVELS)
    assert {path.parent.name for path in (ROOT / "evaluation").glob("*/__init__.py")} == named - {"report"}


def test_a_wrong_import_between_packages_is_found(tmp_path):
    room = tmp_path / "evaluation"
    for name in ("data", "studies"):
        (room / name).mkdir(parents=True)
    (room / "report.py").write_text("from evaluation.data import pairs\n")
    (room / "data/good.py").write_text(
        "import evaluation.report\nfrom . import pairs\nfrom evaluation.data.pairs import Pair\n"
    )
    (room / "data/late.py").write_text("def f():\n    from ..studies.privacy import attack\n")
    (room / "data/root.py").write_text("from evaluation import studies, score_training\n")
    assert wrong_levels(room, ({"report"}, {"data"}, {"studies"})) == [
        "report.py: data",
        "data/late.py: studies",
        "data/root.py: score_training",
        "data/root.py: studies",
    ]


def test_every_room_is_installed():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    ours = [path.parent.relative_to(ROOT) for room in ALLOWED for path in (ROOT / room).rglob("__init__.py")]
    assert listed == {".".join(folder.parts) for folder in ours}
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks"} == set(ALLOWED)


def test_every_third_party_import_is_a_dependency():
    extras = PROJECT["project"]["optional-dependencies"]
    named = ("lora", "dicomseg", "studio", "reader-study")
    lines = PROJECT["project"]["dependencies"] + [line for name in named for line in extras[name]]
    declared = {re.split(r"[<>=!\[ ]", line)[0].lower() for line in lines}
    declared = {IMPORT_NAMES.get(name, name) for name in declared}
    files = [path for room in ALLOWED for path in (ROOT / room).rglob("*.py")] + list(ROOT.glob("*.py"))
    known = declared | our_names() | set(sys.stdlib_module_names)
    missing = {f"{path.relative_to(ROOT)}: {name}" for path in files for name in imported_roots(path) - known}
    assert missing == set()


def test_tests_are_flat():
    assert not list((ROOT / "tests").glob("**/__init__.py"))


def test_names_of_tests_are_short():
    """A name says what is checked in fewer than 60 characters; the rest belongs in a docstring of one line."""
    names = {
        f"{path.relative_to(ROOT)}::{name}": len(name)
        for path in (ROOT / "tests").glob("**/*.py")
        for name in re.findall(r"^ *def (test\w*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(names) > 1000
    assert [name for name, length in names.items() if length >= 60] == []
