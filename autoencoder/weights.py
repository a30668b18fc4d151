"""Find the safetensors files of a model's folder, and check their headers before anything is loaded."""

import inspect
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from files.documents import FileError, parse_json, read_object
from files.paths import open_regular
from files.shipped import expand_path
from volumes.data.preprocessing import check_preprocessing
from volumes.data.subjects import check_subjects

WEIGHTS = "diffusion_pytorch_model"  # diffusers' name for the files of a model
PRIVATE = ("_class_name", "_diffusers_version", "_name_or_path")  # of a config: diffusers' own entries
REPOSITORY = r"(\w[\w.-]*/)?\w[\w.-]*"  # of the Hub: user/name, or an old name without a user
HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")  # keywords of a download
UPLOAD = ("commit_message", "create_pr", "private", "repo_id", "token")  # keywords of save_pretrained, with push_to_hub
LOADING = (  # keywords of from_pretrained that decide how weights are read
    *("device_map", "disable_mmap", "dtype", "low_cpu_mem_usage", "max_memory", "offload_folder", "offload_state_dict"),
    *("torch_dtype", "use_safetensors", "variant"),
)
VARIANT = rf"{WEIGHTS}(?:\.safetensors\.index)?\.([\w-]+?)(?:-\d+-of-\d+)?\.(?:safetensors|json)"  # of the files of one
MOST_HEADER = 1 << 26  # bytes of the header of a safetensors file
MAX_VALUE = 1_000_000  # whole number in a model's config, and values in it, beside records of the training
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_folder(source: str | os.PathLike) -> Path | None:
    """Return the folder of a model on this machine, `~` and names of shipped weights expanded. None if `source` can
    only be a repository of the Hub (user/name).

    Raises: FileError for a path that is not a folder, and for shipped weights that are not there.
    """
    try:
        text = expand_path(os.fspath(source))
    except ValueError as error:
        raise FileError(str(error)) from error
    folder = Path(text)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileError(f"{folder}: is a file; give the folder of the model")
    if not isinstance(source, str) or not re.fullmatch(REPOSITORY, text):
        raise FileError(f"{folder}: no such folder")
    return None


def folder_to_save(place: str | os.PathLike) -> str:
    """Return the folder to save to, `~` expanded. Raises: FileError for a file, where diffusers would return without
    saving.
    """
    folder = os.path.expanduser(os.fspath(place))
    if os.path.isfile(folder):
        raise FileError(f"{folder}: is a file; give a folder to save to")
    return folder


def not_on_the_hub(source: str, error: Exception) -> FileError:
    """Return the error for a name that is neither a folder nor on the Hub, which answered `error`."""
    reason = str(error).strip().partition("\n")[0]
    return FileError(
        f"{source}: is neither a folder here nor found on the Hub ({type(error).__name__}: {reason}); give the path "
        "of a folder, or user/name of a repository that you can reach"
    )


def loading_keywords(given: Mapping[str, Any], *, parts: Collection[str] = ()) -> dict[str, Any]:
    """Return the keywords of `from_pretrained` as diffusers wants them: without those that are None, `~` expanded in
    folders.

    Args:
        parts: a pipeline's components; its `dtype` may be a dict with an entry per component.
    Raises: ValueError for `use_safetensors=False` and for an invalid dtype, which diffusers would load as float32.
    """
    if given.get("use_safetensors") not in (None, True):
        raise ValueError("use_safetensors=False is refused: a pickle can run any code when it is read")
    for name in ("dtype", "torch_dtype"):
        dtype = given.get(name)
        types = dtype if isinstance(dtype, Mapping) and parts else {"default": dtype}
        fits = all(isinstance(one, torch.dtype) or one is None for one in types.values())
        if not fits or not set(types) <= {"default", *parts}:
            by_part = f", or a dict of them by {', '.join([*parts, 'default'])}" if parts else ""
            raise ValueError(f"{name} is {dtype!r}; give a torch.dtype such as torch.bfloat16{by_part}")
    kept = {name: value for name, value in given.items() if value is not None and name != "use_safetensors"}
    return kept | {name: os.path.expanduser(kept[name]) for name in ("cache_dir", "offload_folder") if name in kept}


