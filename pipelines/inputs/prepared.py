"""Requests that were read and checked: the grid of a volume with its mask and images, and everything that its
generation needs.

Axes: (C, X, Y, Z) in RAS+ order.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipelines.storage.record import GenerationRecord
from volumes import Placement, Volume, on_stored_grid

from .crop import Cropped
from .images import GivenImage
from .inpainting import PreparedEdit
from .request import VolumeRequest

if TYPE_CHECKING:  # it imports this module
    from pipelines.sampling import SamplingConfig


@dataclass(frozen=True, eq=False)
class PreparedGrid:
    """The grid of a volume, with the mask, the images and the edit that lie on it.

    Attributes:
        grid: shape (X, Y, Z) and affine in the model's spacing, before padding; its array is the label indices or
            zeros.
        target: the grid of the output: the mask's own, or that of the images; with a crop, its box of that grid.
        placement: pads `grid` to a multiple of the autoencoder's stride, and takes the padding off again.
        labels: label indices (X, Y, Z) int16 of the padded grid, PADDING outside the field of view; None without a
            mask.
        images: the channels that condition the others.
        edit: the image that is changed, if there is one.
        resampled: the fraction of the target that each image shows which lay on another grid, see
            `DataDescription.resample_to`. What one of them does not show is PADDING in `grid` and `target`.
        cropped: what the target was cut from, see `DataDescription.crop`; None if nothing was cut.
    """

    grid: Volume
    target: Volume
    placement: Placement
    labels: np.ndarray | None
    images: Mapping[str, GivenImage] = field(default_factory=dict)
    edit: PreparedEdit | None = None
    resampled: Mapping[str, float] = field(default_factory=dict)
    cropped: Cropped | None = None

    @property
    def output(self) -> Volume:
        """The grid of the output: `target`, or what it was cut from."""
        return self.target if self.cropped is None else self.cropped.whole

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sides of the padded grid; volumes that agree in it can share a batch."""
        return self.placement.target

    @property
    def held_bytes(self) -> int:
        """Memory that the voxels take."""
        volumes = {id(volume): volume for volume in (self.grid, self.target, self.output)}
        # the zeros of a shape take none
        labels = 0 if self.labels is None else self.labels.nbytes + sum(one.array.nbytes for one in volumes.values())
        images = [image.volume.array for image in self.images.values()]
        if self.edit is not None:
            images += [image.volume.array for image in self.edit.images.values()]
            images += [*self.edit.originals.values(), *([] if self.edit.region is None else [self.edit.region])]
        images += [] if self.cropped is None else [image.array for image in self.cropped.images.values()]
        return labels + sum(array.nbytes for array in {id(array): array for array in images}.values())

    @property
    def needs_resampling(self) -> bool:
        """Whether the result must be resampled to lie on the grid of the mask's file."""
        return self.grid is not self.target or not on_stored_grid(self.output)


@dataclass(frozen=True, eq=False)
class PreparedVolume:
    """One request, prepared: all that the generation of a volume needs except a seed.

    Attributes:
        grid: shared by the requests of the same files.
        classes, numbers: conditions of the volume, as the model names them.
        sampling: the sampling settings, as in the record.
        record: the record, without a seed.
    """

    request: VolumeRequest
    grid: PreparedGrid
    classes: Mapping[str, str]
    numbers: Mapping[str, float]
    sampling: "SamplingConfig"
    record: GenerationRecord

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sides of the padded grid."""
        return self.grid.shape

    @property
    def condition_names(self) -> set[str]:
        """The conditions that the volume has."""
        mask = set() if self.grid.labels is None else {"mask"}
        return {*self.classes, *self.numbers, *self.request.images, *mask}


@dataclass(frozen=True)
class EncodedGrid:
    """The latents of a grid's images.

    Attributes:
        condition: the U-Net's "image" (1, k, h, w, d); None for a model without image conditions.
    """

    condition: torch.Tensor | None
