"""Intensities between file units (HU, SUV, arbitrary MR units) and the [-1, 1] in which the models work, and back."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from .volume import VolumeError

if TYPE_CHECKING:  # jsonargparse would run this block, were annotations postponed (from __future__) in this file
    import torch

Array = TypeVar("Array", np.ndarray, "torch.Tensor")


@dataclass(frozen=True)
class LinearScale:
    """low <-> -1 and high <-> 1, in the units of the file."""

    low: float
    high: float

    def apply(self, values: Array) -> Array:
        """File units to [-1, 1]; what lies outside low..high is clipped."""
        return ((values - self.low) * (2 / (self.high - self.low)) - 1).clip(-1, 1)

    def invert(self, values: Array) -> Array:
        """[-1, 1] to file units."""
        return (values + 1) * ((self.high - self.low) / 2) + self.low


@dataclass(frozen=True)
class IntensityScaling:
    """How a channel is scaled.

    Args:
        kind: "percentile" fits low and high anew to every whole volume (MR, PET); "window" takes them as they are
        (CT, in HU).
        low: lower percentile (0-100), or lower value in file units.
        high: upper percentile, or upper value.
    """

    kind: Literal["percentile", "window"] = "percentile"
    low: float = 0.5
    high: float = 99.5

    def __post_init__(self) -> None:
        if self.kind not in ("percentile", "window"):
            raise ValueError(f"intensity kind is 'percentile' or 'window', got {self.kind!r}")
        if not self.low < self.high:
            raise ValueError(f"intensity low ({self.low}) must be below high ({self.high})")
        if self.kind == "percentile" and not (0 <= self.low and self.high <= 100):
            raise ValueError(f"percentiles lie in 0-100, got {self.low} and {self.high}")

    def fit(self, array: np.ndarray) -> LinearScale:
        """The scale of one whole volume (one channel, any shape, file units)."""
        if self.kind == "window":
            return LinearScale(self.low, self.high)
        low, high = np.percentile(array, [self.low, self.high]).astype(np.float32).tolist()
        if not low < high:
            raise VolumeError(
                f"percentiles {self.low:g} and {self.high:g} are both {low:g}: the volume is constant, or nearly; "
                "give other percentiles, or a window"
            )
        return LinearScale(low, high)
