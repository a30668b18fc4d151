"""Volumes as a BIDS data set (https://bids-specification.readthedocs.io): a subject per volume, masks as a derivative.

Suffixes by the name of the channel: those of `SUFFIXES` are BIDS's own. BIDS has no CT, and asks of each PET scan what
only an acquisition has; these and channels of other names are written by the same scheme, and `.bidsignore` lists them,
so that validators skip them.
"""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.storage.finished import FinishedVolume
from volumes.description import DataDescription

from .folder import MARKER, REFERENCE, export_folder, mask_of, origin, sidecar_of

VERSION = "1.10.0"
SUFFIXES = {  # channel in small letters: (folder, entities, suffix)
    **dict.fromkeys(("t1", "t1w", "t1n"), ("anat", "", "T1w")),
    **dict.fromkeys(("t1c", "t1ce", "t1gd"), ("anat", "_ce-gadolinium", "T1w")),
    **dict.fromkeys(("t2", "t2w"), ("anat", "", "T2w")),
    **dict.fromkeys(("flair", "t2f"), ("anat", "", "FLAIR")),
    **dict.fromkeys(("pd", "pdw"), ("anat", "", "PDw")),
    **dict.fromkeys(("ct",), ("ct", "", "ct")),
    **dict.fromkeys(("pet",), ("pet", "", "pet")),
}
OUTSIDE = ("ct", "pet", "image")  # suffixes that validators skip
MASKS = "derivatives/labels"
README = """Synthetic data: {reference}.

Each subject is one generated volume; no subject is a person. The JSON file beside a volume says by which model and from
which seed it was generated. participants.tsv has the mask and the conditions that it was generated from.
Label maps are in derivatives/labels, with the names of their values in dseg.tsv.
"""


def subjects(names: Sequence[str]) -> dict[str, str]:
    """Return the subject of each volume: sub- and the letters and digits of its name.

    Raises: ValueError if that leaves nothing, or the same for two volumes.
    """
    found: dict[str, str] = {}
    for name in names:
        subject = f"sub-{re.sub('[^A-Za-z0-9]', '', name)}"
        if subject == "sub-":
            raise ValueError(f"--export bids: {name!r} has no letter or digit for the name of a subject; rename it")
        if (other := found.setdefault(subject, name)) != name:
            raise ValueError(f"--export bids: {other} and {name} would both be {subject}; tell them apart otherwise")
    return {name: subject for subject, name in found.items()}


def place_of(channel: str) -> tuple[str, str, str]:
    """Return folder, entities and suffix of a channel: those of `SUFFIXES`, or anat, its letters and digits as `acq-`,
    and `image`."""
    label = re.sub("[^A-Za-z0-9]", "", channel) or "channel"
    return SUFFIXES.get(channel.lower(), ("anat", f"_acq-{label}", "image"))


def write(volumes: Sequence[FinishedVolume], data: DataDescription, folder: Path) -> None:
    """Write sub-*/, participants.tsv, dataset_description.json, README and derivatives/labels/.

    Raises: ValueError for names that are one subject, channels that are one file, and masks that changed.
    """
    names = subjects([volume.name for volume in volumes])
    masked = False
    with export_folder(folder, "bids", volumes) as export:
        for volume in volumes:
            subject, (record, digests) = names[volume.name], sidecar_of(volume)
            channels = list(volume.record.channels or data.channels)
            places = [place_of(channel) for channel in channels]
            if len(set(places)) < len(places):
                raise ValueError(f"--export bids: the channels {', '.join(channels)} would have one name; rename one")
            for (kind, entities, suffix), channel, file, sha256 in zip(
                places, channels, volume.files, digests, strict=True
            ):
                stem = f"{subject}/{kind}/{subject}{entities}_{suffix}"
                export.add(file, f"{stem}.nii.gz", sha256)
                export.add_json(
                    f"{stem}.json", {"Description": f"Synthetic: {REFERENCE}", "channel": channel, **record}
                )
            if volume.request.mask is not None:
                masked = True
                kind = places[0][0]
                export.add_mask(mask_of(volume, data), f"{MASKS}/{subject}/{kind}/{subject}_dseg.nii.gz")
        export.add_json("dataset_description.json", _description(folder.absolute().name, "raw", volumes))
        export.add_text("README", README.format(reference=REFERENCE))
        export.add_text("participants.tsv", _participants(volumes, names))
        export.add_json("participants.json", _columns(volumes))
        ignored = [MARKER, *(f"*_{suffix}.*" for suffix in OUTSIDE), "**/ct/"]
        export.add_text(".bidsignore", "\n".join(ignored) + "\n")
        if masked:
            description = _description(f"Label maps of {folder.absolute().name}", "derivative", volumes)
            export.add_json(f"{MASKS}/dataset_description.json", description)
            rows = [{"index": value, "name": name} for value, name in sorted(data.labels.items())]
            export.add_text(f"{MASKS}/dseg.tsv", _table(["index", "name"], rows))


def _description(name: str, kind: str, volumes: Sequence[FinishedVolume]) -> dict[str, Any]:
    made = origin(volumes)
    software, _, version = made["software"].partition(" ")
    described = f"Synthetic: {REFERENCE}. Models: {', '.join(made['models'])}"
    return {
        "Name": name,
        "BIDSVersion": VERSION,
        "DatasetType": kind,
        "GeneratedBy": [{"Name": software, "Version": version, "Description": described}],
        "synthetic": True,
    }


def _participants(volumes: Sequence[FinishedVolume], names: dict[str, str]) -> str:
    """The table of subjects, with the columns of `_columns`."""
    rows = []
    for volume in volumes:
        record = volume.record
        conditions = {**(record.classes or {}), **(record.numbers or {})}
        mask = None if record.mask is None else record.mask["file"]
        rows.append({"participant_id": names[volume.name], "volume": volume.name, "seed": record.seed, "mask": mask})
        rows[-1] |= conditions
    return _table(["participant_id", *_columns(volumes)], rows)


def _columns(volumes: Sequence[FinishedVolume]) -> dict[str, dict[str, str]]:
    """What the columns of participants.tsv mean, but for the first."""
    conditions = dict.fromkeys(
        name for volume in volumes for name in [*(volume.record.classes or {}), *(volume.record.numbers or {})]
    )
    return {
        "volume": {"Description": "name of the generated volume"},
        "seed": {"Description": "seed from which the volume was generated"},
        "mask": {"Description": "file of the label map that the volume was generated from"},
        **{name: {"Description": "condition that the volume was generated from"} for name in conditions},
    }


def _table(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """Return tab-separated text, n/a where there is no value."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = ["n/a" if row.get(column) in (None, "") else str(row[column]) for column in columns]
        writer.writerow([re.sub(r"[\t\r\n]", " ", cell) for cell in cells])
    return text.getvalue()
