"""Make a pipeline folder to publish from a trained one: half-precision weights, example masks, results, model card.

    python -m tools.ship output/hippocampus/ldm/pipeline weights/hippocampus --vae output/hippocampus/sharpen/vae \
        --examples configs/hippocampus/examples.csv --results out/results --card configs/hippocampus/card.md

`--examples` is a table for generate.py, which demo.py runs; its masks are copied to masks/. `--vae` replaces the
pipeline's autoencoder by one with the same encoder and a further trained decoder. `--residual_noise CONFIG` measures
residual noise on the training volumes of a config. `--samplers REPORT` takes scheduler, steps and guidance that
`evaluation.studies.samplers --split validation` chose for the pipeline; without it they stay as they are in its
sampling.json. Every `{name}` in the card is filled from the results:
`{reconstruction.psnr_db.mean:.2f}` is results/reconstruction.json ["psnr_db"]["mean"]; `{megabytes}`, `{bands}` and
`{scores.SOURCE}` are computed here. A missing figure is an error, so a card cannot claim what was not measured.
"""

import argparse
import csv
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cli.command import ArgumentParser, run_command


def parse(args: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", type=Path, help="trained pipeline folder (RUN/pipeline)")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--vae", help="autoencoder with the same encoder, to replace the pipeline's")
    parser.add_argument(
        "--residual_noise",
        type=Path,
        help="config of train_ldm.py: measure residual noise on its training volumes",
    )
    parser.add_argument(
        "--samplers", type=Path, help="report of evaluation.studies.samplers --split validation, for its choice"
    )
    parser.add_argument("--data.root", dest="root", help="folder of these volumes; default: that of the config")
    parser.add_argument("--examples", type=Path, required=True, help="table of the volumes that demo.py generates")
    parser.add_argument(
        "--results", type=Path, required=True, help="folder of JSON reports of evaluate.py and benchmarks"
    )
    parser.add_argument("--card", type=Path, required=True, help="template of the model card")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

import torch

from autoencoder import VolumeAutoencoder
from autoencoder.model import deciding
from autoencoder.residual_noise import measure_noise
from diffusion.latents.cache import weights_hash
from evaluation.studies.sampler_report import apply_choice
from files.atomic import atomic_file, atomic_folder, remove_folder, remove_leftovers, write_text
from files.documents import read_object
from pipelines import MedVolumePipeline
from pipelines.storage.loading import load_autoencoder
from training import TrainLdmConfig, parse_config
from training.splits import load_split
from volumes import describe
from volumes.data.tables import read_table

MAX_BYTES = 40_000_000  # of a published pipeline
MEASURED_ON = ("channels", "image_labels", "spacing", "shape_range")  # entries that tell data sets apart


