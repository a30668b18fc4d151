"""Label values, whatever a file holds, and label indices 0..n-1, which a model sees: places among the sorted values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from files.names import nfc

from .volume import UNKNOWN, VolumeError

VALUES = 1 << 16  # of int16; numpy's negative indices wrap, so a table of this size serves negative labels too


def label_indices(
    labels: np.ndarray,
    known: Iterable[int],
    label_map: Mapping[Any, int] | None = None,
    *,
    name: str = "mask",
    partial: bool = False,
) -> np.ndarray:
    """Map label values (int16, any shape) to int16 indices of the sorted `known` values, after `label_map` {value:
    known}. Names of segments in it were read with the file, see `segment_values`.

    Args:
        partial: whether `label_map` may lead to `UNKNOWN`, which is then the index of these voxels.
    Raises VolumeError, which names the mask and the values, for labels that are neither known nor mapped, and for those
    that are mapped to `UNKNOWN` unless `partial`.
    """
    order = sorted(known)
    present = np.zeros(VALUES, dtype=bool)
    present[labels] = True
    table = np.zeros(VALUES, dtype=np.int16)
    unknown = []
    for wrapped in np.flatnonzero(present).tolist():
        value = wrapped if wrapped < VALUES // 2 else wrapped - VALUES
        target = (label_map or {}).get(value, value)
        if target in order:
            table[value] = order.index(target)
        elif partial and target == UNKNOWN and UNKNOWN in (label_map or {}).values():
            table[value] = UNKNOWN
        else:
            unknown.append(value)
    if hidden := sorted(value for value in unknown if (label_map or {}).get(value) == UNKNOWN):
        raise VolumeError(
            f"{name}: holds {hidden}, which label_map calls unknown ({UNKNOWN}); only the label of a mask's voxels may "
            "be unknown, so map them to a label"
        )
    if unknown:
        raise VolumeError(
            f"{name}: mask holds labels {sorted(unknown)} that have no name (named are {order}); name or map them"
            + (f". {{{UNKNOWN}: {UNKNOWN}}} maps {UNKNOWN} to unknown" if partial and UNKNOWN in unknown else "")
        )
    return table[labels]


def labels_present(indices: np.ndarray, num_labels: int) -> np.ndarray:
    """Return which of the label indices 0 to num_labels - 1 occur in int16 `indices` of any shape: bool (num_labels,).
    Negative ones, such as PADDING, are passed over."""
    present = np.zeros(VALUES, dtype=bool)
    present[indices] = True
    return present[:num_labels]


def label_channels(indices: np.ndarray, num_labels: int) -> np.ndarray:
    """Map label indices (X, Y, Z) to float32 (num_labels - 1, X, Y, Z): 1 where each label but the background (0) is,
    else 0.
    """
    foreground = np.arange(1, num_labels, dtype=indices.dtype).reshape(-1, 1, 1, 1)
    return (indices[None] == foreground).astype(np.float32)


def merge_channels(channels: np.ndarray, values: Sequence[int], threshold: float = 0.0) -> np.ndarray:
    """Merge channels (C, X, Y, Z), one for each label but the background, into a label map (1, X, Y, Z) int16. A voxel
    gets the label of its largest channel, or the background if no channel exceeds `threshold`.

    Args:
        values: label values of background and channels, C + 1 of them.
    """
    indices = np.where(channels.max(axis=0) > threshold, channels.argmax(axis=0) + 1, 0)
    return np.asarray(values, dtype=np.int16)[indices][None]


def segment_values(names: Mapping[int, str], label_map: Mapping[Any, int] | None = None) -> dict[str | int, int]:
    """Decide how segments of DICOM-SEG and RTSTRUCT are read: {name (see `segment_key`) or number: label value}.

    A segment is read as the label to which its name leads in `label_map`, or that is called as it is, or to which its
    number leads in `label_map`. Labels whose names differ in upper and lower case alone are not found by name.

    Args:
        names: label values and their names.
        label_map: {value or name of a segment: label value}.

    Raises: ValueError for a name in `label_map` that leads to two labels, or to a value that `label_map` changes.
    """
    label_map = label_map or {}
    found: dict[str | int, int] = {}
    for text, value in label_map.items():
        if not isinstance(text, str):
            found[text] = text  # `label_indices` maps it, as that of any other file
        elif label_map.get(value, value) != value:
            raise ValueError(f"label_map leads from {text!r} to {value}, and from {value} to {label_map[value]}")
        elif found.setdefault(segment_key(text), value) != value:
            raise ValueError(f"label_map leads from {text!r} to {value} and to {found[segment_key(text)]}")
    own = [(segment_key(text), value) for value, text in names.items() if label_map.get(value, value) == value]
    keys = Counter(key for key, _ in own)
    return {key: value for key, value in own if keys[key] == 1} | found


def segment_key(name: str) -> str:
    """Return the name of a segment as it is compared: without white space at its ends, in lower case."""
    return nfc(name).strip().casefold()
