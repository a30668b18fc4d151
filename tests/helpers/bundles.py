"""Bundles of MONAI's model zoo as it publishes them, but for the weights, which are random, and narrow networks."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets.autoencoderkl import AutoencoderKL
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from peers import old_state, random_weights

BRATS, BRAIN = "brats_mri_generative_diffusion", "brain_image_synthesis_latent_diffusion_model"
NUMBERS = ("gender", "age", "ventricular_vol", "brain_vol")
_COMMON: dict[str, Any] = {
    "imports": ["$import torch", "$from datetime import datetime", "$from pathlib import Path"],
    "bundle_root": ".",
    "model_dir": "$@bundle_root + '/models'",
    "output_dir": "$@bundle_root + '/output'",
    "create_output_dir": "$Path(@output_dir).mkdir(exist_ok=True)",
    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    "autoencoder": "$@autoencoder_def.to(@device)",
    "saver": {"_target_": "SaveImage", "_requires_": "@create_output_dir", "output_dir": "@output_dir"},
}
_VAE = {"num_res_blocks": 2, "norm_num_groups": 32, "norm_eps": 1e-06}
_VAE |= {"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False}
CONFIGS: dict[str, dict[str, Any]] = {
    BRATS: {
        **_COMMON,
        "spatial_dims": 3,
        "image_channels": 1,
        "latent_channels": 8,
        "latent_shape": ["@latent_channels", 36, 44, 28],
        "autoencoder_def": {
            "_target_": "monai.networks.nets.autoencoderkl.AutoencoderKL",
            "spatial_dims": "@spatial_dims",
            "in_channels": "@image_channels",
            "out_channels": "@image_channels",
            "latent_channels": "@latent_channels",
            "channels": [64, 128, 256],
            "attention_levels": [False, False, False],
            **_VAE,
            "include_fc": False,
        },
        "network_def": {
            "_target_": "monai.networks.nets.diffusion_model_unet.DiffusionModelUNet",
            "spatial_dims": "@spatial_dims",
            "in_channels": "@latent_channels",
            "out_channels": "@latent_channels",
            "channels": [256, 256, 512],
            "attention_levels": [False, True, True],
            "num_head_channels": [0, 64, 64],
            "num_res_blocks": 2,
            "include_fc": False,
            "use_combined_linear": False,
        },
        "load_autoencoder_path": "$@bundle_root + '/models/model_autoencoder.pt'",
        "load_autoencoder": "$@autoencoder_def.load_old_state_dict(torch.load(@load_autoencoder_path))",
        "load_diffusion_path": "$@model_dir + '/model.pt'",
        "noise_scheduler": {
            "_target_": "monai.networks.schedulers.ddim.DDIMScheduler",
            "_requires_": ["@load_diffusion", "@load_autoencoder"],
            "num_train_timesteps": 1000,
            "beta_start": 0.0015,
            "beta_end": 0.0195,
            "schedule": "scaled_linear_beta",
            "clip_sample": False,
        },
        "noise": "$torch.randn([1]+@latent_shape).to(@device)",
        "set_timesteps": "$@noise_scheduler.set_timesteps(num_inference_steps=50)",
        "inferer": {"_target_": "scripts.ldm_sampler.LDMSampler", "_requires_": "@set_timesteps"},
        "run": ["$@inferer.run(@noise, @autoencoder, @diffusion, @noise_scheduler, @saver)"],
    },
    BRAIN: {
        **_COMMON,
        "dataset": "",
        "load_old": 1,
        **dict(zip(NUMBERS, (0.0, 0.1, 0.2, 0.4), strict=True)),
        "conditioning": "$torch.tensor([[@gender, @age, @ventricular_vol, @brain_vol]]).to(@device).unsqueeze(1)",
        "autoencoder_def": {
            "_target_": "monai.networks.nets.AutoencoderKL",
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": 1,
            "latent_channels": 3,
            "channels": [64, 128, 128, 128],
            "attention_levels": [False, False, False, False],
            **_VAE,
        },
        "network_def": "@autoencoder_def",
        "load_autoencoder_path": "$@model_dir + '/autoencoder.pt'",
        "diffusion_def": {
            "_target_": "monai.networks.nets.DiffusionModelUNet",
            "spatial_dims": 3,
            "in_channels": 7,
            "out_channels": 3,
            "channels": [256, 512, 768],
            "num_res_blocks": 2,
            "attention_levels": [False, True, True],
            "norm_num_groups": 32,
            "norm_eps": 1e-06,
            "resblock_updown": True,
            "num_head_channels": [0, 512, 768],
            "with_conditioning": True,
            "transformer_num_layers": 1,
            "cross_attention_dim": 4,
            "upcast_attention": True,
            "use_flash_attention": False,
        },
        "load_diffusion_path": "$@model_dir + '/model.pt'",
        "scheduler": {
            "_target_": "monai.networks.schedulers.DDIMScheduler",
            "_requires_": ["@load_diffusion", "@load_autoencoder"],
            "beta_start": 0.0015,
            "beta_end": 0.0205,
            "num_train_timesteps": 1000,
            "schedule": "scaled_linear_beta",
            "clip_sample": False,
        },
        "noise": "$torch.randn((1, 3, 20, 28, 20)).to(@device)",
        "set_timesteps": "$@scheduler.set_timesteps(num_inference_steps=50)",
        "sampler": {"_target_": "scripts.sampler.Sampler", "_requires_": "@set_timesteps"},
        "sample": "$@sampler.sampling_fn(@noise, @autoencoder, @diffusion, @scheduler, @conditioning)",
        "run": "$@saver(@sample[0][0])",
    },
}
METADATA: dict[str, dict[str, Any]] = {
    BRATS: {
        "image_classes": "Flair brain MRI with 1.1x1.1x1.1 mm voxel size",
        "autoencoder_data_format": {"outputs": {"pred": {"value_range": [0, 1]}}},
        "network_data_format": {"outputs": {"pred": {"value_range": [0, 1000]}}},  # latents
    },
    BRAIN: {
        "image_classes": "T1w head MRI with 1x1x1 mm voxel size",
        "network_data_format": {"outputs": {"pred": {"value_range": [0, 1]}}},
    },
}
UNETS = {BRATS: "network_def", BRAIN: "diffusion_def"}
FILES = {BRATS: ("model_autoencoder.pt", "model.pt"), BRAIN: ("autoencoder.pt", "model.pt")}


def narrow_config(name: str) -> dict[str, Any]:
    """The config of a bundle with narrow networks, small volumes and ten steps."""
    config = copy.deepcopy(CONFIGS[name])
    vae, unet = config["autoencoder_def"], config[UNETS[name]]
    vae |= {"channels": [8, 8], "attention_levels": [False, False], "norm_num_groups": 4, "num_res_blocks": 1}
    unet |= {"channels": [8, 8, 16], "num_head_channels": [0, 4, 8], "norm_num_groups": 4, "num_res_blocks": 1}
    if name == BRATS:
        config |= {"latent_channels": 4, "latent_shape": ["@latent_channels", 4, 8, 4]}
    else:
        config["noise"] = "$torch.randn((1, 3, 4, 8, 4)).to(@device)"
    config["set_timesteps"] = config["set_timesteps"].replace("=50", "=10")
    return config


def networks(name: str) -> tuple[AutoencoderKL, DiffusionModelUNet]:
    """MONAI's networks of a narrow bundle."""
    config = narrow_config(name)
    numbers = {"@spatial_dims": 3, "@image_channels": 1, "@latent_channels": 4}
    arguments = [
        {key: numbers.get(str(value), value) for key, value in config[entry].items() if key != "_target_"}
        for entry in ("autoencoder_def", UNETS[name])
    ]
    return random_weights(AutoencoderKL(**arguments[0])), random_weights(DiffusionModelUNet(**arguments[1]), 1)


def write_config(folder: Path, name: str, config: dict[str, Any]) -> Path:
    """Write the configs of a bundle."""
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    (folder / "configs/inference.json").write_text(json.dumps(config))
    (folder / "configs/metadata.json").write_text(json.dumps(METADATA[name]))
    return folder


def write_bundle(folder: Path, name: str) -> tuple[AutoencoderKL, DiffusionModelUNet]:
    """Write a narrow bundle, with the names of MONAI Generative in its files. Returns MONAI's networks, which have read
    these files."""
    write_config(folder, name, narrow_config(name))
    (folder / "models").mkdir()
    found = networks(name)
    for network, file in zip(found, FILES[name], strict=True):
        torch.save(old_state(network), folder / "models" / file)
        network.load_old_state_dict(torch.load(folder / "models" / file, weights_only=True))
    return found
