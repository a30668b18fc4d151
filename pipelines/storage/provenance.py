"""Mark a generated volume as synthetic, with the record of its generation, in its NIfTI header and in a JSON file
beside it.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType
from typing import Any, TypedDict

import nibabel as nib
import numpy as np
import torch
from safetensors import safe_open

from autoencoder.identity import out_of_reach, own_tensors
from autoencoder.model import deciding
from diffusion.guidance import Guidance, guidance_in_effect
from files.atomic import atomic_files, sync
from files.names import Disk
from files.paths import open_regular
from pipelines.inputs.arguments import local_path, plain
from volumes import nifti_path
from volumes.formats.nifti import VoxelError, check_voxels

from .record import GenerationRecord


class FileRecord(TypedDict):
    """A file of a volume in its sidecar."""

    file: str
    bytes: int
    sha256: str


Tensors = Iterable[tuple[str, torch.Tensor]]
FILES = "files"  # a sidecar's entry of the volume's files, in the order of `volume_files`
MOST_SIDECAR_BYTES = 1 << 24
READ_BYTES = 1 << 20  # at a time
_taking_places = threading.Lock()


def software() -> str:
    """Return name and version of this package; "unknown" where it runs from a clone that was not installed."""
    try:
        return f"medvolume {version('medvolume')}"
    except PackageNotFoundError:
        return "medvolume unknown"


def content_hash(components: Mapping[str, tuple[Mapping[str, Any], Tensors]]) -> str:
    """Compute the sha256 over each component's config and tensors (name, type, shape, bytes), in whatever file or
    memory they are.

    Of a config only what decides the result counts (`autoencoder.model.deciding`): not the record of the training
    subjects.
    """
    digest = hashlib.sha256()
    for name, (config, tensors) in sorted(components.items()):
        digest.update(f"{name}{json.dumps(deciding(config), sort_keys=True)}".encode())
        for key, tensor in tensors:
            tensor_digest(digest, key, tensor)
    return digest.hexdigest()


def tensor_digest(digest: Any, key: str, tensor: torch.Tensor) -> None:
    """Add a tensor's name, type, shape and bytes to a hash."""
    digest.update(f"{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def stored_tensors(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in safetensors files, by name, one at a time."""
    places: dict[str, Path] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    for key in sorted(places):
        with safe_open(places[key], framework="pt") as file:
            yield key, file.get_tensor(key)


def memory_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a module's own state, by name, without LoRAs that peft attached.

    Raises: ValueError if they are offloaded to where they cannot be read.
    """
    if out_of_reach(module):
        raise ValueError(
            "the weights are offloaded, so the model's hash cannot be computed: offload by the pipeline's own method, "
            "or save the pipeline and load it from its folder"
        )
    yield from own_tensors(module)


def recorded_guidance(scale: Guidance) -> float | dict[str, float] | None:
    """Return the guidance in effect as a sidecar records it; None for no guidance (a scale of 1 or less)."""
    effect = guidance_in_effect(scale)
    return None if effect in (1.0, {}) else effect


def header_description(record: GenerationRecord) -> str:
    """Format the NIfTI `descrip` field, 79 bytes at most: synthetic, the model, the seed."""
    seed = "" if record.seed is None else f" seed {record.seed}"
    return f"synthetic; {record.software[:20]}; model {record.model[:12]}{seed}"


def sidecar_path(path: str | os.PathLike) -> Path:
    """Return the JSON file beside a volume: case_000.json for case_000.nii.gz."""
    path = local_path("path", path)
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".json")


def sidecars(folder: Path) -> list[Path]:
    """List the JSON files in a folder that may be sidecars, sorted, without what macOS leaves beside them
    (`._case_000.json`).
    """
    return sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))


def read_sidecar(path: str | os.PathLike) -> dict[str, Any] | None:
    """Read the record beside the volume at `path`, without the digests of its files (`sidecar_content`); None if there
    is none.

    Raises: ValueError for what is not a sidecar of this package, or not a regular file.
    """
    content = sidecar_content(path)
    return None if content is None else {key: value for key, value in content.items() if key != FILES}


def sidecar_content(path: str | os.PathLike) -> Mapping[str, Any] | None:
    """Read the file beside the volume at `path`: the record, and `files`, [{"file", "bytes", "sha256"}] of the volume's
    files. None and errors as `read_sidecar`.
    """
    sidecar = Disk().find(sidecar_path(path))
    if not os.path.lexists(sidecar):
        return None
    remedy = "remove it, or write to another folder"
    try:
        with open_regular(sidecar) as file:
            data = file.read(MOST_SIDECAR_BYTES + 1)
    except OSError as error:  # a link that leads nowhere, among others
        raise ValueError(f"{sidecar}: cannot be read ({error.strerror}); {remedy}") from error
    if len(data) > MOST_SIDECAR_BYTES:
        raise ValueError(f"{sidecar}: is larger than {MOST_SIDECAR_BYTES >> 20} MiB, so it is not a sidecar; {remedy}")
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=str)  # NaN as text, which no number is
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{sidecar}: is not JSON ({error}), so it is damaged or somebody else's; {remedy}") from error
    if not isinstance(content, dict) or content.get("synthetic") is not True:
        raise ValueError(f"{sidecar}: is not the sidecar of a generated volume; {remedy}")
    channels = content.get("channels") or []
    if (
        not isinstance(channels, list)
        or not all(_is_name(one) for one in channels)
        or len(set(channels)) < len(channels)
    ):
        raise ValueError(f"{sidecar}: its channels are {str(channels)[:80]!r}, expected names; it is damaged: {remedy}")
    for name in ("mask", "classes", "numbers", "images"):
        if not isinstance(found := content.get(name), dict | NoneType) or not all(
            map(_is_source, _sources(name, found))
        ):
            raise ValueError(f"{sidecar}: its {name} is {str(found)[:80]!r}; it is damaged: {remedy}")
    return content


def _sources(name: str, found: Mapping[str, Any] | None) -> list[Any]:
    """Return the files of an entry that a volume was generated from."""
    return [found] if name == "mask" and found else list(found.values()) if name == "images" and found else []


def _is_source(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str | NoneType) for key in ("file", "sha256"))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not {"/", "\\", "\0"} & set(value)


def describe_file(path: Path) -> FileRecord:
    """Return {"file": its name, "bytes", "sha256"}. Raises: ValueError for what is not a regular file, OSError if it
    cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
            size += len(piece)
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}


