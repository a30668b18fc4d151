"""DICOM trees: a folder per series. Patients, modalities and descriptions come from the headers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pydicom

from files.names import nfc
from recipes.listing import Listing, stem_of
from volumes.formats.dicom import is_dicom, segmentation_kind, series_files

from .layout import FoundFile, Key, Layout, tokens
from .outlines import Outline, read_outline

TAGS = [
    "PatientID", "PatientName", "PatientSex", "PatientAge", "Modality", "SeriesDescription", "SeriesInstanceUID",
    "StudyInstanceUID", "StudyDate", "ImageType",
]  # fmt: skip
NO_VOLUMES = {"SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "SR", "PR", "KO", "REG", "DOC"}
OUTLINES = ("SEG", "RTSTRUCT")  # that are read as masks
NAMES = {"PT": "PET"}
AGE = re.compile(r"(\d{3})([DWMY])")
YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}


@dataclass(frozen=True)
class Series:
    """What the first slice of a series says."""

    folder: str
    uid: str
    patient: str
    study: str
    modality: str
    description: str
    metadata: tuple[tuple[str, str], ...]


def find_series(listing: Listing) -> Layout | None:
    """Read a DICOM tree; None if there is no DICOM folder, or if volume files are the most."""
    if len(listing.series) <= len(listing.volumes) // 4:
        return None
    series, outlines, notes = [], [], []
    skipped: Counter[str] = Counter()
    for folder in listing.series:
        for found in _read_folder(listing.root, folder):
            if isinstance(found, Series):
                series.append(found)
            elif isinstance(found, Outline):
                outlines.append(found)
            else:
                skipped[found] += 1
    notes += [f"{count} in DICOM folders left out: {why}" for why, count in sorted(skipped.items())]
    if not series:
        return None
    studies: dict[str, list[str]] = {}
    for one in series:
        if one.study not in studies.setdefault(one.patient, []):
            studies[one.patient].append(one.study)
    keys: dict[str, Key] = {}
    for one in series:
        key: Key = (("subject", one.patient),)
        if len(studies[one.patient]) > 1:
            key = (*key, ("session", str(studies[one.patient].index(one.study) + 1)))
        keys[one.folder] = key
    roles = _roles(series, keys)
    kept, left, doubled = _one_each(series, keys, roles, {uid for one in outlines for uid in one.drawn_on})
    masks, drawn_on, doubtful, unmatched = _outlined(outlines, kept, left, keys)
    notes += [*doubled, *unmatched]
    files = [FoundFile(one.folder, keys[one.folder], roles[one.folder]) for one in kept]
    found = [*files, *masks, *_beside(listing, series, keys)]
    metadata = {keys[one.folder]: dict(one.metadata) for one in series}
    notes.append("patients are grouped by the PatientID in the headers, which is written to cases.csv")
    segments = {one.path: one.segments for one in outlines if one.path in drawn_on}
    return Layout(
        "a DICOM tree", found, metadata=metadata, segments=segments, drawn_on=drawn_on, doubtful=doubtful, notes=notes
    )


def _one_each(
    series: list[Series], keys: dict[str, Key], roles: dict[str, str], outlined: set[str]
) -> tuple[list[Series], list[Series], list[str]]:
    """Keep one series of each role in a study: the last of those that a mask was drawn on, else the last.

    Args:
        series, keys, roles: all series, and what they are.
        outlined: SeriesInstanceUIDs that masks were drawn on.

    Returns: the series that are kept, those that are left out, and a note on each of these.
    """
    kept: dict[tuple[Key, str], Series] = {}
    left, notes = [], []
    for one in series:
        place = (keys[one.folder], roles[one.folder])
        other = kept.setdefault(place, one)
        if other is one:
            continue
        stays, goes = (other, one) if other.uid in outlined and one.uid not in outlined else (one, other)
        kept[place] = stays
        left.append(goes)
        why = ", which a mask was drawn on" if stays.uid in outlined and goes.uid not in outlined else ""
        notes.append(f"{goes.folder} is left out: it is {place[1]} of the same study as {stays.folder}{why}")
    return list(kept.values()), left, notes


def _outlined(
    outlines: list[Outline], kept: list[Series], left: list[Series], keys: dict[str, Key]
) -> tuple[list[FoundFile], dict[str, str], dict[str, str], list[str]]:
    """Match DICOM-SEG and RTSTRUCT to the series that they were drawn on.

    Returns: their files, {path: folder of the series}, {role: why} of roles that two files of a study have, and notes
    on the files that are left out.
    """
    folders = {one.uid: one.folder for one in kept}
    without = {one.uid: one.folder for one in left}
    matched = [(one, next((folders[uid] for uid in one.drawn_on if uid in folders), None)) for one in outlines]
    counts = Counter((keys[folder], one.kind) for one, folder in matched if folder is not None)
    several = {kind for (_, kind), count in counts.items() if count > 1}
    files: dict[tuple[Key, str], FoundFile] = {}
    drawn_on, doubtful, notes = {}, {}, []
    for one, folder in matched:
        if folder is None:
            theirs = next((without[uid] for uid in one.drawn_on if uid in without), None)
            why = f"so is {theirs}, which it was drawn on" if theirs else "the series that it was drawn on is not there"
            notes.append(f"{one.path} is left out: {why if one.drawn_on else 'it does not name the series'}")
            continue
        words = "_".join(tokens(one.description)) if one.kind in several else ""
        place = (keys[folder], f"{one.kind}_{words}" if words else one.kind)
        if place in files:
            doubtful.setdefault(
                place[1],
                f"{files[place].path} and {one.path} are both {place[1]} of one study, and their SeriesDescription "
                "does not tell them apart; move the one that is not wanted out of the folder",
            )
            continue
        files[place] = FoundFile(one.path, *place)
        drawn_on[one.path] = folder
    return list(files.values()), drawn_on, doubtful, notes


def _read_folder(root: Path, folder: str) -> list[Series | Outline | str]:
    """Return what a folder holds: a series, DICOM-SEG and RTSTRUCT, or why they are not used."""
    files = [file for file in series_files(root / folder) if is_dicom(file)]
    kinds = {file: kind for file in files if (kind := segmentation_kind(file)) is not None}
    slices = [file for file in files if file not in kinds]
    found: list[Series | Outline | str] = [_read_series(folder, slices)] if slices else []
    for file, kind in kinds.items():
        path = folder if len(files) == 1 else file.relative_to(root).as_posix()
        found.append(read_outline(path, file, kind) if kind in OUTLINES else f"{kind} is not a mask of voxels")
    return found


def _read_series(folder: str, slices: list[Path]) -> Series | str:
    """Return what a series says of itself, or why it is not used."""
    header = pydicom.dcmread(slices[0], stop_before_pixels=True, specific_tags=TAGS)
    modality = str(header.get("Modality", "") or "OT")
    if modality in NO_VOLUMES:
        return f"{modality} is not a series of images"
    if "LOCALIZER" in (header.get("ImageType") or []):
        return "localizers"
    if len(slices) < 2:
        return "a single slice"
    patient = str(header.get("PatientID", "") or header.get("PatientName", "") or folder.split("/")[0])
    metadata = {}
    if sex := str(header.get("PatientSex", "") or ""):
        metadata["sex"] = sex
    if age := AGE.fullmatch(str(header.get("PatientAge", "") or "")):
        metadata["age"] = f"{int(age[1]) * YEARS[age[2]]:g}"
    description = "_".join(tokens(str(header.get("SeriesDescription", "") or "")))
    study = str(header.get("StudyInstanceUID", ""))
    uid = str(header.get("SeriesInstanceUID", ""))
    return Series(folder, uid, nfc(patient.strip()), study, modality, nfc(description), tuple(metadata.items()))


def _roles(series: list[Series], keys: dict[str, Key]) -> dict[str, str]:
    """Return the role of each series: its modality, with the description where a study has several of a modality."""
    several = {
        modality
        for (_, modality), count in Counter((keys[one.folder], one.modality) for one in series).items()
        if count > 1
    }
    roles = {}
    for one in series:
        name = NAMES.get(one.modality, one.modality)
        described = one.modality in several and one.description
        roles[one.folder] = f"{name}_{one.description}" if described else name
    return roles


def _beside(listing: Listing, series: list[Series], keys: dict[str, Key]) -> list[FoundFile]:
    """Return volume files that lie in or below a patient's folder: masks beside the series."""
    found = []
    for path in listing.volumes:
        folder = path.rpartition("/")[0]
        while folder:
            near = {keys[one.folder] for one in series if f"{one.folder}/".startswith(f"{folder}/")}
            if near:
                break
            folder = folder.rpartition("/")[0]
        else:
            near = set()
        if len(near) == 1:
            found.append(FoundFile(path, near.pop(), stem_of(path)))
    return found
