"""Packages import what they export when it is asked for, and export what type checkers read."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from cli.lazy import lazy_exports

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("volumes", "autoencoder", "diffusion", "pipelines", "training", "evaluation", "evaluation.html")


@pytest.mark.parametrize("name", PACKAGES)
def test_every_export_is_there_and_is_known_to_type_checkers(name):
    package = importlib.import_module(name)
    assert len(set(package.__all__)) == len(package.__all__)
    for export in package.__all__:
        assert getattr(package, export) is not None
    assert set(package.__all__) <= set(dir(package))
    tree = ast.parse((ROOT / name.replace(".", "/") / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    static = {alias.name for node in imports for alias in node.names if node.module != "lazy"}
    assert set(package.__all__) - static <= {"ModelMixin", "LatentCacheConfig"}  # of diffusers and autoencoder
    with pytest.raises(AttributeError, match="nonsense"):
        _ = package.nonsense


def test_a_function_of_its_modules_name_stays_a_function():
    importlib.import_module("diffusion.denoise")
    from diffusion import denoise

    assert denoise is sys.modules["diffusion.denoise"].denoise


def test_an_export_of_its_modules_name_must_not_be_lazy(tmp_path):
    init = tmp_path / "__init__.py"
    init.write_text("if TYPE_CHECKING:\n    from .same import same\n")
    with pytest.raises(AssertionError, match="same"):
        lazy_exports("package", str(init))


def test_configs_need_no_torch_and_pipelines_register_at_once():
    """In an interpreter of its own, for this one has imported everything."""
    code = (
        "import sys, training.engine.config, training.vae_config, training.ldm_config, volumes, evaluation, "
        "autoencoder\nheavy = {'torch', 'diffusers', 'monai', 'accelerate', 'transformers', 'matplotlib', 'nibabel', "
        "'fsspec'}\nprint(sorted(heavy & set(sys.modules)))\n"
        "import pipelines\n"
        "from diffusers.pipelines import pipeline_loading_utils\n"
        "print('autoencoder' in pipeline_loading_utils.LOADABLE_CLASSES)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "True"]
