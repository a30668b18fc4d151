"""The safetensors files of a model's folder, checked by their headers before anything is loaded."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

WEIGHTS = "diffusion_pytorch_model"  # diffusers' name for the files of a model
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_weights(folder: Path, model_class: Any, variant: str | None = None) -> None:
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
            return _shards(index)
        if single.is_file():
            return [single]
    pickles = [path.name for path in sorted(folder.glob("*")) if path.suffix in PICKLES]
    if pickles:
        raise ValueError(
            f"{folder}: {_shorten(pickles)} is a pickle, which can run any code when it is read; only "
            "safetensors are loaded. If you trust it, convert it: model.save_pretrained(folder)"
        )
    raise ValueError(f"{folder}: no weights ({WEIGHTS}.safetensors) there")


def _shards(index: Path) -> list[Path]:
    """The files that an index names. Raises: ValueError if it is damaged, or if it leads out of its folder or wrong."""
    try:
        places: dict[str, str] = json.loads(index.read_text())["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: is no index of shards ({error!r})") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index}: names files outside of its folder: {_shorten(outside)}")
    for name in names:
        keys, promised = stored_shapes([index.parent / name]).keys(), {key for key in places if places[key] == name}
        if keys != promised:
            raise ValueError(
                f"{index.parent / name}: holds other tensors than the index says ({_shorten(sorted(keys ^ promised))}); "
                "is it the shard of another model?"
            )
    return [index.parent / name for name in names]


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
