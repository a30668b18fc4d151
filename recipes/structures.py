"""Combine binary files, one per structure, into a label map per case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from files.names import same_name
from volumes.formats.nifti import write_volume
from volumes.formats.read import read_mask
from volumes.volume import VolumeError, same_grid

from .layouts.layout import Key
from .section import structures_name


def choose_structures(structures: Mapping[Key, Mapping[str, str]], asked: Sequence[str]) -> list[str]:
    """Return the structures to combine, in alphabetical order: all, or those that the user named.

    Raises:
        ValueError: for a name that no case has.
    """
    names = sorted({name for files in structures.values() for name in files})
    chosen = []
    for name in asked:
        found = [one for one in names if same_name(one) == same_name(name)]
        if not found:
            raise ValueError(f"--structures {name}: no case has it; there are {', '.join(names[:20])}")
        chosen += found
    return sorted(set(chosen)) or names


def without_structures(structures: Mapping[Key, Mapping[str, str]], names: Sequence[str]) -> list[Key]:
    """Return the cases that have none of these structures."""
    return [key for key, files in structures.items() if not files.keys() & set(names)]


def combine(
    root: Path,
    structures: Mapping[Key, Mapping[str, str]],
    names: Sequence[str],
    folder: Path,
    on_case: Callable[[], object] = lambda: None,
) -> tuple[dict[str, int], int]:
    """Write a label map per case: 0 for background, and 1, 2, ... for the structures in the order of `names`.

    Where structures overlap, the later one counts.

    Args:
        root: that the paths are relative to.
        structures: {case: {structure: path}}.
        names: of the structures.
        folder: that the maps are written to.
        on_case: called after each.

    Returns:
        How many cases have each structure, and how many voxels belong to several.

    Raises:
        VolumeError: for structures of one case on different grids.
    """
    counts, overlaps = dict.fromkeys(names, 0), 0
    folder.mkdir(parents=True, exist_ok=True)
    for key, files in structures.items():
        combined = None
        for value, name in enumerate(names, start=1):
            if name not in files:
                continue
            mask = read_mask(root / files[name])
            if combined is None:
                combined = mask.replace(np.zeros_like(mask.array))
            if not same_grid(combined, mask):
                raise VolumeError(f"{root / files[name]}: lies on another grid than the other structures of its case")
            inside = mask.array > 0
            counts[name] += bool(inside.any())
            overlaps += int((inside & (combined.array > 0)).sum())
            combined.array[inside] = value
        if combined is None:
            raise VolumeError(f"{root}: the case {structures_name(key)} has none of the structures {', '.join(names)}")
        write_volume(combined, folder / structures_name(key))
        on_case()
    return counts, overlaps
