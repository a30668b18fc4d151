"""`pip install .` installs every package and data file, and what it installs works without the clone."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

import medvolume
from cli.command import ROOMS

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
OF_THE_CLONE = {"benchmarks", "tools"}  # packages that measure and document; they read the clone
MODULES = {f"{name}.py" for name in SETTINGS["py-modules"]}
TOP = {name.partition(".")[0] for name in SETTINGS["packages"]}


def tree() -> set[str]:
    """The files of the packages and modules in the clone, by their names in a wheel."""
    inside = {path for name in TOP for path in (ROOT / name).rglob("*") if path.is_file()}
    return MODULES | {str(path.relative_to(ROOT)) for path in inside if "__pycache__" not in path.parts}


def test_every_folder_with_code_is_a_package_of_the_wheel():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - OF_THE_CLONE == TOP
    code = {str(PurePosixPath(name).parent).replace("/", ".") for name in tree() - MODULES if name.endswith(".py")}
    assert code == set(SETTINGS["packages"])
    assert {path.name for path in ROOT.glob("*.py")} == MODULES
    assert set(ROOMS) == TOP | OF_THE_CLONE


def test_every_data_file_is_named_in_the_packages_data():
    patterns = SETTINGS["package-data"]
    named = {
        str(path.relative_to(ROOT))
        for package in SETTINGS["packages"]
        for pattern in (*patterns["*"], *patterns.get(package, ()))
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    data = {name for name in tree() if not name.endswith(".py")}
    assert data == named and {f"{name}/py.typed" for name in TOP} <= data


def builder(folder: Path) -> dict[str, str]:
    """The environment with the setuptools that pyproject asks for; skips where pip cannot get it."""
    (wanted,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot get {wanted}: {done.stderr.strip().splitlines()[-1]}")
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that pip builds from a copy of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in TOP:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*MODULES, "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    command += ["--wheel-dir", str(folder), str(folder / "source")]
    done = subprocess.run(command, env=builder(folder / "builder"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("medvolume-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Run Python in an empty folder, where medvolume is the content of the wheel."""
    site, empty = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        paths = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
        return subprocess.run([sys.executable, *words], cwd=empty, env=paths, capture_output=True, text=True)

    found = run("-c", "import medvolume, files; print(medvolume.__file__, files.__file__)")
    assert found.stdout.split() == [str(site / "medvolume.py"), str(site / "files/__init__.py")], found
    return run


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_tree_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        scripts = file.read(f"{info}/entry_points.txt").decode()
        assert "License-Expression: Apache-2.0" in file.read(f"{info}/METADATA").decode()
    assert {name for name in names if not name.startswith(info)} == tree()
    assert f"{info}/licenses/LICENSE" in names and "medvolume = medvolume:main" in scripts


@pytest.mark.slow
def test_what_the_wheel_installs_works_without_the_clone(installed):
    code = "import medvolume as m\nprint(*(getattr(m, name).__module__ for name in m.__all__))\nm.MedVolumePipeline"
    done = installed("-c", code)
    assert done.returncode == 0 and not done.stderr, done.stderr
    for name in medvolume.COMMANDS:
        done = installed("-c", "import medvolume; medvolume.main()", name, "--help")
        assert done.returncode == 0 and done.stdout.startswith(f"usage: medvolume {name}"), done.stderr


ABSENT = """
import demo, medvolume
for attempt in (
    lambda: medvolume.MedVolumePipeline.from_pretrained("shipped:hippocampus"),
    lambda: medvolume.MedVolumePipeline.from_pretrained("weights/hippocampus"),
    lambda: demo.main([]),
):
    try:
        attempt()
    except ValueError as error:
        print(str(error).replace("\\n", " "))
"""


@pytest.mark.slow
def test_without_the_clone_a_message_says_what_to_type(installed):
    """The weights lie in the clone. A name of theirs, and the demo, say where to get them."""
    done = installed("-c", ABSENT)
    named, path, demo = done.stdout.splitlines()
    assert "weights/ of the clone" in named and "pip install -e CLONE" in named
    assert path.startswith("weights/hippocampus: is neither a folder here nor found on the Hub")
    assert "medvolume demo --weights CLONE/weights" in demo
