"""Files that were damaged or made to do harm: refused by name; a folder's code is never run and its links not followed.

`make fuzz` does the same with 10,000 files in processes with a limit of memory; see tests/helpers/fuzz.py.
"""

import gzip
import importlib.util
import json
import os
import pickle
import sys
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from fuzz import SHARES, run_case
from hostile import make_target
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import tiny_pipeline

from files.documents import read_yaml
from pipelines import MedVolumePipeline
from pipelines.storage.loading import load_autoencoder
from training.build import initialize_from
from training.engine.checkpoints import find_checkpoint, list_checkpoints
from volumes import (
    Case,
    DataConfig,
    Volume,
    VolumeError,
    read_slabs,
    read_volume,
    resample,
    write_volume,
)
from volumes.formats import raw as stored
from volumes.prepared.case import prepare

EXAMPLES = {name: max(6, 2 * share) for name, share in SHARES.items()}  # some 210 together


@pytest.mark.parametrize("name", sorted(SHARES))
def test_mutated_files_are_read_right_or_refused_by_name(name, tmp_path_factory):
    if name == "dicom_seg":
        pytest.importorskip("highdicom", reason="the extra dicomseg is not installed")
    folder = tmp_path_factory.mktemp(name)
    target = make_target(name, folder)
    for number, files in enumerate(target.variants):  # unharmed they are read, or nothing would be found
        for file, data in files.items():
            path = folder / f"valid_{number}" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        target.read(folder / f"valid_{number}")

    @settings(
        max_examples=EXAMPLES[name],
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def every(draw):
        outcome, what = run_case(target, draw, folder)
        assert outcome != "finding", what

    every()


def lying_header(path: Path, *, stored: int = 64) -> None:
    """A NIfTI file that claims 10,321 voxels a side, 2^40 in all, and holds a few."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((10321, 10321, 10321))
    header.set_sform(np.eye(4), 1)
    header["vox_offset"] = 352
    path.write_bytes(header.binaryblock + bytes(4 + stored))


@pytest.mark.parametrize("read", [read_volume, lambda path: list(read_slabs(path, 1))])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_header_of_2_to_the_40_voxels_takes_no_memory(read, name, tmp_path):
    lying_header(tmp_path / "a.nii")
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes()))
    tracemalloc.start()
    try:
        with pytest.raises(VolumeError, match=f"{name}: its voxels cannot be read"):
            read(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_what_does_not_fit_into_memory_is_refused_beforehand(tmp_path, monkeypatch):
    """A file that holds what it says, and a spacing that would make it huge: both by the memory that there is."""
    write_volume(Volume(np.random.default_rng(0).random((1, 20, 20, 20), np.float32), np.eye(4)), tmp_path / "a.nii")
    config = DataConfig(images="*.nii", spacing=(1e-4, 1e-4, 1e-4))
    with pytest.raises(VolumeError, match="a.nii: resampling 20 x 20 x 20 voxels .* more than fits into memory .*GiB"):
        prepare(Case("a", "a", images={"image": tmp_path / "a.nii"}), config)
    with pytest.raises(VolumeError, match="which leaves no volume"):
        resample(Volume(np.zeros((1, 4, 4, 4)), np.diag([1e-5, 1e-5, 1e-5, 1])), (1, 1, 1))
    monkeypatch.setattr("volumes.formats.raw.memory_bytes", lambda: 100_000)
    with pytest.raises(VolumeError, match="a.nii: says that it holds 20 x 20 x 20 voxels"):
        read_volume(tmp_path / "a.nii")
    assert sum(slab.size for slab in read_slabs(tmp_path / "a.nii", 2)) == 8000  # what slabs are for


def test_windows_has_no_limits_of_a_process(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    spec = importlib.util.spec_from_file_location("volumes.stored_on_windows", stored.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.memory_bytes() >= stored.memory_bytes() > 0


# Pipeline folders


class Bomb:
    """Unpickled, it makes the folder that it is told."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_pipeline().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def planted(folder, tmp_path, monkeypatch) -> Path:
    """A module that makes a folder `ran` when it is imported: importable by name, and in the pipeline's folder."""
    code = f"import os\nos.makedirs({str(tmp_path / 'ran')!r}, exist_ok=True)\nclass AutoencoderKL3D: pass\n"
    for place in (tmp_path / "modules", folder, folder / "scheduler"):
        place.mkdir(exist_ok=True)
        for name in ("planted", "autoencoder", "diffusion", "pipeline"):
            (place / f"{name}.py").write_text(code)
    (tmp_path / "modules" / "only_planted.py").write_text(code)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    return tmp_path / "ran"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"vae": ["only_planted", "AutoencoderKL3D"]}, "takes vae from .'only_planted'"),
        ({"vae": ["planted", "AutoencoderKL3D"]}, "only classes of autoencoder are loaded"),
        ({"unet": ["os", "system"]}, "only classes of diffusion are loaded"),
        ({"scheduler": ["subprocess", "Popen"]}, "only classes of diffusers are loaded"),
        ({"scheduler": ["diffusers", "DiffusionPipeline"]}, "which is not a SchedulerMixin"),
        ({"unet": ["diffusion", "denoise"]}, "which is not a LatentDenoiser"),
        ({"unet": ["diffusion", "nothing"]}, "which diffusion does not have"),
        ({"unet": [None, None]}, "takes unet from"),
        ({"vae": "autoencoder"}, "takes vae from"),
        ({"safety_checker": ["only_planted", "X"]}, "names .'safety_checker'"),
        ({"_class_name": ["pipeline", "MedVolumePipeline"]}, "is of the class .'pipeline'"),
        ({"data": {"labels": {}}}, "model_index.json: data has no affine"),
    ],
)
def test_an_index_that_names_other_code_is_refused(folder, planted, values, reason):
    change_json(folder / "model_index.json", **values)
    with pytest.raises(ValueError, match=reason) as refused:
        MedVolumePipeline.from_pretrained(folder)
    assert str(folder) in str(refused.value)
    assert not planted.exists() and "only_planted" not in sys.modules


