"""TotalSegmentator: a folder per case with an image, and a binary file per structure in `segmentations/`."""

from __future__ import annotations

from recipes.listing import Listing, stem_of, suffix_of

from .layout import FoundFile, Layout

FOLDER = "segmentations"
ROLE = "structures"  # the label map that is made of them


def find_structures(listing: Listing) -> Layout | None:
    """Read TotalSegmentator's folders; None if there are none. Deeper folders than `case/segmentations/` are fine.

    Raises: ValueError for the folder of a single case.
    """
    inside = [path for path in listing.volumes if path.split("/")[-2:-1] == [FOLDER]]
    if not inside:
        return None
    if all(path.startswith(f"{FOLDER}/") for path in inside):
        above = listing.root.resolve().parent
        raise ValueError(f"{listing.root}: is the folder of one case; give the folder that holds all cases: {above}")
    structures: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
    for path in inside:
        folder = "/".join(path.split("/")[:-2])
        structures.setdefault((("case", folder),), {})[stem_of(path)] = path
    files, extras = [], 0
    for path in listing.volumes:
        folder = path.rpartition("/")[0]
        if (("case", folder),) in structures:
            pattern = f"{{case}}/{stem_of(path)}{suffix_of(path)}" if folder and "/" not in folder else ""
            files.append(FoundFile(path, (("case", folder),), stem_of(path), pattern))
        elif path not in inside:
            extras += 1
    notes = [f"{extras} volumes without {FOLDER}/ beside them are left out"] if extras else []
    return Layout("TotalSegmentator", files, masks=set(), structures=structures, notes=notes)
