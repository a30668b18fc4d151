"""Mask in, volume out: the pipeline for people, and what goes in and comes out of it."""

import sys
from typing import TYPE_CHECKING

from cli.lazy import lazy_exports

if TYPE_CHECKING:
    from .edit_pipeline import MedVolumeEditPipeline
    from .inputs.conditions import check_conditions
    from .inputs.images import check_images, describe_images
    from .inputs.masks import MaskLike, describe_mask
    from .inputs.prepared import PreparedGrid, PreparedVolume
    from .inputs.request import VolumeRequest
    from .pipeline import MedVolumePipeline
    from .rejection import Check, Rejection
    from .sampling import SamplingConfig, equal_batches
    from .storage.loading import check_folder, register_packages
    from .storage.output import MedVolumePipelineOutput
    from .storage.provenance import (
        read_sidecar,
        sidecar_path,
        volume_files,
        write_synthetic,
    )
    from .storage.record import GenerationRecord
    from .storage.sampling_settings import SamplingSettings
    from .volume_processor import VolumeProcessor

__all__ = [
    "Check",
    "GenerationRecord",
    "MaskLike",
    "MedVolumeEditPipeline",
    "MedVolumePipeline",
    "MedVolumePipelineOutput",
    "PreparedGrid",
    "PreparedVolume",
    "Rejection",
    "SamplingConfig",
    "SamplingSettings",
    "VolumeProcessor",
    "VolumeRequest",
    "check_conditions",
    "check_folder",
    "check_images",
    "describe_images",
    "describe_mask",
    "equal_batches",
    "read_sidecar",
    "register_packages",
    "sidecar_path",
    "volume_files",
    "write_synthetic",
]

__getattr__, __dir__ = lazy_exports(__name__, __file__)

if sys.argv[:1] != ["-m"]:  # then Python is on its way to `python -m pipelines.storage.to_dicom`, which needs no model
    for name in (
        "MedVolumePipeline",
        "MedVolumeEditPipeline",
    ):  # diffusers finds them, and their components, from then on
        __getattr__(name)
