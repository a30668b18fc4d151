"""Find volumes that a model generated, which must not pass for patients."""

from __future__ import annotations

from pathlib import Path

from files.documents import read_object

from .contents import spread
from .listing import Listing, stem_of

MARKERS = ("synthetic.json", "dataset.json")  # of exported sets: `pipelines.export`
LOOKED_AT = 50  # volumes, whose records beside them are read


def find_synthetic(listing: Listing) -> list[str]:
    """Return a warning if files beside the volumes say that a model generated them; else nothing.

    Args:
        listing: the folder.
    """
    folders = {Path(path).parent for path in (*listing.volumes, *listing.series)}
    folders = {Path("."), *folders, *(above for folder in folders for above in folder.parents)}
    marked = [folder / name for folder in sorted(folders) for name in MARKERS]
    marked += [Path(path).parent / f"{stem_of(path)}.json" for path in spread(listing.volumes, LOOKED_AT)]
    saying = [path.as_posix() for path in marked if _says_synthetic(listing.root / path)]
    if not saying:
        return []
    return [
        f"THESE VOLUMES ARE SYNTHETIC: {saying[0]} says that a model generated them. They are not patients: a model "
        "trained on them learns from another model, and tests on them say nothing about patients"
    ]


def _says_synthetic(path: Path) -> bool:
    try:
        return path.is_file() and read_object(path).get("synthetic") is True
    except ValueError:  # another program's file, which says nothing of this
        return False
