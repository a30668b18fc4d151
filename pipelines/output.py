"""What the pipeline returns."""

from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput


@dataclass
class MedVolumePipelineOutput(BaseOutput):
    """Generated volumes, mask by mask (all volumes of the first mask, then all of the second, ...).

    Attributes:
        volumes: one entry a volume, whatever the shapes. By `output_type`:
            "nifti"   nibabel images on their mask's own grid (shape, affine, orientation), in original units;
            "np"      float32 arrays (C, X, Y, Z) with the same voxels in the same axis order;
            "pt"      the same as float32 tensors on the CPU;
            "latent"  standardised latents (latent_channels, h, w, d) of the padded mask, on the model's device.
            With `paths`: the files that were written, as `Path`.
        provenance: one JSON-ready dict a volume: model hash, seed, steps, scheduler, mask; the sidecar's content.
    """

    volumes: list[Any]
    provenance: list[dict[str, Any]]
