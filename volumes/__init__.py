"""Files, geometry, intensity, datasets: everything about volumes before a model sees them, and after."""

from typing import TYPE_CHECKING

from cli.lazy import lazy_exports

if TYPE_CHECKING:
    from .data.cases import Case, load_cases
    from .data.config import DataConfig, PhantomConfig
    from .data.crops import CropDataset
    from .data.dataset import VolumeDataset, describe, pad_sample
    from .figures import FigureCase, shapes_figure, slices_figure
    from .foreground import ForegroundCrop
    from .formats.dicom_out import write_dicom
    from .formats.dicom_seg_out import write_seg
    from .formats.nifti import (
        VoxelError,
        nifti_path,
        on_stored_grid,
        stored_grid,
        to_nibabel,
        to_stored_grid,
        write_volume,
    )
    from .formats.read import (
        read_mask,
        read_volume,
        volume_parts,
        volume_stem,
    )
    from .formats.slabs import read_slabs, write_slabs
    from .intensity import IntensityScaling, LinearScale
    from .labels import label_channels, label_indices, merge_channels
    from .map_checks import draw_shape, label_map_fault
    from .phantom import PHANTOM_CLASSES, PHANTOM_LABELS, make_phantom
    from .placement import Placement, pad_or_crop, pad_to_multiple
    from .resampling import resample, resample_to
    from .volume import PADDING, UNKNOWN, SourceGrid, Volume, VolumeError, describe_grid, grid_numbers, same_grid

__all__ = [
    "PADDING",
    "PHANTOM_CLASSES",
    "PHANTOM_LABELS",
    "Case",
    "CropDataset",
    "DataConfig",
    "FigureCase",
    "ForegroundCrop",
    "IntensityScaling",
    "LinearScale",
    "PhantomConfig",
    "Placement",
    "SourceGrid",
    "UNKNOWN",
    "Volume",
    "VolumeDataset",
    "VolumeError",
    "VoxelError",
    "describe",
    "describe_grid",
    "draw_shape",
    "grid_numbers",
    "label_channels",
    "label_indices",
    "load_cases",
    "make_phantom",
    "label_map_fault",
    "merge_channels",
    "nifti_path",
    "on_stored_grid",
    "pad_or_crop",
    "pad_sample",
    "pad_to_multiple",
    "read_mask",
    "read_slabs",
    "read_volume",
    "resample",
    "resample_to",
    "same_grid",
    "shapes_figure",
    "slices_figure",
    "stored_grid",
    "to_nibabel",
    "to_stored_grid",
    "volume_parts",
    "volume_stem",
    "write_dicom",
    "write_seg",
    "write_slabs",
    "write_volume",
]

__getattr__, __dir__ = lazy_exports(__name__, __file__)
