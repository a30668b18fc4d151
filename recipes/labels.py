"""Find the labels of the masks: values, names, and how many cases have each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cli.live_bar import LiveBar
from volumes.formats.dicom import series_grid
from volumes.formats.read import read_mask
from volumes.formats.segments import OverlapError, grid_volume
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


def find_labels(
    options: Options, layout: Layout, choice: Choice, reader: Reader, drawn: Mapping[str, set[str]]
) -> tuple[Labels, int]:
    """Return the labels of the masks, and how many masks they were read from.

    Args:
        options: what the user said.
        layout, choice: of the files.
        reader: of the folder.
        drawn: of DICOM masks, see `read_drawn`.

    Raises:
        ValueError: for masks without labels, and for names of labels that there are not.
    """
    if choice.mask is None:
        _check_values(options, [])
        return {}, 0
    if choice.mask == STRUCTURES:
        return _combined(options, layout, choice)
    if choice.mask in layout.outlined:
        return _outlined(options, layout, choice, drawn)
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
    """Leave cases out that have none of the structures, or segments of DICOM masks, that the user named.

    Raises:
        ValueError: for masks that have neither.
    """
    if not structures:
        return
    there = _named(layout, choice)
    if not there:
        why = (
            "there is no mask"
            if choice.mask is None
            else f"{layout.shown(choice.mask)} holds labels, which have values"
        )
        raise ValueError(
            f"--structures {','.join(structures)}: takes some of TotalSegmentator's files, or of the segments of DICOM "
            f"masks, and {why}; leave it out"
        )
    if without := without_structures(there, choose_structures(there, structures)):
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


def read_drawn(structures: Sequence[str], layout: Layout, choice: Choice, reader: Reader) -> Mapping[str, set[str]]:
    """Read DICOM masks, and leave cases out whose mask cannot be read, such as an RTSTRUCT without contours.

    Returns: {path: keys of the names (`segment_key`) of segments that have voxels} of the masks that were read, which
    are all if that takes seconds; empty for other masks.

    Raises:
        Ambiguous: if segments overlap.
        ValueError: if no mask can be read.
    """
    if choice.mask not in layout.outlined:
        return {}
    names = _spellings(layout, choice, structures)
    files = layout.of_role(str(choice.mask))
    paths = masks_to_read(reader, [files[key].path for key in choice.keys])
    drawn: dict[str, set[str]] = {}
    refused: dict[str, str] = {}
    with LiveBar(paths, desc="reading masks", unit="mask", disable=None) as progress:
        for path in progress:
            try:
                drawn[path] = _drawn(reader, path, names)
            except OverlapError as error:
                raise Ambiguous(
                    f"{error}; here that is to say --structures with some of '{','.join(names)}', or --mask none"
                ) from error
            except VolumeError as error:
                refused[path] = str(error)
    if not drawn:
        raise ValueError(f"no {choice.mask} can be read, so say --mask none: {'; '.join([*refused.values()][:3])}")
    if refused:
        choice.unsure.append(
            f"{len(refused)} cases have a mask that cannot be read and are left out: "
            f"{'; '.join([*refused.values()][:3])}"
        )
        choice.keys = [key for key in choice.keys if files[key].path not in refused]
    return drawn


def _spellings(layout: Layout, choice: Choice, structures: Sequence[str]) -> list[str]:
    """Return the names of the segments of DICOM masks that are used; of several spellings of a name, the first."""
    spellings: dict[str, str] = {}
    for name in choose_structures(_named(layout, choice), structures):
        spellings.setdefault(segment_key(name), name)
    return list(spellings.values())


def _outlined(options: Options, layout: Layout, choice: Choice, drawn: Mapping[str, set[str]]) -> tuple[Labels, int]:
    """Return the labels of DICOM-SEG or RTSTRUCT, which are called as the segments."""
    names = _spellings(layout, choice, options.structures)
    counts = {name: sum(segment_key(name) in held for held in drawn.values()) for name in names}
    if len(drawn) == len(choice.keys) and (empty := [name for name in names if not counts[name]]):
        choice.unsure.append(f"no mask holds a voxel of {', '.join(empty)}; --structures leaves segments out")
    _check_values(options, names)
    renamed = _renamed(options, names)
    choice.segments = {name: value for value, name in enumerate(names, 1) if renamed[value] != name}
    used = {segment_key(name) for name in names}
    left = sorted({one for named in _named(layout, choice).values() for one in named if segment_key(one) not in used})
    choice.sure += [f"segments that --structures does not name are left out: {', '.join(left[:8])}"] if left else []
    return {v: (name, counts[names[v - 1]] if v else 0) for v, name in renamed.items()}, len(drawn)


def _renamed(options: Options, names: Sequence[str]) -> dict[int, str]:
    """Return {value: name}: 0 for the background, and 1, 2, ... for the names or what --label_names says instead."""
    return {value: options.label_names.get(value, name) for value, name in enumerate(["background", *names])}


def _check_values(options: Options, names: Sequence[str]) -> None:
    """Raise ValueError if --label_names names a value that no label has. Labels are 1, 2, ... for `names`."""
    values = range(len(names) + 1 if names else 0)
    if wrong := [value for value in options.label_names if value not in values]:
        there = ", ".join(f"{value}={name}" for value, name in enumerate(names, 1)) or "none, without a mask"
        raise ValueError(
            f"--label_names {wrong[0]}={options.label_names[wrong[0]]}: no label has this value; there are {there}"
        )


def _drawn(reader: Reader, path: str, names: Sequence[str]) -> set[str]:
    """Return the keys of the names of the segments that have voxels in a DICOM mask. Raises: VolumeError."""
    grid = grid_volume(series_grid(reader.root / reader.drawn_on[path]))
    values: dict[str | int, int] = {segment_key(name): value for value, name in enumerate(names, 1)}
    with warnings.catch_warnings():  # of segments that are left out, which is said for all masks together
        warnings.filterwarnings("ignore", ".*segments that no label is called as")
        mask = read_mask(reader.root / path, names=values, like=grid)
    return {segment_key(names[int(value) - 1]) for value in np.unique(mask.array) if value}


def _combined(options: Options, layout: Layout, choice: Choice) -> tuple[Labels, int]:
    """Make label maps of the structures, next to the recipe."""
    structures = _named(layout, choice)
    names = choose_structures(structures, options.structures)
    _check_values(options, names)
    with LiveBar(total=len(structures), desc="combining structures", unit="case", disable=None) as progress:
        counts, overlaps = combine(options.folder, structures, names, options.output / LABELS, progress.update)
    if absent := [name for name in names if not counts[name]]:
        names = [name for name in names if counts[name]]
        counts, overlaps = combine(options.folder, structures, names, options.output / LABELS)
        choice.sure.append(f"{len(absent)} structures are empty in all cases, and no labels: {', '.join(absent[:5])}")
    if overlaps:
        choice.unsure.append(f"structures overlap in {overlaps} voxels; the later one in the alphabet counts there")
    choice.sure.append(f"{len(names)} structures were combined into a label map per case, in {options.output / LABELS}")
    _check_values(options, names)
    held = [len(structures), *(counts[name] for name in names)]
    return {value: (name, held[value]) for value, name in _renamed(options, names).items()}, len(structures)
