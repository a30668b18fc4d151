"""A model's name belongs to its weights, whatever pipeline objects hold them, and changes with them."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline

from autoencoder import AutoencoderKL3D
from diffusion import LatentUNet3D
from pipelines import MedVolumePipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    tiny_pipeline().save_pretrained(folder)
    return folder


def load(folder, **kwargs):
    return MedVolumePipeline.from_pretrained(folder, **kwargs)


def built_of(pipe, **others):
    parts = {"vae": pipe.vae, "unet": pipe.unet, "scheduler": pipe.scheduler, "data": pipe.data}
    return MedVolumePipeline(**parts | others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_folder_has_one_name(folder, dtype):
    """However it was loaded, cast, copied or handed on."""
    expected = tiny_pipeline().model_hash
    pipe = load(folder, dtype=dtype)
    unet = LatentUNet3D.from_pretrained(folder, subfolder="unet", dtype=dtype)
    vae = AutoencoderKL3D.from_pretrained(folder / "vae", dtype=dtype)
    for same in (
        pipe,
        built_of(pipe),
        load(folder, unet=pipe.unet),
        load(folder, unet=unet, vae=vae),
        built_of(load(folder), unet=unet),
        copy.deepcopy(pipe),
        built_of(pipe, unet=pickle.loads(pickle.dumps(pipe.unet))),
        load(folder).to(dtype),
        load(folder, dtype=dtype).to(torch.float32),
        load(folder).to(torch.float16).to(torch.bfloat16),
    ):
        assert same.model_hash == expected
    pipe.vae.decoder.to(torch.float16)
    assert pipe.model_hash == expected


def fused_step(unet):
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    for parameter in unet.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def one_value(unet):
    with torch.no_grad():
        unet.conv_in.weight[3, 2, 1, 0, 2] += 1


CHANGES = {
    "a fused optimizer, which counts no version": fused_step,
    "one value of a large tensor": one_value,
    "data": lambda unet: unet.down_blocks[0][0].conv1.weight.data.add_(0.01),
    "data replaced": lambda unet: setattr(unet.conv_in.bias, "data", unet.conv_in.bias.data + 1),
    "other weights": lambda unet: unet.load_state_dict(tiny_pipeline(seed=1).unet.state_dict()),
    "other tensors": lambda unet: unet.load_state_dict(tiny_pipeline(seed=1).unet.state_dict(), assign=True),
    "the config": lambda unet: unet.register_to_config(condition_dropout={"mask": 0.5}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_component_that_was_changed_loses_its_name(folder, change, dtype):
    """It is noticed whether or not the name was asked for before, and by all that hold the component."""
    for asked in (True, False):
        pipe, shared = (pipe := load(folder, dtype=dtype)), built_of(pipe)
        before = tiny_pipeline().model_hash
        if asked:
            assert pipe.model_hash == shared.model_hash == before
        CHANGES[change](pipe.unet)
        pipe.to(torch.float32)  # a cast afterwards hides nothing
        assert pipe.model_hash == shared.model_hash != before
        assert pipe.unet_hash != tiny_pipeline().unet_hash


def test_data_that_was_changed_renames_the_model():
    pipe = tiny_pipeline()
    before = pipe.model_hash
    other = {**pipe.config["data"], "labels": {"0": "background", "2": "left", "5": "posterior"}}
    pipe = MedVolumePipeline.from_pipe(pipe, data=other)
    assert pipe.model_hash != before == tiny_pipeline().model_hash
    vae = pipe.vae
    before = pipe.model_hash
    vae.set_latent_statistics([0.0] * 4, [1.0] * 4)
    assert pipe.model_hash != before


def test_overwritten_files_do_not_identify_the_loaded_model(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    pipe = load(tmp_path)
    tiny_pipeline(seed=1).save_pretrained(tmp_path)
    assert pipe.model_hash == tiny_pipeline().model_hash != load(tmp_path).model_hash


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_weights_leave_their_files(folder, dtype):
    """A mapped file would stay in memory beside the weights, and what is written over it would change them."""
    pipe = load(folder, dtype=dtype)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_offloaded_weights_keep_their_name(folder):
    pipe = load(folder, dtype=torch.bfloat16)
    pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert pipe.model_hash == tiny_pipeline().model_hash
