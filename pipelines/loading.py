"""Saving and loading through diffusers, made strict: packages registered, safetensors only, every key accounted for."""

import importlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers.pipelines import pipeline_loading_utils
from safetensors import SafetensorError, safe_open

from autoencoder import AutoencoderKL3D

# Top-level packages that hold components of a pipeline.
PACKAGES = ("autoencoder", "diffusion")
WEIGHTS = "diffusion_pytorch_model"  # diffusers' name for the files of a model
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def register_packages() -> None:
    """Let diffusers save and load components by package: model_index.json reads `["autoencoder", "AutoencoderKL3D"]`.

    Without it the index names the module, which breaks every saved folder when a file is renamed. `LOADABLE_CLASSES` is
    private; tests/test_pipeline_loading.py notices if a new diffusers changes it. The package must hold the name
    `ModelMixin`.
    """
    for package in PACKAGES:
        importlib.import_module(package)  # diffusers looks it up in sys.modules
        pipeline_loading_utils.LOADABLE_CLASSES[package] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}


def check_folder(folder: str | Path, variant: str | None = None) -> None:
    """Check, before anything is loaded, that a pipeline folder holds exactly the weights that its configs ask for.

    Only headers are read. diffusers itself merely warns of a missing key and leaves the parameter unset.

    Raises: ValueError naming the folder and the keys that are missing, unknown or of another shape; the file that is
    damaged; or the pickle that stands where safetensors should.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: no model_index.json, so this is not a pipeline folder (train_ldm.py writes one)")
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder}: model_index.json is no JSON: {error}") from error
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] in PACKAGES:
            model_class = getattr(importlib.import_module(entry[0]), entry[1], None)
            if model_class is None:
                raise ValueError(f"{folder}: model_index.json asks for {entry[1]}, which {entry[0]} does not have")
            check_weights(folder / name, model_class, variant)


def load_autoencoder(folder: str | Path) -> AutoencoderKL3D:
    """The trained autoencoder in `folder`, or in its subfolder vae/ (a run or a pipeline), for inference.

    Raises: ValueError where there is none, where its weights do not fit, or where its latents were never measured.
    """
    folder = Path(folder)
    found = next((path for path in (folder, folder / "vae") if (path / "config.json").is_file()), None)
    if found is None:
        raise ValueError(
            f"{folder}: no autoencoder there (config.json, or vae/config.json); give a folder that train_vae.py wrote"
        )
    vae = AutoencoderKL3D.from_pretrained(found)
    if vae.config["latents_std"] is None:
        raise ValueError(
            f"{found}: no latents_mean and latents_std in its config; train_vae.py measures them when it ends"
        )
    return vae.eval().requires_grad_(False)


def check_weights(folder: Path, model_class: type, variant: str | None = None) -> None:
    """Check that the safetensors in `folder` hold exactly the tensors of the model that its config.json describes."""
    stored = stored_shapes(weight_files(folder, variant))
    config = model_class.load_config(folder)
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in model_class.from_config(config).state_dict().items()}
    problems = {
        "missing": sorted(expected.keys() - stored.keys()),
        "unknown": sorted(stored.keys() - expected.keys()),
        "of another shape": sorted(key for key in expected.keys() & stored.keys() if expected[key] != stored[key]),
    }
    found = [f"{len(keys)} {what} ({_shorten(keys)})" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(
            f"{folder}: the weights do not fit {model_class.__name__} as config.json describes it: {'; '.join(found)}. "
            "Use the weights and the config of one and the same model"
        )


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files that diffusers loads from one component's folder; what else lies there does not count.

    They are the shards that an index names, or else the one file; of `variant` (such as "fp16") if the folder has it.

    Raises: ValueError if there is none, naming the pickle that is there in its place.
    """
    for middle in ([f".{variant}"] if variant else []) + [""]:
        index, single = folder / f"{WEIGHTS}.safetensors.index{middle}.json", folder / f"{WEIGHTS}{middle}.safetensors"
        if index.is_file():
            return sorted({folder / shard for shard in json.loads(index.read_text())["weight_map"].values()})
        if single.is_file():
            return [single]
    pickles = [path.name for path in sorted(folder.glob("*")) if path.suffix in PICKLES]
    if pickles:
        raise ValueError(
            f"{folder}: {_shorten(pickles)} is a pickle, which can run any code when it is read; only "
            "safetensors are loaded. If you trust it, convert it: model.save_pretrained(folder)"
        )
    raise ValueError(f"{folder}: no weights ({WEIGHTS}.safetensors) there")


def stored_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in safetensors files, read from the headers alone.

    Raises: ValueError naming a file that is damaged or missing.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path}: is no whole safetensors file ({error}); was it downloaded to the end (`git lfs pull`)?"
            ) from error
    return shapes


def _shorten(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