def test_code_in_the_folder_is_not_run(folder, planted):
    for part, package in (("vae", "autoencoder"), ("unet", "diffusion")):
        (folder / part / f"{package}.py").write_text((folder / "planted.py").read_text())
        with pytest.raises(ValueError, match=f"holds {package}.py; code of a pipeline's folder is never run"):
            MedVolumePipeline.from_pretrained(folder)
        with pytest.raises(ValueError, match="trust_remote_code are refused: code of a model is never run"):
            MedVolumePipeline.from_pretrained(folder, trust_remote_code=True)
        (folder / part / f"{package}.py").unlink()
    MedVolumePipeline.from_pretrained(folder)  # other code beside the weights is left alone
    assert not planted.exists()


@pytest.mark.parametrize(
    ("part", "values", "reason"),
    [
        ("vae", {"_class_name": "os"}, "config.json is of 'os'"),
        ("vae", {"encoder_blocks": [1_000_000_000, 1]}, "encoder_blocks = 1000000000, which no model has"),
        ("vae", {"encoder_blocks": [900_000, 1]}, "sets 900001 encoder_blocks"),
        ("unet", {"blocks": "many"}, "a list of numbers of blocks"),
        ("unet", {"quantization_config": {"quant_method": "torchao"}}, "names quantization_config"),
        ("unet", {"auto_map": {"AutoModel": "planted.X"}}, "names auto_map"),
        ("unet", {"channels": [-1, 16]}, "does not describe a LatentUNet3D|do not fit"),
        ("unet", {"head_dim": "x"}, "does not describe a LatentUNet3D"),
    ],
)
def test_configs_of_components_that_are_refused(folder, part, values, reason):
    change_json(folder / part / "config.json", **values)
    with pytest.raises(ValueError, match=reason) as refused:
        MedVolumePipeline.from_pretrained(folder)
    assert str(folder / part) in str(refused.value)


@pytest.mark.parametrize("steps", [10**12, -1, "many", None])
def test_a_scheduler_that_would_fill_the_memory_is_refused(folder, steps):
    change_json(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=steps)
    with pytest.raises(ValueError, match="num_train_timesteps="):
        MedVolumePipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "vae", "scheduler/scheduler_config.json"])
def test_links_out_of_the_folder_are_refused(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link to .*elsewhere, outside of the folder of the model"):
        MedVolumePipeline.from_pretrained(folder)


def test_a_component_is_looked_for_in_its_own_folder(folder, tmp_path):
    """Without it diffusers reads what lies beside the index, which nobody checked."""
    (folder / "scheduler").rename(tmp_path / "elsewhere")
    (folder / "scheduler_config.json").symlink_to(tmp_path / "elsewhere" / "scheduler_config.json")
    with pytest.raises(ValueError, match=f"{folder}: has no folder scheduler"):
        MedVolumePipeline.from_pretrained(folder)
    pipe = tiny_pipeline()
    assert MedVolumePipeline.from_pretrained(folder, scheduler=pipe.scheduler).scheduler is pipe.scheduler


def test_links_of_an_autoencoder_and_circles_are_refused(folder, tmp_path):
    (folder / "vae" / "config.json").rename(tmp_path / "elsewhere.json")
    (folder / "vae" / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match="config.json: is a link to .*elsewhere.json, outside of the folder"):
        load_autoencoder(folder / "vae")
    (folder / "unet" / "circle").symlink_to("circle")
    with pytest.raises(ValueError, match="is a link to"):
        MedVolumePipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("names", "said"), [(["CT"], ": the data's channels are"), (7, "/vae: .*channel_names: got 7, expected a list")]
)
def test_components_that_do_not_fit_are_refused_by_the_folder(folder, names, said):
    change_json(folder / "vae" / "config.json", channel_names=names)
    with pytest.raises(ValueError, match=f"{folder}{said}"):
        MedVolumePipeline.from_pretrained(folder)


