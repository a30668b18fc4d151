"""Mask in, volume out: the pipeline for people, and what goes in and comes out of it."""

from .conditions import check_conditions
from .images import check_images, describe_images
from .loading import check_folder, register_packages, register_pipeline
from .masks import MaskLike, describe_mask
from .output import MedVolumePipelineOutput
from .pipeline import MedVolumePipeline
from .provenance import read_sidecar, sidecar_path, volume_files, write_synthetic
from .rejection import Check, Rejection, as_planned, rejection_columns
from .sampling import equal_batches
from .volume_processor import Canvas, VolumeProcessor

register_packages()
register_pipeline(MedVolumePipeline)

__all__ = [
    "Check",
    "Canvas",
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
