"""The safetensors files of a model's folder, checked by their headers before anything is loaded."""

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from volumes.preprocessing import check_preprocessing
from volumes.subjects import check_subjects
from volumes.text import read_object

WEIGHTS = "diffusion_pytorch_model"  # diffusers' name for the files of a model
PRIVATE = ("_class_name", "_diffusers_version", "_name_or_path")  # of a config: diffusers' own entries
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_weights(folder: Path, model_class: Any, variant: str | None = None) -> None:
    """Check that the safetensors in `folder` hold exactly the tensors of the model that its config.json describes."""
    stored = stored_shapes(weight_files(folder, variant))
    config = read_object(folder / "config.json")
    check_config(folder, config, model_class, len(stored))
    try:
        with torch.device("meta"):
            expected = {key: tuple(value.shape) for key, value in model_class.from_config(config).state_dict().items()}
    except Exception as error:  # of any kind: a constructor that is given nonsense
        raise ValueError(f"{folder}: config.json describes no {model_class.__name__}: {error}") from error
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


def check_config(folder: Path, config: dict[str, Any], model_class: Any, tensors: int) -> None:
    """Check that a config.json is one of `model_class`, before a model is built of it: only the class's own arguments
    (diffusers would act on others, such as a quantisation), and no more blocks than the `tensors` that are stored."""
    if config.get("_class_name", model_class.__name__) != model_class.__name__:
        raise ValueError(f"{folder}: config.json is of {config['_class_name']!r}, {model_class.__name__} was expected")
    known = {*inspect.signature(model_class.__init__).parameters, *PRIVATE}
    if unknown := sorted(config.keys() - known):
        raise ValueError(
            f"{folder}: config.json names {_shorten(unknown)}, which no {model_class.__name__} has; is it of another version?"
        )
    try:
        check_preprocessing(config.get("data"))
        check_subjects(config.get("subjects"))
    except ValueError as error:
        raise ValueError(f"{folder}: config.json: {error}") from error
    for key, value in config.items():
        if key.endswith("blocks") and (not isinstance(value, list) or not all(isinstance(n, int) for n in value)):
            raise ValueError(f"{folder}: config.json has {key} = {value!r}; a list of numbers of blocks was expected")
        if key.endswith("blocks") and sum(value) > tensors:
            raise ValueError(f"{folder}: config.json asks for {sum(value)} {key}, its weights are {tensors} tensors")


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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: is no index of shards ({error!r})") from error
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ValueError(f"{index}: names files outside of its folder: {_shorten(list(map(str, outside)))}")
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
