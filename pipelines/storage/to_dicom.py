"""Write generated volumes as DICOM series, one per folder: marked as synthetic, with new UIDs and without a patient;
and generated label maps as DICOM-SEG.

python -m pipelines.storage.to_dicom out/generated/case_000.nii.gz --output out/dicom --modality MR
python -m pipelines.storage.to_dicom out/pairs/masks/map_000.nii.gz --output out/dicom --modality SEG
    --pipeline weights/hippocampus-masks --series out/dicom/map_000_000
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.command import ArgumentParser, run_command

SEG = "SEG"


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "volumes", nargs="+", type=Path, help="generated .nii.gz or .nii files, their sidecars beside them"
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="folder; each volume gets one in it, of its own name"
    )
    parser.add_argument(
        "--modality",
        required=True,
        help="CT, MR, another's code such as PT (secondary capture), or SEG: label maps",
    )
    parser.add_argument("--pipeline", type=Path, help="with SEG: the folder of a pipeline that knows the labels' names")
    parser.add_argument("--series", type=Path, help="with SEG: the series of one label map's volume, from this command")
    options = parser.parse_args(args)
    if (options.modality == SEG) != (options.pipeline is not None):
        parser.error(f"--pipeline names the labels of --modality {SEG}: give both, or neither")
    if options.series is not None and (options.modality != SEG or len(options.volumes) > 1):
        parser.error(f"--series is that of one label map, with --modality {SEG}")
    return options


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from files.documents import read_object
from pipelines.inputs.arguments import local_path
from volumes import read_mask, read_volume, volume_stem, write_dicom, write_seg
from volumes.description import DataDescription

from .provenance import read_sidecar, volume_files


def find_record(path: str | os.PathLike) -> Mapping[str, Any]:
    """Find the sidecar of a generated volume, or of one channel of it (case_000_ct.nii.gz has its record in
    case_000.json).

    Raises: ValueError if there is none: only a volume that is known to be synthetic is marked as such.
    """
    path, words = local_path("path", path), volume_stem(path).split("_")
    for count in range(len(words), 0, -1):
        whole = path.with_name(f"{'_'.join(words[:count])}.nii.gz")
        record = read_sidecar(whole)
        if record is not None and volume_stem(path) in map(volume_stem, volume_files(whole, record)):
            return record
    raise ValueError(
        f"{path}: has no sidecar (.json) beside it, so it is not known to be synthetic; generate.py writes one"
    )


def export(path: str | os.PathLike, folder: str | os.PathLike, modality: str) -> list[Path]:
    """Write the generated volume at `path` as a DICOM series into a new folder. Returns: its files.

    Raises: ValueError as `find_record` and `volumes.write_dicom`.
    """
    record = find_record(path)
    return write_dicom(
        read_volume(path),
        local_path("folder", folder),
        modality=modality,
        software=str(record["software"]),
        model=str(record["model"]),
        seed=record.get("seed"),
    )


def export_mask(
    path: str | os.PathLike,
    folder: str | os.PathLike,
    labels: Mapping[int, str],
    series: str | os.PathLike | None = None,
) -> Path:
    """Write the generated label map at `path` as DICOM-SEG into a new folder. Returns: its file.

    Raises: ValueError as `find_record` and `volumes.write_seg`.
    """
    record = find_record(path)
    return write_seg(
        read_mask(path),
        local_path("folder", folder),
        labels=labels,
        software=str(record["software"]),
        model=str(record["model"]),
        seed=record.get("seed"),
        series=None if series is None else local_path("series", series),
    )


def label_names(pipeline: Path) -> Mapping[int, str]:
    """Read the names of the labels that a saved pipeline generates, or is conditioned on. Raises: ValueError if it has
    none.
    """
    index = pipeline / "model_index.json"
    if not index.is_file():
        raise ValueError(f"--pipeline {pipeline}: holds no model_index.json; give the folder of a pipeline")
    data = DataDescription.from_json(read_object(index).get("data"))
    if not (labels := data.image_labels or data.labels):
        raise ValueError(f"--pipeline {pipeline}: knows no labels; give that which generated the label maps")
    return labels


def main(args: Sequence[str] | None = None) -> None:
    options = parse(args)
    labels = label_names(options.pipeline) if options.modality == SEG else {}
    for path in options.volumes:
        if options.modality == SEG:
            print(export_mask(path, options.output / volume_stem(path), labels, options.series))
            continue
        files = export(path, options.output / volume_stem(path), options.modality)
        print(f"{files[0].parent}: {len(files)} slices")
