"""DICOM series with what is drawn on them: RTSTRUCT by pydicom alone, SEG by highdicom."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from volumes import Volume, write_dicom

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def oblique(spacing: Sequence[float] = (1.0, 2.0, 3.0)) -> np.ndarray:
    """An affine some 20 degrees from the patient's axes."""
    axes = np.linalg.qr(np.array([[0.98, -0.2, 0.13], [0.2, 0.95, -0.17], [-0.1, 0.19, 0.98]]))[0]
    affine = np.eye(4)
    affine[:3, :3] = axes * np.sign(np.diag(axes)) * list(spacing)
    affine[:3, 3] = [-10, 20, 30]
    return affine


def series_of(volume: Volume, folder: Path) -> list[Dataset]:
    """Write a volume as a CT series. Returns: its slices, in order."""
    return [pydicom.dcmread(p) for p in write_dicom(volume, folder, modality="CT", software="a test", model="0" * 64)]


def rtstruct(
    slices: Sequence[Dataset], rois: Mapping[str, Sequence[np.ndarray]], kind: str = "CLOSED_PLANAR"
) -> Dataset:
    """An RTSTRUCT of a series.

    Args:
        rois: contours by name, each points (n, 3) in RAS+ and mm.
    """
    one = Dataset()
    one.file_meta = FileMetaDataset()
    one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = RTStructureSetStorage
    one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = generate_uid()
    one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one.Modality, one.SeriesInstanceUID = "RTSTRUCT", generate_uid()
    series, study, frame = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = slices[0].SeriesInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID = slices[0].FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    one.ReferencedFrameOfReferenceSequence = [frame]
    one.StructureSetROISequence, one.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(rois.items(), start=1):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName = number, name
        roi.ReferencedFrameOfReferenceUID = frame.FrameOfReferenceUID
        one.StructureSetROISequence.append(roi)
        drawn.ReferencedROINumber, drawn.ContourSequence = number, []
        for points in contours:
            contour = Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(points)
            contour.ContourData = [f"{x:.9g}"[:16] for x in (points @ LPS[:3, :3]).ravel()]
            drawn.ContourSequence.append(contour)
        one.ROIContourSequence.append(drawn)
    return one


def on_slice(points: Sequence[Sequence[float]], k: float, affine: np.ndarray) -> np.ndarray:
    """Points (n, 2) in voxels of slice k, as (n, 3) in RAS+ and mm."""
    flat = np.asarray(points, float)
    return np.c_[flat, np.full(len(flat), k)] @ affine[:3, :3].T + affine[:3, 3]
