"""Find the labels of the masks: values, names, and how many cases have each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cli.live_bar import LiveBar
from volumes.formats.dicom import series_grid
from volumes.formats.read import read_mask
from volumes.formats.segments import grid_volume
from volumes.labels import segment_key
from volumes.volume import VolumeError

from .choice import Ambiguous, Choice
from .contents import Reader, label_counts, masks_to_read
from .layouts.layout import Key, Layout, case_name
from .layouts.structures import ROLE as STRUCTURES
from .section import LABELS
from .structures import choose_structures, combine, without_structures

if TYPE_CHECKING:
    from .survey import Options

Labels = dict[int, tuple[str, int]]  # {value: (name, cases that have it)}


def find_labels(options: Options, layout: Layout, choice: Choice, reader: Reader) -> tuple[Labels, int]:
    """Return the labels of the masks, and how many masks they were read from.

    Raises:
        Ambiguous: for DICOM masks whose segments make no label map together.
        ValueError: for masks without labels.
    """
    if choice.mask is None:
        return {}, 0
    if choice.mask == STRUCTURES:
        return _combined(options, layout, choice)
    if choice.mask in layout.outlined:
        return _outlined(options, layout, choice, reader)
    files = layout.of_role(choice.mask)
    paths = masks_to_read(reader, [files[key].path for key in choice.keys])
    with LiveBar(paths, desc="reading masks", unit="mask", disable=None) as progress:
        counts, read = label_counts(reader, progress)
    named = {**layout.label_names, **options.label_names}
    if len(counts) < 2:
        raise ValueError(
            f"{layout.shown(choice.mask)}: all masks hold one value alone, {next(iter(counts), 0)}; say --mask none"
        )
    foreground = [value for value in sorted(counts) if value != 0]
    single = _role_name(choice.mask) if len(foreground) == 1 else ""
    labels = {}
    for value in sorted({0, *counts, *named}):
        name = named.get(value) or ("background" if value == 0 else single or f"label_{value}")
        labels[value] = (name, counts.get(value, 0))
    missing = [name for value, (name, count) in labels.items() if value and not count]
    if missing and read == len(choice.keys):
        choice.unsure.append(f"no mask holds {', '.join(missing)}, so it is left out of the labels")
        labels = {value: entry for value, entry in labels.items() if entry[1] or value == 0}
    return labels, read


def _role_name(role: str) -> str:
    """Return a label's name for the role of its masks: `tumour`, but `label_1` for `labels` and `CT_mask`."""
    name = role.rpartition("/")[2]
    plain = name.lower() in ("mask", "masks", "label", "labels", "seg", "segmentation", "labelstr", "gt")
    words = [word for word in name.split("_") if word.lower() not in ("mask", "seg", "label", "ct", "mr", "pet")]
    return "foreground" if plain or not words else "_".join(words).lower()


def keep_asked(structures: Sequence[str], layout: Layout, choice: Choice) -> None:
    """Leave cases out that have none of the structures, or segments of DICOM masks, that the user named."""
    if not structures or choice.mask is None:
        return
    there = _named(layout, choice)
    without = without_structures(there, choose_structures(there, structures)) if there else []
    if without:
        choice.unsure.append(
            f"{len(without)} cases have none of {', '.join(structures)} and are left out: "
            f"{', '.join(case_name(key) for key in without[:5])}"
        )
        choice.keys = [key for key in choice.keys if key not in without]


def _named(layout: Layout, choice: Choice) -> dict[Key, Mapping[str, str]]:
    """Return {case: {name: path}} of the structures, or of the segments of DICOM masks; empty for other masks."""
    if choice.mask == STRUCTURES:
        return {key: layout.structures[key] for key in choice.keys}
    if choice.mask not in layout.outlined:
        return {}
    files = layout.of_role(choice.mask)
    return {key: dict.fromkeys(layout.segments[files[key].path], files[key].path) for key in choice.keys}


def _outlined(options: Options, layout: Layout, choice: Choice, reader: Reader) -> tuple[Labels, int]:
    """Return the labels of DICOM-SEG or RTSTRUCT, which are called as the segments."""
    there = _named(layout, choice)
    chosen = choose_structures(there, options.structures)
    spellings: dict[str, str] = {}
    for name in chosen:
        spellings.setdefault(segment_key(name), name)
    names = list(spellings.values())
    paths = [layout.of_role(str(choice.mask))[key].path for key in choice.keys]
    counts = dict.fromkeys(range(1, len(names) + 1), 0)
    values: dict[str | int, int] = {segment_key(name): value for value, name in enumerate(names, 1)}
    read = masks_to_read(reader, paths)
    with LiveBar(read, desc="reading masks", unit="mask", disable=None) as progress:
        for path in progress:
            for value in _values(reader, path, values, names):
                counts[value] += 1
    if len(read) == len(paths) and (empty := [name for value, name in enumerate(names, 1) if not counts[value]]):
        choice.unsure.append(f"no mask holds a voxel of {', '.join(empty)}; --structures leaves segments out")
    renamed = {value: options.label_names.get(value, name) for value, name in enumerate(names, 1)}
    choice.segments = {name: value for value, name in enumerate(names, 1) if renamed[value] != name}
    left = sorted({one for named in there.values() for one in named} - set(chosen))
    choice.sure += [f"segments that --structures does not name are left out: {', '.join(left[:8])}"] if left else []
    return {0: ("background", 0), **{value: (name, counts[value]) for value, name in renamed.items()}}, len(read)


def _values(reader: Reader, path: str, values: Mapping[str | int, int], names: Sequence[str]) -> list[int]:
    """Return the label values that a DICOM mask holds. Raises: Ambiguous if its segments make no label map."""
    grid = grid_volume(series_grid(reader.root / reader.drawn_on[path]))
    try:
        with warnings.catch_warnings():  # of segments that are left out, which is said for all masks together
            warnings.filterwarnings("ignore", ".*segments that no label is called as")
            mask = read_mask(reader.root / path, names=values, like=grid)
    except VolumeError as error:
        raise Ambiguous(
            f"{error}; here that is to say --structures with some of '{','.join(names)}', or --mask none"
        ) from error
    return [int(value) for value in np.unique(mask.array) if value]


def _combined(options: Options, layout: Layout, choice: Choice) -> tuple[Labels, int]:
    """Make label maps of the structures, next to the recipe."""
    structures = _named(layout, choice)
    names = choose_structures(structures, options.structures)
    with LiveBar(total=len(structures), desc="combining structures", unit="case", disable=None) as progress:
        counts, overlaps = combine(options.folder, structures, names, options.output / LABELS, progress.update)
    if absent := [name for name in names if not counts[name]]:
        names = [name for name in names if counts[name]]
        counts, overlaps = combine(options.folder, structures, names, options.output / LABELS)
        choice.sure.append(f"{len(absent)} structures are empty in all cases, and no labels: {', '.join(absent[:5])}")
    if overlaps:
        choice.unsure.append(f"structures overlap in {overlaps} voxels; the later one in the alphabet counts there")
    choice.sure.append(f"{len(names)} structures were combined into a label map per case, in {options.output / LABELS}")
    return {0: ("background", len(structures)), **{v: (n, counts[n]) for v, n in enumerate(names, 1)}}, len(structures)
