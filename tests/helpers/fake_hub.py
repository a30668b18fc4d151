"""A Hub in a folder: uploads land in the layout of the local cache, from which an offline client loads."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import diffusers.models.modeling_utils
import diffusers.pipelines.pipeline_utils
import diffusers.utils.hub_utils
import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError

COMMIT = "0" * 40


def fake_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Let diffusers upload to `cache`, a cache_dir. Returns a function: repository -> the folder of what it holds."""
    load_card = huggingface_hub.ModelCard.load

    def folder_of(repo_id: str) -> Path:
        return cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / COMMIT

    def upload(*, repo_id, folder_path, **_):
        shutil.copytree(folder_path, folder_of(repo_id), dirs_exist_ok=True)
        ref = folder_of(repo_id).parents[1] / "refs" / "main"
        ref.parent.mkdir(exist_ok=True)
        ref.write_text(COMMIT)

    def card(repo_id, **_):
        if not (folder_of(repo_id) / "README.md").is_file():
            raise EntryNotFoundError("no card yet")
        return load_card(folder_of(repo_id) / "README.md")

    for module in (diffusers.utils.hub_utils, diffusers.pipelines.pipeline_utils, diffusers.models.modeling_utils):
        monkeypatch.setattr(module, "create_repo", lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(diffusers.utils.hub_utils, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", card)
    return folder_of