def volume_files(path: str | os.PathLike, record: Mapping[str, Any]) -> list[Path]:
    """Return the files of the volume at `path`: the path itself, or one for each of the record's channels
    (case_000_ct.nii.gz and case_000_pet.nii.gz for case_000.nii.gz). Raises: ValueError unless it ends in .nii.gz or
    .nii.
    """
    return channel_files(path, record.get("channels"))


def channel_files(path: str | os.PathLike, channels: Sequence[str] | None) -> list[Path]:
    """Return the `volume_files` of a volume with these channels."""
    path, stem = nifti_path(local_path("path", path)), sidecar_path(path).stem
    return [path.with_name(f"{stem}_{one}{path.name.removeprefix(stem)}") for one in channels] if channels else [path]


@contextmanager
def synthetic_files(record: Mapping[str, Any], path: str | os.PathLike) -> Iterator[list[Path]]:
    """Open the files to write a generated volume (.nii or .nii.gz) to. When the block ends, they are moved to their
    places (see `volume_files`), with `record` beside them.

    Each file appears whole or not at all. Older files of the volume are removed first, then the sidecar appears, then
    the volume: a volume on disk always has its record. The sidecar holds the size and sha256 of each file: see
    `finished.file_fault`.

    Raises: ValueError if a JSON that is not a sidecar is in the way, see `read_sidecar`, and for a record that JSON
    cannot hold.
    """
    files, content = volume_files(path, record), plain(record, f"{path}: the record")
    read_sidecar(path)  # refused before the work
    with ExitStack() as stack, atomic_files(sidecar_path(path), *files) as (sidecar, *unfinished):
        yield unfinished
        content[FILES] = [describe_file(file) for file in unfinished]
        sidecar.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        sync(sidecar.parent)  # all is on the disk before older files are removed
        stack.enter_context(_taking_places)  # of two calls that write one volume, each takes all places at once
        older = read_sidecar(path)
        for file in {*files, *(volume_files(path, older) if older else [])}:  # it may have had other channels
            file.unlink(missing_ok=True)


def write_synthetic(
    image: nib.Nifti1Image | Mapping[str, nib.Nifti1Image], record: Mapping[str, Any], path: str | os.PathLike
) -> None:
    """Write a generated volume (.nii or .nii.gz), or a file for each of its channels, and its sidecar, see
    `synthetic_files`. Raises: ValueError if `image` has other channels than the record, VoxelError for voxels that are
    not finite."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{path}: the record is {type(record).__name__}; give an entry of the output's provenance")
    channels = list(record.get("channels") or [])
    if (set(image) if isinstance(image, Mapping) else set()) != set(channels):
        given = list(image) if isinstance(image, Mapping) else "a single image"
        raise ValueError(f"{path}: got {given}, its record has the channels {channels}; give both of one volume")
    images = [image[channel] for channel in channels] if isinstance(image, Mapping) else [image]
    if foreign := [type(one).__name__ for one in images if not isinstance(one, nib.Nifti1Image)]:
        raise ValueError(f"{path}: got {foreign[0]}; write what the pipeline returns as output_type='nifti'")
    for one, file in zip(images, volume_files(path, record), strict=True):
        values, dtype = np.asanyarray(one.dataobj), np.dtype(one.get_data_dtype())
        try:
            check_voxels(values, dtype if dtype.kind == "f" else values.dtype)  # to whole numbers nibabel scales
        except VoxelError as error:
            raise VoxelError(f"{file}: {error}") from error
    with synthetic_files(record, path) as unfinished:
        for one, file in zip(images, unfinished, strict=True):
            nib.save(one, file)
