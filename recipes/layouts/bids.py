"""BIDS: sub-*/ses-*/anat/sub-*_ses-*_T1w.nii.gz, masks in derivatives/, people in participants.tsv."""

from __future__ import annotations

import re
from collections import Counter

from recipes.listing import Listing, stem_of

from .layout import FoundFile, Layout, pattern_of

SUBJECT, SESSION = re.compile(r"sub-[^_/]+"), re.compile(r"ses-[^_/]+")
NO_VOLUMES = ("func", "fmap", "dwi", "perf", "eeg", "meg", "ieeg", "beh")  # 4-D series and others, not anatomy
MASKS = ("mask", "dseg", "roi", "lesion")
TABLE = "participants.tsv"


def find_bids(listing: Listing) -> Layout | None:
    """Read a BIDS folder; None for other folders: those without a `sub-*` folder whose files are called `sub-*`."""
    files: list[FoundFile] = []
    skipped: Counter[str] = Counter()
    masks, secondary, others = set(), set(), 0
    for path in listing.volumes:
        *folders, _ = path.split("/")
        stem, derived = stem_of(path), folders[:1] == ["derivatives"]
        subject = SUBJECT.match(stem)
        if subject is None or subject[0] not in folders:
            others += 1
            continue
        if folders[-1] in NO_VOLUMES:
            skipped[folders[-1]] += 1
            continue
        session = SESSION.search(stem)
        pieces = [piece for piece in stem.split("_") if piece not in (subject[0], session and session[0])]
        run = next((piece for piece in pieces if re.fullmatch(r"run-\d+", piece)), None)
        pieces = [piece for piece in pieces if piece != run]
        values = {"participant_id": subject[0]}
        values |= {"session": session[0]} if session else {}
        values |= {"run": run} if run else {}
        role = "_".join(pieces) or "image"
        if derived and folders[1:2] != [subject[0]]:
            role = f"{folders[1]}/{role}"
        if pieces and pieces[-1] in MASKS:
            masks.add(role)
        elif derived:
            secondary.add(role)
        files.append(FoundFile(path, tuple(values.items()), role, pattern_of(path, values)))
    if not files or len(files) < others:
        return None
    notes = [f"{count} volumes of {kind}/ are left out" for kind, count in sorted(skipped.items())]
    if others:
        notes.append(f"{others} volumes outside of the subjects' folders are left out")
    table = TABLE if (listing.root / TABLE).is_file() else None
    return Layout("BIDS", files, masks=masks, secondary=secondary, table=table, notes=notes)
