"""Mask in, volume out: the pipeline for people, and what goes in and comes out of it."""

import sys
from typing import TYPE_CHECKING

from cli.lazy import lazy_exports

if TYPE_CHECKING:
    from .inputs.conditions import check_conditions
    from .inputs.images import check_images, describe_images
    from .inputs.masks import MaskLike, describe_mask
    from .pipeline import MedVolumePipeline
    from .rejection import Check, Rejection, as_planned, rejection_columns
    from .sampling import equal_batches
    from .storage.loading import check_folder, register_packages
    from .storage.output import MedVolumePipelineOutput
    from .storage.provenance import (
        read_sidecar,
        sidecar_path,
        volume_files,
        write_synthetic,
    )
    from .volume_processor import PreparedVolume, VolumeProcessor

__all__ = [
    "Check",
    "PreparedVolume",
    "MaskLike",
    "MedVolumePipeline",
    "MedVolumePipelineOutput",
    "Rejection",
    "VolumeProcessor",
    "as_planned",
    "check_conditions",
    "check_folder",
    "check_images",
    "describe_images",
    "describe_mask",
    "equal_batches",
    "read_sidecar",
    "register_packages",
    "rejection_columns",
    "sidecar_path",
    "volume_files",
    "write_synthetic",
]

__getattr__, __dir__ = lazy_exports(__name__, __file__)

if sys.argv[:1] != ["-m"]:  # then Python is on its way to `python -m pipelines.storage.to_dicom`, which needs no model
    __getattr__("MedVolumePipeline")  # diffusers finds it, and its components, from then on
