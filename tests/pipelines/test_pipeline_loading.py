"""Saving and loading pipelines: equality, strictness, and what diffusers' private parts must keep doing."""

import json
import pkgutil
import shutil
from pathlib import Path

import diffusers.pipelines
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.pipelines import pipeline_loading_utils
from safetensors.torch import load_file, save_file
from tiny import mask_image, seeded, tiny_pipeline

import autoencoder
import diffusion
import pipelines
from autoencoder import VQGAN3D, AutoencoderKL3D, SpaceToDepth3D
from diffusion import LatentUNet3D
from pipelines import MedVolumePipeline
from pipelines.storage.loading import load_autoencoder
from pipelines.storage.provenance import content_hash, stored_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def change_weights(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_loaded_equals_saved(folder):
    saved, loaded = tiny_pipeline(), MedVolumePipeline.from_pretrained(folder)
    assert loaded.data == saved.data
    for name in ("vae", "unet"):
        theirs = getattr(loaded, name).state_dict()
        for key, tensor in getattr(saved, name).state_dict().items():
            assert torch.equal(tensor, theirs[key]), key
    loaded.set_progress_bar_config(disable=True)
    mask = mask_image((7, 8, 6))
    volumes = [
        pipe(mask, num_inference_steps=2, generator=seeded(0), output_type="np").volumes[0] for pipe in (saved, loaded)
    ]
    np.testing.assert_array_equal(*volumes)


def test_the_index_names_packages_and_holds_no_paths(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["vae"] == ["autoencoder", "AutoencoderKL3D"] and index["unet"] == ["diffusion", "LatentUNet3D"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert index["data"]["labels"] == {"0": "background", "2": "anterior", "5": "posterior"}
    MedVolumePipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for path in sorted(folder.rglob("*.*")):
        assert (tmp_path / "again" / path.relative_to(folder)).read_bytes() == path.read_bytes(), path.name
    assert "_name_or_path" not in "".join(path.read_text() for path in (tmp_path / "again").rglob("*.json"))


def test_private_parts_of_diffusers_that_we_rely_on():
    for package in ("autoencoder", "diffusion"):
        assert pipeline_loading_utils.LOADABLE_CLASSES[package] == {
            "ModelMixin": ["save_pretrained", "from_pretrained"]
        }
    assert issubclass(autoencoder.AutoencoderKL3D, autoencoder.ModelMixin)
    assert issubclass(diffusion.LatentUNet3D, diffusion.ModelMixin)
    assert pipeline_loading_utils._fetch_class_library_tuple(tiny_pipeline().unet) == ("diffusion", "LatentUNet3D")


def test_no_module_is_named_like_a_folder_of_diffusers():
    """diffusers would look for our classes in its own folder: saving works, loading fails."""
    taken = {module.name for module in pkgutil.iter_modules(diffusers.pipelines.__path__) if module.ispkg}
    for package in (autoencoder, diffusion, pipelines):
        ours = {package.__name__, *(module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg)}
        assert not ours & taken


def test_diffusers_own_loader_finds_the_parts(folder):
    """What the Hub does: the index alone, our packages imported."""
    parts = DiffusionPipeline.load_config(folder)
    for name in ("vae", "unet"):
        found = pipeline_loading_utils.simple_get_class_obj(*parts[name])
        assert found.__name__ == parts[name][1]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", lambda t: t.pop("conv_in.bias"), "1 missing \\(conv_in.bias\\)"),
        ("vae", lambda t: t.update(extra=torch.zeros(1)), "1 unknown \\(extra\\)"),
        ("unet", lambda t: t.update({"conv_in.bias": torch.zeros(3)}), "1 of another shape \\(conv_in.bias\\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, part, change, message):
    change_weights(folder / part / WEIGHTS, change)
    with pytest.raises(ValueError, match=message) as error:
        MedVolumePipeline.from_pretrained(folder)
    assert str(folder / part) in str(error.value)


def test_a_pickle_is_refused(folder):
    tensors = load_file(folder / "unet" / WEIGHTS)
    (folder / "unet" / WEIGHTS).unlink()
    torch.save(tensors, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="diffusion_pytorch_model.bin is a pickle.*only safetensors"):
        MedVolumePipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="use_safetensors=False is refused"):
        MedVolumePipeline.from_pretrained(folder, use_safetensors=False)
    with pytest.raises(ValueError, match="safe_serialization=False is refused"):
        tiny_pipeline().save_pretrained(folder, safe_serialization=False)


def test_folders_that_are_no_pipeline_are_named(folder):
    with pytest.raises(ValueError, match="no model_index.json"):
        MedVolumePipeline.from_pretrained(folder / "vae")
    (folder / "vae" / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="vae: no weights"):
        MedVolumePipeline.from_pretrained(folder)


def test_names_that_are_nowhere(folder, monkeypatch):
    """A path is never asked of the Hub; what may be a repository is, and the error still says that there is no such
    folder."""
    for load in (MedVolumePipeline.from_pretrained, AutoencoderKL3D.from_pretrained):
        for name in (
            folder / "gone",
            str(folder / "gone"),
            Path("gone"),
            "weights/no_such/pipeline",
            "./gone",
            "gone/",
        ):
            with pytest.raises(OSError, match=f"^{Path(name)}: no such folder$"):
                load(name)
        for name in ("user/gone", "gone"):
            with pytest.raises(OSError, match=f"^{name}: is neither a folder here nor found on the Hub \\("):
                load(name)
        with pytest.raises(OSError, match="model_index.json: is a file; give the folder"):
            load(folder / "model_index.json")
    with pytest.raises(OSError, match="no autoencoder there"):
        load_autoencoder(folder / "gone")


def test_missing_or_damaged_files_are_os_errors_as_in_diffusers(folder):
    """And a ValueError, as all errors for users are."""
    (folder / "unet" / WEIGHTS).write_bytes(b"")
    with pytest.raises(OSError, match="truncated or corrupt safetensors file"):
        LatentUNet3D.from_pretrained(folder / "unet")
    (folder / "unet" / "config.json").write_text("{")
    (folder / "unet" / WEIGHTS).unlink()
    with pytest.raises(OSError, match="no weights"):
        LatentUNet3D.from_pretrained(folder / "unet")
    with pytest.raises(OSError, match="no weights"):
        MedVolumePipeline.from_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(OSError, match="no scheduler_config.json"):
        MedVolumePipeline.from_pretrained(folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(OSError, match="has no folder vae"):
        MedVolumePipeline.from_pretrained(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(OSError, match="no model_index.json") as error:
        MedVolumePipeline.from_pretrained(folder)
    assert isinstance(error.value, ValueError)


def test_keywords_that_nothing_reads_are_refused(folder, tmp_path):
    """diffusers ignores them, or takes those of a model for changes of its config."""
    pipe = tiny_pipeline()
    for call, keyword in (
        (lambda **more: MedVolumePipeline.from_pretrained(folder, **more), "nonsense"),
        (lambda **more: MedVolumePipeline.from_pretrained(folder, **more), "text_encoder"),
        (lambda **more: AutoencoderKL3D.from_pretrained(folder / "vae", **more), "latent_channels"),
        (lambda **more: LatentUNet3D.from_pretrained(folder / "unet", **more), "quantization_config"),
        (lambda **more: AutoencoderKL3D.from_config(pipe.vae.config, **more), "nonsense"),
        (lambda **more: pipe.save_pretrained(tmp_path / "out", **more), "nonsense"),
        (lambda **more: pipe.save_pretrained(tmp_path / "out", **more), "repo_id"),  # read with push_to_hub alone
        (lambda **more: pipe.vae.save_pretrained(tmp_path / "out", **more), "nonsense"),
        (lambda **more: MedVolumePipeline.from_pipe(pipe, **more), "nonsense"),
    ):
        with pytest.raises(TypeError, match=f"unexpected keyword arguments: {keyword}"):
            call(**{keyword: 8})
    for keyword, value in (("custom_pipeline", "pipeline"), ("trust_remote_code", True)):
        with pytest.raises(ValueError, match="code of a model is never run"):
            MedVolumePipeline.from_pretrained(folder, **{keyword: value})
    for dtype in ("bfloat16", {"transformer": torch.bfloat16}, np.float16):
        with pytest.raises(
            ValueError, match="give a torch.dtype such as torch.bfloat16, or a dict of them by vae, unet, unet_weak, co"
        ):
            MedVolumePipeline.from_pretrained(folder, dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_none_is_what_is_not_given(folder):
    nothing = dict.fromkeys(
        ("vae", "unet", "scheduler", "data", "use_safetensors", "torch_dtype", "variant", "cache_dir")
    )
    assert MedVolumePipeline.from_pretrained(folder, **nothing).model_hash == tiny_pipeline().model_hash
    vae = AutoencoderKL3D.from_pretrained(folder, subfolder="vae", use_safetensors=None, torch_dtype=None)
    assert vae.dtype == torch.float32
    parts = MedVolumePipeline.from_pretrained(folder, dtype={"unet": torch.bfloat16, "default": torch.float16})
    assert (parts.unet.dtype, parts.vae.dtype) == (torch.bfloat16, torch.float16)


def test_the_home_folder_is_found(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "copy")
    pipe = MedVolumePipeline.from_pretrained("~/copy")
    pipe.save_pretrained("~/again")
    pipe.vae.save_pretrained(Path("~/again/other"))
    assert AutoencoderKL3D.from_pretrained("~/again/other").config["channels"] == [8, 8]
    assert load_autoencoder("~/again").config["channels"] == [8, 8]
    assert not (tmp_path / "~").exists()


def test_diffusers_finds_our_class(folder):
    """`DiffusionPipeline.from_pretrained`, once `pipelines` is imported."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is MedVolumePipeline and pipe.data == tiny_pipeline().data
    assert all(
        type(getattr(pipe, name)) is type(getattr(tiny_pipeline(), name)) for name in ("vae", "unet", "scheduler")
    )
    (folder / "unet" / WEIGHTS).write_bytes(b"")
    with pytest.raises(ValueError, match="truncated or corrupt safetensors file"):
        DiffusionPipeline.from_pretrained(folder)


VAES = {
    "kl": lambda: tiny_pipeline().vae,
    "vq": lambda: VQGAN3D(latent_channels=4, channels=(8, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1)),
    "voxels": lambda: SpaceToDepth3D(patch_size=4),
}


@pytest.mark.parametrize("kind", VAES)
def test_a_pipeline_from_a_pipeline_shares_its_components(kind, caplog):
    """Also by diffusers' own from_pipe, which compares the classes in our signature."""
    vae = VAES[kind]()
    channels = vae.config["latent_channels"]
    vae.set_latent_statistics([0.0] * channels, [1.0] * channels)
    unet = LatentUNet3D(channels, channels, channels=(16, 16), blocks=(1, 1), head_dim=8, num_labels=3, mask_width=8)
    pipe = MedVolumePipeline(vae, unet, tiny_pipeline().scheduler, tiny_pipeline().data).to(torch.bfloat16)
    shared = MedVolumePipeline.from_pipe(pipe)
    assert all(getattr(shared, name) is getattr(pipe, name) for name in ("vae", "unet", "scheduler"))
    assert shared.data == pipe.data and shared.unet.dtype == torch.bfloat16  # not cast, as diffusers would
    other = tiny_pipeline(labels={"0": "background", "2": "left", "5": "right"}).data
    assert MedVolumePipeline.from_pipe(pipe, data=other).data.labels[2] == "left"
    assert DiffusionPipeline.from_pipe.__func__(MedVolumePipeline, pipe, dtype=torch.bfloat16).vae is vae
    assert "not switched over" not in caplog.text
    assert MedVolumePipeline.from_pipe(pipe, dtype=torch.float32).unet.dtype == torch.float32


def test_a_component_of_another_kind_is_named():
    pipe = tiny_pipeline()
    for name, wrong in (("vae", pipe.unet), ("vae", None), ("unet", "weights/unet"), ("scheduler", None)):
        with pytest.raises(ValueError, match=f"{name} is {type(wrong).__name__}; a .* is needed"):
            MedVolumePipeline(**{**pipe.components, name: wrong}, data=pipe.data)


def test_wrong_pipelines_folders_and_schedulers_are_named(tmp_path):
    pipe = tiny_pipeline()
    for wrong in ("folder", None, pipe.unet, MedVolumePipeline):
        with pytest.raises(ValueError, match="from_pipe takes a pipeline"):
            MedVolumePipeline.from_pipe(wrong)
    (tmp_path / "file").write_text("mine")
    for part in (pipe, pipe.unet, pipe.vae):  # where diffusers only logs that nothing was saved
        with pytest.raises(OSError, match="file: is a file; give a folder to save to"):
            part.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    pipe.scheduler = DDIMScheduler
    with pytest.raises(ValueError, match="the scheduler is the class DDIMScheduler; give DDIMScheduler.from_config"):
        pipe(mask_image((8, 8, 8)))


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_damaged_files_are_named(folder, content):
    path = folder / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(
        ValueError, match="unet/diffusion_pytorch_model.safetensors: truncated or corrupt safetensors file"
    ):
        MedVolumePipeline.from_pretrained(folder)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="model_index.json is not JSON"):
        MedVolumePipeline.from_pretrained(folder)


def test_weights_that_are_not_loaded_do_not_count(folder):
    """Neither a backup beside the file, for keys or hash, nor a single file beside the shards that diffusers
    prefers."""
    expected = MedVolumePipeline.from_pretrained(folder).model_hash
    other = {key: tensor + 1 for key, tensor in load_file(folder / "unet" / WEIGHTS).items()}
    save_file(other, folder / "unet" / "old.safetensors")
    assert MedVolumePipeline.from_pretrained(folder).model_hash == expected
    tiny_pipeline().save_pretrained(folder, max_shard_size="50KB")
    save_file(other, folder / "unet" / WEIGHTS)
    assert (folder / "unet" / f"{WEIGHTS}.index.json").is_file()
    assert MedVolumePipeline.from_pretrained(folder).model_hash == expected
    (folder / "vae" / WEIGHTS).unlink()
    for path in (folder / "vae").glob("*-of-*.safetensors"):
        path.unlink()
        with pytest.raises(ValueError, match="truncated or corrupt safetensors file"):
            MedVolumePipeline.from_pretrained(folder)


def test_a_variant_is_checked_and_hashed_by_its_own_files(folder):
    other = tiny_pipeline(seed=1)
    other.save_pretrained(folder, variant="fp16")
    assert MedVolumePipeline.from_pretrained(folder).model_hash == tiny_pipeline().model_hash
    assert MedVolumePipeline.from_pretrained(folder, variant="fp16").model_hash == other.model_hash
    change_weights(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors", lambda t: t.pop("conv_in.bias"))
    with pytest.raises(ValueError, match="1 missing"):
        MedVolumePipeline.from_pretrained(folder, variant="fp16")
    (folder / "unet" / WEIGHTS).unlink()
    with pytest.raises(OSError, match="no weights .* there; it has those of another variant: give variant='fp16'"):
        LatentUNet3D.from_pretrained(folder / "unet")


def test_the_hash_names_the_content(folder, tmp_path):
    """The same in memory, on disk and in half precision; another when a weight, a config or the data's meaning
    changes."""
    saved = tiny_pipeline()
    expected = saved.model_hash
    assert MedVolumePipeline.from_pretrained(folder).model_hash == expected
    assert MedVolumePipeline.from_pretrained(folder, dtype=torch.bfloat16).model_hash == expected
    assert tiny_pipeline(labels={"0": "background", "2": "left", "5": "right"}).model_hash != expected
    loaded = MedVolumePipeline.from_pretrained(folder)
    assert loaded.model_hash == expected
    loaded.vae = tiny_pipeline(seed=1).vae
    assert loaded.model_hash != expected
    change_weights(folder / "vae" / WEIGHTS, lambda tensors: tensors["decoder.0.bias"].add_(1e-6))
    assert MedVolumePipeline.from_pretrained(folder).model_hash != expected


def test_an_argument_that_is_new_and_unused_renames_no_model():
    """What ships has the hash of its files: arguments that models got since are None."""
    folder = Path(__file__).resolve().parents[2] / "weights" / "hippocampus"
    contents = {"data": (json.loads((folder / "model_index.json").read_text())["data"], ())}
    for name in ("vae", "unet"):
        config = json.loads((folder / name / "config.json").read_text())
        contents[name] = config, stored_tensors([folder / name / WEIGHTS])
    assert MedVolumePipeline.from_pretrained(folder).model_hash == content_hash(contents)
    assert content_hash({"a": ({"x": 1, "new": None}, ())}) == content_hash({"a": ({"x": 1}, ())})


def test_a_component_that_is_given_needs_no_files(folder):
    given = tiny_pipeline(seed=1)
    (folder / "unet" / WEIGHTS).unlink()
    loaded = MedVolumePipeline.from_pretrained(folder, unet=given.unet)
    assert loaded.unet is given.unet and loaded.unet_hash == given.unet_hash


def test_loading_keeps_the_memory_layout(folder):
    """diffusers' loader drops channels_last_3d, and with it the speed on CPUs."""
    loaded = MedVolumePipeline.from_pretrained(folder)
    for model in (loaded.vae, loaded.unet):
        kernels = [p for p in model.parameters() if p.ndim == 5 and min(p.shape) > 1]
        assert kernels and all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in kernels)


def test_data_is_needed():
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="needs `data`.*data=pipe.data"):
        MedVolumePipeline(**pipe.components)
