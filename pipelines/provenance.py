"""A generated volume says that it is synthetic, and how it was made: in its NIfTI header and a JSON file beside it."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nibabel as nib
import torch
from safetensors import safe_open

Tensors = Iterable[tuple[str, torch.Tensor]]


def software() -> str:
    """Name and version of this package; "unknown" where it runs from a clone that was not installed."""
    try:
        return f"medvolume {version('medvolume')}"
    except PackageNotFoundError:
        return "medvolume unknown"


def content_hash(components: Mapping[str, tuple[Mapping[str, Any], Tensors]]) -> str:
    """sha256 over each component's config and tensors (name, type, shape, bytes), whatever file or memory they are in.

    Private config entries (with a leading underscore: versions, paths) do not count.
    """
    digest = hashlib.sha256()
    for name, (config, tensors) in sorted(components.items()):
        public = {key: value for key, value in config.items() if not key.startswith("_")}
        digest.update(f"{name}{json.dumps(public, sort_keys=True)}".encode())
        for key, tensor in tensors:
            digest.update(f"{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
    """Every tensor of a module's state, by name."""
    yield from sorted(module.state_dict().items())


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


def write_synthetic(image: nib.Nifti1Image, record: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write a generated volume (.nii or .nii.gz) and its sidecar.

    Each appears whole or not at all, the sidecar first: a volume on disk always has its record, and a volume with a
    matching record is finished.
    """
    path = Path(path)
    suffix = next((s for s in (".nii.gz", ".nii") if path.name.endswith(s)), None)
    if suffix is None:
        raise ValueError(f"{path}: name it .nii.gz or .nii")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
        unfinished = Path(folder)
        (unfinished / "sidecar.json").write_text(json.dumps(record, indent=2) + "\n")
        nib.save(image, unfinished / f"volume{suffix}")
        os.replace(unfinished / "sidecar.json", sidecar_path(path))
        os.replace(unfinished / f"volume{suffix}", path)
