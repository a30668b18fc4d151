"""Label values, whatever a file holds, and label indices 0..n-1, which a model sees: places among the sorted values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from .volume import VolumeError

VALUES = 1 << 16  # of int16; numpy's negative indices wrap, so a table of this size serves negative labels too


def label_indices(
    labels: np.ndarray, known: Iterable[int], label_map: Mapping[int, int] | None = None, *, name: str = "mask"
) -> np.ndarray:
    """Label values (int16, any shape) to int16 indices of the sorted `known` values, after `label_map` {value: known}.

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
            f"{name}: mask holds labels {sorted(unknown)} that are not known (known are {order}); name or map them"
        )
    return table[labels]
