"""The bytes of the page's drawing, and the label values that they mean.

The page paints codes: 0 is the background, 1, 2, ... are the model's other labels in the order of their values. A
drawing is one byte per voxel in RAS+ order, the first axis running fastest, as NiiVue keeps it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from volumes import PADDING, UNKNOWN

OUTSIDE_CODE = 255  # voxels outside the field of view
UNKNOWN_CODE = 254  # voxels whose label the model is to choose
MOST = 254  # labels that fit below these codes


@dataclass(frozen=True)
class LabelCodes:
    """The code of each label of a model.

    Attributes:
        values: the label value of code 0, 1, ...
        names: the label's name of each.
    """

    values: tuple[int, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, labels: Mapping[int, str]) -> "LabelCodes":
        """Give each label of a model a code; the background is label 0, or the lowest one.

        Raises: ValueError for more labels than there are codes.
        """
        if len(labels) > MOST:
            raise ValueError(f"the studio paints at most {MOST} labels, this model has {len(labels)}")
        values = sorted(labels, key=lambda value: (value != 0, value))
        return cls(tuple(values), tuple(labels[value] for value in values))

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Turn label values (X, Y, Z) into codes, uint8 of the same shape. Raises: ValueError for other values."""
        codes = np.full(values.shape, OUTSIDE_CODE, np.uint8)
        known = values == PADDING
        if PADDING in self.values:
            known = np.zeros(values.shape, bool)
        pairs = [*enumerate(self.values), *([(UNKNOWN_CODE, UNKNOWN)] if UNKNOWN not in self.values else [])]
        for code, value in pairs:
            here = values == value
            codes[here] = code
            known |= here
        if not known.all():
            raise ValueError(f"the mask holds {sorted(set(values[~known].tolist()))[:5]}, which are no labels")
        return codes

    def decode(self, data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
        """Turn the bytes of a drawing into label values, int16 (X, Y, Z).

        Raises: ValueError for a drawing of another size, and for codes that mean nothing.
        """
        if len(data) != int(np.prod(shape)):
            raise ValueError(f"the drawing has {len(data)} voxels, its grid has {' x '.join(map(str, shape))}")
        codes = np.frombuffer(data, np.uint8).reshape(shape, order="F")
        table = np.full(256, np.iinfo(np.int16).min, np.int16)
        table[: len(self.values)] = self.values
        table[OUTSIDE_CODE] = PADDING
        table[UNKNOWN_CODE] = UNKNOWN  # a model that takes whole masks alone refuses it when it generates
        used = np.unique(codes)
        if wrong := [code for code in used.tolist() if table[code] == np.iinfo(np.int16).min]:
            raise ValueError(f"the drawing holds the codes {wrong[:5]}, which are no labels of this model")
        return table[codes]


def drawing(codes: np.ndarray) -> bytes:
    """Return codes (X, Y, Z) as the bytes of a drawing."""
    return codes.tobytes(order="F")
