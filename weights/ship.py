"""Make a shippable pipeline folder out of a trained one: half-precision weights, example masks, results, model card.

python weights/ship.py output/hippocampus/ldm/pipeline weights/hippocampus --masks ../shared/data/hippocampus/labels \
    --cases hippocampus_010 hippocampus_011 --results out/results --card configs/hippocampus/card.md

Every `{name}` in the card is filled from the results: `{reconstruction.psnr_db.mean:.2f}` is results/reconstruction.json
["psnr_db"]["mean"]; `{megabytes}`, `{bands}` and `{scores.SOURCE}` are made here. A figure that no result file holds is an
error, so a card cannot claim what was not measured.
"""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from pipelines import MedVolumePipeline

LIMIT = 40_000_000  # bytes a shipped pipeline may weigh


def main(args: list[str] | None = None) -> None:
    """Write the folder. Raises: ValueError for a mask or result that is missing, or a folder over the limit."""
    options = parse(args)
    target: Path = options.target
    masks = [options.masks / f"{name}.nii.gz" for name in options.cases]
    for path in (*masks, options.card):
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
    reports = sorted(options.results.glob("*.json"))
    results = {path.stem: json.loads(path.read_text()) for path in reports}

    pipe = MedVolumePipeline.from_pretrained(options.pipeline)
    pipe.to(torch.float16)
    pipe.save_pretrained(target)
    size = sum(path.stat().st_size for path in target.rglob("*.safetensors"))
    if size > LIMIT:
        raise ValueError(f"{target}: weights of {size / 1e6:.1f} MB, the limit is {LIMIT / 1e6:.0f} MB")
    for folder, files in (("masks", masks), ("results", reports)):
        shutil.rmtree(target / folder, ignore_errors=True)
        (target / folder).mkdir()
        for path in files:
            shutil.copyfile(path, target / folder / path.name)

    figures = {**results, **summaries(results), "megabytes": size / 1e6}
    (target / "README.md").write_text(fill(options.card.read_text(), figures))
    print(f"{target}: {size / 1e6:.1f} MB of weights, {len(options.cases)} masks, {len(results)} result files")


def summaries(results: dict[str, Any]) -> dict[str, Any]:
    """Lists as the card prints them: power ratios by band from 0.2 cycles a voxel, Dice with each seed's beside."""
    ratios = results["reconstruction"]["spectrum"]["ratio_db"]
    bands = [f"{band}: {value:+.1f}" for band, value in ratios.items() if float(band.split("-")[0]) >= 0.2]
    scores = {}
    for source, runs in results["dice"]["scores"].items():
        values = [run["dice"] for run in runs]
        scores[source] = f"{sum(values) / len(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})"
    return {"bands": ", ".join(bands), "scores": scores}


def fill(card: str, values: dict[str, Any]) -> str:
    """`{a.b.c:format}` -> values["a"]["b"]["c"], formatted. Raises: ValueError naming a figure that is not there."""

    def figure(match: re.Match[str]) -> str:
        value: Any = values
        for key in match["path"].split("."):
            try:
                value = value[int(key)] if isinstance(value, list) else value[key]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise ValueError(f"the model card asks for {match['path']}, but no result holds it") from error
        return format(value, match["format"] or "")

    return re.sub(r"\{(?P<path>[\w./%-]+)(?::(?P<format>[^}]*))?\}", figure, card)


def parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="trained pipeline folder (RUN/pipeline)")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument(
        "--masks", type=Path, required=True, help="folder of label maps that the examples are taken from"
    )
    parser.add_argument("--cases", nargs="+", required=True, help="names of the example masks, without .nii.gz")
    parser.add_argument(
        "--results", type=Path, required=True, help="folder of JSON reports of evaluate.py and benchmarks"
    )
    parser.add_argument("--card", type=Path, required=True, help="template of the model card")
    return parser.parse_args(args)


if __name__ == "__main__":
    main()
