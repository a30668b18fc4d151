"""Write into a pipeline's folder on whose volumes it was trained, and how they were prepared: for weights from before training did so.

python weights/record.py weights/hippocampus --config configs/hippocampus/ldm.yaml --vae_config configs/hippocampus/vae.yaml

The configs are those of the trainings, and their data must be at hand, as they were then: the volumes are read for digests of their voxels.
Only vae/config.json and unet/config.json are written, in the form that diffusers gives them; no tensor, and nothing that the model's hash
counts, changes. A folder that has records already is refused.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli.command import ArgumentParser, run_command


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", type=Path, help="pipeline folder")
    parser.add_argument("--config", type=Path, required=True, help="config of train_ldm.py")
    parser.add_argument("--vae_config", type=Path, required=True, help="config of train_vae.py")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from files.atomic import remove_leftovers, write_text
from files.documents import read_object
from training import TrainLdmConfig, TrainVaeConfig, parse_config
from training.splits import load_split, own_record
from volumes import describe
from volumes.data.preprocessing import described_preprocessing, refuse_differences
from volumes.description import DataDescription

MEASURED = ("channels", "labels", "image_labels", "spacing", "shape_range", "classes")  # of `volumes.describe`


def main(args: Sequence[str] | None = None) -> None:
    """Write the records. Raises: ValueError for records that are there already, and for data that is not the pipeline's."""
    options = parse(args)
    folder: Path = options.pipeline
    data = DataDescription.from_json(read_object(folder / "model_index.json").get("data"))
    ldm = parse_config(TrainLdmConfig, ["--config", str(options.config)]).data
    vae = parse_config(TrainVaeConfig, ["--config", str(options.vae_config)]).data
    written: dict[Path, dict[str, Any]] = {}
    for name, config in (("vae", vae), ("unet", ldm)):
        path = folder / name / "config.json"
        stored = read_object(path)
        if stored.get("subjects") or stored.get("data"):
            raise ValueError(f"{path}: says already what it was trained on")
        train, held_out = load_split(config)
        refuse_differences(
            described_preprocessing(data), train.preprocessing, str(folder), "Give the config of its training"
        )
        if name == "unet":
            check_described(folder, data, describe(train))
        stored["subjects"] = [own_record(train, held_out)]
        if name == "vae":
            stored["data"] = train.preprocessing
        written[path] = stored
    for path, stored in written.items():
        remove_leftovers(path.parent)
        write_text(path, json.dumps(stored, indent=2, sort_keys=True) + "\n")
        print(path)


def check_described(folder: Path, data: DataDescription, found: DataDescription) -> None:
    """Raises: ValueError if volumes described as `found` are not those that the pipeline was trained on, as `data` says."""
    intensity = [scale.linear for scale in found.intensity]
    stored = [scale.linear for scale in data.intensity]
    other = [name for name in MEASURED if getattr(data, name) != getattr(found, name)]
    other += ["intensity"] if intensity != stored else []
    if other:
        raise ValueError(f"{folder}: the volumes of this config have other {', '.join(other)} than it was trained on")
