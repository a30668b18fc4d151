"""A generated volume says that it is synthetic, and how it was made: in its NIfTI header and a JSON file beside it."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nibabel as nib
import torch
from safetensors import safe_open

from volumes import in_one_step, nifti_path

Tensors = Iterable[tuple[str, torch.Tensor]]


def software() -> str:
    """Name and version of this package; "unknown" where it runs from a clone that was not installed."""
    try:
        return f"medvolume {version('medvolume')}"
    except PackageNotFoundError:
        return "medvolume unknown"


def content_hash(components: Mapping[str, tuple[Mapping[str, Any], Tensors]]) -> str:
    """sha256 over each component's config and tensors (name, type, shape, bytes), whatever file or memory they are in.

    Private config entries (with a leading underscore: versions, paths) do not count, nor do those that are None: an
    argument that a later version adds renames no model that does not use it.
    """
    digest = hashlib.sha256()
    for name, (config, tensors) in sorted(components.items()):
        public = {key: value for key, value in config.items() if not key.startswith("_") and value is not None}
        digest.update(f"{name}{json.dumps(public, sort_keys=True)}".encode())
        for key, tensor in tensors:
            tensor_digest(digest, key, tensor)
    return digest.hexdigest()


def tensor_digest(digest: Any, key: str, tensor: torch.Tensor) -> None:
    """Add a tensor's name, type, shape and bytes to a hash."""
    digest.update(f"{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def stored_tensors(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in safetensors files, by name, one at a time."""
    places: dict[str, Path] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    for key in sorted(places):
        with safe_open(places[key], framework="pt") as file:
            yield key, file.get_tensor(key)


def memory_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a module's own state, by name; a LoRA that peft attached is left out.

    Raises: ValueError if they are offloaded out of reach.
    """
    state = {k.replace(".base_layer.", "."): v for k, v in module.state_dict().items() if ".lora_" not in k}
    if hasattr(module, "offloaded_to_disk") or any(tensor.is_meta for tensor in state.values()):
        raise ValueError(
            "the weights are offloaded, so the model's hash cannot be computed: offload by the pipeline's own method, or "
            "save the pipeline and load it from its folder"
        )
    yield from sorted(state.items())


def header_description(record: Mapping[str, Any]) -> str:
    """The NIfTI `descrip` field, 79 bytes at most: that it is synthetic, by which model, from which seed."""
    seed = "" if record["seed"] is None else f" seed {record['seed']}"
    return f"synthetic; {record['software'][:20]}; model {record['model'][:12]}{seed}"


def sidecar_path(path: str | os.PathLike) -> Path:
    """The JSON file beside a volume: case_000.nii.gz -> case_000.json."""
    path = Path(path)
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".json")


def read_sidecar(path: str | os.PathLike) -> dict[str, Any] | None:
    """The record beside the volume at `path`; None if there is none.

    Raises: ValueError on a file that is no sidecar of ours.
    """
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        return None
    try:
        record = json.loads(sidecar.read_text())
    except ValueError as error:
        raise ValueError(f"{sidecar}: is no JSON ({error}); it was not written by generate.py") from error
    if not isinstance(record, dict) or record.get("synthetic") is not True:
        raise ValueError(f"{sidecar}: is not the sidecar of a generated volume; write to another folder")
    return record


@contextmanager
def synthetic_file(record: Mapping[str, Any], path: str | os.PathLike) -> Iterator[Path]:
    """The file to write a generated volume (.nii or .nii.gz) to: when the block ends, it takes its place at `path`, with
    `record` beside it.

    Each appears whole or not at all, the sidecar first: a volume on disk always has its record, and a volume with a
    matching record is finished.
    """
    path = nifti_path(path)
    with in_one_step(sidecar_path(path), path) as (sidecar, volume):
        sidecar.write_text(json.dumps(record, indent=2) + "\n")
        yield volume


def write_synthetic(image: nib.Nifti1Image, record: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write a generated volume (.nii or .nii.gz) and its sidecar, see `synthetic_file`."""
    with synthetic_file(record, path) as unfinished:
        nib.save(image, unfinished)
