"""Files of LoRAs: diffusers' `pytorch_lora_weights.safetensors`, written, found and read.

Tensors `unet.<layer>.lora_A.weight` (rank, in, ...) and `lora_B.weight` (out, rank, ...). The header holds, as JSON,
peft's settings and the hash of the U-Net that the LoRA was trained on.
"""

import json
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file

from autoencoder.weights import (
    HUB,
    check_keywords,
    find_folder,
    loading_keywords,
    not_on_the_hub,
    open_safetensors,
)
from files.atomic import atomic_file
from files.documents import FileError, parse_json
from volumes.data.preprocessing import check_preprocessing
from volumes.data.subjects import check_subjects

from .lora_settings import OTHERS, SETTINGS, check_settings, check_tensors, plain_settings

BASE = "base.unet_sha256"  # beside peft's settings, which are `unet.<name>`
TRAINED_ON = "training."  # data and subjects
MOST_HEADER = 1 << 22  # letters of the JSON in a LoRA's header, records of training subjects among it
FACTORS = (".lora_A.weight", ".lora_B.weight")


def write_lora(
    tensors: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any] | None,
    base: str | None,
    folder: str | PathLike,
    name: str = LORA_WEIGHT_NAME_SAFE,
    *,
    trained_on: Mapping[str, Any] | None = None,
) -> Path:
    """Write a LoRA's tensors by layer ("down_blocks.0.0.conv1.lora_A.weight"), and what is known of it: peft's
    settings, the hash of its base, and the "data" and "subjects" that it was `trained_on` (`LoraFile`). Returns the
    file."""
    path = Path(folder).expanduser() / name
    plain = plain_settings(settings or {}, tensors)
    check_tensors(tensors, path)
    check_settings(plain, tensors, path)  # what is written can be read
    header = {f"unet.{key}": plain[key] for key in SETTINGS if key in plain} | ({BASE: base} if base else {})
    header |= {f"{TRAINED_ON}{key}": value for key, value in (trained_on or {}).items() if value is not None}
    with atomic_file(path) as unfinished:
        save_file(
            {f"unet.{key}": tensor.detach().contiguous() for key, tensor in tensors.items()},
            unfinished,
            metadata={"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(header, indent=1, sort_keys=True)},
        )
    return path


class LoraFile(NamedTuple):
    """A LoRA: its tensors by layer ("down_blocks.0.0.conv1.lora_A.weight"), and what its file records, or None: peft's
    settings, the hash of the base U-Net, how its training volumes were prepared (`volumes.data.preprocessing`), and its
    training subjects (`volumes.data.subjects`).
    """

    tensors: dict[str, torch.Tensor]
    settings: Mapping[str, Any] | None = None
    base: str | None = None
    data: Mapping[str, Any] | None = None
    subjects: list[Any] | None = None


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA's file. Raises: FileError if it is not a safetensors file, ValueError if it does not hold a LoRA of a
    U-Net, and as `check_tensors` and `check_settings`.
    """
    try:
        with open_safetensors(path) as file:
            text = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}")
            if len(text) > MOST_HEADER:
                raise FileError(f"its settings are {len(text)} characters; {MOST_HEADER} at most are read")
            header = parse_json(text)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{path}: is not a LoRA in safetensors ({error}); pickles are not read") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: is not a LoRA: its settings are {type(header).__name__}")
    found = {name: header[f"unet.{name}"] for name in (*SETTINGS, *OTHERS) if f"unet.{name}" in header}
    base, data, subjects = header.get(BASE), header.get(f"{TRAINED_ON}data"), header.get(f"{TRAINED_ON}subjects")
    if base is not None and not (isinstance(base, str) and re.fullmatch("[0-9a-f]{64}", base)):
        raise ValueError(f"{path}: names its base {repr(base)[:80]}; a sha256 is expected")
    try:
        check_preprocessing(data)
        check_subjects(subjects)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    own = unet_tensors(tensors, path)
    return LoraFile(own, check_settings(found, own, path), base, data, subjects)


def unet_tensors(state: Mapping[str, torch.Tensor], source: object) -> dict[str, torch.Tensor]:
    """Return tensors by layer from a state dict of diffusers: its names begin with `unet.` and end in peft's
    `lora_A.weight` or diffusers' older `lora.down.weight`.

    Raises: ValueError naming tensors that do not belong to a LoRA of a U-Net, and as `check_tensors`.
    """
    tensors = dict(state)
    if tensors and not any(".lora_A." in key for key in tensors):
        tensors = convert_unet_state_dict_to_peft(tensors)
    foreign = sorted(key for key in tensors if not key.startswith("unet.") or not key.endswith(FACTORS))
    if foreign or not tensors:
        raise ValueError(
            f"{source}: is not a LoRA of a latent U-Net: tensors that do not belong: {repr(foreign[:4])[:200]}; the "
            f"names begin with unet. and end in {' or '.join(FACTORS)}"
        )
    check_tensors(tensors, source)
    return {key.removeprefix("unet."): tensor for key, tensor in tensors.items()}


def find_lora(
    source: str | PathLike | Mapping[str, torch.Tensor],
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
    **download: Any,
) -> LoraFile:
    """Read a LoRA, as `read_lora`, from a file, a folder, a Hub repository, or a state dict in memory.

    Args:
        weight_name, subfolder: the file, and the folder that it is in, of a folder or repository.
        download: revision, token, cache_dir, force_download, local_files_only of `huggingface_hub.hf_hub_download`.
    Raises: FileError if there is none; ValueError as `read_lora` and `unet_tensors`; TypeError for other keywords.
    """
    check_keywords("load_lora_weights", download, (*HUB, "subfolder", "use_safetensors", "weight_name"))
    options = loading_keywords({**download, "use_safetensors": use_safetensors})
    if isinstance(source, Mapping):
        if weight_name or subfolder:
            raise ValueError("weight_name and subfolder are for folders and repositories; the LoRA is given as a dict")
        return LoraFile(unet_tensors(source, "the dict"))
    path = Path(source).expanduser()
    if path.is_file():
        if subfolder or weight_name not in (None, path.name):
            raise ValueError(f"{path}: is the file itself; give weight_name and subfolder with its folder")
        return read_lora(path)
    folder, name = find_folder(source), weight_name or LORA_WEIGHT_NAME_SAFE
    if folder is not None:
        path = folder / (subfolder or "") / name
        if not path.is_file():
            raise FileError(f"{path}: no such file; name it by weight_name, and its folder by subfolder")
        return read_lora(path)
    try:
        return read_lora(Path(hf_hub_download(str(source), name, subfolder=subfolder, **options)))
    except FileError:
        raise
    except (OSError, HFValidationError) as error:
        raise not_on_the_hub(str(source), error) from error
