"""Intensities between file units (HU, SUV, arbitrary MR units) and the [-1, 1] in which the models work, and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from cli.settings import FiniteFloat, checked

from .volume import VolumeError

if TYPE_CHECKING:  # jsonargparse would run this block, were annotations postponed (from __future__) in this file
    import torch

FEW_INSIDE = 0.05  # warn if a smaller fraction of a volume's voxels is within the window
Array = TypeVar("Array", np.ndarray, "torch.Tensor")


@dataclass(frozen=True)
class LinearScale:
    """low <-> -1 and high <-> 1, in the units of the file."""

    low: float
    high: float

    def apply(self, values: Array) -> Array:
        """Map file units to [-1, 1]; values outside low..high are clipped."""
        return ((values - self.low) * (2 / (self.high - self.low)) - 1).clip(-1, 1)

    def invert(self, values: Array) -> Array:
        """Map [-1, 1] to file units."""
        return (values + 1) * ((self.high - self.low) / 2) + self.low


@dataclass(frozen=True)
@checked
class IntensityScaling:
    """How a channel is scaled.

    Args:
        kind: "window" uses low and high unchanged, for quantities (CT in HU, PET in SUV, maps of T1 in ms): values
            outside are cut off, the same in every volume. "percentile" fits them to every whole volume, for values
            without a unit (most MR): it cuts off the brightest voxels of each volume, and SUV loses its meaning.
        low: lower percentile (0-100), or lower value in file units.
        high: upper percentile, or upper value.
    """

    kind: Literal["percentile", "window"] = "percentile"
    low: FiniteFloat = 0.5
    high: FiniteFloat = 99.5

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"intensity low ({self.low}) must be below high ({self.high})")
        if self.kind == "percentile" and not (self.low >= 0 and self.high <= 100):
            raise ValueError(f"percentiles lie in 0-100, got {self.low} and {self.high}")

    def fit(self, array: np.ndarray) -> LinearScale:
        """Fit the scale to one whole volume (one channel, any shape, file units).

        Raises: VolumeError for a volume without contrast: one that is constant, whose percentiles coincide, or
        whose voxels all lie on one side of the window.
        """
        lowest, highest = float(array.min()), float(array.max())
        if lowest == highest:
            raise VolumeError(f"every voxel is {lowest:g}: it is constant; exclude it")
        if self.kind == "window":
            for side, beyond in (("at or below", highest <= self.low), ("at or above", lowest >= self.high)):
                if beyond:
                    raise VolumeError(
                        f"0 % of its voxels lie within the window {self.low:g} to {self.high:g}: all are {side} it "
                        f"({lowest:g} to {highest:g}); check the file's unit, or set intensity to a window around its "
                        "values"
                    )
            return LinearScale(self.low, self.high)
        low, high = np.percentile(array, [self.low, self.high]).astype(np.float32).tolist()
        if not low < high:
            raise VolumeError(
                f"percentiles {self.low:g} and {self.high:g} are both {low:g}: it is constant, or nearly; "
                "give other percentiles, or a window"
            )
        return LinearScale(low, high)

    def share_inside(self, array: np.ndarray) -> float:
        """Return the fraction of the voxels (one channel, file units) that a window does not cut off. It is 1 for
        percentiles, and for a volume of two values if the window shows both.
        """
        if self.kind != "window" or np.all((array == array.min()) | (array == array.max())):
            return 1.0
        return float(((self.low < array) & (array < self.high)).mean())


def few_inside(shares: Sequence[float], names: Sequence[str], limits: tuple[float, float]) -> str | None:
    """Return a warning if a window shows little of some volumes.

    Args:
        shares: `IntensityScaling.share_inside` of one channel of each volume.
        names: of the volumes.
        limits: the window, in file units.
    """
    few = [f"{name} ({share:.1%})" for name, share in zip(names, shares, strict=True) if share < FEW_INSIDE]
    if not few:
        return None
    listed = ", ".join(few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
    return (
        f"the window {limits[0]:g} to {limits[1]:g} cuts off most of {len(few)} of {len(names)} volumes; voxels "
        f"within it: {listed}. Check the files' unit, or set data.intensity to a window around their values"
    )
