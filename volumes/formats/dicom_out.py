"""Generated volumes as DICOM series: right geometry, new UIDs, no patient, and marked as synthetic in every slice.

The attributes are those of PS3.3 of the standard; attributes of a scan that never took place stay empty.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)
from pydicom.valuerep import format_number_as_ds

from files.atomic import atomic_folder
from volumes.volume import Volume, affine_spacing

from .nifti import VoxelError
from .raw import LPS_TO_RAS, check_grid

MAX_SHEAR = 1e-3  # cosine between axes: what files that were rounded have, and a fifth of a voxel over 200
MAX_VALUE = 1e30  # of a voxel: the difference of two is a finite number, and one of 16 characters
LEVELS = 65000  # of a volume of fractions: fewer than 16 bits hold, so that rounding stays within them
# Of the standard, by modality, with what they ask for beside the geometry; all others are secondary captures.
CLASSES = {
    "CT": (CTImageStorage, {"KVP": None, "AcquisitionNumber": None, "RescaleType": "HU"}),
    "MR": (
        MRImageStorage,
        {
            "ScanningSequence": "RM",  # research mode
            "SequenceVariant": "NONE",
            "ScanOptions": "",
            "MRAcquisitionType": "",
            "RepetitionTime": None,
            "EchoTime": None,
            "EchoTrainLength": None,
            "RescaleType": "US",  # unspecified
        },
    ),
}
SECONDARY_CAPTURE = (SecondaryCaptureImageStorage, {"ConversionType": "SYN", "RescaleType": "US"})  # a synthetic image


def write_dicom(
    volume: Volume, folder: str | os.PathLike, *, modality: str, software: str, model: str, seed: int | None = None
) -> list[Path]:
    """Write a generated volume as one DICOM series with one file per slice, all files or none. Slices run from feet to
    head, or along the nearest axis.

    Voxels that are whole numbers of 16 bits are stored unchanged, all others in 65,000 steps with slope and intercept:
    the error is at most a 130,000th of the range.

    Args:
        volume: one channel (1, X, Y, Z), in the units of its modality (HU for CT).
        folder: a new or empty folder.
        modality: CT, MR, or another code, such as PT, which becomes a secondary capture.
        software, model, seed: those of the sidecar; they are written to every slice.

    Returns: the files. Raises: ValueError for several channels, sheared axes, and a folder that holds files.
    """
    if len(volume.array) != 1:
        raise ValueError(f"a DICOM series holds one channel, the volume has {len(volume.array)}; write one per folder")
    if not (modality.isascii() and modality.isalnum() and modality.isupper() and len(modality) <= 16):
        raise ValueError(f"modality is a code such as CT, MR or PT, got {modality!r}")
    if not np.isfinite(volume.array).all():
        raise VoxelError("the volume holds values that are not finite, which no DICOM file can; replace them first")
    if np.abs(volume.array).max() > MAX_VALUE:
        raise VoxelError(
            f"the volume holds values beyond {MAX_VALUE:g}, which DICOM's decimal numbers cannot be scaled to; check "
            "its units"
        )
    folder = check_new_folder(folder)
    array, affine = in_patient_order(volume)
    stored, slope, intercept = _stored(array)
    common = _common(affine, array, modality, software, model, seed)
    names = [f"{k + 1:04d}.dcm" for k in range(array.shape[2])]
    with atomic_folder(folder) as unfinished:
        for k, name in enumerate(names):
            one = _slice(common, stored[:, :, k], slope, intercept, k, affine)
            one.save_as(unfinished / name, enforce_file_format=True)
    return [folder / name for name in names]


def slice_headers(volume: Volume, modality: str, software: str, model: str, seed: int | None) -> list[Dataset]:
    """Build the slices that `write_dicom` would write, with pixels of 0."""
    array, affine = in_patient_order(volume)
    empty = np.zeros(array.shape[:2], np.uint16)
    common = _common(affine, array, modality, software, model, seed)
    return [_slice(common, empty, 1.0, 0.0, k, affine) for k in range(array.shape[2])]


def check_new_folder(folder: str | os.PathLike) -> Path:
    """Return the folder. Raises: ValueError if it holds files, or is something else."""
    folder = Path(folder)
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ValueError(f"{folder}: is there already; give a new folder, or an empty one")
    return folder


def in_patient_order(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Return the first channel in DICOM's order (column, row, slice), and its affine to LPS and mm. Raises: ValueError
    for axes that are not at right angles.
    """
    _check_right_angles(volume.affine)
    to_lps = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt("LPS"))
    affine = LPS_TO_RAS @ volume.affine @ inv_ornt_aff(to_lps, volume.shape)
    return apply_orientation(volume.array[0], to_lps), affine


def statement(software: str, model: str, seed: int | None) -> tuple[str, str]:
    """Say what made an object, in words and as its comment."""
    made = f"{software}, model {model}" + ("" if seed is None else f", seed {seed}")
    return made, f"SYNTHETIC IMAGE, shows no patient: generated by {made}"


