"""What is uploaded to the Hub: weights, settings, card and license, and what comes back."""

from pathlib import Path

import peers
import pytest
import torch
from fake_hub import fake_hub
from tiny import tiny_pipeline

from interop.convert import convert
from interop.formats import FORMATS
from pipelines import MedVolumeEditPipeline, MedVolumePipeline, SamplingSettings
from pipelines.storage.documents import UNFILLED

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
SHIPPED = sorted(path.parent.name for path in WEIGHTS.glob("*/model_index.json"))
QUICK = "hippocampus-fast"  # a student
MODELS = {"model_index.json", "scheduler/scheduler_config.json"} | {
    f"{part}/{name}" for part in ("unet", "vae") for name in ("config.json", "diffusion_pytorch_model.safetensors")
}
CARD = "# Ours\n\nDice 0.8.\n"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub in a folder: repository -> the folder of what it holds."""
    return fake_hub(tmp_path / "hub", monkeypatch)


@pytest.fixture
def local(tmp_path):
    """A pipeline's folder with a card, a license and settings, and a file that is none of its documents."""
    pipe = tiny_pipeline()
    pipe.sampling_settings = SamplingSettings(num_inference_steps=3)
    pipe.save_pretrained(tmp_path / "local")
    (tmp_path / "local/README.md").write_text(CARD)
    (tmp_path / "local/LICENSE").write_text("CC BY 4.0")
    (tmp_path / "local/notes.txt").write_text("not to be shared")
    return tmp_path / "local"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        ("push_to_hub", MedVolumePipeline),
        ("save_pretrained", MedVolumePipeline),
        ("push_to_hub", MedVolumeEditPipeline),
    ],
)
def test_card_license_and_settings_are_uploaded(hub, local, tmp_path, way, kind):
    pipe = kind.from_pretrained(local)
    if way == "push_to_hub":
        pipe.push_to_hub("user/tiny")
    else:
        pipe.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="user/tiny")
        assert files(tmp_path / "again") == files(hub("user/tiny"))
    there = hub("user/tiny")
    assert files(there) == MODELS | {"README.md", "LICENSE", "sampling.json"}
    metadata, card = (there / "README.md").read_text().removeprefix("---\n").split("\n---\n\n")
    assert card == CARD and "library_name: diffusers" in metadata and "license" not in metadata
    back = kind.from_pretrained("user/tiny", cache_dir=tmp_path / "hub")
    assert back.sampling_settings == pipe.sampling_settings and back.model_hash == pipe.model_hash
    assert back.documents["LICENSE"] == b"CC BY 4.0" and back.documents["README.md"].endswith(CARD.encode())


def test_documents_stay_with_their_weights(local, tmp_path):
    pipe, other = MedVolumePipeline.from_pretrained(local), tiny_pipeline(seed=1).unet
    for same in (pipe, MedVolumeEditPipeline.from_pipe(pipe)):
        same.save_pretrained(tmp_path / "same")
        assert (tmp_path / "same/README.md").read_text() == CARD
    for changed in (
        MedVolumePipeline.from_pretrained(local, unet=other),
        MedVolumePipeline.from_pipe(pipe, unet=other),
    ):
        changed.save_pretrained(tmp_path / "changed")
        assert files(tmp_path / "changed") == MODELS | {"sampling.json"}


def test_without_a_card_there_is_a_short_one_or_the_hubs(hub):
    pipe = tiny_pipeline()
    pipe.push_to_hub("user/tiny")
    place = hub("user/tiny") / "README.md"
    assert UNFILLED not in place.read_text() and "0 background, 2 anterior, 5 posterior" in place.read_text()
    place.write_text(f"---\nlibrary_name: diffusers\n---\n{CARD}")
    pipe.push_to_hub("user/tiny")
    assert place.read_text().endswith(CARD) and place.read_text().count("---\n") == 2


def test_the_name_of_the_folder_is_that_of_the_repository(hub, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert files(hub("mine")) == MODELS | {"README.md"}


def test_a_link_that_leads_out_is_no_document(local, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (local / "LICENSE").unlink()
    (local / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.warns(UserWarning, match="LICENSE: leads out of the folder, so it is not saved or uploaded"):
        MedVolumePipeline.from_pretrained(local)


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SHIPPED]
)
def test_a_shipped_pipeline_is_uploaded_with_its_card(name, hub):
    """Students too; as float16, which they are stored in, the weights are the same bytes."""
    MedVolumePipeline.from_pretrained(WEIGHTS / name, dtype=torch.float16).push_to_hub(f"user/{name}")
    there, card = hub(f"user/{name}"), (WEIGHTS / name / "README.md").read_text()
    assert files(there) == MODELS | {"README.md", "sampling.json"}
    assert (there / "README.md").read_text().endswith(card) and "CC BY" in card
    for file in ("sampling.json", "unet/diffusion_pytorch_model.safetensors"):
        assert (there / file).read_bytes() == (WEIGHTS / name / file).read_bytes(), file


def test_weights_with_terms_name_their_license_in_every_card(hub, tmp_path, monkeypatch):
    """Of a converted pipeline that may not be used commercially, its own card is uploaded; without it, a short one."""
    name = "maisi-rflow-mr"
    peers.narrow(monkeypatch, name)
    peers.write_maisi(tmp_path / "hub_of_maisi", name)
    convert(name, tmp_path / "hub_of_maisi", tmp_path / "out")
    MedVolumePipeline.from_pretrained(tmp_path / "out").push_to_hub("user/maisi")
    (tmp_path / "out/README.md").unlink()
    MedVolumePipeline.from_pretrained(tmp_path / "out").push_to_hub("user/short")
    assert FORMATS[name].restricted is not None
    for repository in ("user/maisi", "user/short"):
        text = (hub(repository) / "README.md").read_text()
        assert text.startswith("---\n") and "\nlicense: other\n" in text
        assert text.count(FORMATS[name].restricted) == 1, text
        assert files(hub(repository)) == MODELS | {"README.md", "sampling.json", "provenance.json"}
    assert "Weights converted from maisi-rflow-mr" in (hub("user/maisi") / "README.md").read_text()
