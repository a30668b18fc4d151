"""DICOM series to volumes: a folder of slices, ordered and placed by their own positions, in rescaled units (HU for
CT).

Names, instance numbers and slice thickness are never used for geometry: they are wrong too often. Anything but a
regular stack of slices is refused with a VolumeError that names the reason; nothing is resampled silently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.filereader import read_file_meta_info
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    RTStructureSetStorage,
    SegmentationStorage,
    SurfaceSegmentationStorage,
)

from files.paths import open_regular
from volumes.volume import SourceGrid, VolumeError

from .raw import (
    LPS_TO_RAS,
    RawVolume,
    check_room,
    make_grid,
    refuse_special_volume,
)

UNCOMPRESSED = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
LABEL_MAP_SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.7"  # pydicom 3.0 does not have it yet
SEGMENTATIONS = {
    SegmentationStorage: "SEG",
    LABEL_MAP_SEGMENTATION: "SEG",
    RTStructureSetStorage: "RTSTRUCT",
    SurfaceSegmentationStorage: "surface",
}
RLE_RATIO = 64  # at most: two bytes stand for up to 128
OTHER_FILES = (".txt", ".json", ".xml", ".csv", ".md", ".pdf", ".html", ".ini", ".db")  # may lie beside the slices
LOOKED_AT = 8  # files, to tell whether a folder holds a series
IRREGULAR = 0.05  # voxels that a slice may be off its place in a regular stack: positions are rounded in files
TAGS = [
    "ImageType",
    "Modality",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelSpacing",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
]
SIZE_TAGS = ["Rows", "Columns", "NumberOfFrames", "PixelSpacing", "SpacingBetweenSlices", "SliceThickness"]


@dataclass(frozen=True)
class Slice:
    """The header of a slice, without its pixels. Lengths in mm, LPS."""

    path: Path
    series: str
    frame: str | None  # of reference
    shape: tuple[int, int]  # columns, rows
    spacing: tuple[float, float]  # between columns, between rows
    axes: tuple[float, ...]  # direction along a row, and along a column
    position: tuple[float, ...]  # of the center of the first pixel
    slope: float
    intercept: float
    bytes_a_pixel: int


def read_dicom(path: Path, units: str | None = None) -> RawVolume:
    """Read the volume of a folder that holds one DICOM series (subfolders do not count). Voxels are (column, row,
    slice).

    Lengths are in mm, or in `units` if the slices are wrong.

    Raises: VolumeError unless it is a regular stack of scalar slices: several series, localizers, multi-frame and color
    images, compression other than RLE, missing or unevenly spaced slices, several at one place, a tilted gantry,
    truncated files, files that are not DICOM.
    """
    ordered, grid = _read_headers(path, units)
    plain = all(one.slope == 1 and one.intercept == 0 for one in ordered)
    check_room(str(path), grid.shape, ordered[0].bytes_a_pixel)
    pixels = [_read_pixels(one, rescale=not plain) for one in ordered]
    return RawVolume(str(path), np.stack(pixels, axis=-1)[..., None], grid)


def series_grid(path: Path, units: str | None = None) -> SourceGrid:
    """Read the grid of a series from the headers of its slices alone. Raises: VolumeError as `read_dicom`."""
    return _read_headers(path, units)[1]


def series_size(path: Path) -> tuple[int, float]:
    """Return about how many voxels a series has, and the mm^3 of one, from the header of its first file and the number
    of its files. Raises: VolumeError for a file that is not DICOM.
    """
    files = [file for file in series_files(path) if is_dicom(file)]
    if not files:
        return 0, 0.0
    try:
        header = pydicom.dcmread(files[0], stop_before_pixels=True, specific_tags=SIZE_TAGS)
        pixels = int(header.get("Rows") or 0) * int(header.get("Columns") or 0) * int(header.get("NumberOfFrames") or 1)
        row, column = map(float, header.get("PixelSpacing") or (0.0, 0.0))
        apart = float(header.get("SpacingBetweenSlices") or header.get("SliceThickness") or 0.0)
    except Exception as error:  # of many kinds, see `_read_slice`
        raise VolumeError(f"{files[0]}: cannot be read as DICOM: {type(error).__name__}: {error}") from error
    return len(files) * pixels, row * column * apart


def _read_headers(path: Path, units: str | None) -> tuple[list[Slice], SourceGrid]:
    """Read the slices of a series in the order of their positions, and their grid (column, row, slice). Segmentation
    objects in its folder are passed over.
    """
    files = series_files(path) if path.is_dir() else [path]
    if path.is_dir() and not any(map(is_dicom, files)):
        raise VolumeError(f"{path}: is a folder without DICOM files; give a volume's file, or the folder of its series")
    images = [file for file in files if segmentation_kind(file) is None]
    if not images:
        raise VolumeError(
            f"{files[0]}: is a DICOM {segmentation_kind(files[0])} object, not an image; read it as a mask (read_mask, "
            "data.masks, mask=)"
        )
    slices = [_read_slice(file) for file in images]
    _check_one_series(path, slices)
    ordered, affine = stack(path, slices)
    shape = (*slices[0].shape, len(ordered))
    return ordered, make_grid(str(path), shape, affine, units=units, frame=slices[0].frame)


def is_series(path: Path) -> bool:
    """Return whether a folder holds DICOM files."""
    return path.is_dir() and any(is_dicom(file) for file in series_files(path)[:LOOKED_AT])


def series_files(folder: Path) -> list[Path]:
    """List the files of a series: all in the folder, except hidden ones, its index (DICOMDIR) and notes beside it.

    Raises: VolumeError for a pipe, socket or device among them.
    """
    files = sorted(
        file
        for file in folder.iterdir()
        if not file.name.startswith(".")
        and file.name.upper() != "DICOMDIR"
        and file.suffix.lower() not in OTHER_FILES
        and not file.is_dir()
    )
    for file in files:
        refuse_special_volume(file)
    return [file for file in files if file.is_file()]


def is_dicom(path: Path) -> bool:
    """Return whether a file begins as DICOM does. Old files without a preamble do not, and are refused."""
    with open_regular(path) as file:
        return file.read(132)[128:] == b"DICM"


def segmentation_kind(path: Path) -> str | None:
    """Return SEG, RTSTRUCT or surface if a file says that it is such an object; None for all others."""
    if not is_dicom(path):
        return None
    try:
        return SEGMENTATIONS.get(read_file_meta_info(path).get("MediaStorageSOPClassUID"))
    except Exception:  # of many kinds: what it is, its reader finds out
        return None


def check_syntax(path: Path) -> bool:
    """Return whether a file is compressed (RLE). Raises: VolumeError for other compressions, in which a bomb could
    hide, and for what is not DICOM.
    """
    if not is_dicom(path):
        raise VolumeError(f"{path}: is not a DICOM file; move it out of the folder of the series, or fetch it again")
    syntax = read_file_meta_info(path).get("TransferSyntaxUID")
    if syntax not in (*UNCOMPRESSED, RLELossless):
        named = getattr(syntax, "name", None) or "an unknown transfer syntax"
        raise VolumeError(f"{path}: is stored as {named}; decompress it first (gdcmconv --raw, dcmdjpeg)")
    return syntax == RLELossless


def _read_slice(path: Path) -> Slice:
    """Read the header of one file. pydicom raises errors of many kinds on damaged files; all mean that it cannot be
    read.
    """
    try:
        compressed = check_syntax(path)
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS)
        _check_kind(path, header)
        return _described(path, header, compressed=compressed)
    except VolumeError:
        raise
    except Exception as error:
        raise VolumeError(f"{path}: cannot be read as DICOM: {type(error).__name__}: {error}") from error


def _check_kind(path: Path, header: Any) -> None:
    if header.get("Rows") is None or header.get("Columns") is None:
        raise VolumeError(f"{path}: holds no image (modality {header.get('Modality', 'unknown')}); remove it")
    if int(header.get("NumberOfFrames") or 1) != 1:
        raise VolumeError(
            f"{path}: holds {header.NumberOfFrames} frames (an enhanced or multi-frame object); convert it to NIfTI "
            "(dcm2niix), or to one file per slice"
        )
    if "LOCALIZER" in (header.get("ImageType") or []):
        raise VolumeError(f"{path}: is a localizer, not a slice of a volume; remove it from the folder")
    if int(header.get("SamplesPerPixel", 1)) != 1 or "MONOCHROME" not in str(header.get("PhotometricInterpretation")):
        raise VolumeError(
            f"{path}: is a color image ({header.get('PhotometricInterpretation')}); only scalar images are supported"
        )
    if header.PhotometricInterpretation == "MONOCHROME1":
        raise VolumeError(
            f"{path}: is MONOCHROME1 (its low values are meant to look bright), which some readers invert and others "
            "do not; convert the series to MONOCHROME2 or NIfTI, and look which of the two it is"
        )
    if header.get("HighBit", header.BitsStored - 1) != header.BitsStored - 1:
        raise VolumeError(
            f"{path}: its pixels do not end at the lowest bit (HighBit {header.HighBit}, BitsStored "
            f"{header.BitsStored}), which is not supported; convert it first (dcm2niix)"
        )
    if header.get("ModalityLUTSequence"):
        raise VolumeError(f"{path}: gives its units by a table (ModalityLUTSequence), which is not supported")


def _described(path: Path, header: Any, *, compressed: bool) -> Slice:
    if absent := [
        tag for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing") if not header.get(tag)
    ]:
        raise VolumeError(f"{path}: has no {' and no '.join(absent)}, so it is unknown where it lies in the patient")
    axes = _floats(path, header, "ImageOrientationPatient", 6)
    spacing = _floats(path, header, "PixelSpacing", 2)  # between rows, between columns
    along_row, along_column = np.array(axes[:3]), np.array(axes[3:])
    lengths = np.linalg.norm(along_row), np.linalg.norm(along_column)
    if max(abs(length - 1) for length in lengths) > 1e-2 or min(spacing) <= 0:
        raise VolumeError(f"{path}: its geometry is broken: orientation {axes}, pixel spacing {spacing}")
    bits, rows, columns = int(header.BitsAllocated), int(header.Rows), int(header.Columns)
    if bits not in (8, 16, 32):
        raise VolumeError(f"{path}: has {bits} bits per pixel; 8, 16 and 32 are supported")
    promised, there = rows * columns * bits // 8, path.stat().st_size * (RLE_RATIO if compressed else 1)
    if not 0 < promised <= there:
        raise VolumeError(
            f"{path}: says {columns} x {rows} pixels of {bits} bits, more than it can hold; it is truncated"
        )
    slope, intercept = (
        _floats(path, header, tag, 1)[0] if header.get(tag) is not None else default
        for tag, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
    )
    if slope == 0:
        raise VolumeError(f"{path}: its RescaleSlope is 0")
    return Slice(
        path=path,
        series=str(header.get("SeriesInstanceUID")),
        frame=str(header.FrameOfReferenceUID) if header.get("FrameOfReferenceUID") else None,
        shape=(columns, rows),
        spacing=(spacing[1], spacing[0]),
        axes=axes,
        position=_floats(path, header, "ImagePositionPatient", 3),
        slope=slope,
        intercept=intercept,
        bytes_a_pixel=bits // 8,
    )


def _floats(path: Path, header: Any, tag: str, count: int) -> tuple[float, ...]:
    value = header[tag].value
    values = tuple(float(one) for one in (value if count > 1 else [value]))
    if len(values) != count or not np.isfinite(values).all():
        raise VolumeError(f"{path}: its {tag} is {values}; expected {count} finite numbers")
    return values


def _check_one_series(path: Path, slices: Sequence[Slice]) -> None:
    """Raise VolumeError if these are slices of several volumes, or too few."""
    series = Counter(one.series for one in slices)
    if len(series) > 1:
        found = ", ".join(f"{count} files of {uid}" for uid, count in series.most_common(3))
        raise VolumeError(f"{path}: mixes {len(series)} series ({found}); give each a folder of its own")
    if len(slices) < 2:
        raise VolumeError(f"{path}: is one slice; a volume needs two or more, give the folder of the whole series")
    first = slices[0]
    for one in slices[1:]:
        for what, mine, theirs, tolerance in (
            ("size", one.shape, first.shape, 0),
            ("pixel spacing", one.spacing, first.spacing, 1e-3 * min(first.spacing)),
            ("orientation", one.axes, first.axes, 1e-3),
            ("bytes a pixel", [one.bytes_a_pixel], [first.bytes_a_pixel], 0),
        ):
            if np.abs(np.subtract(mine, theirs)).max() > tolerance:
                raise VolumeError(
                    f"{one.path}: has another {what} than {first.path.name} ({mine} against {theirs}), so the folder "
                    "holds more than one volume; give each a folder of its own"
                )


def stack(path: Path, slices: Sequence[Slice]) -> tuple[list[Slice], np.ndarray]:
    """Sort the slices by their position along the normal, and return them with the affine (column, row, slice) to RAS+
    in mm.
    """
    first = slices[0]
    along_row, along_column = np.array(first.axes[:3]), np.array(first.axes[3:])
    normal = np.cross(along_row, along_column)
    ordered = sorted(slices, key=lambda one: float(np.dot(normal, one.position)))
    positions = np.array([one.position for one in ordered])
    heights = positions @ normal
    steps = np.diff(heights)
    if steps.min() <= 1e-3 * max(steps.max(), 1e-3):
        twice = [one.path.name for one in ordered[int(steps.argmin()) :][:2]]
        raise VolumeError(
            f"{path}: {twice[0]} and {twice[1]} lie at one place; several time points, echoes or directions are "
            "several volumes, give each a folder of its own"
        )
    count = len(ordered)
    axis = (positions[-1] - positions[0]) / (count - 1)
    regular = positions[0] + np.arange(count)[:, None] * axis
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = along_row * first.spacing[0], along_column * first.spacing[1]
    affine[:3, 2], affine[:3, 3] = axis, positions[0]
    away = np.abs((positions - regular) @ normal).max() / (heights[-1] - heights[0]) * (count - 1)
    drift = np.linalg.norm((positions - regular) - np.outer((positions - regular) @ normal, normal), axis=1).max()
    if away > IRREGULAR:
        worst = int(np.abs(steps - np.median(steps)).argmax())
        raise VolumeError(
            f"{path}: its slices are not evenly spaced: steps of {steps.min():.4g} to {steps.max():.4g} mm, the "
            f"median being {np.median(steps):.4g}{_tilt(positions, normal)}; after {ordered[worst].path.name} some "
            "are missing, or the scan changes its step: complete it, or resample it (dcm2niix makes a regular volume)"
        )
    if drift > IRREGULAR * min(first.spacing):
        raise VolumeError(
            f"{path}: its slices are shifted against each other by up to {drift:.3g} mm in their own plane, and not "
            "evenly so; no affine describes that, resample it first"
        )
    return ordered, LPS_TO_RAS @ affine


def _tilt(positions: np.ndarray, normal: np.ndarray) -> str:
    """Describe how far the stack leans, as a phrase; empty if it stands upright."""
    along = positions[-1] - positions[0]
    angle = float(np.degrees(np.arccos(np.clip(abs(along @ normal) / np.linalg.norm(along), 0, 1))))
    return f", and the gantry was tilted by {angle:.1f} degrees" if angle > 1 else ""


def _read_pixels(one: Slice, *, rescale: bool) -> np.ndarray:
    """Read the pixels of a slice (column, row), in its units."""
    try:
        found = pydicom.dcmread(one.path, specific_tags=[*TAGS, "PixelData"])
        if "PixelData" not in found:
            raise VolumeError(f"{one.path}: has no pixels; it is truncated, or not an image")
        pixels = found.pixel_array.T
    except VolumeError:
        raise
    except Exception as error:  # of many kinds, as in `_read_slice`
        raise VolumeError(f"{one.path}: its pixels cannot be read: {type(error).__name__}: {error}") from error
    if pixels.shape != one.shape:
        raise VolumeError(f"{one.path}: its pixels are {pixels.shape}, its header says {one.shape}")
    return (pixels * one.slope + one.intercept).astype(np.float32) if rescale else pixels
