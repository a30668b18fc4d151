"""Is this volume a copy of one that the model learned from? Asked while generating, without the training scans at hand.

A `CopyCheck` holds a fingerprint of each training volume: the means of blocks of `block` voxels in a crop about the centre.

What fingerprints reveal: each is a blurred scan. Coarse anatomy can be seen in it (at 4 voxels a block, 1/64 of the numbers), whoever has a
patient's scan can tell whether it was in the training set (that is what the check does), and two fingerprints of one patient can be
matched. They leave out fine texture and everything outside the crop, and nothing more. So they are personal data wherever the scans are:
publish them only with scans that are public. With blocks of 1 voxel they are the scans, and are not written to files.

What they cannot tell apart: volumes that agree in all but fine detail. Set the threshold by `calibrated`, on unseen real volumes.
"""

import dataclasses
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from volumes import pad_or_crop

from .neighbours import Sides, Space, Volumes, crop_of, standardised
from .privacy import Units, conformal_threshold

FORMAT = "medvolume copy check 1"


class CopyFound(NamedTuple):
    """Whether a volume is a copy, of the fingerprint with which number, and how alike they are (correlation)."""

    copy: bool
    similarity: float
    index: int


@dataclass(frozen=True)
class CopyCheck:
    """Fingerprints (R, C, h, w, d) of training volumes, standardised; and how volumes are compared with them.

    A volume is moved by up to `shift` voxels along each axis and mirrored along every combination of `flips`, so that a copy moved by
    whole voxels is found as one that was not, if it extends `shift` voxels beyond the crop; elsewhere its edge is repeated.
    `threshold`: similarity above which a volume is a copy.
    """

    fingerprints: Tensor
    crop: Sides
    block: int = 4
    flips: tuple[int, ...] = ()
    shift: int = 2
    threshold: float = 1.0

    @classmethod
    def of(
        cls, volumes: Volumes, crop: Sides, *, block: int = 4, flips: tuple[int, ...] = (), shift: int = 2
    ) -> "CopyCheck":
        """Of training volumes (C, X, Y, Z). Raises: ValueError for a crop that is no multiple of the block."""
        if any(side % block for side in crop):
            raise ValueError(f"crop {crop}: each side must be a multiple of the block, {block} voxels")
        prints = [_blocks(torch.from_numpy(crop_of(volume, crop)), block) for volume in volumes]
        maps = torch.stack([torch.from_numpy(standardised(one.numpy())) for one in prints])
        return cls(maps, crop, block, flips, shift)

    def calibrated(self, unseen: Volumes, units: Units, alpha: float = 0.05) -> "CopyCheck":
        """With the threshold that one in 1 / alpha unseen real subjects exceeds (`conformal_threshold`)."""
        scores = np.array([self.check(volume).similarity for volume in unseen])
        return dataclasses.replace(self, threshold=conformal_threshold(scores, units, alpha))

    def check(self, volume: Any) -> CopyFound:
        """Whether the volume (C, X, Y, Z) is a copy. Raises: ValueError for another number of channels."""
        placed = self._placements(volume)
        if placed.shape[1] != self.fingerprints.shape[1]:
            raise ValueError(
                f"a volume of {placed.shape[1]} channels, against {self.fingerprints.shape[1]} of the fingerprints"
            )
        ours, theirs = placed.flatten(2), self.fingerprints.flatten(2)
        products = torch.einsum("pcn,rcn->pcr", ours, theirs) / ours.shape[2]
        varies = (ours.any(2)[:, :, None] & theirs.any(2).T[None]).float()  # constant channels say nothing
        similarity = (products.sum(1) / varies.sum(1).clamp_min(1)).amax(0).clamp(-1, 1)
        nearest = int(similarity.argmax())
        return CopyFound(bool(similarity[nearest] > self.threshold), float(similarity[nearest]), nearest)

    def _placements(self, volume: Any) -> Tensor:
        """Standardised blocks (P, C, h, w, d) of the volume in every placement."""
        array = np.asarray(volume.detach().cpu() if isinstance(volume, Tensor) else volume)
        array = array[None] if array.ndim == 3 else array
        held = tuple(min(n, side + 2 * self.shift) for n, side in zip(array.shape[1:], self.crop, strict=True))
        wide = tuple(side + 2 * self.shift for side in self.crop)
        within = crop_of(array, held)  # type: ignore[arg-type]
        start = pad_or_crop(held, wide).start
        edges = [(-low, target - side + low) for low, side, target in zip(start, held, wide, strict=True)]
        within = torch.from_numpy(np.pad(within, [(0, 0), *edges], mode="edge"))
        pieces = []
        for axes in Space(self.crop, self.flips).flip_sets:
            means = F.avg_pool3d(within.flip([axis + 1 for axis in axes])[None], self.block, stride=1)[0]
            for place in itertools.product(range(2 * self.shift + 1), repeat=3):
                window = [
                    slice(low, low + side - self.block + 1, self.block)
                    for low, side in zip(place, self.crop, strict=True)
                ]
                pieces.append(means[:, window[0], window[1], window[2]])
        return torch.from_numpy(standardised(torch.stack(pieces).flatten(0, 1).numpy())).unflatten(0, (len(pieces), -1))

    def save(self, path: str | Path) -> None:
        """Write the fingerprints in half precision, as safetensors. Read first what they reveal: see this file's head.

        Raises: ValueError for blocks of one voxel, which would be the scans themselves.
        """
        if self.block < 2:
            raise ValueError("fingerprints of single voxels are the scans; take a larger block")
        entries = {name: getattr(self, name) for name in ("crop", "block", "flips", "shift", "threshold")}
        save_file(
            {"fingerprints": self.fingerprints.half().contiguous()},
            path,
            {"format": FORMAT, "settings": json.dumps(entries)},
        )

    @classmethod
    def load(cls, path: str | Path) -> "CopyCheck":
        """Read what `save` wrote. Raises: ValueError for another file."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path}: holds no fingerprints of training volumes ({FORMAT!r}); make it with CopyCheck.save"
                )
            settings = json.loads(metadata["settings"])
            fingerprints = file.get_tensor("fingerprints").float()
        settings |= {"crop": tuple(settings["crop"]), "flips": tuple(settings["flips"])}
        return cls(fingerprints, **settings)


def _blocks(volume: Tensor, block: int) -> Tensor:
    """(C, X, Y, Z) -> means of its blocks."""
    return F.avg_pool3d(volume[None], block)[0]
