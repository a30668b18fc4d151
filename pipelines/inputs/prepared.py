"""The grid that one volume is drawn on. Axes: (C, X, Y, Z) in RAS+ order."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from volumes import Placement, Volume, on_stored_grid

from .images import GivenImage
from .inpainting import PreparedEdit


@dataclass(frozen=True, eq=False)
class PreparedVolume:
    """The grid that one volume is drawn on.

    Attributes:
        grid: shape (X, Y, Z) and affine in the model's spacing, before padding; its array is the label indices or
            zeros.
        target: the grid that the result is handed back on: the mask's own, or that of the images.
        placement: pads `grid` to a multiple of the autoencoder's stride, and takes the padding off again.
        labels: label indices (X, Y, Z) int16 of the padded grid, PADDING outside the field of view; None without a
            mask.
        images: the channels that are given.
        edit: the image that is changed, if one is.
    """

    grid: Volume
    target: Volume
    placement: Placement
    labels: np.ndarray | None
    images: Mapping[str, GivenImage] = field(default_factory=dict)
    edit: PreparedEdit | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sides of the padded grid; volumes whose canvases agree in it can share a batch."""
        return self.placement.target

    @property
    def needs_resampling(self) -> bool:
        """Whether the result must be resampled to lie on the grid of the mask's file."""
        return self.grid is not self.target or not on_stored_grid(self.target)