def check_keywords(function: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError, as Python does, for keywords that the function does not accept."""
    if unknown := sorted(set(given) - set(known)):
        raise TypeError(
            f"{function}() got unexpected keyword arguments: {', '.join(unknown)}; it takes {', '.join(sorted(known))}"
        )


def check_weights(folder: Path, model_class: Any, variant: str | None = None) -> None:
    """Check that the safetensors in `folder` hold exactly the tensors of the model that its config.json describes."""
    files = weight_files(folder, variant)
    stored = stored_shapes(files)
    config = read_object(folder / "config.json")
    if "_class_name" in config and not isinstance(config["_class_name"], str):
        raise ValueError(f"{folder}: config.json is of {config['_class_name']!r:.80}; the name of a class is expected")
    check_config(folder, config, model_class, len(stored))
    try:
        with torch.device("meta"):
            described = model_class.from_config(config).state_dict()
    except Exception as error:  # of any kind: the constructor got nonsense
        raise ValueError(f"{folder}: config.json does not describe a {model_class.__name__}: {error}") from error
    expected = {key: tuple(value.shape) for key, value in described.items()}
    problems = {
        "missing": sorted(expected.keys() - stored.keys()),
        "unknown": sorted(stored.keys() - expected.keys()),
        "of another shape": sorted(key for key in expected.keys() & stored.keys() if expected[key] != stored[key]),
        "of another type": sorted(_other_types(files, described)),
    }
    found = [f"{len(keys)} {what} ({_shorten(keys)})" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(
            f"{folder}: the weights do not fit {model_class.__name__} as config.json describes it: {'; '.join(found)}. "
            "Use the weights and the config of one and the same model"
        )


def check_config(folder: Path, config: Mapping[str, Any], model_class: Any, tensors: int) -> None:
    """Check that a config.json is one of `model_class`, before a model is built of it: only the class's own arguments
    (diffusers would act on others, such as a quantization), and no more blocks than the `tensors` that are stored."""
    if config.get("_class_name", model_class.__name__) != model_class.__name__:
        raise ValueError(f"{folder}: config.json is of {config['_class_name']!r}, {model_class.__name__} was expected")
    known = {*inspect.signature(model_class.__init__).parameters, *PRIVATE}
    if unknown := sorted(config.keys() - known):
        raise ValueError(
            f"{folder}: config.json names {_shorten(unknown)}, which {model_class.__name__} does not have; is it of "
            "another version?"
        )
    try:
        check_preprocessing(config.get("data"))
        check_subjects(config.get("subjects"))
    except ValueError as error:
        raise ValueError(f"{folder}: config.json: {error}") from error
    _check_values(folder, {key: value for key, value in config.items() if key not in ("data", "subjects")})
    named = [found for found in map(config.get, ("classes", "numbers")) if isinstance(found, dict)]
    if (count := sum(map(len, named))) > tensors:
        raise ValueError(f"{folder}: config.json names {count} conditions, but its weights have {tensors} tensors")
    for key, value in config.items():
        if key.endswith("blocks") and (not isinstance(value, list) or not all(isinstance(n, int) for n in value)):
            raise ValueError(f"{folder}: config.json has {key} = {value!r}; a list of numbers of blocks was expected")
        if key.endswith("blocks") and max(sum(value), len(value)) > tensors:
            largest = max(sum(value), len(value))
            raise ValueError(f"{folder}: config.json sets {largest} {key}, but its weights have {tensors} tensors")


def _check_values(folder: Path, config: Any) -> None:
    """Raise ValueError for numbers that are not finite or that no model has, and for too many values, before any are
    used.
    """
    left, count = [("", config)], 0
    while left:
        name, value = left.pop()
        count += 1
        large = (
            isinstance(value, int) and abs(value) > MAX_VALUE and name != "numbers"
        )  # of a condition, in its own units
        if large or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{folder}: config.json has {name} = {repr(value)[:80]}, which no model has")
        if isinstance(value, dict | list):
            left += [
                (name or str(key), one) for key, one in (value.items() if isinstance(value, dict) else enumerate(value))
            ]
        if count + len(left) > MAX_VALUE:
            raise ValueError(f"{folder}: config.json holds more than {MAX_VALUE} values, which no model has")


def _other_types(files: Iterable[Path], described: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the tensors that are stored as integers where the model has floating point, or the other way round."""
    found = []
    for path in files:
        with open_safetensors(path) as file:
            for key in described.keys() & set(file.keys()):
                floating = file.get_slice(key).get_dtype().startswith(("F", "BF"))
                found += [key] if floating != described[key].is_floating_point() else []
    return found


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the safetensors files that diffusers loads from one component's folder; other files there do not matter.

    They are the shards that an index names, or else the one file; of `variant` (such as "fp16") if the folder has it.

    Raises: FileError if there is none, naming a pickle in its place.
    """
    for middle in ([f".{variant}"] if variant else []) + [""]:
        index, single = folder / f"{WEIGHTS}.safetensors.index{middle}.json", folder / f"{WEIGHTS}{middle}.safetensors"
        if index.is_file():
            return _shards(index)
        if single.is_file():
            return [single]
    pickles = [path.name for path in sorted(folder.glob("*")) if path.suffix in PICKLES]
    if pickles:
        raise FileError(
            f"{folder}: {_shorten(pickles)} is a pickle, which can run any code when it is read; only "
            "safetensors are loaded. If you trust it, convert it: model.save_pretrained(folder)"
        )
    variants = sorted({found[1] for path in folder.glob("*") if (found := re.fullmatch(VARIANT, path.name))})
    remedy = f"; it has those of another variant: give variant={' or '.join(map(repr, variants))}" if variants else ""
    raise FileError(f"{folder}: no weights ({WEIGHTS}.safetensors) there{remedy}")


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names. Raises: FileError if it is damaged, names a file outside its folder, or is
    inconsistent.
    """
    try:
        places: dict[str, str] = read_object(index)["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{index}: is not an index of shards ({error!r:.200})") from error
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise FileError(
            f"{index}: names files outside of its folder: {_shorten([repr(name)[:80] for name in outside])}"
        )
    for name in names:
        keys, promised = stored_shapes([index.parent / name]).keys(), {key for key in places if places[key] == name}
        if keys != promised:
            raise FileError(
                f"{index.parent / name}: holds other tensors than the index says "
                f"({_shorten(sorted(keys ^ promised))}); is it the shard of another model?"
            )
    return [index.parent / name for name in names]


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file for torch, with `safe_open`, which checks that the tensors fill the file without gaps or
    overlaps. Raises: SafetensorError, OSError; ValueError unless it is a regular file (a pipe would wait forever) whose
    header names each tensor once.
    """
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MOST_HEADER, os.fstat(file.fileno()).st_size - 8):
            raise ValueError(f"its header is of {length} bytes")
        if not isinstance(parse_json(file.read(length).decode()), dict):
            raise ValueError("its header is not a JSON object")
    return safe_open(path, framework="pt")


def stored_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor in safetensors files, read from the headers alone.

    Raises: FileError naming a file that is damaged or missing.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with open_safetensors(path) as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise FileError(
                f"{path}: truncated or corrupt safetensors file ({error}); was the download complete (`git lfs pull`)?"
            ) from error
    return shapes


def _shorten(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
