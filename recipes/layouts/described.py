"""Data sets with a dataset.json: nnU-Net (raw and v1), and the Medical Segmentation Decathlon, which came first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

from files.documents import read_object
from files.names import nfc
from recipes.listing import Listing, stem_of, suffix_of

from .layout import FoundFile, Layout

NAME = "dataset.json"
CHANNEL = re.compile(r"(.+)_(\d{4})")
IMAGES, LABELS = "imagesTr", "labelsTr"


def find_described(listing: Listing) -> Layout | None:
    """Read a data set of nnU-Net or of the Decathlon; None if it is neither.

    Raises:
        ValueError: if a folder of several such data sets is given, or for a damaged dataset.json.
    """
    own = listing.root / NAME
    inside = {path.split("/")[0] for path in listing.volumes}
    if not own.is_file() and IMAGES not in inside:
        others = sorted(folder for folder in inside if (listing.root / folder / NAME).is_file())
        if others:
            raise ValueError(f"{listing.root}: holds {len(others)} data sets; give one: {listing.root / others[0]}")
        return None
    if IMAGES not in inside:
        return None
    said = read_object(own) if own.is_file() else {}
    images = [path for path in listing.volumes if path.startswith(f"{IMAGES}/")]
    labels = [path for path in listing.volumes if path.startswith(f"{LABELS}/")]
    numbered = _is_numbered([stem_of(path) for path in images], {stem_of(path) for path in labels})
    files, roles = [], {}
    for path in images:
        stem = stem_of(path)
        match = CHANNEL.fullmatch(stem) if numbered else None
        case, number = (match[1], match[2]) if match else (stem, "")
        role = f"{IMAGES}_{number}" if match else IMAGES
        roles[role] = int(number or 0)
        ending = f"_{number}" if match else ""
        files.append(FoundFile(path, (("case", case),), role, f"{IMAGES}/{{case}}{ending}{suffix_of(path)}"))
    for path in labels:
        files.append(FoundFile(path, (("case", stem_of(path)),), LABELS, f"{LABELS}/{{case}}{suffix_of(path)}"))
    others = [path for path in listing.volumes if path.split("/")[0] not in (IMAGES, LABELS)]
    notes = (
        [f"{len(others)} volumes outside of {IMAGES} and {LABELS} are left out, such as {others[0]}"] if others else []
    )
    if not own.is_file():
        notes.append(f"there is no {NAME}, so channels and labels have no names")
    names = _channel_names(said)
    by_role = {
        role: [names[number]] if number < len(names) else [f"channel_{number}"] for role, number in roles.items()
    }
    if not numbered:
        by_role = {IMAGES: names or ["image"]}
    label_names, more = _label_names(said)
    kind = "nnU-Net" if numbered else "Medical Segmentation Decathlon"
    return Layout(
        kind, files, masks={LABELS} if labels else set(), channel_names=by_role, label_names=label_names,
        notes=notes + more,
    )  # fmt: skip


def _is_numbered(images: Sequence[str], labels: Set[str]) -> bool:
    """Return whether the digits at the end of all names are a channel's: labels are named without them."""
    matches = [CHANNEL.fullmatch(stem) for stem in images]
    cases = {match[1] for match in matches if match}
    return all(matches) and (not labels or len(labels & cases) > len(labels & set(images)))


def _channel_names(said: Mapping[str, Any]) -> list[str]:
    channels = said.get("channel_names", said.get("modality", {}))
    if not isinstance(channels, Mapping) or not all(str(key).isdecimal() for key in channels):
        return []
    return [nfc(str(channels[key])) for key in sorted(channels, key=int)]


def _label_names(said: Mapping[str, Any]) -> tuple[dict[int, str], list[str]]:
    """Return {value: name} of `labels`, which has the values first (v1, Decathlon) or the names (v2), and notes."""
    labels, names, regions = said.get("labels", {}), {}, []
    for key, value in labels.items() if isinstance(labels, Mapping) else ():
        if isinstance(value, list):
            regions.append(str(key))
        elif str(key).lstrip("-").isdecimal() and not isinstance(value, int):
            names[int(key)] = nfc(str(value))
        elif str(value).lstrip("-").isdecimal():
            names[int(value)] = nfc(str(key))
    note = f"{NAME} names regions of several labels ({', '.join(regions)}), which have no value of their own"
    return names, [note] if regions else []
