"""Write generated volumes as DICOM series, one per folder: marked as synthetic, with new UIDs and without a patient.

python -m pipelines.storage.to_dicom out/generated/case_000.nii.gz --output out/dicom --modality MR
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.command import ArgumentParser, run_command


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
        "--modality", required=True, help="CT, MR, or another one's code such as PT (secondary capture)"
    )
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from pipelines.inputs.arguments import local_path
from volumes import read_volume, volume_stem, write_dicom

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


def main(args: Sequence[str] | None = None) -> None:
    options = parse(args)
    for path in options.volumes:
        files = export(path, options.output / volume_stem(path), options.modality)
        print(f"{files[0].parent}: {len(files)} slices")
