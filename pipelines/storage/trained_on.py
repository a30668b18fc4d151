"""Read what a saved model says of its training, without loading it: its training subjects, and how their volumes were
prepared.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from autoencoder.weights import find_folder, not_on_the_hub
from files.atomic import refuse_link, remove_leftovers, write_text
from files.documents import read_object
from files.shipped import expand_path
from pipelines.lora import LoraMixin
from volumes.data.preprocessing import check_preprocessing, described_preprocessing
from volumes.data.subjects import check_subjects, join_records
from volumes.description import DataDescription

from .lora_files import read_lora

MASKS = "masks"  # folder in the output of a run, of masks that it wrote for its volumes
GENERATED = (
    "provenance/training_subjects.json"  # in a folder of generated volumes, beside no sidecar: {model hash: records}
)


@dataclass(frozen=True)
class TrainedOn:
    """Records of training subjects (`volumes.data.subjects`), and the facts of `volumes.data.preprocessing`; None if
    they are not known."""

    subjects: Sequence[Mapping[str, Any]]
    data: Mapping[str, Any] | None


def read_model(source: str | Path) -> TrainedOn:
    """Read the records of a pipeline's folder, an autoencoder's or its run's, a LoRA's file or folder, or a Hub
    repository that holds one of these.

    Raises: ValueError for none of these, and for a damaged file.
    """
    path = Path(expand_path(str(source)))
    if not path.exists() and find_folder(source) is None:
        path = described_on_the_hub(str(source))
    if path.suffix == ".safetensors" and path.is_file():
        lora = read_lora(path)
        return TrainedOn(join_records(lora.subjects), lora.data)
    if (path / "model_index.json").is_file():
        try:
            described = DataDescription.from_json(read_object(path / "model_index.json").get("data", {}))
        except ValueError as error:
            raise ValueError(f"{path}: model_index.json: {error}") from error
        (of_vae, facts), (of_unet, _) = (_config(path / name) for name in ("vae", "unet"))
        known = {**(facts or {}), **described_preprocessing(described)}  # time points, say, the autoencoder alone knows
        return TrainedOn(join_records(of_vae, of_unet), known)
    for folder in (path, path / "vae"):
        if (folder / "config.json").is_file():
            subjects, data = _config(folder)
            return TrainedOn(join_records(subjects), data)
    loras = sorted(path.glob("*.safetensors"))
    if len(loras) > 1 and path / LORA_WEIGHT_NAME_SAFE not in loras:
        raise ValueError(f"{path}: holds several LoRAs, {', '.join(one.name for one in loras)}; give the file of one")
    if loras:
        return read_model(path / LORA_WEIGHT_NAME_SAFE if len(loras) > 1 else loras[0])
    raise ValueError(f"{path}: contains no model: give the folder of a pipeline, an autoencoder or a LoRA")


def described_on_the_hub(name: str) -> Path:
    """Download what a repository of the Hub says of its models, without their weights, and return the folder. Raises:
    FileError if that fails.
    """
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["model_index.json", "config.json", "*/config.json", LORA_WEIGHT_NAME_SAFE]
            )
        )
    except (OSError, HFValidationError) as error:
        raise not_on_the_hub(name, error) from error


def read_generated(folder: Path) -> Sequence[Mapping[str, Any]]:
    """Read the records of the models that generated the volumes in a folder, and the masks in its masks/, as
    generate.py writes them there.

    Raises: ValueError for a damaged file.
    """
    path = folder / GENERATED
    found = read_object(path) if path.is_file() else {}
    try:
        for records in found.values():
            check_subjects(records)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; generate the volumes again") from error
    of_masks = [read_generated(folder / MASKS)] if (folder / MASKS).is_dir() and made_by(folder / MASKS) else []
    return join_records(*(found.get(model) for model in made_by(folder) or [""]), *of_masks)


def write_generated_by(pipe: LoraMixin, output: Path) -> None:
    """Add the pipeline's model to provenance/training_subjects.json, {hash: records of the training subjects} of each
    model that generated volumes in the folder. By this file, evaluate.py refuses to evaluate the volumes on such
    subjects. Nothing is written for a model without any record.

    Raises: ValueError for a damaged file, and for a link in place of its folder.
    """
    if all("salt" not in record for record in pipe.training_subjects):
        return
    path = output / GENERATED
    refuse_link(path.parent)
    remove_leftovers(path.parent)
    known = read_object(path) if path.is_file() else {}
    records = known | {pipe.model_hash: pipe.training_subjects}
    if records != known:  # evaluate.py measures again where a file is new
        write_text(path, json.dumps(records, indent=1) + "\n")


def made_by(folder: Path) -> list[str]:
    """Return hashes of the models that generated the volumes in a folder, by their sidecars."""
    hashes = set()
    for path in folder.glob("*.json"):
        try:
            record = read_object(path)
        except ValueError:  # somebody else's file; a sidecar of ours that is damaged is named where its volume is read
            continue
        if record.get("synthetic") is True and isinstance(record.get("model"), str):
            hashes.add(record["model"])
    return sorted(hashes)


def _config(folder: Path) -> tuple[Any, Any]:
    """Read records and facts in a component's config.json. Raises: ValueError if they are damaged."""
    path = folder / "config.json"
    config = read_object(path) if path.is_file() else {}
    try:
        check_subjects(config.get("subjects"))
        check_preprocessing(config.get("data"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config.get("subjects"), config.get("data")