def test_the_cache_of_the_hub_links_to_its_blobs(folder, tmp_path):
    """As huggingface_hub lays it out: snapshots/<revision>/file is a link to blobs/<hash>."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    assert MedVolumePipeline.from_pretrained(snapshot).model_hash == tiny_pipeline().model_hash


def test_an_index_of_shards_does_not_lead_out_of_the_folder(folder, tmp_path):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    names = dict.fromkeys(load_file(weights), "../../elsewhere.safetensors")
    weights.rename(tmp_path / "elsewhere.safetensors")
    (folder / "unet" / f"{weights.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(ValueError, match="names files outside of its folder"):
        MedVolumePipeline.from_pretrained(folder)


def test_pickles_are_never_opened(folder, tmp_path):
    """Beside the weights they are left alone, in their place they are refused, under their name they are not
    safetensors."""
    bomb = pickle.dumps(Bomb(tmp_path / "ran"))
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pkl"):
        (folder / "unet" / name).write_bytes(bomb)
    MedVolumePipeline.from_pretrained(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(bomb)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(bomb)
    for load in (
        MedVolumePipeline.from_pretrained,
        load_autoencoder,
        lambda f: initialize_from(torch.nn.Linear(1, 1), f / "vae"),
    ):
        with pytest.raises(ValueError, match="safetensors file"):
            load(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="no .safetensors file there"):
        initialize_from(torch.nn.Linear(1, 1), folder / "vae")
    assert not (tmp_path / "ran").exists()
    pickle.loads(bomb)  # it would have
    assert (tmp_path / "ran").exists()


def test_checkpoints_of_other_places_are_not_read(tmp_path):
    """Accelerate's pickles are read from the run's own folder: no link into it counts."""
    mine, other = tmp_path / "mine" / "checkpoints", tmp_path / "other" / "checkpoints"
    for folder in (mine, other):
        (folder / "step_000001").mkdir(parents=True)
        (folder / "step_000001" / "state.json").write_text("{}")
    (mine / "step_000002").symlink_to(other / "step_000001")
    (mine / "step_old").mkdir()
    assert [path.name for path in list_checkpoints(mine)] == ["step_000001"]
    assert find_checkpoint("latest", mine) == mine / "step_000001"
    for path in (other / "step_000001", mine / "step_000002"):
        with pytest.raises(ValueError, match="only those of this run"):
            find_checkpoint(str(path), mine)


def test_a_damaged_checkpoint_is_named_and_not_unpickled(tmp_path):
    target = make_target("checkpoint", tmp_path)
    files = target.variants[0]
    bomb = pickle.dumps(Bomb(tmp_path / "ran"))
    for number, name in enumerate(files):
        home = tmp_path / str(number)
        (home / "step_000003").mkdir(parents=True)
        for one, data in files.items():
            (home / one).write_bytes(bomb if one == name else data)
        with pytest.raises(ValueError, match="step_000003"):
            target.read(home)
    assert not (tmp_path / "ran").exists()
    home = tmp_path / "links" / "step_000003"
    home.mkdir(parents=True)
    for one, data in files.items():
        (home.parent / one).write_bytes(data)
    (home / "state.json").rename(tmp_path / "state.json")
    (home / "state.json").symlink_to(tmp_path / "state.json")
    with pytest.raises(ValueError, match="links to another place"):
        target.read(home.parent)


BOMB = "\n".join(
    ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))]
)


@pytest.mark.parametrize(
    "text, reason",
    [
        (BOMB, "aliases repeat values more than 20000 times"),
        ("data: &data {root: *data}\n", "nested too deeply, or contains itself"),
        ("[" * 5000, "nested more than 100 deep"),
        ("data: {root: \x00}\n", "is not readable YAML"),
        ("loop: {fsdp: !!bool maybe}\n", "is not readable YAML"),
        ("output: !!timestamp 2001-02-30\n", "is not readable YAML"),
    ],
    ids=["bomb", "circle", "deep", "zero", "tag", "date"],
)
def test_yaml_that_does_not_end_is_refused_at_once(tmp_path, text, reason):
    from evaluation.report import read_config
    from training import TrainVaeConfig, parse_config

    (tmp_path / "run.yaml").write_text(text)
    for read in (read_config, lambda path: parse_config(TrainVaeConfig, ["--config", str(path)])):
        with pytest.raises(ValueError, match=f"run.yaml.*{reason}"):
            read(tmp_path / "run.yaml")


def test_aliases_that_repeat_little_are_read(tmp_path):
    (tmp_path / "run.yaml").write_text("shape: &shape [32, 32, 32]\ncrops: {shape: *shape}\n")
    assert read_yaml(tmp_path / "run.yaml")["crops"]["shape"] == [32, 32, 32]