def main(args: list[str] | None = None) -> None:
    """Write the folder. Raises: ValueError for a missing mask or result, or weights over the size limit."""
    options = parse(args)
    target = options.target
    rows = read_table(options.examples)
    masks = [options.examples.parent / row["mask"] for row in rows if row.get("mask")]
    if len({path.name for path in masks}) < len({path.resolve() for path in masks}):
        raise ValueError(f"{options.examples}: two masks have the same file name; rename one")
    for path in (*masks, options.card):
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
    reports = sorted(options.results.glob("*.json"))

    pipe = MedVolumePipeline.from_pretrained(options.pipeline)
    models = [pipe.model_hash]
    if options.vae:
        pipe = with_decoder(pipe, load_autoencoder(options.vae))
    if options.residual_noise:
        root = [f"--data.root={options.root}"] if options.root else []
        train = load_split(parse_config(TrainLdmConfig, ["--config", str(options.residual_noise), *root]).data)[0]
        found = describe(train)
        if other := [name for name in MEASURED_ON if getattr(pipe.data, name) != getattr(found, name)]:
            raise ValueError(
                f"--residual_noise {options.residual_noise}: its volumes differ from the pipeline's in "
                f"{', '.join(other)}"
            )
        noisy = replace(pipe.data, residual_noise=tuple(measure_noise(train, pipe.vae)))
        pipe = MedVolumePipeline.from_pipe(pipe, data=noisy)
    if options.samplers:
        apply_choice(pipe, options.samplers, [*models, pipe.model_hash])
    pipe.to(torch.float16)
    remove_leftovers(target)
    pipe.save_pretrained(target)
    size = weights_size(target)
    if size > MAX_BYTES:
        raise ValueError(f"{target}: weights of {size / 1e6:.1f} MB, the limit is {MAX_BYTES / 1e6:.0f} MB")
    for folder, files in (("masks", masks), ("results", reports)):
        if files:
            with atomic_folder(target / folder) as unfinished:
                for path in files:
                    shutil.copyfile(path, unfinished / path.name)
        elif (target / folder).exists():
            remove_folder(target / folder)

    with (
        atomic_file(target / "examples.csv") as unfinished,
        unfinished.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(row | ({"mask": f"masks/{Path(row['mask']).name}"} if row.get("mask") else {}) for row in rows)

    write_text(target / "README.md", card_text(options.card, target))
    print(f"{target}: {size / 1e6:.1f} MB of weights, {len(rows)} examples, {len(reports)} result files")


def weights_size(folder: Path) -> int:
    """Return the bytes of the weights in a pipeline folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def card_text(template: Path, folder: Path) -> str:
    """Return the model card of a pipeline folder with results/. Raises: ValueError naming a missing figure."""
    results = {path.stem: read_object(path) for path in sorted((folder / "results").glob("*.json"))}
    figures = {**results, **summaries(results), "megabytes": weights_size(folder) / 1e6}
    return fill(template.read_text(encoding="utf-8"), figures)


def with_decoder(pipe: MedVolumePipeline, vae: VolumeAutoencoder) -> MedVolumePipeline:
    """Replace the pipeline's autoencoder, and drop the residual noise of the old one.

    Raises:
        ValueError: if the new one gives other latents.
    """
    old: VolumeAutoencoder = pipe.vae
    if weights_hash(old.encoder) != weights_hash(vae.encoder) or public(old.config) != public(vae.config):
        raise ValueError("--vae: its encoder or latent statistics differ from those that the U-Net was trained on")
    data = replace(pipe.data, residual_noise=None)
    return MedVolumePipeline.from_pipe(pipe, vae=vae, data=data)


def public(config: Mapping[str, object]) -> dict[str, object]:
    """Return the entries of a config that define the model, without versions, folder and training subjects."""
    return {"_class_name": config.get("_class_name"), **deciding(config)}


def summaries(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Format lists for cards: power ratios by band from 0.2 cycles per voxel, and Dice with the values of all seeds."""
    texts: dict[str, dict[str, str]] = {"bands": {}, "scores": {}}
    for name, report in results.items():
        if "spectrum" in report:
            ratios = report["spectrum"]["ratio_db"]
            bands = [f"{band}: {value:+.1f}" for band, value in ratios.items() if float(band.split("-")[0]) >= 0.2]
            texts["bands"][name] = ", ".join(bands)
    for source, runs in results.get("dice", {"scores": {}})["scores"].items():
        values = [run["dice"] for run in runs]
        texts["scores"][source] = f"{sum(values) / len(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})"
    return texts


def fill(card: str, values: Mapping[str, object]) -> str:
    """Replace `{a.b.c:format}` by values["a"]["b"]["c"], formatted. Raises: ValueError naming a missing figure."""

    def figure(match: re.Match[str]) -> str:
        value: Any = values
        for key in match["path"].split("."):
            try:
                value = value[int(key)] if isinstance(value, list) else value[key]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise ValueError(f"the model card names {match['path']}, but no result has it") from error
        return format(value, match["format"] or "")

    return re.sub(r"\{(?P<path>[\w./%, -]+)(?::(?P<format>[^}]*))?\}", figure, card)
