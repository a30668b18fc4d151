"""Read volumes from files of any supported kind, by their names: NIfTI, DICOM series (folders), NRRD and MetaImage.

A file that cannot be read reliably is refused with a `VolumeError` that names it and says why; nothing is guessed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Pair
from nibabel.orientations import apply_orientation, io_orientation

from files.names import nfc
from volumes.volume import SourceGrid, Volume, VolumeError

from . import metaimage, nrrd
from .carriers import carries_geometry, read_carrier
from .contents import check_content
from .dicom import is_dicom, is_series, read_dicom, segmentation_kind, series_files
from .dicom_seg import read_seg
from .nifti import NIFTI_SUFFIXES, canonical_grid, exact_values, read_nifti
from .raw import AXES, UNITS, RawVolume, refuse_special_volume
from .rtstruct import read_rtstruct

Readable = str | os.PathLike | Any  # an image in memory, see `carriers`

READERS = {
    ".nrrd": nrrd.read_nrrd,
    ".nhdr": nrrd.read_nrrd,
    ".mha": metaimage.read_metaimage,
    ".mhd": metaimage.read_metaimage,
    ".dcm": read_dicom,
}
SUFFIXES = (*NIFTI_SUFFIXES, *READERS)  # longest first where one ends in another
WHOLE_NUMBER_TOLERANCE = 1e-4


def read_volume(
    source: Readable,
    *,
    time_point: int | None = None,
    exact: bool = False,
    units: str | None = None,
    axes: str | None = None,
) -> Volume:
    """Read a scalar image as float32 (C, X, Y, Z), in RAS+ order, in the file's units: slope and intercept applied.

    A 3-D file has one channel; the fourth axis of a 4-D file becomes the channels, or `time_point` picks one of them.
    With `exact`, the type is one of NIfTI's that holds the same values: the file's own integers, float32, or float64.

    Args:
        source: a NIfTI, NRRD or MetaImage file, the folder of a DICOM series, or an image in memory that carries its
            geometry: of nibabel, SimpleITK or torchio, or a MetaTensor of MONAI.
        units: the unit of lengths in the file's header, if the header is wrong: "mm", "cm", "m" or "um".
        axes: "CXYZ" for NIfTI whose channels come first, "XYZC" for a file that only looks like that.

    Raises: VolumeError for files that are broken, truncated, in color, complex, sheared, or hold values that are not
    finite, and for unsupported kinds of files.
    """
    stored = read_stored(source, units=units, axes=axes)
    values = stored.values
    if time_point is not None:
        if not 0 <= time_point < values.shape[3]:
            raise VolumeError(
                f"{stored.name}: has no time point {time_point}; it holds {values.shape[3]}, counted from 0"
            )
        values = values[..., time_point : time_point + 1]
    with np.errstate(over="ignore"):  # what exceeds float32 becomes infinite and is refused below
        array = values.astype(np.float32)
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise VolumeError(
            f"{stored.name}: {bad} of {array.size} values are not finite (NaN or infinite); replace them first"
        )
    return _canonical(exact_values(values) if exact else array, stored.grid)


def read_mask(
    source: Readable,
    *,
    units: str | None = None,
    axes: str | None = None,
    names: Mapping[str | int, int] | None = None,
    like: Volume | None = None,
) -> Volume:
    """Read a label map as int16 (1, X, Y, Z), in RAS+ order, from anything that `read_volume` reads, and from DICOM-SEG
    and RTSTRUCT. Float files are fine if they hold whole numbers.

    Args:
        source: see `read_volume`; also the file of a SEG or RTSTRUCT, or the folder that holds one.
        units, axes: see `read_volume`.
        names: of SEG and RTSTRUCT, the label value of each segment, by its name or number; segments that it does not
            name are left out. None reads all, by their numbers.
        like: of SEG and RTSTRUCT, the image that they were drawn on; without it, they lie on the grid of the series
            that they name, see `segments.grid_for`.

    Raises: VolumeError as `read_volume`, for values that are not labels, and see `read_seg` and `read_rtstruct`.
    """
    if (drawn := segmentation_file(source)) is not None:
        return _read_segmentation(*drawn, names, like, units)
    stored = read_stored(source, units=units, axes=axes)
    name, values = stored.name, stored.values
    if values.shape[3] != 1:
        raise VolumeError(f"{name}: a mask is one label map, this file holds {values.shape[3]}; merge them into one")
    if not np.isfinite(values).all():
        raise VolumeError(f"{name}: the mask holds values that are not finite")
    labels = values if values.dtype.kind in "biu" else np.rint(values)
    if labels is not values and np.abs(values - labels).max() > WHOLE_NUMBER_TOLERANCE:
        worst = float(values.flat[np.abs(values - labels).argmax()])
        raise VolumeError(
            f"{name}: the mask holds {worst:.6g}, which is not a whole number; is it an image or a probability map?"
        )
    limits = np.iinfo(np.int16)
    if labels.min() < limits.min or labels.max() > limits.max:
        raise VolumeError(f"{name}: labels run from {labels.min():.0f} to {labels.max():.0f}; only int16 is supported")
    return _canonical(labels.astype(np.int16), stored.grid)


def read_stored(source: Readable, *, units: str | None = None, axes: str | None = None) -> RawVolume:
    """Read the voxels of a file as stored, and their grid. Raises: VolumeError as `read_volume`."""
    for what, value, known in (("units", units, tuple(UNITS)), ("axes", axes, AXES)):
        if value is not None and value not in known:
            raise VolumeError(f"{what} {value!r}: expected one of {', '.join(known)}, or None")
    if isinstance(source, Nifti1Pair):
        return read_nifti(source, units=units, axes=axes)
    if carries_geometry(source):
        if units is not None or axes is not None:
            raise VolumeError(
                f"units and axes are for files; change the geometry of the {type(source).__name__} itself"
            )
        return read_carrier(source)
    if not isinstance(source, str | os.PathLike):
        raise VolumeError(
            "expected a path, or an image that carries its geometry (of nibabel, SimpleITK or torchio, or a "
            f"MetaTensor); got {type(source).__name__}"
        )
    if isinstance(os.fspath(source), bytes):
        raise VolumeError(f"a path is text, {os.fspath(source)!r} is bytes; give os.fsdecode(path)")
    path = Path(os.path.expanduser(source))
    try:
        if not path.exists():
            raise VolumeError(f"{path}: no such file")
        refuse_special_volume(path)
        if path.is_dir():
            return read_dicom(path, units)
        if is_nifti(path):
            return read_nifti(path, units=units, axes=axes)
        check_content(path)
        reader = READERS.get(path.suffix.lower(), read_dicom if is_dicom(path) else None)
        if reader is None:
            raise VolumeError(
                f"{path}: is not of a supported kind; supported are {', '.join(SUFFIXES)}, and DICOM folders"
            )
        return reader(path, units)
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise VolumeError(f"{path}: does not fit into the memory of this process") from error


def segmentation_file(source: Readable) -> tuple[Path, str] | None:
    """Find the file of a DICOM-SEG or RTSTRUCT, or the one in a folder, and its kind; None for all else.

    Raises: VolumeError for a folder that holds several.
    """
    if not isinstance(source, str | os.PathLike) or isinstance(os.fspath(source), bytes):
        return None
    path = Path(os.path.expanduser(source))
    refuse_special_volume(path)
    try:
        if not path.is_dir():
            known = is_nifti(path) or path.suffix.lower() in set(READERS) - {".dcm"}
            kind = segmentation_kind(path) if path.is_file() and not known else None
            return None if kind is None else (path, kind)
        kinds = {file: kind for file in series_files(path) if (kind := segmentation_kind(file)) is not None}
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(kinds) > 1:
        names = ", ".join(f"{file.name} ({kind})" for file, kind in kinds.items())
        raise VolumeError(f"{path}: holds {len(kinds)} segmentation objects, {names}; give the file of one")
    return next(iter(kinds.items()), None)


def _read_segmentation(
    path: Path, kind: str, names: Mapping[str | int, int] | None, like: Volume | None, units: str | None
) -> Volume:
    if units is not None and units not in UNITS:
        raise VolumeError(f"units {units!r}: expected one of {', '.join(UNITS)}, or None")
    readers = {"SEG": read_seg, "RTSTRUCT": read_rtstruct}
    if kind not in readers:
        raise VolumeError(f"{path}: holds surfaces, not voxels; save it as DICOM-SEG with binary segments, or as NIfTI")
    try:
        return readers[kind](path, names, like, units)
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise VolumeError(f"{path}: does not fit into the memory of this process") from error


def is_nifti(path: str | os.PathLike) -> bool:
    """Return whether a path has the name of a NIfTI file."""
    return str(path).lower().endswith(NIFTI_SUFFIXES)


def is_volume(path: Path) -> bool:
    """Return whether there is a file or folder that may hold a volume: any file, and folders of DICOM files.

    Raises: VolumeError for a pipe, socket or device, which would keep its reader waiting.
    """
    refuse_special_volume(path)
    return path.is_file() or is_series(path)


def is_volume_name(name: str) -> bool:
    """Return whether a file is named as a volume is, and not hidden (as macOS's `._a.nii.gz`).

    An .img file counts as part of its .hdr; .dcm is a slice.
    """
    lower = name.lower()
    return lower.endswith(SUFFIXES) and not lower.startswith(".") and not lower.endswith((".dcm", ".img", ".img.gz"))


def volume_stem(path: str | os.PathLike) -> str:
    """Return the name of a volume's file without its suffix (.nii.gz, .nrrd, ...), in NFC; for DICOM that of the
    folder.
    """
    name = nfc(Path(path).name)
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def volume_parts(path: str | os.PathLike) -> list[Path]:
    """List all files that make up one volume: itself, header and voxels if they are two, or the slices of a series."""
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        return series_files(path)
    if half := re.fullmatch(r"(.*)\.(hdr|img)(\.gz)?", path.name, re.IGNORECASE):
        parts = ("HDR", "IMG") if half[2].isupper() else ("hdr", "img")  # as nibabel finds the other one
        return [path.with_name(f"{half[1]}.{part}{half[3] or ''}") for part in parts]
    suffix = path.suffix.lower()
    detached = {".nhdr": nrrd.detached_file, ".nrrd": nrrd.detached_file, ".mhd": metaimage.detached_file}.get(suffix)
    voxels = detached(path) if detached else None
    return [path] if voxels is None else [path, voxels]


def _canonical(values: np.ndarray, grid: SourceGrid) -> Volume:
    """Convert voxels (I, J, K, C) in the order of the file to a Volume in RAS+."""
    array = apply_orientation(values, io_orientation(grid.affine))
    return Volume(np.ascontiguousarray(np.moveaxis(array, -1, 0)), canonical_grid(grid)[1], grid)
