"""What every test runs under, and the real data that some tests read where it is there."""

import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing in the tests may reach for a hub

import fsspec
import pytest
import torch
from line import fresh_accelerate  # noqa: F401
from short_runs import vae_folder  # noqa: F401

SHARED = Path(__file__).resolve().parents[2] / "shared"

if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the cores
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """All tests share a cache of prepared volumes that ends with them: nothing is written to ~/.cache."""
    if not os.environ.get("MEDVOLUME_CACHE"):
        os.environ["MEDVOLUME_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def seeded():
    """Each test starts from the same global seed, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def copies(tmp_path, monkeypatch) -> Path:
    """An empty cache of copies of remote files, and an empty `memory://`."""
    monkeypatch.setenv("MEDVOLUME_CACHE", str(tmp_path / "copies"))
    fsspec.filesystem("memory").store.clear()
    return tmp_path / "copies"


def shared_folder(name: str) -> Path:
    """`../shared/<name>` beside the clone; the test that asks for it is skipped, by name, where it is absent."""
    folder = SHARED / name
    if not folder.exists():
        pytest.skip(f"needs ../shared/{name}")
    return folder


@pytest.fixture(scope="session")
def hippocampus() -> Path:
    """The real hippocampus MR set: images/, labels/, subjects.csv."""
    return shared_folder("data/hippocampus")


@pytest.fixture(scope="session")
def awkward() -> Path:
    """Real files that are awkward or broken to read, with MANIFEST.csv."""
    return shared_folder("data/awkward")