def _check_right_angles(affine: np.ndarray) -> None:
    """Raise ValueError for axes that no ImageOrientationPatient describes: readers interpret them differently."""
    check_grid(affine)
    axes = affine[:3, :3] / affine_spacing(affine)
    cosine = float(np.abs(np.triu(axes.T @ axes, 1)).max())
    if cosine > MAX_SHEAR:
        angle = np.degrees(np.arccos(cosine))
        raise ValueError(
            f"two axes of the volume are {angle:.2f} degrees apart instead of 90, which DICOM cannot describe; "
            "resample it onto a grid with right angles first"
        )


def _common(
    affine: np.ndarray, array: np.ndarray, modality: str, software: str, model: str, seed: int | None
) -> Dataset:
    """Build the attributes that all slices of the series share."""
    one = Dataset()
    made, comment = statement(software, model, seed)
    sop_class, own = CLASSES.get(modality, SECONDARY_CAPTURE)
    one.SpecificCharacterSet = "ISO_IR 192"
    one.SOPClassUID = sop_class
    one.SyntheticData = "YES"
    one.ContentQualification = "RESEARCH"
    one.ImageType = ["DERIVED", "SECONDARY", "AXIAL" if modality == "CT" else "OTHER"]
    one.DerivationDescription = f"Synthetic image, generated by {made}"[:1024]
    one.ImageComments = comment
    one.StudyInstanceUID, one.SeriesInstanceUID = generate_uid(None), generate_uid(None)
    one.FrameOfReferenceUID = generate_uid(None)
    one.PatientName = "SYNTHETIC^MEDVOLUME"
    one.PatientID = f"SYNTHETIC-{hashlib.sha256(one.StudyInstanceUID.encode()).hexdigest()[:12]}"
    for empty in (
        "PatientBirthDate",
        "PatientSex",
        "StudyDate",
        "StudyTime",
        "StudyID",
        "AccessionNumber",
        "Laterality",
        "PatientOrientation",
    ):
        setattr(one, empty, "")
    one.ReferringPhysicianName = one.PositionReferenceIndicator = one.PatientPosition = ""
    one.Manufacturer, one.SoftwareVersions = "medvolume", software[:64]
    one.Modality = modality
    one.SeriesNumber, one.SeriesDescription = 1, f"SYNTHETIC {modality}"
    one.BurnedInAnnotation = "NO"
    columns, rows, thickness = affine_spacing(affine)
    one.PixelSpacing = [_decimal(rows), _decimal(columns)]  # between rows, between columns
    one.SliceThickness = one.SpacingBetweenSlices = _decimal(thickness)
    one.ImageOrientationPatient = [_decimal(x) for x in (*affine[:3, 0] / columns, *affine[:3, 1] / rows)]
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.Columns, one.Rows = array.shape[:2]
    one.BitsAllocated = one.BitsStored = 16
    one.HighBit = 15
    low, high = float(array.min()), float(array.max())
    one.WindowCenter, one.WindowWidth = _decimal((low + high) / 2), _decimal(max(high - low, 1e-6))
    for keyword, value in own.items():
        setattr(one, keyword, value)
    return one


def _slice(common: Dataset, pixels: np.ndarray, slope: float, intercept: float, k: int, affine: np.ndarray) -> Dataset:
    """Build slice `k`, pixels (column, row)."""
    one = Dataset()
    one.update(common)
    one.SOPInstanceUID, one.InstanceNumber = generate_uid(None), k + 1
    one.ImagePositionPatient = [_decimal(x) for x in affine[:3] @ [0, 0, k, 1]]
    one.PixelRepresentation = int(pixels.dtype.kind == "i")
    one.RescaleSlope, one.RescaleIntercept = _decimal(slope), _decimal(intercept)
    one.set_pixel_data(np.ascontiguousarray(pixels.T), "MONOCHROME2", 16)
    one.file_meta = FileMetaDataset()
    one.file_meta.MediaStorageSOPClassUID, one.file_meta.MediaStorageSOPInstanceUID = (
        one.SOPClassUID,
        one.SOPInstanceUID,
    )
    one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return one


def _stored(array: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Return 16-bit integers, slope and intercept: the voxels are slope times the integers plus intercept."""
    values = array.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    whole = bool((values == np.rint(values)).all())
    for dtype in (np.int16, np.uint16):
        if whole and np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype), 1.0, 0.0
    slope = float(_decimal((high - low) / LEVELS)) or 1.0  # as the file will have them
    intercept = float(_decimal(low))
    return np.rint((values - intercept) / slope).clip(0, np.iinfo(np.uint16).max).astype(np.uint16), slope, intercept


def _decimal(value: float) -> str:
    """Format a number as DICOM writes it, in 16 characters at most."""
    return format_number_as_ds(float(value))
