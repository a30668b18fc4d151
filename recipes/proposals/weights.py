"""Shipped weights that a small data set may start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from files.documents import read_object
from files.shipped import PREFIX, WEIGHTS
from volumes.data.preprocessing import SAME_SPACING

NAME = "hippocampus"  # that are proposed: one MR channel
LAYERS = ("latent_channels", "patch_size", "channels", "strides", "encoder_blocks", "decoder_blocks")
UNET_LAYERS = ("channels", "strides", "blocks", "attention", "mask_width")
NEAR = 1.5  # ratio of voxel sizes, and of sizes in voxels, up to which images look alike


@dataclass(frozen=True)
class Weights:
    """A shipped pipeline: its folder, and what decides whether it fits.

    Attributes:
        vae, unet: the arguments that decide the layers' shapes.
        labels: {value: name} of the masks that its U-Net knows, with the background.
        spacing: in mm.
        smallest, largest: fewest and most voxels of its training volumes along each axis.
    """

    folder: Path
    vae: dict[str, Any]
    unet: dict[str, Any]
    labels: dict[int, str]
    spacing: tuple[float, ...]
    smallest: tuple[int, ...]
    largest: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name of the pipeline."""
        return self.folder.name

    @property
    def shipped_name(self) -> str:
        """The name of its folder, which holds on every machine."""
        return f"{PREFIX}{self.name}"

    def part(self, name: str) -> str:
        """Return the name of the folder of its `vae` or `unet`, which holds on every machine."""
        return f"{self.shipped_name}/{name}"

    @property
    def described(self) -> str:
        """What its U-Net knows, in words."""
        spacing = " x ".join(f"{mm:g}" for mm in self.spacing)
        return f"one channel without a unit, {len(self.labels) - 1} labels, voxels of about {spacing} mm"

    def misfits(
        self, kinds: Sequence[str], labels: int, spacing: Sequence[float], shapes: np.ndarray, exactly: bool = False
    ) -> list[str]:
        """Return why volumes are of another kind than those that the U-Net knows; empty if it fits.

        Args:
            kinds: of the channels' intensity scaling.
            labels: of the masks, with the background.
            spacing: mm as the model would see it.
            shapes: (n, 3) voxels at that spacing.
            exactly: the spacing stays as it is; else volumes can be resampled to that of the weights.
        """
        found = []
        if list(kinds) != ["percentile"]:
            found.append(f"it knows one channel without a unit, the images have {len(kinds)} ({', '.join(kinds)})")
        if labels != len(self.labels):
            found.append(f"it knows {len(self.labels) - 1} labels, the masks have {max(labels - 1, 0)}")
        ratios, most = np.array(spacing) / np.array(self.spacing), 1 + SAME_SPACING if exactly else NEAR
        if (np.abs(np.log(ratios)) > np.log(most)).any():
            told = (" x ".join(f"{mm:.3g}" for mm in one) for one in (self.spacing, spacing))
            found.append("it knows voxels of {} mm, these are {}".format(*told))
        else:
            sides = np.median(shapes, axis=0) * ratios
            if (sides > NEAR * np.array(self.largest)).any() or (NEAR * sides < np.array(self.smallest)).any():
                ends = (" x ".join(f"{side:.0f}" for side in one) for one in (self.smallest, self.largest, sides))
                found.append("it knows volumes of {} to {} voxels, the median here is {}".format(*ends))
        return found

    def paired(self, labels: Sequence[str]) -> str:
        """Return which of its labels stands for which of these names, in the order of their values, for messages.

        Args:
            labels: of the masks, with the background; as many as its U-Net knows.
        """
        own = [self.labels[value] for value in sorted(self.labels)]
        pairs = [f"{ours} for {theirs}" for ours, theirs in zip(own[1:], labels[1:], strict=True)]
        return "anatomy was not compared" + (f", and its labels stand {', '.join(pairs)}" if pairs else "")


def find_weights(name: str = NAME, folder: Path = WEIGHTS) -> Weights | None:
    """Return shipped weights for images; None in an installation without them, and for those of label maps."""
    pipeline = folder / name
    if name not in image_weights(folder):
        return None
    vae, unet = read_object(pipeline / "vae/config.json"), read_object(pipeline / "unet/config.json")
    data = read_object(pipeline / "model_index.json")["data"]
    return Weights(
        pipeline,
        {name: vae[name] for name in LAYERS},
        {name: unet[name] for name in UNET_LAYERS},
        {int(value): label for value, label in data["labels"].items()},
        tuple(data["spacing"]),
        tuple(data["shape_range"][0]),
        tuple(data["shape_range"][1]),
    )


def image_weights(folder: Path = WEIGHTS) -> list[str]:
    """Return the names of the shipped pipelines that generate images of one channel, not label maps."""
    indices = sorted(folder.glob("*/model_index.json"))
    described = {path.parent.name: read_object(path)["data"] for path in indices}
    return [name for name, data in described.items() if not data["image_labels"] and len(data["channels"]) == 1]
