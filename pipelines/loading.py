"""Saving and loading through diffusers, made strict: packages registered, safetensors only, every key accounted for."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.pipelines import pipeline_loading_utils

import autoencoder
from autoencoder import VolumeAutoencoder
from diffusion import LatentUNet3D

from .conditions import check_described

# Top-level packages that hold components of a pipeline.
PACKAGES = ("autoencoder", "diffusion")


def register_packages() -> None:
    """Let diffusers save and load components by package: model_index.json reads `["autoencoder", "AutoencoderKL3D"]`.

    Without it the index names the module, which breaks every saved folder when a file is renamed. `LOADABLE_CLASSES` is
    private; tests/test_pipeline_loading.py notices if a new diffusers changes it. The package must hold the name
    `ModelMixin`.
    """
    for package in PACKAGES:
        importlib.import_module(package)  # diffusers looks it up in sys.modules
        pipeline_loading_utils.LOADABLE_CLASSES[package] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}


def check_folder(folder: str | Path) -> None:
    """Check that a folder is a pipeline's, of classes that are here; each model checks its own weights when it is loaded.

    Raises: ValueError naming the folder and what is wrong with its model_index.json.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: no model_index.json, so this is not a pipeline folder (train_ldm.py writes one)")
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder}: model_index.json is no JSON: {error}") from error
    for entry in index.values():
        if isinstance(entry, list) and entry[0] in PACKAGES:
            if not hasattr(importlib.import_module(entry[0]), entry[1]):
                raise ValueError(f"{folder}: model_index.json asks for {entry[1]}, which {entry[0]} does not have")


def load_autoencoder(folder: str | Path) -> VolumeAutoencoder:
    """The trained autoencoder in `folder`, or in its subfolder vae/ (a run or a pipeline), for inference: of the class
    that its config names.

    Raises: ValueError where there is none, where its weights do not fit, or where its latents were never measured.
    """
    folder = Path(folder)
    found = next((path for path in (folder, folder / "vae") if (path / "config.json").is_file()), None)
    if found is None:
        raise ValueError(
            f"{folder}: no autoencoder there (config.json, or vae/config.json); give a folder that train_vae.py wrote"
        )
    try:
        name = json.loads((found / "config.json").read_text()).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{found}: config.json is no model's config: {error}") from error
    model_class = getattr(autoencoder, str(name), None)
    if not (isinstance(model_class, type) and issubclass(model_class, VolumeAutoencoder)):
        raise ValueError(f"{found}: config.json is of {name}, which is no autoencoder")
    vae = model_class.from_pretrained(found)
    if vae.config["latents_std"] is None:
        raise ValueError(
            f"{found}: no latents_mean and latents_std in its config; train_vae.py measures them when it ends"
        )
    return vae.eval().requires_grad_(False)


def check_fit(vae: VolumeAutoencoder, unet: LatentUNet3D, data: Mapping[str, Any]) -> None:
    """Raises: ValueError if autoencoder, U-Net and data do not belong together."""
    if unet.config["in_channels"] != vae.config["latent_channels"]:
        raise ValueError(
            f"the U-Net takes {unet.config['in_channels']} channels, the autoencoder gives {vae.config['latent_channels']}"
        )
    if vae.config["latents_std"] is None:
        raise ValueError("the autoencoder has no latent statistics; train_vae.py measures them when it ends")
    if len(data["intensity"]) != vae.config["out_channels"]:
        raise ValueError(
            f"data describes {len(data['intensity'])} channels, the autoencoder makes {vae.config['out_channels']}"
        )
    vae.check_channels(data["channels"])
    check_described(vae, unet, data)
    if unet.config["num_labels"] == 0:
        return
    if unet.config["num_labels"] != len(data["labels"]):
        raise ValueError(
            f"the U-Net knows {unet.config['num_labels']} labels, data names {len(data['labels'])}: {data['labels']}"
        )
    if tuple(unet.mask_stride) != tuple(vae.stride):
        raise ValueError(
            f"the U-Net folds masks by {unet.mask_stride}, the autoencoder's stride is {vae.stride}; they must agree"
        )
