r"""Add the record of training subjects and preprocessing to pipelines that were trained before records existed.

    python -m tools.record weights/hippocampus --config configs/hippocampus/ldm.yaml \
        --vae_config configs/hippocampus/vae.yaml

The configs are those of the trainings. Their data must be present and unchanged: the volumes are read for digests of
their voxels. Only vae/config.json and unet/config.json are written, in diffusers' format; tensors and the model's hash
do not change. A folder that already has records is refused.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from cli.command import ArgumentParser, run_command


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", type=Path, help="pipeline folder")
    parser.add_argument("--config", type=Path, required=True, help="config of train_ldm.py")
    parser.add_argument("--vae_config", type=Path, required=True, help="config of train_vae.py")
    parser.add_argument("--data.root", dest="root", help="folder of the volumes; default: that of the config")
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
    """Write the records. Raises: ValueError if there are records already, or the data differ from the pipeline's."""
    options = parse(args)
    folder: Path = options.pipeline
    data = DataDescription.from_json(read_object(folder / "model_index.json").get("data"))
    root = [f"--data.root={options.root}"] if options.root else []
    ldm = parse_config(TrainLdmConfig, ["--config", str(options.config), *root]).data
    vae = parse_config(TrainVaeConfig, ["--config", str(options.vae_config), *root]).data
    written: dict[Path, dict[str, object]] = {}
    for name, config in (("vae", vae), ("unet", ldm)):
        path = folder / name / "config.json"
        stored = read_object(path)
        if stored.get("subjects") or stored.get("data"):
            raise ValueError(f"{path}: already has a record of its training")
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
    """Compare the description of volumes with that of the pipeline. Raises: ValueError if they differ."""
    intensity = [scale.linear for scale in found.intensity]
    stored = [scale.linear for scale in data.intensity]
    other = [name for name in MEASURED if getattr(data, name) != getattr(found, name)]
    other += ["intensity"] if intensity != stored else []
    if other:
        raise ValueError(f"{folder}: the volumes of this config differ from its training volumes in {', '.join(other)}")
