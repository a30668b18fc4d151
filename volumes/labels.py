"""Label values, whatever a file holds, and label indices 0..n-1, which a model sees: places among the sorted values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .volume import VolumeError

VALUES = 1 << 16  # of int16; numpy's negative indices wrap, so a table of this size serves negative labels too


def label_indices(
    labels: np.ndarray, known: Iterable[int], label_map: Mapping[int, int] | None = None, *, name: str = "mask"
) -> np.ndarray:
    """Map label values (int16, any shape) to int16 indices of the sorted `known` values, after `label_map` {value:
    known}.

    Raises VolumeError, which names the mask and the values, for labels that are neither known nor mapped.
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
        else:
            unknown.append(value)
    if unknown:
        raise VolumeError(
            f"{name}: mask holds labels {sorted(unknown)} that have no name (named are {order}); name or map them"
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
