"""Shipped weights that a small data set may start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from files.documents import read_object

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
NAME = "hippocampus"  # one MR channel; the others' images are label maps
LAYERS = ("latent_channels", "patch_size", "channels", "strides", "encoder_blocks", "decoder_blocks")
UNET_LAYERS = ("channels", "strides", "blocks", "attention", "mask_width")
NEAR = 1.5  # ratio of voxel sizes, and of sizes in voxels, up to which images look alike


@dataclass(frozen=True)
class Weights:
    """A shipped pipeline: its folder, and what decides whether it fits.

    Attributes:
        vae, unet: the arguments that decide the layers' shapes.
        labels: of the masks that its U-Net knows.
        spacing: in mm.
        largest: voxels along each axis of its largest training volume.
    """

    folder: Path
    vae: dict[str, Any]
    unet: dict[str, Any]
    labels: int
    spacing: tuple[float, ...]
    largest: tuple[int, ...]

    def is_alike(self, kinds: Sequence[str], labels: int, spacing: Sequence[float], shapes: np.ndarray) -> bool:
        """Return whether volumes are of such a kind that the U-Net fits, too.

        That is one channel without a unit, voxels and volumes of about the same size, and as many labels.
        """
        ratios = np.abs(np.log(np.array(spacing) / np.array(self.spacing)))
        near = bool((ratios <= np.log(NEAR)).all())
        fits = bool((np.median(shapes, axis=0) <= NEAR * np.array(self.largest)).all())
        return list(kinds) == ["percentile"] and labels == self.labels and near and fits


def find_weights(folder: Path = WEIGHTS) -> Weights | None:
    """Return the shipped weights for images; None in an installation without them."""
    pipeline = folder / NAME
    if not (pipeline / "model_index.json").is_file():
        return None
    vae, unet = read_object(pipeline / "vae/config.json"), read_object(pipeline / "unet/config.json")
    data = read_object(pipeline / "model_index.json")["data"]
    return Weights(
        pipeline,
        {name: vae[name] for name in LAYERS},
        {name: unet[name] for name in UNET_LAYERS},
        unet["num_labels"],
        tuple(data["spacing"]),
        tuple(data["shape_range"][1]),
    )
